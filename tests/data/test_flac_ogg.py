"""FLAC and Ogg files: wrong lengths, cuts, damage."""

import pytest

from tests.helpers.sounds import COUNT, RANDOM, encoded, flac_with_total, noise, refused, source, wav
from ttt_jax.data.audio import reader
from ttt_jax.data.audio.containers import flac
from ttt_jax.data.audio.containers.ogg import checksum


@pytest.mark.parametrize("total", [0, 1, 12000, COUNT - 1, (1 << 36) - 1])
def test_a_flac_is_read_to_its_last_frame_whatever_its_header_states(read, files, caplog, total):
    assert read(flac_with_total(files["flac"], total)).shape == (1, COUNT)
    assert (f"states {total} samples in its header, which is wrong" in caplog.text) == (total != 0)
    for more in (COUNT + 1, 10 * COUNT):
        refused(read, flac_with_total(files["flac"], more), f"promises {more} samples, its frames hold {COUNT}")


def test_a_cut_off_flac_of_unknown_length_is_refused(read, files):
    content = flac_with_total(files["flac"], 0)
    for keep in (0.3, 0.7, 0.99, 0.9999):
        refused(read, content[: int(len(content) * keep)], "cut off or damaged")
    content = flac_with_total(encoded(noise() * 0.001, format="FLAC"), 0)
    for missing in (1, 100, 500):  # a short frame is no stray bytes
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


def test_what_the_decoder_does_not_open_is_reported_with_both_remedies(read, files):
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
    page[22:26] = checksum(bytes(page)).to_bytes(4, "little")
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
    end = next(pages(content))[1]
    content = with_position(content[:end], int.from_bytes(content[6:14], "little")) + content[end:]
    refused(read, content, "an Ogg file that holds Speex, where one stream of Vorbis or Opus is read")
