"""From a manifest's entry to frames: rows, the cache, and codes made elsewhere."""

import json
import re
import shutil
import types

import numpy as np
import pytest
import safetensors.numpy

from tests.helpers.manifests import TOKENIZER, CountingCodec, frames_of, write_codes, write_entry, write_manifest
from tests.helpers.recordings import RATE, babble
from ttt_jax.codec import load_codec
from ttt_jax.data.encode import Encoder, encode_blocks
from ttt_jax.data.frames import FrameReader, open_manifest
from ttt_jax.data.manifest import read_manifest
from ttt_jax.data.text import ABSENT, EPAD, PAD
from ttt_jax.errors import InputError
from ttt_jax.moshi import delays


@pytest.fixture(scope="module")
def codec():
    return load_codec()


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


def test_mono_file_has_encoded_silence_as_other_voice_and_absent_text(codec, tmp_path):
    frames = frames_of(write_entry(tmp_path, babble(1.0)), codec, tmp_path / "cache")
    silence = codec.encode(np.zeros(RATE, np.float32))
    assert frames.shape == (17, 13)
    np.testing.assert_array_equal(frames[9:], silence)
    assert (frames[0] == -1).all()


def test_a_last_part_of_a_frame_is_filled_up_behind(codec):
    left, right = babble(1.0, channels=2).T  # 12.5 frames
    channels, samples = encode_blocks([np.stack([left, right])[:, :9000], np.stack([left, right])[:, 9000:]], codec)
    assert samples == len(left)
    np.testing.assert_array_equal(channels, [codec.encode(left), codec.encode(right)])


def test_silence_goes_on_from_the_state_of_the_codec():
    class Counting:
        """Its codes of a frame are the number of frames before."""

        num_codebooks, frame_size = 2, 4

        def init_state(self):
            return 0

        def encode_step(self, audio, state):
            after = state + len(audio) // self.frame_size
            return np.tile(np.arange(state, after, dtype=np.int32), (2, 1)), after

    encoder = Encoder(Counting(), TOKENIZER)
    for frames in (3, 600, 5):  # more than a block of silence, and fewer than are known
        np.testing.assert_array_equal(encoder.silence(frames), [np.arange(frames)] * 2)


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
    moshi, user = (codes[1:9], codes[9:]) if rows == 17 else (codes[:8], codes[8:])
    np.testing.assert_array_equal(frames[1:9], moshi)
    silence = codec.encode(np.zeros(30 * codec.frame_size, np.float32))
    np.testing.assert_array_equal(frames[9:], silence if rows == 8 else user)
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


def test_recordings_of_one_name_are_distinguished(codec, tmp_path):
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
