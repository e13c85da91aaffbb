"""From a manifest's entry to frames: rows, the cache, code files made elsewhere, and recordings that change."""

import json
import re
import shutil
import types

import numpy as np
import pytest
import safetensors.numpy

from eval.__main__ import main
from tests.helpers.manifests import (
    TOKENIZER,
    CountingCodec,
    frames_of,
    opened,
    write_codes,
    write_entry,
    write_manifest,
)
from tests.helpers.recordings import CODEC, RATE, babble
from ttt_jax.codec import CodecInfo
from ttt_jax.data import codes as codefiles
from ttt_jax.data.encode import Encoder, encode_blocks
from ttt_jax.data.frames import FrameReader, open_manifest
from ttt_jax.data.manifest import read_manifest
from ttt_jax.data.text import ABSENT, EPAD, PAD, TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.moshi import delays


@pytest.fixture(name="codec")
def _codec():
    return CODEC


def test_rows_are_text_then_left_then_right_channel(codec, tmp_path):
    stereo = babble(2.0, channels=2)
    words = [["ab", [0.5, 0.9], "SPEAKER_MAIN"], ["no", [1.0, 1.2], "SPEAKER_OTHER"]]
    frames = frames_of(write_entry(tmp_path, stereo, words=words), codec, tmp_path / "cache")
    assert frames.shape == (17, 25)
    assert frames.dtype == np.int32
    np.testing.assert_array_equal(frames[1:9], codec.encode(stereo[:, 0]))
    np.testing.assert_array_equal(frames[9:], codec.encode(stereo[:, 1]))
    expected = np.full(25, PAD)
    expected[5:8] = [EPAD, *TOKENIZER.encode("ab")]
    np.testing.assert_array_equal(frames[0], expected)


@pytest.mark.parametrize(("words", "token"), [(None, ABSENT), ([], PAD)])
def test_mono_file_has_encoded_silence_as_user_and_absent_text_without_an_alignment(codec, tmp_path, words, token):
    frames = frames_of(write_entry(tmp_path, babble(1.0), words=words), codec, tmp_path / "cache")
    assert frames.shape == (17, 13)
    np.testing.assert_array_equal(frames[9:], codec.encode(np.zeros(RATE, np.float32)))
    assert (frames[0] == token).all()
    assert ABSENT == delays.ABSENT


def test_a_last_part_of_a_frame_is_filled_up_behind(codec):
    left, right = babble(1.0, channels=2).T  # 12.5 frames
    channels, samples = encode_blocks([np.stack([left, right])[:, :9000], np.stack([left, right])[:, 9000:]], codec)
    assert samples == len(left)
    np.testing.assert_array_equal(channels, [codec.encode(left), codec.encode(right)])


def test_silence_goes_on_from_the_state_of_the_codec():
    class Counting:
        """Its codes of a frame are the number of frames before."""

        num_codebooks, frame_size, fails = 2, 4, False

        def init_encoder(self, batch):
            return 0

        def encode_step(self, audio, state):
            if self.fails and state:
                raise KeyboardInterrupt
            after = state + audio.shape[1] // self.frame_size
            return np.tile(np.arange(state, after, dtype=np.int32), (len(audio), 2, 1)), after

    encoder = Encoder(Counting(), TOKENIZER)
    for frames in (3, 600, 5):  # more than a block of silence, and fewer than are known
        np.testing.assert_array_equal(encoder.silence(frames), [np.arange(frames)] * 2)
    encoder = Encoder(Counting(), TOKENIZER)
    encoder.codec.fails = True
    with pytest.raises(KeyboardInterrupt):
        encoder.silence(600)  # in its second block
    encoder.codec.fails = False
    np.testing.assert_array_equal(encoder.silence(600), [np.arange(600)] * 2)


