"""MPEG audio: counting frames, cuts, damage, layers."""

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.sounds import COUNT, RANDOM, RATE, TAG, chunk, encoded, noise, refused, source
from ttt_jax.data.audio import formats
from ttt_jax.data.audio.containers import mpeg
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError


def without_info(content):
    """An mp3 without its Xing header."""
    assert content[:60].find(b"Xing") > 0 or content[:60].find(b"Info") > 0
    return content[mpeg._parse(content[:4]).length :]


def with_count(content, count):
    at = content.find(b"Xing") + 8
    return content[:at] + count.to_bytes(4, "big") + content[at + 4 :]


def count_of(content):
    return int.from_bytes(content[content.find(b"Xing") + 8 :][:4], "big")


def frame_at(content, share):
    """The position of a frame behind this share of an mp3."""
    places = range(int(share * len(content)), len(content))
    return next(at for at in places if mpeg._search(source(content), at) == at)


def with_vbri(bare, size, count):
    """An mp3 behind a header of Fraunhofer's encoder."""
    length = mpeg._parse(bare[:4]).length
    header = b"VBRI" + struct.pack(">HHHII", 1, 576, 75, size, count)
    return (bare[:4].ljust(36, b"\0") + header).ljust(length, b"\0") + bare


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100, 48000])
def test_an_mp3_is_as_long_with_and_without_its_header(read, rate, channels, mode):
    content = encoded(noise(2 * rate, channels), rate, format="MP3", bitrate_mode=mode)
    frame = 1152 if rate > 24000 else 576
    assert read(content, rate).shape == (channels, 2 * rate)
    bare = without_info(content)
    # Every frame is decoded; 529 samples are the decoder's delay.
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
    bare, count = without_info(files["mp3"]), count_of(files["mp3"])
    for stated in (count, 0, 5):
        assert read(with_vbri(bare, len(with_vbri(bare, 0, 0)), stated)).shape == read(bare).shape
    refused(read, with_vbri(bare, 2 * len(bare), 2 * count), f"counts {2 * count} frames")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_frame_that_is_cut_off_is_refused_without_a_header_too(read, keep):
    content = without_info(encoded(noise(), format="MP3", bitrate_mode="VARIABLE"))
    refused(read, content[: int(len(content) * keep) | 1], "cut off or damaged")
    for begun in (1, 2, 3, 4, 100):  # hardly begun, it is no stray bytes
        refused(read, content + content[:begun], "its last frame is incomplete")


def test_zeros_behind_an_mp3_that_nothing_counts_are_reported_where_few_and_refused_where_many(read, files, caplog):
    bare, counted = without_info(files["mp3"]), files["mp3"]
    for few in (1, 500, 1023):
        caplog.clear()
        for tail in (b"", TAG):
            assert read(bare + bytes(few) + tail).shape == read(bare).shape
            assert f"has {few} zeros behind its frames at byte {len(bare)}, and may be cut off" in caplog.text
    early, half = frame_at(bare, 0.05), frame_at(bare, 0.5)
    lost = bare[:early] + bytes(len(bare) - early)
    joined = bare[:half] + bytes(len(bare) - half) + counted
    for content in (bare + bytes(1024), bare + bytes(9000) + TAG, lost, lost + TAG, joined, counted + lost):
        refused(read, content, "zeros from byte .* are no MPEG frame, and no header counts its frames")
    layer_2 = 20 * tone_of_layer(2, 1)
    refused(read, layer_2 + bytes(len(layer_2)), "7680 zeros from byte 7680 on are no MPEG frame")
    caplog.clear()
    assert read(counted + bytes(9000)).shape == (1, COUNT)  # by its count nothing is missing
    assert not caplog.text


def test_bytes_within_an_mp3_that_are_no_frames_are_refused(read, files):
    for bare in (files["mp3"], without_info(files["mp3"])):
        middle = frame_at(bare, 0.5)
        refused(read, bare[:middle] + RANDOM[:700] + bare[middle:], "are no MPEG frame|counts .* frames")
        end = middle + mpeg._parse(bare[middle : middle + 4]).length
        refused(read, bare[:middle] + bytes(end - middle) + bare[end:], "are no MPEG frame|counts .* frames")


@pytest.mark.parametrize("form", [(16000, 1), (24000, 2), (44100, 1), (48000, 2)])
def test_frames_of_an_mp3_that_promise_what_no_frame_holds_are_reported(read, caplog, form):
    rate, channels = form
    content = bytearray(encoded(noise(rate, channels), rate, format="MP3"))
    assert read(bytes(content), rate).shape == form[::-1]
    assert not caplog.text
    at = 0
    for number in range(-9, 4):
        at += mpeg._parse(bytes(content[at : at + 4])).length
        if number < 1:
            continue
        end = at + mpeg._parse(bytes(content[at : at + 4])).info_at
        # The numbers of pairs in all granules are the largest that can be written.
        content[at + 6 : end] = b"\xff" * (end - at - 6)
        caplog.clear()
        try:
            read(bytes(content), rate)
        except InputError as error:  # the decoder may make any numbers of it
            assert "is damaged (it holds samples of" in str(error)  # noqa: PT017
        assert f"holds {number} damaged frames among" in caplog.text


def test_the_rest_of_a_frame_before_the_first_one_is_reported(read, files, caplog):
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


def test_endings_of_what_is_read_and_of_what_must_be_converted_are_known():
    assert all(formats.is_read(Path(f"a.{ending}")) for ending in ("wave", "rf64", "bwf", "fla", "mpga", "MP2", "mp1"))
    assert all(formats.is_other(Path(f"a.{ending}")) for ending in ("ac4", "dff", "QT"))
    assert not set(formats.READ) & set(formats.OTHER)
