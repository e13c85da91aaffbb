"""The sound file reader believes what a file holds: wrong lengths in headers, joined files, bytes behind the sound,
levels."""

import io
import logging
import os
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttt_jax.data.audio import formats, reader
from ttt_jax.data.audio.containers import Source, find_parts, flac, mpeg
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError

RATE = 16000
COUNT = 24000  # samples of `noise`
FORMATS = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "rifx": {"format": "WAV", "subtype": "PCM_16", "endian": "BIG"},
    "extensible": {"format": "WAVEX", "subtype": "PCM_24"},
    "float": {"format": "WAV", "subtype": "FLOAT"},
    "rf64": {"format": "RF64", "subtype": "PCM_16"},
    "flac": {"format": "FLAC"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
}
RANDOM = np.random.default_rng(0).integers(1, 255, 5000, dtype=np.uint8).tobytes()
TAG = b"TAG" + b"x" * 125
ID3 = b"ID3\x04\0\0\0\0\0\x0a" + b"y" * 10
APE = b"".join(
    (b"APETAGEX", struct.pack("<IIIIQ", 2000, 42, 1, 0xA0000000, 0), b"z" * 10)
    + (b"APETAGEX", struct.pack("<IIIIQ", 2000, 42, 1, 0x80000000, 0))
)


APE_1 = b"x" * 1500 + b"APETAGEX" + struct.pack("<IIIIQ", 1000, 1532, 1, 0, 0)  # version 1: a footer only


def noise(count=COUNT, channels=1, seed=0):
    """Noise that begins quietly: encoders of a variable bit rate spend less on its first third."""
    samples = np.random.default_rng(seed).uniform(-0.3, 0.3, (count, channels))
    samples[: count // 3] *= 0.01
    return samples


def encoded(samples, rate=RATE, **form):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **form)
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    """The same noise in every format."""
    return {name: encoded(noise(), **form) for name, form in FORMATS.items()}


@pytest.fixture
def read(tmp_path):
    """Samples [channels, n] of the file that has these bytes."""

    def read(content, rate=RATE):
        path = tmp_path / "sound"
        path.write_bytes(content)
        return read_audio(path, rate)

    return read


def refused(read, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(content)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text


# Wav


def wav(size, whole=None, magic=b"RIFF", tail=b"", before=b""):
    """24,000 samples of 16 bits behind a header that states other sizes; without `whole` the RIFF size is true."""
    order = ">" if magic == b"RIFX" else "<"
    pcm = (noise()[:, 0] * 32767).astype(order + "i2").tobytes()
    chunks = before + b"fmt " + struct.pack(order + "IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    whole = 4 + len(chunks) + 8 + len(pcm) + len(tail) if whole is None else whole
    sizes = struct.pack(order + "I", whole & 0xFFFFFFFF), struct.pack(order + "I", size & 0xFFFFFFFF)
    return magic + sizes[0] + b"WAVE" + chunks + b"data" + sizes[1] + pcm + tail


def chunk(name, content):
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


MARKS = (0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFFFFF - 36, 0x80000000, 0x80000000 - 44)


@pytest.mark.parametrize("size", MARKS)
@pytest.mark.parametrize("magic", [b"RIFF", b"RIFX"])
def test_a_wav_with_a_mark_for_its_size_is_read_whole_and_that_is_said(read, caplog, magic, size):
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


def test_a_wav_whose_rate_contradicts_itself_is_told(read, caplog):
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


# FLAC


def flac_with_total(content, total):
    fields = int.from_bytes(content[18:26], "big") >> 36 << 36 | total
    return content[:18] + fields.to_bytes(8, "big") + content[26:]


@pytest.mark.parametrize("total", [0, 1, 12000, COUNT - 1, (1 << 36) - 1])
def test_a_flac_is_read_to_its_last_frame_whatever_its_header_states(read, files, caplog, total):
    assert read(flac_with_total(files["flac"], total)).shape == (1, COUNT)
    assert (f"states {total} samples in its header, which is wrong" in caplog.text) == (total != 0)


@pytest.mark.parametrize("total", [COUNT + 1, 10 * COUNT])
def test_a_flac_that_promises_more_than_its_frames_hold_is_refused(read, files, total):
    refused(read, flac_with_total(files["flac"], total), f"promises {total} samples, its frames hold {COUNT}")


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.99, 0.9999])
def test_a_cut_off_flac_of_unknown_length_is_refused(read, files, keep):
    content = flac_with_total(files["flac"], 0)
    refused(read, content[: int(len(content) * keep)], "cut off or damaged")