def test_cache_follows_audio_alignments_codec_and_tokenizer(codec, tmp_path):
    manifest, cache = write_entry(tmp_path, babble(1.0), words=[]), tmp_path / "cache"
    (entry,) = read_manifest(manifest).entries
    first = FrameReader(codec, TOKENIZER, cache).open(entry).read()
    other = types.SimpleNamespace(**vars(TOKENIZER) | {"digest": "u" * 64})
    FrameReader(codec, other, cache).open(entry)
    assert len(list(cache.iterdir())) == 2
    changed = CountingCodec(codec)
    changed.digest = "0" * 64
    FrameReader(changed, TOKENIZER, cache).open(entry)
    assert len(list(cache.iterdir())) == 3
    write_entry(tmp_path, babble(1.0), words=[["hi", [0.2, 0.4], "SPEAKER_MAIN"]])
    assert (FrameReader(codec, TOKENIZER, cache).open(entry).read()[0] != first[0]).any()
    write_entry(tmp_path, babble(1.0, seed=5), words=[])
    assert (FrameReader(codec, TOKENIZER, cache).open(entry).read()[1] != first[1]).any()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other tensor"])
def test_damaged_cache_file_is_made_again(codec, tmp_path, damage):
    manifest, counting = write_entry(tmp_path, babble(1.0), words=[]), CountingCodec(codec)
    first = frames_of(manifest, counting, tmp_path / "cache")
    (cached,) = (tmp_path / "cache").iterdir()
    whole = cached.read_bytes()
    if damage == "other tensor":
        safetensors.numpy.save_file({"frames": first + 1}, cached, metadata={"seconds": "1.0", "sha256": "0"})
    else:
        flipped = whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]
        cached.write_bytes({"cut": whole[:-8], "flipped": flipped, "empty": b""}[damage])
    for made_again in (True, False):
        calls = counting.calls
        np.testing.assert_array_equal(frames_of(manifest, counting, tmp_path / "cache"), first)
        assert (counting.calls > calls) == made_again
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_wrong_duration_is_refused_with_and_without_cache(codec, tmp_path):
    for _ in range(2):
        with pytest.raises(InputError, match=r"a\.wav lasts 2\.00 s"):
            frames_of(write_entry(tmp_path, babble(2.0), duration=9.0), codec, tmp_path / "cache")
        frames_of(write_entry(tmp_path, babble(2.0)), codec, tmp_path / "cache")


def test_cache_that_cannot_be_written_is_refused(codec, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"cache_dir .*cache cannot be written"):
        frames_of(write_entry(tmp_path, babble(1.0)), codec, tmp_path / "cache")


