"""Opened recordings: headers first, changes, damage, and code files without their codec."""

import json

import numpy as np
import pytest

from eval.__main__ import main
from tests.helpers.manifests import TOKENIZER, CountingCodec, frames_of, write_codes, write_entry, write_manifest
from tests.helpers.recordings import RATE, babble
from ttt_jax.codec import CodecInfo, load_codec
from ttt_jax.data import codes as codefiles
from ttt_jax.data.frames import FrameReader
from ttt_jax.data.manifest import read_manifest
from ttt_jax.data.text import TokenizerInfo
from ttt_jax.errors import InputError


@pytest.fixture(scope="module")
def codec():
    return load_codec()


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
    for content in ({"book_meta": {}}, {"id": "x"}, {"words": []}, {"alignments": [["x", [1, 1.1], "A"]]}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        again = opened(manifest, codec, tmp_path)
        assert again.digest == found.digest
        np.testing.assert_array_equal(again.read(), found.read())
        assert (again.read()[0] == -1).all()
    assert [message.split(": ")[1][:12] for message in caplog.messages] == ["holds words ", "of 1 words n"]


def test_what_was_dropped_is_reported_once_however_often_codes_are_read(codec, tmp_path, caplog):
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
    (tmp_path / "a.json").write_text(json.dumps({"alignments": [["x", [1.0, 1.1], "SPEAKER_MAIN"]]}))
    with pytest.raises(InputError, match=r"a\.json has the words of a\.safetensors.*give data\.tokenizer"):
        opened(manifest, STATED, tmp_path, TEXT)


@pytest.mark.parametrize("fault", ["silent", "word"])
@pytest.mark.parametrize("way", ["open", "prepare"])
def test_what_is_wrong_with_a_recording_is_reported_when_it_is_encoded_and_not_again(
    codec, tmp_path, caplog, fault, way
):
    audio, words = (np.zeros(RATE), []) if fault == "silent" else (babble(1.0), [["x", [0.2, 0.4], "SPEAKER_MAIN"]])
    words = words and [*words, ["y", [0.5, 0.5], "SPEAKER_MAIN"]]
    manifest = write_entry(tmp_path, audio, words=words)
    (entry,) = read_manifest(manifest).entries
    for _ in range(2):
        if way == "prepare":
            main(["prepare", str(manifest), "--out", str(tmp_path / "out")])
        else:
            FrameReader(codec, TOKENIZER, tmp_path / "cache").open(entry).read()
        assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(str(tmp_path / ("a.wav" if fault == "silent" else "a.json")))