@pytest.mark.parametrize("missing", [1, 100, 500])
def test_a_short_frame_that_is_cut_off_is_no_stray_bytes(read, missing):
    content = flac_with_total(encoded(noise() * 0.001, format="FLAC"), 0)
    refused(read, content[:-missing], "its last frame is incomplete")


@pytest.mark.parametrize("block", [1 << 18, 1000])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("damage", ["overwritten", "zeros", "missing"])
def test_damage_in_the_middle_of_a_flac_is_named_so_whatever_the_block(read, files, monkeypatch, damage, place, block):
    monkeypatch.setattr(reader, "_BLOCK", block)
    content = files["flac"]
    at = int(place * len(content))
    rest = {"overwritten": RANDOM[:3000], "zeros": bytes(3000), "missing": b""}[damage]
    refused(read, content[:at] + rest + content[at + 3000 :], r"cut off or damaged \(.*: copy or encode the file again")


def test_what_the_decoder_does_not_open_is_told_of_with_both_remedies(read, files):
    codec, bits = bytearray(wav(48000)), bytearray(encoded(noise(), format="WAV", subtype="IMA_ADPCM"))
    codec[20:22], bits[34:36] = b"\x45\0", b"\x05\0"
    streaminfo = bytearray(files["flac"])
    streaminfo[8:12] = bytes(4)  # least and largest block
    for content in (codec, bits, streaminfo):
        refused(read, bytes(content), r"damaged .*copy the file again, or convert it first|cut off or damaged")


def test_a_flac_whose_frames_have_another_rate_than_its_header_is_refused(read, files):
    content = bytearray(files["flac"])
    content[18:20] = (24000 >> 4).to_bytes(2, "big")
    refused(read, bytes(content), "none fits its header")


def test_a_flac_without_frames_holds_no_samples(read, files):
    content = files["flac"]
    empty = flac_with_total(content, 0)[: flac._first_frame(source(content), 0)]
    refused(read, empty, "holds no samples")
    assert read(empty + content + empty).shape == (1, COUNT)


# Ogg


def pages(content):
    at = 0
    while at < len(content):
        lengths = content[at + 27 : at + 27 + content[at + 26]]
        end = at + 27 + len(lengths) + sum(lengths)
        yield at, end
        at = end


def with_position(content, position):
    """An Ogg file whose last page states another position, with a right checksum."""
    start = list(pages(content))[-1][0]
    page = bytearray(content[start:])
    page[6:14] = position.to_bytes(8, "little")
    page[22:26] = bytes(4)
    remainder = 0
    for byte in page:
        remainder ^= byte << 24
        for _ in range(8):
            remainder = (remainder << 1 ^ (0x04C11DB7 if remainder >> 31 else 0)) & 0xFFFFFFFF
    page[22:26] = remainder.to_bytes(4, "little")
    return content[:start] + bytes(page)


