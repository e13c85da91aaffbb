"""Wav files: wrong sizes, chunks, rates."""

import shlex
import struct

import pytest

from tests.helpers.sounds import APE, COUNT, ID3, RANDOM, RATE, TAG, chunk, encoded, noise, refused, wav
from ttt_jax.data.audio.containers import Source, find_parts
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError

MARKS = (0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFFFFF - 36, 0x80000000, 0x80000000 - 44)


@pytest.mark.parametrize("size", MARKS)
@pytest.mark.parametrize("magic", [b"RIFF", b"RIFX"])
def test_a_wav_with_a_mark_for_its_size_is_read_whole_and_that_is_logged(read, caplog, magic, size):
    for whole in (size, 0, None):
        caplog.clear()
        assert read(wav(size, whole, magic)).shape == (1, COUNT)
        assert "in its header, which is wrong: the 48000 bytes that are there are read" in caplog.text


@pytest.mark.parametrize("size", [2, 20000, 24000, 47998])
def test_a_wav_whose_data_size_is_too_small_is_read_to_the_end_of_the_riff_chunk(read, caplog, size):
    for whole in (None, 0, 0xFFFFFFFF):
        assert read(wav(size, whole)).shape == (1, COUNT)
    assert f"states {size} bytes of sound in its header, which is wrong" in caplog.text


def test_silence_behind_a_data_size_that_is_too_small_is_sound(read):
    silent = bytearray(wav(24000))
    silent[44 + 24000 :] = bytes(24000)
    assert read(bytes(silent)).shape == (1, COUNT)


@pytest.mark.parametrize("whole", [None, 0, 0xFFFFFFFF, 36])
@pytest.mark.parametrize("size", [2, 24000, 47000])
def test_silence_behind_a_wrong_data_size_is_sound_whatever_the_size_of_the_whole(read, caplog, size, whole):
    content = wav(size, whole)
    assert read(content[: 44 + size] + bytes(48000 - size)).shape == (1, COUNT)
    assert f"states {size} bytes of sound in its header, which is wrong: the 48000 bytes that are there" in caplog.text


@pytest.mark.parametrize("size", [48016, 48002, 96000, 1 << 30])
def test_a_wav_that_promises_more_than_there_is_is_refused(read, size):
    refused(read, wav(size), rf"cut off or damaged \(its header states {size} bytes of sound, 48000 are there\)")


def test_a_wav_with_both_sizes_too_small_is_refused(read):
    refused(read, wav(24000, 24036), r"24000 bytes from byte 24044 on are neither wav sound nor a tag")


