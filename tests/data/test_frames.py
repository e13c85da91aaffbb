"""From a manifest's entry to frames: rows, the cache, and codes made elsewhere."""

import json
import re
import shutil
import types

import numpy as np
import pytest
import safetensors.numpy
import soundfile

from eval.__main__ import main
from ttt_jax.codec import CodecInfo, load_codec
from ttt_jax.data import codes as codefiles
from ttt_jax.data.frames import FrameReader, open_manifest
from ttt_jax.data.manifest import read_manifest
from ttt_jax.data.text import ABSENT, EPAD, PAD, TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.moshi import delays

RATE = 16000
TOKENIZER = types.SimpleNamespace(
    cardinality=300, digest="t" * 64, encode=lambda word: [4 + ord(c) % 200 for c in word]
)


@pytest.fixture(scope="module")
def codec():
    return load_codec()


class CountingCodec:
    """The codec, counting how often it encodes."""

    def __init__(self, codec):
        self._codec, self.calls = codec, 0

    def __getattr__(self, name):
        return getattr(self._codec, name)

    def encode_step(self, audio, state):
        self.calls += 1
        return self._codec.encode_step(audio, state)


def babble(seconds, seed=0):
    """Noise whose level changes every tenth of a second: cheap, and full of different codes."""
    rng = np.random.default_rng(seed)
    level = np.repeat(10 ** rng.uniform(-3, -0.5, round(seconds * 10)), RATE // 10)
    return (level * rng.normal(size=len(level))).clip(-1, 1).astype(np.float32)


def write_entry(folder, audio, name="a.wav", words=None, duration=None):
    """Writes audio [samples] or [samples, 2] with its manifest, and returns the manifest's path."""
    soundfile.write(folder / name, audio, RATE, subtype="FLOAT")
    if words is not None:
        (folder / name).with_suffix(".json").write_text(json.dumps({"alignments": words}))
    return write_manifest(folder, name, len(audio) / RATE if duration is None else duration)


def write_manifest(folder, name, duration):
    (folder / "m.jsonl").write_text(json.dumps({"path": name, "duration": duration}) + "\n")
    return folder / "m.jsonl"


def frames_of(manifest, codec, cache):
    (entry,) = read_manifest(manifest).entries
    return FrameReader(codec, TOKENIZER, cache).read(entry)


def write_codes(folder, codes, made_by, duration=None, **changes):
    metadata = {"frame_rate": "12.5", "codec": made_by.digest} | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    safetensors.numpy.save_file({"codes": codes}, folder / "a.safetensors", metadata=metadata)
    return write_manifest(folder, "a.safetensors", codes.shape[1] / 12.5 if duration is None else duration)


def test_rows_are_text_then_left_then_right_channel(codec, tmp_path):
    stereo = np.stack([babble(2.0, 0), babble(2.0, 1)], axis=1)
    words = [["ab", [0.5, 0.9], "SPEAKER_MAIN"], ["no", [1.0, 1.2], "SPEAKER_OTHER"]]
    frames = frames_of(write_entry(tmp_path, stereo, words=words), codec, tmp_path / "cache")
    assert frames.shape == (17, 25)
    assert frames.dtype == np.int32
    np.testing.assert_array_equal(frames[1:9], codec.encode(stereo[:, 0]))
    np.testing.assert_array_equal(frames[9:], codec.encode(stereo[:, 1]))
    expected = np.full(25, PAD)
    expected[5:8] = [EPAD, *TOKENIZER.encode("ab")]
    np.testing.assert_array_equal(frames[0], expected)


def test_mono_file_has_encoded_silence_as_other_voice_and_absent_text(codec, tmp_path):
    frames = frames_of(write_entry(tmp_path, babble(1.0)), codec, tmp_path / "cache")
    silence = codec.encode(np.zeros(RATE, np.float32))
    assert frames.shape == (17, 13)
    np.testing.assert_array_equal(frames[9:], silence)
    assert (frames[0] == -1).all()


def test_what_is_absent_here_is_absent_to_the_model():
    assert ABSENT == delays.ABSENT


def test_alignment_without_words_is_text_of_padding_not_absent_text(codec, tmp_path):
    frames = frames_of(write_entry(tmp_path, babble(1.0), words=[]), codec, tmp_path / "cache")
    assert (frames[0] == PAD).all()


def test_cache_hit_is_equal_and_does_not_encode(codec, tmp_path):
    manifest, counting = write_entry(tmp_path, babble(1.0), words=[]), CountingCodec(codec)
    first = frames_of(manifest, counting, tmp_path / "cache")
    calls = counting.calls
    second = frames_of(manifest, counting, tmp_path / "cache")
    assert counting.calls == calls > 0
    np.testing.assert_array_equal(second, first)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_cache_follows_audio_alignments_codec_and_tokenizer(codec, tmp_path):
    manifest, cache = write_entry(tmp_path, babble(1.0), words=[]), tmp_path / "cache"
    (entry,) = read_manifest(manifest).entries
    first = FrameReader(codec, TOKENIZER, cache).read(entry)
    other = types.SimpleNamespace(**vars(TOKENIZER) | {"digest": "u" * 64})
    FrameReader(codec, other, cache).read(entry)
    assert len(list(cache.iterdir())) == 2
    changed = CountingCodec(codec)
    changed.digest = "0" * 64
    FrameReader(changed, TOKENIZER, cache).read(entry)
    assert len(list(cache.iterdir())) == 3
    write_entry(tmp_path, babble(1.0), words=[["hi", [0.2, 0.4], "SPEAKER_MAIN"]])
    assert (FrameReader(codec, TOKENIZER, cache).read(entry)[0] != first[0]).any()
    write_entry(tmp_path, babble(1.0, seed=5), words=[])
    assert (FrameReader(codec, TOKENIZER, cache).read(entry)[1] != first[1]).any()


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
    calls = counting.calls
    np.testing.assert_array_equal(frames_of(manifest, counting, tmp_path / "cache"), first)
    assert counting.calls > calls
    calls = counting.calls
    np.testing.assert_array_equal(frames_of(manifest, counting, tmp_path / "cache"), first)
    assert counting.calls == calls


def test_wrong_duration_is_refused_with_and_without_cache(codec, tmp_path):
    for _ in range(2):
        with pytest.raises(InputError, match=r"a\.wav lasts 2\.00 s"):
            frames_of(write_entry(tmp_path, babble(2.0), duration=9.0), codec, tmp_path / "cache")
        frames_of(write_entry(tmp_path, babble(2.0)), codec, tmp_path / "cache")


def test_file_shorter_than_a_frame_is_refused(codec, tmp_path):
    manifest = write_entry(tmp_path, babble(1.0)[: codec.frame_size - 1])
    with pytest.raises(InputError, match=r"a\.wav lasts 0\.080 s, less than one frame"):
        frames_of(manifest, codec, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


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
    own, other = (codes[1:9], codes[9:]) if rows == 17 else (codes[:8], codes[8:])
    np.testing.assert_array_equal(frames[1:9], own)
    silence = codec.encode(np.zeros(30 * codec.frame_size, np.float32))
    np.testing.assert_array_equal(frames[9:], silence if rows == 8 else other)
    if rows == 17:
        np.testing.assert_array_equal(frames[0], codes[0])
    else:
        assert (frames[0] != PAD).sum() == 2  # EPAD and the letter


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frame_rate": "25"}, ["'25'", "12.5"]),
        ({"frame_rate": "12.6"}, ["'12.6'", "12.5"]),
        ({"frame_rate": "nan"}, ["'nan'", "12.5"]),
        ({"frame_rate": "often"}, ["'often'", "12.5"]),
        ({"frame_rate": None}, ["None", "12.5"]),
        ({"codec": "f" * 64}, ["f" * 64, "DIGEST", "data.codec"]),
        ({"codec": "melkmeans-8x64"}, ["'melkmeans-8x64'", "DIGEST"]),
        ({"codec": None}, ["None", "DIGEST"]),
    ],
)
def test_codes_of_another_rate_or_codec_are_refused_naming_both(codec, tmp_path, changes, words):
    manifest = write_codes(tmp_path, np.zeros((8, 20), np.int32), codec, **changes)
    with pytest.raises(InputError) as error:
        frames_of(manifest, codec, tmp_path / "cache")
    assert all(word.replace("DIGEST", codec.digest) in str(error.value) for word in ["a.safetensors", *words])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((8, 20), 64), "from 64 to 64 in row 0 of its codes, expected -1 to 63"),
        (np.full((16, 20), -2), "from -2 to -2 in row 0"),
        (np.repeat([[300]] + 16 * [[0]], 20, axis=1), "expected -1 to 299 (the tokenizer)"),
        (np.zeros((9, 20), np.int64), "shape [9, 20]"),
        (np.zeros((8, 20), np.float32), "type float32"),
        (np.zeros((8, 0), np.int64), "less than one frame"),
    ],
)
def test_codes_of_wrong_range_or_shape_are_refused(codec, tmp_path, codes, message):
    manifest = write_codes(tmp_path, codes, codec, duration=20 / 12.5)
    with pytest.raises(InputError, match=re.escape(message)):
        frames_of(manifest, codec, tmp_path / "cache")