@pytest.mark.parametrize("name", ["vorbis", "opus"])
def test_an_ogg_that_states_a_wrong_length_is_refused(read, files, name):
    truth = int.from_bytes(files[name][list(pages(files[name]))[-1][0] + 6 :][:8], "little")
    assert read(with_position(files[name], truth)).shape == (1, COUNT)
    for position in (0, 100, 10 * truth, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        refused(read, with_position(files[name], position), "cut off or damaged|not audio")


@pytest.mark.parametrize("name", ["vorbis", "opus"])
def test_an_ogg_without_a_page_or_with_a_damaged_one_is_refused(read, files, name):
    content = files[name]
    places = list(pages(content))
    start, end = places[len(places) // 2]
    refused(read, content[:start] + content[end:], "Ogg pages are missing before byte")
    refused(read, content[: end - 9] + b"damage" + content[end - 3 :], "the checksum of the Ogg page at byte")
    refused(read, content[: places[-1][0]], "lacks the end mark")
    refused(read, content[: places[-1][0]] + content, "begins at byte .* before the last one has its end mark")


def test_an_ogg_of_another_codec_is_named(read, files):
    content = files["opus"].replace(b"OpusHead", b"Speex   ", 1)
    refused(read, with_checksums(content), "an Ogg file that holds Speex, where one stream of Vorbis or Opus is read")


def with_checksums(content):
    """The first page with a right checksum."""
    end = next(pages(content))[1]
    return with_position(content[:end], int.from_bytes(content[6:14], "little")) + content[end:]


# MPEG audio


def without_info(content):
    """An mp3 without its Xing header."""
    assert content[:60].find(b"Xing") > 0 or content[:60].find(b"Info") > 0
    return content[mpeg._parse(content[:4]).length :]


def with_count(content, count):
    at = content.find(b"Xing") + 8
    return content[:at] + count.to_bytes(4, "big") + content[at + 4 :]


def count_of(content):
    at = content.find(b"Xing") + 8
    return int.from_bytes(content[at : at + 4], "big")


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100, 48000])
def test_an_mp3_is_as_long_with_and_without_its_header(read, rate, channels, mode):
    content = encoded(noise(2 * rate, channels), rate, format="MP3", bitrate_mode=mode)
    frame = 1152 if rate > 24000 else 576
    assert read(content, rate).shape == (channels, 2 * rate)
    bare = without_info(content)
    # Every frame is decoded; 529 samples are the decoder's own delay.
    assert read(bare, rate).shape == (channels, count_of(content) * frame - 529)


def test_the_sound_of_an_mp3_without_header_is_that_of_the_one_with_header(read):
    content = encoded(noise(), format="MP3", bitrate_mode="VARIABLE")
    whole, bare = read(content)[0], read(without_info(content))[0]
    at = 576  # delay of LAME's encoder at this rate, which only its header states
    np.testing.assert_allclose(bare[at + 2000 : at + COUNT], whole[2000:], atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 20, 0x7FFFFFFF, 0xFFFFFFFF])
def test_frames_are_counted_where_the_header_of_an_mp3_is_wrong(read, files, caplog, count):
    assert read(with_count(files["mp3"], count)).shape == (1, COUNT)
    assert "in its header, which is" in caplog.text


def test_an_mp3_that_promises_more_than_there_is_is_refused(read, files):
    count = count_of(files["mp3"])
    for more in (2, 100):
        refused(read, with_count(files["mp3"], count + more), f"counts {count + more} frames, {count} are there")


def test_the_header_of_fraunhofers_encoder_is_no_sound(read, files):
    bare = without_info(files["mp3"])
    count = count_of(files["mp3"])
    length = mpeg._parse(bare[:4]).length
    for stated in (count, 0, 5):
        header = b"VBRI" + struct.pack(">HHHII", 1, 576, 75, length + len(bare), stated)
        frame = (bare[:4].ljust(36, b"\0") + header).ljust(length, b"\0")
        assert read(frame + bare).shape == read(bare).shape
    header = b"VBRI" + struct.pack(">HHHII", 1, 576, 75, 2 * len(bare), 2 * count)
    refused(read, (bare[:4].ljust(36, b"\0") + header).ljust(length, b"\0") + bare, f"counts {2 * count} frames")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_frame_that_is_cut_off_is_refused_without_a_header_too(read, keep):
    content = without_info(encoded(noise(), format="MP3", bitrate_mode="VARIABLE"))
    refused(read, content[: int(len(content) * keep) | 1], "cut off or damaged")


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 100])
def test_a_frame_that_has_hardly_begun_is_cut_off_and_no_stray_bytes(read, files, kept):
    refused(read, without_info(files["mp3"]) + without_info(files["mp3"])[:kept], "its last frame is incomplete")


