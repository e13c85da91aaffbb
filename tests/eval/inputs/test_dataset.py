"""Files to evaluate on: which tokens are fed, names, codecs, what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from eval.inputs import dataset
from tests.helpers import micro
from tests.helpers.eval_models import DIGEST, tokens, write_data, write_run
from tests.helpers.recordings import record
from ttt_jax.checkpoints import loading
from ttt_jax.codec import CodecInfo, load_codec
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.data.corpus import EMBEDDED, Corpus, CorpusConfig, load_coders
from ttt_jax.data.encode import Encoder
from ttt_jax.data.frames import open_manifest
from ttt_jax.data.manifest import Entry
from ttt_jax.data.text import TokenizerInfo
from ttt_jax.errors import InputError

LENGTHS = (60, 45, 52)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("checkpoints") / "memory")


@pytest.fixture
def data(tmp_path):
    codes = [tokens(length, i) for i, length in enumerate(LENGTHS)]
    return write_data(tmp_path / "speech", [*codes[:2], codes[2][1:]])


def test_a_text_that_is_not_known_is_fed_as_nothing(run, data):
    files, skipped = dataset.read(data, [loading.load(run)])
    assert not skipped
    assert [file.text_known.mean() for file in files] == [1, 1, 0]
    assert (files[2].frames[0] == -1).all()
    np.testing.assert_array_equal(files[2].frames[1:], tokens(LENGTHS[2], 2)[1:])
    np.testing.assert_array_equal(files[0].frames, tokens(LENGTHS[0], 0))


def test_held_out_files_of_a_run_are_grouped_by_speaker():
    a, b, c = micro.source(micro.files((8, 9, 10))).recordings
    heldout = dataclasses.replace(a, speaker="x"), dataclasses.replace(b, speaker="x"), c
    codec = CodecInfo("stated", DIGEST)
    corpus = Corpus(codec, TokenizerInfo(), (), heldout, heldout, {"heldout": []})
    files, skipped = dataset.of_corpus(corpus)
    assert [(file.name, file.group) for file in files] == [(a.name, "x"), (b.name, "x"), (c.name, c.name)]
    assert [file.frames.shape[1] for file in files] == [8, 9, 10]
    assert not skipped


def test_evaluation_feeds_what_training_reads(run, tmp_path):
    words = [["yes", [0.3, 0.5], "SPEAKER_MAIN"], ["\u4e2d", [1.0, 1.2], "SPEAKER_MAIN"]]
    beside = {"words": {"alignments": words}, "book": {"book_meta": {}}, "emilia": {"id": "x"}, "nothing": None}
    beside["labels"] = {"alignments": [["yes", [0.3, 0.5], "SPEAKER_00"]]}
    data = write_data(tmp_path / "data", [tokens(25, i)[1:] for i in range(len(beside))], load_codec().digest)
    for i, content in enumerate(beside.values()):
        if content is not None:
            (data / f"{i}.json").write_text(json.dumps(content))
    part = tokens(25, 0)
    part[0, 3:9] = -1
    data2 = write_data(tmp_path / "part", [part], load_codec().digest)
    for folder in (data, data2):
        files, skipped = dataset.read(folder, [loading.load(run)])
        assert not skipped
        coders = load_coders(CorpusConfig())
        trained = open_manifest(folder / "manifest.jsonl", *coders, tmp_path / "cache", progress=False)
        for file, recording in zip(files, trained, strict=True):
            np.testing.assert_array_equal(file.frames, recording.read())
            np.testing.assert_array_equal(file.text_known, file.frames[0] >= 0)
        known = [file.text_known.sum() for file in files]
        assert known == ([25 - 4, 0, 0, 0, 0] if folder == data else [19])


def test_speakers_are_the_units(run, tmp_path):
    data = write_data(tmp_path / "s", [tokens(20, 0), tokens(20, 1)], speaker="one", group="a/b")
    assert {file.group for file in dataset.read(data, [loading.load(run)])[0]} == {"one"}


def test_files_are_called_by_the_names_of_their_links(run, tmp_path):
    (tmp_path / "blobs").mkdir()
    data = write_data(tmp_path / "snapshot", [tokens(16, i) for i in range(2)])
    for i in range(2):
        (data / f"{i}.safetensors").rename(tmp_path / "blobs" / f"{i:064x}")
        (data / f"{i}.safetensors").symlink_to(f"../blobs/{i:064x}")
    (data / "twin.safetensors").symlink_to(f"../blobs/{0:064x}")
    with (data / "manifest.jsonl").open("a") as file:
        file.write(json.dumps({"path": "twin.safetensors", "duration": 16 / 12.5}))
    files, skipped = dataset.read(data, [loading.load(run)])
    assert [file.name for file in files] == ["0", "1", "twin"]
    assert not skipped


WEIGHTS = loading.Checkpoint("moshi", micro.MODEL, None, {})
CODECS = {"codec": {"name": "theirs", "digest": "1" * 64}, "tokenizer": {"digest": "2" * 64, "pieces": None}}
TRAINED = loading.Checkpoint("trained", micro.MODEL, None, CODECS, CorpusConfig(train="gone", codec="files"))
"""A run on code files, whose data are gone."""


@pytest.mark.parametrize(
    ("model", "message"),
    [(WEIGHTS, "converted weights do not say which codec"), (TRAINED, r"a\.wav is audio, but data\.codec='files'")],
)
def test_code_files_need_neither_codec_nor_training_data(model, message, tmp_path):
    data = write_data(tmp_path / "codes", [tokens(20), tokens(20)[1:], tokens(20)[1:9]], digest="1" * 64)
    files, (skipped,) = dataset.read(data, [model])
    assert [file.text_known.mean() for file in files] == [1, 0]
    np.testing.assert_array_equal(files[0].frames, tokens(20))
    assert "holds 8 rows of codes" in skipped.reason
    (data / "a.wav").write_bytes(b"RIFF")
    (data / "manifest.jsonl").write_text('{"path": "a.wav", "duration": 4.8}\n')
    with pytest.raises(InputError, match=message):
        dataset.read(data, [model])


def test_converted_weights_encode_audio_with_the_mimi_that_came_with_them(small_mimi, tmp_path):
    words = [["yes", [0.3, 0.5], "SPEAKER_MAIN"]]
    path = record(tmp_path / "a.wav", 2.4, channels=2, rate=24000, words=words)
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.wav", "duration": 2.4}))
    model, codec = loading.load(small_mimi.parent / "weights"), load_codec(small_mimi)
    assert model.codec["digest"] == codec.digest
    for data in (path, tmp_path / "m.jsonl"):
        (file,), skipped = dataset.read(data, [model])
        assert not skipped
        assert file.codec == {"name": "mimi-8x64", "digest": codec.digest}
        assert (file.frames[0] == -1).all()  # no tokenizer came with them
        channels = codec.encode_batch(read_audio(path, 24000))
        np.testing.assert_array_equal(file.frames[1:], np.concatenate(channels))


def test_converted_weights_read_words_with_the_tokenizer_that_came_with_them(small_mimi, tmp_path):
    path = record(tmp_path / "a.wav", 2.4, rate=24000, words=[["yes", [0.3, 0.5], "SPEAKER_MAIN"]])
    folder = shutil.copytree(small_mimi.parent / "weights", tmp_path / "weights")
    shutil.copy(EMBEDDED / "tokenizer" / "spm512.model", folder / "pieces.model")
    info = json.loads((folder / "config.json").read_text())
    info["source"]["tokenizer"] = "pieces.model"
    (folder / "config.json").write_text(json.dumps(info))
    (file,), _ = dataset.read(path, [loading.load(folder)])
    codec, tokenizer = load_codec(small_mimi), load_coders(CorpusConfig())[1]
    read = Encoder(codec, tokenizer).encode(Entry(path, 2.4, path.with_suffix(".json")))
    assert set(tokenizer.encode("yes")) <= set(file.frames[0].tolist())
    np.testing.assert_array_equal(file.frames, read.frames)


def test_converted_weights_with_a_mimi_take_its_codes_and_no_others(small_mimi, tmp_path):
    model, codec = loading.load(small_mimi.parent / "weights"), load_codec(small_mimi)
    data = write_data(tmp_path / "own", [tokens(20), tokens(20)[1:9]], digest=codec.digest)
    files, skipped = dataset.read(data, [model])
    assert not skipped
    np.testing.assert_array_equal(files[0].frames, tokens(20))
    np.testing.assert_array_equal(files[1].frames[9:], codec.encode(np.zeros(20 * codec.frame_size, np.float32)))
    other = write_data(tmp_path / "other", [tokens(20)], digest="3" * 64)
    with pytest.raises(InputError, match="weights was trained with the codec mimi-8x64 .*the speech was encoded with"):
        dataset.read(other, [model])


def test_code_files_of_both_streams_do_not_load_the_mimi_of_weights(small_mimi, tmp_path, monkeypatch):
    model = loading.load(small_mimi.parent / "weights")
    data = write_data(tmp_path / "own", [tokens(20), tokens(20)[1:]], digest=model.codec["digest"])
    monkeypatch.delattr(loading, "load_codec")
    files, skipped = dataset.read(data, [model])
    assert not skipped
    np.testing.assert_array_equal(files[0].frames, tokens(20))
    np.testing.assert_array_equal(files[1].frames[1:], tokens(20)[1:])


def test_codes_of_another_codec_than_the_runs_are_refused(tmp_path):
    with pytest.raises(InputError, match="trained was trained with the codec theirs .*the speech was encoded with"):
        dataset.read(write_data(tmp_path / "other", [tokens(20)], digest="3" * 64), [TRAINED])


@pytest.mark.parametrize("rate", ["25", "12.50001", "6.25"])
def test_codes_of_another_rate_are_refused_for_converted_weights_too(run, tmp_path, rate):
    data = write_data(tmp_path / "fast", [tokens(20)])
    metadata = {"frame_rate": rate, "codec": DIGEST}
    save_file({"codes": tokens(20)}, data / "0.safetensors", metadata=metadata)
    (data / "manifest.jsonl").write_text(json.dumps({"path": "0.safetensors", "duration": 20 / float(rate)}))
    for model in (WEIGHTS, loading.load(run)):
        for place in (data, data / "0.safetensors"):
            with pytest.raises(InputError, match=f"0.safetensors states frame_rate '{rate}' .*models read 12.5 frames"):
                dataset.read(place, [model])


def test_codes_of_several_codecs_and_of_other_sizes_do_not_pass_with_converted_weights(tmp_path):
    from ttt_jax.data.codes import Codes, write_codes

    data = write_data(tmp_path / "mixed", [tokens(20), tokens(20)], digest="1" * 64)
    save_file({"codes": tokens(20)}, data / "1.safetensors", metadata={"frame_rate": "12.5", "codec": "2" * 64})
    with pytest.raises(InputError, match="holds codes of 2 codecs, such as 0 .codec 1111.* and 1 .codec 2222"):
        dataset.read(data, [WEIGHTS])
    write_codes(data / "1.safetensors", Codes(tokens(20), 12.5, "1" * 64, "small", cardinality=32))
    files, (skipped,) = dataset.read(data, [WEIGHTS])
    assert "moshi has 64 codes and 512 text pieces, but the codec small has 32" in skipped.reason
    assert files[0].codec == {"name": None, "digest": "1" * 64}


def test_every_file_has_a_name_of_its_own(run, tmp_path):
    lines = []
    for folder in ("a", "b"):
        data = write_data(tmp_path / folder / "audio", [tokens(20)])
        lines.append(json.dumps({"path": str(data / "0.safetensors"), "duration": 1.6}))
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "m.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    files, (twice,) = dataset.read(other / "m.jsonl", [loading.load(run)])
    assert len({file.name for file in files}) == len({file.group for file in files}) == 2
    assert "twice" in twice.reason