def test_codes_file_that_is_not_one_or_does_not_match_its_duration_is_refused(codec, tmp_path):
    with pytest.raises(InputError, match=r"a\.safetensors lasts 1\.60 s"):
        frames_of(write_codes(tmp_path, np.zeros((8, 20), np.int32), codec, duration=5.0), codec, tmp_path)
    safetensors.numpy.save_file({"other": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="expected a safetensors file with a tensor 'codes'"):
        frames_of(write_manifest(tmp_path, "a.safetensors", 1.6), codec, tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as codes"):
        frames_of(write_manifest(tmp_path, "a.safetensors", 1.6), codec, tmp_path)


def test_recordings_of_one_name_are_told_apart(codec, tmp_path):
    write_codes(tmp_path, np.zeros((8, 20), np.int32), codec, duration=1.6)
    names, lines = ("x/en/a", "y/en/a", "x/en/b"), []
    for name in names:
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "a.safetensors", path)
        lines.append(json.dumps({"path": f"{name}.safetensors", "duration": 1.6}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    found = open_manifest(tmp_path / "m.jsonl", codec, TOKENIZER, tmp_path / "cache", progress=False)
    assert [one.name for one in found] == [*(str(tmp_path / f"{name}.safetensors") for name in names[:2]), "en/b"]


def opened(manifest, codec, cache, tokenizer=TOKENIZER):
    (entry,) = read_manifest(manifest).entries
    return FrameReader(codec, tokenizer, cache).open(entry)


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


def test_audio_that_changed_while_its_cache_vanished_is_refused(codec, tmp_path):
    recording = opened(write_entry(tmp_path, babble(1.0), words=[]), codec, tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    write_entry(tmp_path, babble(1.0, seed=1), words=[])
    with pytest.raises(InputError, match=r"a\.wav has changed since it was opened"):
        recording.read()


def stated(codes, codec, /, **changes):
    fields = {"codec": codec.digest, "codec_name": "it", "cardinality": 64} | changes
    return codefiles.Codes(codes, 12.5, **fields)


def write_stated(folder, codes, codec, /, duration=None, **changes):
    """A code file as `prepare` writes it, with its manifest."""
    codefiles.write_codes(folder / "a.safetensors", stated(codes, codec, **changes))
    return write_manifest(folder, "a.safetensors", codes.shape[1] / 12.5 if duration is None else duration)


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


def test_the_digest_of_a_code_file_follows_codes_and_words(codec, tmp_path):
    def digest():
        return opened(tmp_path / "m.jsonl", codec, tmp_path).digest

    found = []
    for seed in (0, 1):
        write_stated(tmp_path, random_codes(seed=seed), codec)
        found.append(digest())
    for seed in (0, 1):
        write_codes(tmp_path, random_codes(seed=seed), codec)  # no checksum: the file's own digest
        found.append(digest())
    for text in ("x", "xy"):
        (tmp_path / "a.json").write_text(json.dumps({"alignments": [[text, [1.0, 1.1], "SPEAKER_MAIN"]]}))
        found.append(digest())
    assert len(set(found)) == 6


def test_what_is_no_alignment_beside_a_code_file_changes_nothing(codec, tmp_path, caplog):
    manifest = write_stated(tmp_path, random_codes(), codec)
    found = opened(manifest, codec, tmp_path)
    for content in (
        {"book_meta": {}},
        {"id": "x", "text": "no times"},
        {"words": []},
        {"alignments": [["x", [1, 1.1], "A"]]},
    ):
        (tmp_path / "a.json").write_text(json.dumps(content))
        again = opened(manifest, codec, tmp_path)
        assert again.digest == found.digest
        np.testing.assert_array_equal(again.read(), found.read())
        assert (again.read()[0] == -1).all()
    assert [message.split(": ")[1][:12] for message in caplog.messages] == ["holds words ", "of 1 words n"]


def test_what_was_dropped_is_told_once_however_often_codes_are_read(codec, tmp_path, caplog):
    manifest = write_stated(tmp_path, random_codes(), codec)
    words = [["x", [0.4, 0.5], "SPEAKER_MAIN"], ["y", [1.0, 1.0], "SPEAKER_MAIN"]]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": words}))
    recording = opened(manifest, codec, tmp_path)
    np.testing.assert_array_equal(recording.read(), recording.read())
    (message,) = caplog.messages
    assert message == f"{tmp_path / 'a.json'}: 1 of 2 words dropped, 1 without duration (such as 'y')."


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


@pytest.mark.parametrize(
    ("codes", "changes", "message"),
    [
        (random_codes(9), {}, "shape [9, 20]"),
        (random_codes(), {"codec": "0" * 64}, "states codec"),
        (random_codes(), {"duration": 9.0}, "lasts 1.60 s"),
        (random_codes(17), {"tokenizer": "0" * 64}, "states tokenizer"),
    ],
)
def test_what_a_header_shows_is_refused_at_first(codec, tmp_path, codes, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        opened(write_stated(tmp_path, codes, codec, **changes), codec, tmp_path)


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((8, 0), np.int16, "less than one frame"),
        ((8, 20), np.float32, "type F32"),
        ((8,), np.int16, "expected integers"),
    ],
)
def test_a_header_of_no_codes_is_refused(codec, tmp_path, shape, kind, message):
    safetensors.numpy.save_file({"codes": np.zeros(shape, kind)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        opened(write_manifest(tmp_path, "a.safetensors", 1.6), codec, tmp_path)


def test_wrong_words_beside_a_code_file_are_refused_at_first(codec, tmp_path):
    manifest = write_stated(tmp_path, random_codes(), codec)
    (tmp_path / "a.json").write_text(json.dumps({"alignments": [["x", [50.0, 51.0], "SPEAKER_MAIN"]]}))
    with pytest.raises(InputError, match=r"a\.json does not match its audio of 1\.60 s"):
        opened(manifest, codec, tmp_path)


STATED, TEXT = CodecInfo("it", "c" * 64, 64), TokenizerInfo("t" * 64, 300)


def read_stated(folder, codes, codec=STATED, tokenizer=TEXT, /, **changes):
    return opened(write_stated(folder, codes, STATED, **changes), codec, folder, tokenizer).read()


def test_without_codec_and_tokenizer_both_voices_are_taken_as_they_are(tmp_path):
    np.testing.assert_array_equal(read_stated(tmp_path, random_codes(17)), random_codes(17))
    frames = read_stated(tmp_path, random_codes(16))
    np.testing.assert_array_equal(frames[1:], random_codes(16))
    assert (frames[0] == -1).all()


def test_tokens_are_bounded_where_somebody_says_by_what(tmp_path):
    big = random_codes(17)
    big[3, 4] = 5000
    with pytest.raises(InputError, match="from .* to 5000 in row 3 of its codes, expected -1 to 63 .it"):
        read_stated(tmp_path, big)
    nobody = CodecInfo("it", STATED.digest), TokenizerInfo()
    assert read_stated(tmp_path, big, *nobody, cardinality=None, tokenizer="x").max() == 5000
    big[3, 4] = -2
    with pytest.raises(InputError, match="from -2 to .* expected -1 or more"):
        read_stated(tmp_path, big, *nobody)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (8, {}, "8 rows of codes.*write both streams, 16 rows"),
        (
            16,
            {"codec": "d" * 64},
            "states codec 'dddd.*the codec of the data, it, has the digest cccc.*use code files of this",
        ),
        (16, {"cardinality": 32}, "states cardinality 32 .*it has 64"),
        (
            17,
            {"tokenizer": "u" * 64},
            "states tokenizer 'uuuu.*the tokenizer of the data has the digest tttt.*of this tokenizer",
        ),
    ],
)
def test_code_files_that_do_not_go_together_are_refused(tmp_path, rows, changes, message):
    manifest = write_stated(tmp_path, random_codes(rows), STATED, **changes)
    with pytest.raises(InputError, match=message):
        opened(manifest, STATED, tmp_path, TEXT)


def test_words_and_audio_are_refused_where_nothing_can_encode_them(tmp_path):
    with pytest.raises(InputError, match=r"a\.wav is audio, but data\.codec='files'.*make codes"):
        opened(write_entry(tmp_path, babble(1.0)), STATED, tmp_path, TEXT)
    manifest = write_stated(tmp_path, random_codes(), STATED)
    (tmp_path / "a.json").write_text(json.dumps({"book_meta": {}}))
    assert (opened(manifest, STATED, tmp_path, TEXT).read()[0] == -1).all()
    (tmp_path / "a.json").write_text(json.dumps({"alignments": [["x", [1.0, 1.1], "SPEAKER_MAIN"]]}))
    with pytest.raises(InputError, match=r"a\.json has the words of a\.safetensors.*give data\.tokenizer"):
        opened(manifest, STATED, tmp_path, TEXT)


@pytest.mark.parametrize("fault", ["silent", "word"])
@pytest.mark.parametrize("way", ["read", "open", "prepare"])
def test_what_is_wrong_with_a_recording_is_told_when_it_is_encoded_and_not_again(codec, tmp_path, caplog, fault, way):
    audio, words = (np.zeros(RATE), []) if fault == "silent" else (babble(1.0), [["x", [0.2, 0.4], "SPEAKER_MAIN"]])
    words = words and [*words, ["y", [0.5, 0.5], "SPEAKER_MAIN"]]
    manifest = write_entry(tmp_path, audio, words=words)
    (entry,) = read_manifest(manifest).entries
    for _ in range(2):
        if way == "prepare":
            main(["prepare", str(manifest), "--out", str(tmp_path / "out")])
        elif way == "read":
            FrameReader(codec, TOKENIZER, tmp_path / "cache").read(entry)
        else:
            FrameReader(codec, TOKENIZER, tmp_path / "cache").open(entry).read()
        assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(str(tmp_path / ("a.wav" if fault == "silent" else "a.json")))