def test_zeros_behind_an_mp3_that_nothing_counts_are_told_where_few_and_refused_where_many(read, files, caplog):
    bare, counted = without_info(files["mp3"]), files["mp3"]
    for few in (1, 500, 1023):
        caplog.clear()
        for tail in (b"", TAG):
            assert read(bare + bytes(few) + tail).shape == read(bare).shape
            assert f"has {few} zeros behind its frames at byte {len(bare)}, and may be cut off" in caplog.text
    middle = next(at for at in range(len(bare) // 20, len(bare)) if mpeg._search(source(bare), at) == at)
    lost = bare[:middle] + bytes(len(bare) - middle)
    half = next(at for at in range(len(bare) // 2, len(bare)) if mpeg._search(source(bare), at) == at)
    joined = bare[:half] + bytes(len(bare) - half) + counted
    for content in (bare + bytes(1024), bare + bytes(9000) + TAG, lost, lost + TAG, joined, counted + lost):
        refused(read, content, "zeros from byte .* are no MPEG frame, and no header counts its frames")
    layer_2 = 20 * tone_of_layer(2, 1)
    refused(read, layer_2 + bytes(len(layer_2)), "7680 zeros from byte 7680 on are no MPEG frame")
    caplog.clear()
    assert read(counted + bytes(9000)).shape == (1, COUNT)  # the count says that nothing is missing
    assert not caplog.text


def test_bytes_within_an_mp3_that_are_no_frames_are_refused(read, files):
    for bare in (files["mp3"], without_info(files["mp3"])):
        middle = next(at for at in range(len(bare) // 2, len(bare)) if mpeg._search(source(bare), at) == at)
        refused(read, bare[:middle] + RANDOM[:700] + bare[middle:], "are no MPEG frame|counts .* frames")
        end = middle + mpeg._parse(bare[middle : middle + 4]).length
        refused(read, bare[:middle] + bytes(end - middle) + bare[end:], "are no MPEG frame|counts .* frames")


@pytest.mark.parametrize("form", [(16000, 1), (24000, 2), (44100, 1), (48000, 2)])
def test_frames_of_an_mp3_that_promise_what_no_frame_holds_are_told(read, caplog, form):
    rate, channels = form
    content = bytearray(encoded(noise(rate, channels), rate, format="MP3"))
    assert read(bytes(content), rate).shape == form[::-1]
    assert not caplog.text
    for number in range(10, 13):
        at = 0
        for _ in range(number):
            at += mpeg._parse(bytes(content[at : at + 4])).length
        begin, end = at + 4, at + mpeg._parse(bytes(content[at : at + 4])).info_at
        # The numbers of pairs in all granules are the largest that can be written.
        content[begin + 2 : end] = b"\xff" * (end - begin - 2)
        caplog.clear()
        try:
            read(bytes(content), rate)
        except InputError as error:  # the decoder may make any numbers of it
            assert "is damaged (it holds samples of" in str(error)  # noqa: PT017
        assert f"holds {number - 9} damaged frames among" in caplog.text


def source(content):
    return Source(Path("made"), io.BytesIO(content), len(content))


def test_the_rest_of_a_frame_before_the_first_one_is_told(read, files, caplog):
    bare = without_info(files["mp3"])
    first = mpeg._parse(bare[:4])
    assert read(bare[100:]).shape == (1, read(bare).shape[1] - first.samples)
    assert f"has {first.length - 100} bytes before its first whole MPEG frame" in caplog.text
    for many in (RANDOM, bare[: first.length] + bytes(5000), first.length * b"x" + RANDOM[:3000]):
        refused(read, many + bare, "bytes before its first whole MPEG frame are no such frame|zeros from byte")


def test_mpeg_audio_in_a_wav_is_read(read, files):
    bare = without_info(files["mp3"])
    form = struct.pack("<HHIIHHH", 0x55, 1, RATE, 4000, 1, 0, 0)
    head = b"RIFF" + struct.pack("<I", 4 + 26 + 8 + len(bare)) + b"WAVE" + chunk(b"fmt ", form) + b"data"
    head += struct.pack("<I", len(bare))
    assert read(head + bare).shape == read(bare).shape
    refused(read, head + bare[:-2000] + bytes(2000), "bytes of MPEG audio in it|its last frame|no MPEG frame")
    refused(read, head + bytes(len(bare)), "bytes of MPEG audio in it 0 are frames")


def tone_of_layer(layer, band):
    """A frame of mono sound at 24 kHz, 64 kbit/s, that is steady in one of the 32 bands (ISO 11172-3, 13818-3)."""
    header = f"{0xFFF:012b}0{'11' if layer == 1 else '10'}1{'0100' if layer == 1 else '1000'}01" + "0011000000"
    allocations = [4] * 32 if layer == 1 else [4] * 4 + [3] * 7 + [2] * 19  # bits of each band's allocation
    finest = 14 if layer == 1 else 15  # samples of 15 and of 14 bits
    bits = header + "".join(f"{finest * (number == band):0{width}b}" for number, width in enumerate(allocations))
    bits += "000110" if layer == 1 else "10" + "000110"  # scale factor 1/2; layer II: one for the whole frame
    bits += f"{28000:015b}" * 12 if layer == 1 else f"{14000:014b}" * 36
    length = 128 if layer == 1 else 384
    return int(bits.ljust(8 * length, "0"), 2).to_bytes(length, "big")


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("band", [0, 1, 3])
def test_mpeg_audio_of_the_layers_1_and_2_is_read_and_its_endings_are_known(tmp_path, layer, band):
    path = tmp_path / f"tone.mp{layer}"
    path.write_bytes(TAG + 50 * tone_of_layer(layer, band) + TAG)
    (samples,) = read_audio(path, 24000)
    assert len(samples) == 50 * (384 if layer == 1 else 1152)
    power = np.abs(np.fft.rfft(samples[2000:])) ** 2
    per_band = len(power) / 32
    assert power[int(max(0, band - 0.2) * per_band) : int((band + 1.2) * per_band)].sum() > 0.99 * power.sum() > 1
    assert formats.is_read(path)
    assert not formats.is_other(path)


@pytest.mark.parametrize("ending", [".wave", ".rf64", ".bwf", ".fla", ".mpga", ".MP2", ".mp1"])
def test_other_endings_of_what_is_read_are_known(ending):
    assert formats.is_read(Path(f"a{ending}"))


@pytest.mark.parametrize("ending", [".ac4", ".dff", ".QT"])
def test_other_endings_of_what_must_be_converted_are_known(ending):
    assert formats.is_other(Path(f"a{ending}"))


# All containers


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block", [1 << 18, 1000])
def test_joined_files_are_read_one_after_the_other(read, files, monkeypatch, name, block):
    monkeypatch.setattr(reader, "_BLOCK", block)
    other = encoded(noise(10000, seed=1), **FORMATS[name])
    each = [read(files[name]), read(other), read(files[name])]
    joined = read(files[name] + other + files[name])
    np.testing.assert_array_equal(joined, np.concatenate(each, axis=1))


def test_joined_wavs_of_open_size_and_joined_flacs_of_open_length(read, files):
    assert read(wav(0xFFFFFFFF, 0xFFFFFFFF) + wav(0, 0) + wav(48000)).shape == (1, 3 * COUNT)
    assert read(2 * flac_with_total(files["flac"], 0)).shape == (1, 2 * COUNT)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_joined_and_cut_off_is_refused(read, files, name):
    twice = 2 * files[name]
    for keep in (0.51, 0.75, 0.98):
        refused(read, twice[: int(len(twice) * keep)], "cut off or damaged|sound nor a tag")


@pytest.mark.parametrize("name", ["wav", "flac", "vorbis", "mp3"])
def test_joined_files_of_two_rates_are_resampled_and_of_other_channels_refused(read, files, name):
    other = encoded(noise(12000), 8000, **FORMATS[name])
    assert read(files[name] + other).shape == (1, COUNT + 24000)
    stereo = encoded(noise(channels=2), **FORMATS[name])
    refused(read, files[name] + stereo, "joined of files with 1 and 2 channels")


@pytest.mark.parametrize(
    "tail", [TAG, ID3 + TAG, APE + TAG, APE_1, APE_1 + TAG, bytes(2000), b"LYRICSBEGINabc000012LYRICS200" + TAG]
)
@pytest.mark.parametrize("name", FORMATS)
def test_tags_and_zeros_behind_the_sound_are_no_sound(read, files, caplog, name, tail):
    assert read(files[name] + tail).shape == (1, COUNT)
    assert not caplog.text


@pytest.mark.parametrize("name", FORMATS)
def test_few_stray_bytes_are_left_out_and_told_many_are_refused(read, files, caplog, name):
    assert read(files[name] + b"hello\n").shape == (1, COUNT)
    assert "ends with 6 bytes that are neither sound nor a tag" in caplog.text
    refused(read, files[name] + RANDOM, "cut off or damaged")


@pytest.mark.parametrize("name", FORMATS)
def test_a_tag_before_the_sound_is_no_sound(read, files, name):
    assert read(ID3 + files[name]).shape == (1, COUNT)


DAMAGES = (
    lambda data, rng: data[: rng.integers(1, len(data))],
    lambda data, rng: _replaced(data, rng.integers(len(data)), rng.bytes(1)),
    lambda data, rng: _replaced(data, rng.integers(100), rng.choice([b"\0", b"\xff", b"\x7f", b"\x80", b"\1"])),
    lambda data, rng: _replaced(data, rng.integers(80), rng.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"])),
    lambda data, rng: _inserted(data, rng.integers(len(data)), rng.bytes(rng.integers(1, 3000))),
    lambda data, rng: _replaced(data, rng.integers(len(data)), bytes(rng.integers(1, 3000))),
)


def _replaced(data, at, new):
    return (data[:at] + new + data[at + len(new) :])[: len(data)]


def _inserted(data, at, new):
    return data[:at] + new + data[at:]


def check_damaged(read, content, seed):
    """A damaged file is read or refused by one sentence; one that is cut off is never read."""
    rng = np.random.default_rng(seed)
    kind = int(rng.integers(len(DAMAGES)))
    damaged = DAMAGES[kind](content, rng)
    try:
        samples = read(damaged)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert kind != 0 or len(damaged) == len(content)
        assert np.isfinite(samples).all()


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_refused(read, files, name):
    for seed in range(12):
        check_damaged(read, files[name], seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files_are_read_or_refused(read, files, name):
    for seed in range(100, 220):
        check_damaged(read, files[name] * (1 + seed % 2), seed)


# Levels


@pytest.mark.parametrize("peak", [20.0, 127.0, 32767.0, 2.0**31])
def test_integers_as_floats_are_refused(read, peak):
    samples = noise() / 0.3 * peak
    samples[100] = -peak
    refused(
        read,
        encoded(samples, format="WAV", subtype="FLOAT"),
        "holds samples of .* near second 0.* where full scale is 1: divide them by",
    )


@pytest.mark.parametrize("value", [2.0**31 + 256, -1e10, 1e30])
def test_a_sample_beyond_all_integers_is_damage(read, value):
    samples = noise()
    samples[RATE] = value
    content = encoded(samples, format="WAV", subtype="FLOAT")
    refused(read, content, r"is damaged \(it holds samples of .* near second 1\.0.* copy or encode the file again")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1.0, ""),
        (6.0, ""),
        (10.0, "has a peak of 3.0, where full scale is 1"),
        (0.0, "is silent: all its samples are 0"),
    ]
    + [(0.003, "is nearly silent: its peak is -61 dB of full scale")],
)
def test_doubtful_levels_are_told(read, caplog, scale, message):
    samples = noise() * scale
    np.testing.assert_allclose(read(encoded(samples, format="WAV", subtype="FLOAT"))[0], samples[:, 0], atol=1e-6)
    assert message in caplog.text if message else "peak" not in caplog.text


@pytest.mark.parametrize(("share", "told"), [(0.002, False), (0.02, True), (0.6, True)])
@pytest.mark.parametrize("name", ["wav", "float", "flac"])
def test_clipped_recordings_are_told(read, caplog, name, share, told):
    samples = noise()
    samples[: int(share * COUNT) : 2] = 1
    samples[1 : int(share * COUNT) : 2] = -1
    read(encoded(samples, **FORMATS[name]))
    assert (f"is clipped: {100 * share:.0f} % of its samples are at full scale" in caplog.text) == told


# What is no wav, flac, ogg or mp3


OTHERS = {
    "an MP4 file": b"\0\0\0\x1cftypM4A \0\0\2\0isomiso2",
    "a Matroska or WebM file": b"\x1a\x45\xdf\xa3\x9fB\x86\x81\1",
    "a NIST SPHERE file": b"NIST_1A\n   1024\n",
    "an AIFF file": b"FORM\0\0\x10\0AIFFCOMM",
    "an AIFC file": b"FORM\0\0\x10\0AIFCFVER",
    "a CAF file": b"caff\0\1\0\0desc",
    "an AU file": b".snd\0\0\0\x18",
    "an ASF file": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9",
    "an AMR file": b"#!AMR\n",
    "a raw AAC stream": b"\xff\xf1\x50\x80\x2e\x7f\xfc",
    "MPEG audio of a free bit rate": b"\xff\xfb\x00\xc4",
    "a W64 file": b"riff\x2e\x91\xcf\x11\xa5\xd6",
    "an AVI file": b"RIFF\0\0\x10\0AVI LIST",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named_with_what_converts_them(tmp_path, name):
    path = tmp_path / "talk.wav"
    path.write_bytes(OTHERS[name] + bytes(100) + RANDOM)
    with pytest.raises(
        InputError, match=rf"is {name}.*convert it first, for example by ffmpeg -i talk\.wav talk\.flac\.$"
    ):
        read_audio(path, RATE)


@pytest.mark.parametrize("name", ["talk.flac", "a b.FLAC", "flac"])
def test_a_file_is_never_converted_to_itself(tmp_path, name):
    (tmp_path / name).write_bytes(OTHERS["an MP4 file"] + RANDOM)
    with pytest.raises(InputError, match="convert it first") as caught:
        read_audio(tmp_path / name, RATE)
    words = shlex.split(str(caught.value)[:-1].split("for example by ", 1)[1])
    assert words[:3] == ["ffmpeg", "-i", name]
    assert words[3].lower() != name.lower()


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS file"), (b"<!DOCTYPE html><html>", "a web page")]
    + [(b"/annex/objects/SHA256E-s1--ab.wav\n", "a git-annex file"), (b"PK\x03\x04aaaaaaaaaaaa", "a zip archive")],
)
def test_what_is_no_sound_is_named(read, content, name):
    refused(read, content, f"{name}.*, no sound: give a wav, flac, ogg or mp3 file")


@pytest.mark.parametrize("name", FORMATS)
def test_the_content_decides_and_not_the_ending(tmp_path, files, name):
    for ending in ("wav", "mp3", "raw", "txt"):
        path = tmp_path / f"sound.{ending}"
        path.write_bytes(files[name])
        assert read_audio(path, RATE).shape == (1, COUNT)


@pytest.mark.parametrize(
    "name", [b"caf\xe9.wav", b"\xff\xfe \n.wav", "e\u0301 \u00e9 \U0001f3a4.wav".encode(), b"-i 100%.wav"]
)
def test_files_of_any_name_and_links_to_them_are_read(tmp_path, files, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(files["wav"])
    link = path.with_suffix(".link")
    link.symlink_to(path)
    for given in (path, str(path), link):
        assert read_audio(given, RATE).shape == (1, COUNT)
    path.write_bytes(files["wav"][:-100])
    with pytest.raises(InputError, match="is cut off or damaged"):
        read_audio(path, RATE)


def test_a_broken_link_a_pipe_and_a_device_are_refused(tmp_path):
    (tmp_path / "link.wav").symlink_to(tmp_path / "nowhere.wav")
    with pytest.raises(InputError, match=r"link\.wav does not exist"):
        read_audio(tmp_path / "link.wav", RATE)
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", "/dev/zero"):
        with pytest.raises(InputError, match="it is no regular file"):
            read_audio(path, RATE)


def test_an_error_of_the_disk_is_told(tmp_path, files, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(files["wav"])
    before = Source.read

    def fail(self, at, count):
        if 20000 < at < 40000:  # not where the container is walked
            raise OSError(5, "Input/output error")
        return before(self, at, count)

    monkeypatch.setattr(Source, "read", fail)
    with pytest.raises(InputError, match=r"a\.wav cannot be read \(Input/output error\)"):
        read_audio(path, RATE)


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING, logger="ttt_jax")