@pytest.mark.parametrize("name", ["a talk.wav", "it's.wav", "a$b;c.wav"])
def test_the_command_that_writes_a_wav_anew_is_one_for_a_shell(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(wav(96000))
    with pytest.raises(InputError, match="write it anew") as caught:
        read_audio(path, RATE)
    words = shlex.split(str(caught.value)[:-1].split("for example by ", 1)[1])
    assert words == ["ffmpeg", "-ignore_length", "1", "-i", name, f"{path.stem}.flac"]


LOST = {
    "a second data chunk": chunk(b"data", 10 * RANDOM),
    "a second data chunk, short": chunk(b"data", RANDOM[:10]),
    "a second data chunk of open size": b"data\xff\xff\xff\xff" + RANDOM,
    "a data chunk behind others": chunk(b"LIST", b"INFOab") + chunk(b"data", RANDOM),
    "an unknown chunk": chunk(b"ABCD", RANDOM),
    "an unknown chunk, just too large": chunk(b"ABCD", RANDOM[:1024]),
    "many unknown chunks": chunk(b"ABCD", RANDOM[:600]) + chunk(b"EFGH", RANDOM[:600]),
    "an unknown chunk behind others": chunk(b"bext", bytes(602)) + chunk(b"ABCD", RANDOM),
    "a joined wav with a flipped bit": b"RIFG" + wav(48000)[4:],
    "a joined wav within a chunk of wrong length": b"LIST" + struct.pack("<I", 48044) + wav(48000),
    "a joined wav behind a cut chunk": chunk(b"LIST", b"INFO" + bytes(90000))[:12] + wav(48000),
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("size", [48000, 0xFFFFFFFF])
def test_what_may_be_sound_behind_the_sound_of_a_wav_is_never_left_out_in_silence(read, caplog, name, size):
    for whole in (None, 48036):
        try:
            shape = read(wav(size, whole, tail=LOST[name])).shape
        except InputError as error:
            assert "cut off or damaged" in str(error)  # noqa: PT017
        else:
            assert size != 48000
            assert shape[1] > COUNT
            assert "in its header, which is wrong" in caplog.text


@pytest.mark.parametrize("name", [b"ABCD", b"dat`", b"DATA"])
def test_an_unknown_chunk_before_the_sound_of_a_wav_is_refused(read, name):
    refused(
        read, wav(48000, before=chunk(name, RANDOM)), rf"its chunk '{name.decode()}' of 5000 bytes at byte 12 may be"
    )
    assert read(wav(48000, before=chunk(name, b"few bytes"))).shape == (1, COUNT)


@pytest.mark.parametrize("name", [b"bext", b"LIST", b"iXML", b"id3 ", b"JUNK", b"dbmd", b"guan", b"SMED"])
def test_large_chunks_of_metadata_are_no_sound(read, caplog, name):
    large = chunk(name, 20 * RANDOM)
    assert read(wav(48000, before=large)).shape == read(wav(48000, tail=large)).shape == (1, COUNT)
    assert not caplog.text


@pytest.mark.parametrize(
    "tail",
    [
        chunk(b"LIST", b"INFOab"),
        chunk(b"abcd", b"odd"),
        chunk(b"id3 ", ID3),
        chunk(b"LIST", bytes(600))[:50],
        bytes(3000),
    ]
    + [TAG, APE, chunk(b"LIST", b"INFOab") + bytes(99), b"\0"],
)
def test_chunks_and_tags_behind_the_sound_of_a_wav_are_no_sound(read, caplog, tail):
    assert read(wav(48000, 48036, tail=tail)).shape == (1, COUNT)
    assert not caplog.text


@pytest.mark.parametrize("tail", [chunk(b"LIST", b"INFOab"), TAG, chunk(b"bext", bytes(602)) + chunk(b"id3 ", ID3)])
@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 24000])
def test_chunks_and_tags_behind_sound_of_a_wrong_size_are_no_sound(read, caplog, tail, size):
    assert read(wav(size, tail=tail)).shape == (1, COUNT)
    assert "neither sound nor a tag" not in caplog.text


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 1 << 63, 48000])
@pytest.mark.parametrize("magic", [b"RF64", b"BW64"])
def test_the_large_sizes_of_rf64_are_judged_like_the_others(read, magic, size):
    large = b"ds64" + struct.pack("<IQQQI", 28, size + 72, size, COUNT, 0)
    assert read(wav(0xFFFFFFFF, 0xFFFFFFFF, magic, before=large)).shape == (1, COUNT)
    for wrong in (48002, 1 << 40):
        large = b"ds64" + struct.pack("<IQQQI", 28, wrong + 72, wrong, COUNT, 0)
        refused(read, wav(0xFFFFFFFF, 0xFFFFFFFF, magic, before=large), f"states {wrong} bytes of sound")


def test_a_size_of_more_than_4_gb_that_was_counted_in_32_bits(tmp_path, caplog):
    path, size = tmp_path / "large.wav", (1 << 32) + 100_000
    with path.open("w+b") as file:
        file.write(wav(size, size + 36)[:44])
        file.seek(44 + 100_000)
        file.write(b"\1")
        file.truncate(44 + size)
        (part,) = find_parts(Source(path, file, 44 + size))
    assert (part.end - part.start, part.samples) == (size, size // 2)
    assert part.head.startswith(b"RF64")
    assert "counted in 32 bits" in caplog.text


def test_a_wav_whose_rate_contradicts_itself_is_reported(read, caplog):
    content = bytearray(wav(48000))
    content[28:32] = struct.pack("<I", 88200)
    assert read(bytes(content)).shape == (1, COUNT)
    assert "states 88200 bytes a second in its header" in caplog.text
    for name in ("IMA_ADPCM", "MS_ADPCM", "GSM610", "ULAW"):
        caplog.clear()
        content = bytearray(encoded(noise(), format="WAV", subtype=name))
        assert read(bytes(content)).shape[1] >= COUNT
        assert not caplog.text
        content[24:28] = struct.pack("<I", 8000)
        assert read(bytes(content), 8000).shape[1] >= COUNT
        assert "it is read at 8000 Hz" in caplog.text


@pytest.mark.parametrize("rate", [8000, 24000, 44100])
@pytest.mark.parametrize("name", ["IMA_ADPCM", "MS_ADPCM"])
def test_the_bit_rate_that_ffmpeg_states_for_adpcm_is_no_contradiction(read, caplog, name, rate):
    content = bytearray(encoded(noise(), rate, format="WAV", subtype=name))
    content[28:32] = struct.pack("<I", 16000)
    assert read(bytes(content), rate).shape[1] >= COUNT
    assert not caplog.text


def test_a_rate_that_no_recording_has_is_refused(read):
    content = bytearray(wav(48000))
    content[24:28] = struct.pack("<I", 3)
    refused(read, bytes(content), "a rate of 3 Hz")