def test_manifest_is_encoded_in_its_order(codec, tmp_path, capsys):
    lines = []
    for index in (2, 1):
        write_entry(tmp_path, babble(index), name=f"{index}.wav")
        lines.append(json.dumps({"path": f"{index}.wav", "duration": float(index)}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    found = open_manifest(tmp_path / "m.jsonl", codec, TOKENIZER, tmp_path / "cache", progress=False)
    names = [f"{tmp_path.name}/2", f"{tmp_path.name}/1"]
    assert [(one.name, one.shape) for one in found] == list(zip(names, [(17, 25), (17, 13)], strict=True))
    assert capsys.readouterr().err == ""
    open_manifest(tmp_path / "m.jsonl", codec, TOKENIZER, tmp_path / "cache")
    assert "encoding m.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [8, 16, 17])
def test_codes_made_elsewhere_are_accepted(codec, tmp_path, rows):
    codes = np.random.default_rng(0).integers(-1, codec.cardinality, (rows, 30), dtype=np.int16)
    manifest = write_codes(tmp_path, codes, codec)
    (tmp_path / "a.json").write_text(json.dumps({"alignments": [["x", [1.0, 1.1], "SPEAKER_MAIN"]]}))
    frames = frames_of(manifest, codec, tmp_path / "cache")
    assert frames.shape == (17, 30)
    assert frames.dtype == np.int32
    moshi, user = (codes[1:9], codes[9:]) if rows == 17 else (codes[:8], codes[8:])
    np.testing.assert_array_equal(frames[1:9], moshi)
    silence = codec.encode(np.zeros(30 * codec.frame_size, np.float32))
    np.testing.assert_array_equal(frames[9:], silence if rows == 8 else user)
    if rows == 17:
        np.testing.assert_array_equal(frames[0], codes[0])
    else:
        assert (frames[0] != PAD).sum() == 2  # EPAD and the letter


EIGHT = np.zeros((8, 20), np.int32)
RATES = r"a.safetensors states frame_rate {} in its metadata, but models read 12.5 frames"
MADE_BY = r"a.safetensors states codec {} in its metadata, but the codec of the data, melkmeans-8x64, has the digest"
BAD = [
    *((EIGHT, {"frame_rate": rate}, RATES.format(repr(rate))) for rate in ("25", "nan", "often")),
    (EIGHT, {"frame_rate": None}, RATES.format(None)),
    *((EIGHT, {"codec": name}, MADE_BY.format(repr(name))) for name in ("f" * 64, "melkmeans-8x64")),
    (EIGHT, {"codec": None}, MADE_BY.format(None)),
    (np.zeros((17, 20), np.int32), {"tokenizer": "0" * 64}, "states tokenizer"),
    (EIGHT, {"duration": 5.0}, "a.safetensors lasts 1.60 s"),
    (np.zeros((9, 20), np.int64), {}, "shape [9, 20]"),
    (np.zeros((8, 20), np.float32), {}, "type F32"),
    (np.zeros(8, np.int16), {"duration": 1.0}, "expected integers"),
    (np.zeros((8, 0), np.int64), {"duration": 1.6}, "less than one frame"),
    (EIGHT, {"boundaries": "[20]"}, "states boundaries [20]"),
    (EIGHT, {"boundaries": "[3, 2]"}, "states boundaries [3, 2]"),
    (EIGHT, {"boundaries": "{"}, "metadata that cannot be read"),
    (EIGHT, {"sources": '[{"path": "a"}]'}, "metadata that cannot be read"),
    (EIGHT, {"cardinality": "many"}, "metadata that cannot be read"),
    (EIGHT, {"format": "ttt_jax.codes/1"}, "has the format 'ttt_jax.codes/1'"),
]
BAD_TOKENS = [
    (np.full((8, 20), 64), {}, "from 64 to 64 in row 0 of its codes, expected -1 to 63"),
    (np.full((16, 20), -2), {}, "from -2 to -2 in row 0"),
    (np.repeat([[300]] + 16 * [[0]], 20, axis=1), {}, "expected -1 to 299 (the tokenizer)"),
    (EIGHT, {"checksum": "0" * 64}, "is damaged"),
]


@pytest.mark.parametrize(("codes", "changes", "message"), BAD)
def test_a_code_file_whose_header_is_wrong_is_refused_when_it_is_opened(codec, tmp_path, codes, changes, message):
    manifest = write_codes(tmp_path, codes, codec, **changes)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        opened(manifest, codec, tmp_path / "cache")
    assert "states codec" not in message or codec.digest in str(error.value)


@pytest.mark.parametrize(("codes", "changes", "message"), BAD_TOKENS)
def test_wrong_tokens_are_refused_when_they_are_read(codec, tmp_path, codes, changes, message):
    recording = opened(write_codes(tmp_path, codes, codec, **changes), codec, tmp_path / "cache")
    with pytest.raises(InputError, match=re.escape(message)):
        recording.read()


@pytest.mark.parametrize("content", [b"no", safetensors.numpy.save({"other": np.zeros(3)})])
def test_a_file_that_holds_no_codes_is_refused(codec, tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as codes.*expected a safetensors file with a tensor 'codes'"):
        frames_of(write_manifest(tmp_path, "a.safetensors", 1.6), codec, tmp_path)


def test_recordings_of_one_name_are_distinguished(codec, tmp_path):
    write_codes(tmp_path, EIGHT, codec)
    names, lines = ("x/en/a", "y/en/a", "x/en/b"), []
    for name in names:
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "a.safetensors", path)
        lines.append(json.dumps({"path": f"{name}.safetensors", "duration": 1.6}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    found = open_manifest(tmp_path / "m.jsonl", codec, TOKENIZER, tmp_path / "cache", progress=False)
    assert [one.name for one in found] == [*(str(tmp_path / f"{name}.safetensors") for name in names[:2]), "en/b"]


def test_opened_audio_is_encoded_once_and_read_from_the_cache(codec, tmp_path):
    manifest, counting, cache = write_entry(tmp_path, babble(1.0), words=[]), CountingCodec(codec), tmp_path / "cache"
    recording = opened(manifest, counting, cache)
    calls = counting.calls
    assert (recording.shape, recording.num_frames, recording.digest) == ((17, 13), 13, None)
    first = recording.read()
    assert counting.calls == calls > 0
    np.testing.assert_array_equal(first, frames_of(manifest, codec, cache))
    for path in cache.iterdir():
        path.unlink()
    np.testing.assert_array_equal(recording.read(), first)
    assert counting.calls > calls
    assert len(list(cache.iterdir())) == 1
    write_entry(tmp_path, babble(1.0, seed=1), words=[])
    for path in cache.iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"a\.wav has changed since it was opened"):
        recording.read()


def write_stated(folder, codes, codec, /, **changes):
    """A code file as `prepare` writes it, with its manifest."""
    fields = {"codec": codec.digest, "codec_name": "it", "cardinality": 64} | changes
    codefiles.write_codes(folder / "a.safetensors", codefiles.Codes(codes, 12.5, **fields))
    return write_manifest(folder, "a.safetensors", codes.shape[1] / 12.5)


def random_codes(rows=16, frames=20, seed=0):
    return np.random.default_rng(seed).integers(-1, 64, (rows, frames), dtype=np.int32)


def test_of_a_code_file_the_header_is_read_at_first(codec, tmp_path, monkeypatch):
    manifest = write_stated(tmp_path, random_codes(), codec)
    with monkeypatch.context() as patch:
        patch.setattr("ttt_jax.data.frames.read_codes", None)
        recording = opened(manifest, codec, tmp_path)
    assert recording.shape == (17, 20)
    assert recording.digest == codefiles.read_header(tmp_path / "a.safetensors").checksum
    np.testing.assert_array_equal(recording.read()[1:], random_codes())


def write_words(folder, *words):
    (folder / "a.json").write_text(json.dumps({"alignments": [[*word, "SPEAKER_MAIN"] for word in words]}))


def test_the_digest_of_a_code_file_follows_codes_and_words(codec, tmp_path):
    digests = set()
    for write in (write_stated, write_codes):  # the latter without checksum: the file's own digest
        for seed in (0, 1):
            digests.add(opened(write(tmp_path, random_codes(seed=seed), codec), codec, tmp_path).digest)
    for text in ("x", "xy"):
        write_words(tmp_path, [text, [1.0, 1.1]])
        digests.add(opened(tmp_path / "m.jsonl", codec, tmp_path).digest)
    assert len(digests) == 6


def test_what_is_no_alignment_beside_a_code_file_changes_nothing(codec, tmp_path, caplog):
    manifest = write_stated(tmp_path, random_codes(), codec)
    found = opened(manifest, codec, tmp_path)
    for content in ({"book_meta": {}}, {"id": "x"}, {"words": []}, {"alignments": [["x", [1, 1.1], "A"]]}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        again = opened(manifest, codec, tmp_path)
        assert again.digest == found.digest
        np.testing.assert_array_equal(again.read(), found.read())
        assert (again.read()[0] == -1).all()
    assert [message.split(": ")[1][:12] for message in caplog.messages] == ["holds words ", "of 1 words n"]


def test_what_was_dropped_is_reported_once_however_often_codes_are_read(codec, tmp_path, caplog):
    manifest = write_stated(tmp_path, random_codes(), codec)
    write_words(tmp_path, ["x", [0.4, 0.5]], ["y", [1.0, 1.0]])
    recording = opened(manifest, codec, tmp_path)
    np.testing.assert_array_equal(recording.read(), recording.read())
    (message,) = caplog.messages
    assert message == f"{tmp_path / 'a.json'}: 1 of 2 words dropped, 1 without duration (such as 'y')."
    write_words(tmp_path, ["x", [50.0, 51.0]])
    with pytest.raises(InputError, match=r"a\.json does not match its audio of 1\.60 s"):
        opened(manifest, codec, tmp_path)


def test_damage_in_a_code_file_is_noticed_when_it_is_read_and_named(codec, tmp_path):
    recording = opened(write_stated(tmp_path, random_codes(), codec), codec, tmp_path)
    path = tmp_path / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"a\.safetensors is damaged"):
        recording.read()
    write_stated(tmp_path, random_codes(frames=21), codec)
    with pytest.raises(InputError, match=r"a\.safetensors has changed since it was opened"):
        recording.read()
    path.unlink()
    with pytest.raises(InputError, match=r"a\.safetensors cannot be read"):
        recording.read()


STATED, TEXT = CodecInfo("it", "c" * 64, 64), TokenizerInfo("t" * 64, 300)


def read_stated(folder, codes, codec=STATED, tokenizer=TEXT, /, **changes):
    return opened(write_stated(folder, codes, STATED, **changes), codec, folder, tokenizer).read()


def test_without_codec_and_tokenizer_both_voices_are_taken_as_they_are(tmp_path):
    np.testing.assert_array_equal(read_stated(tmp_path, random_codes(17)), random_codes(17))
    frames = read_stated(tmp_path, random_codes(16))
    np.testing.assert_array_equal(frames[1:], random_codes(16))
    assert (frames[0] == -1).all()


def test_tokens_are_bounded_where_their_number_is_known(tmp_path):
    big = random_codes(17)
    big[3, 4] = 5000
    with pytest.raises(InputError, match="from .* to 5000 in row 3 of its codes, expected -1 to 63 .it"):
        read_stated(tmp_path, big)
    nobody = CodecInfo("it", STATED.digest), TokenizerInfo()
    assert read_stated(tmp_path, big, *nobody, cardinality=None, tokenizer="x").max() == 5000
    big[3, 4] = -2
    with pytest.raises(InputError, match="from -2 to .* expected -1 or more"):
        read_stated(tmp_path, big, *nobody)


def test_words_and_audio_are_refused_where_nothing_can_encode_them(tmp_path):
    with pytest.raises(InputError, match=r"a\.wav is audio, but data\.codec='files'.*make codes"):
        opened(write_entry(tmp_path, babble(1.0)), STATED, tmp_path, TEXT)
    manifest = write_stated(tmp_path, random_codes(), STATED)
    (tmp_path / "a.json").write_text(json.dumps({"book_meta": {}}))
    assert (opened(manifest, STATED, tmp_path, TEXT).read()[0] == -1).all()
    write_words(tmp_path, ["x", [1.0, 1.1]])
    with pytest.raises(InputError, match=r"a\.json has the words of a\.safetensors.*give data\.tokenizer"):
        opened(manifest, STATED, tmp_path, TEXT)


@pytest.mark.parametrize(("audio", "named"), [(np.zeros(RATE), "a.wav"), (babble(1.0), "a.json")])
@pytest.mark.parametrize("way", ["open", "prepare"])
def test_what_is_wrong_is_reported_when_a_recording_is_encoded_and_not_again(tmp_path, caplog, audio, named, way):
    words = [["x", [0.2, 0.4], "SPEAKER_MAIN"], ["y", [0.5, 0.5], "SPEAKER_MAIN"]] if named == "a.json" else []
    manifest = write_entry(tmp_path, audio, words=words)
    for _ in range(2):
        if way == "prepare":
            main(["prepare", str(manifest), "--out", str(tmp_path / "out")])
        else:
            frames_of(manifest, CODEC, tmp_path / "cache")
        (message,) = caplog.messages
        assert message.startswith(str(tmp_path / named))
