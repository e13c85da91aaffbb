"""Ogg-Opus in and out: all rates, any pieces, and what a hostile client may send."""

from __future__ import annotations

import struct

import numpy as np
import psutil
import pytest
import sphn

from ttt_jax.errors import InputError
from ttt_jax.serve import opus
from ttt_jax.serve.opus import RATES, WITHOUT_AUDIO, OpusReader, OpusWriter, check_rate

RATE = 16000
TAGS = b"OpusTags" + struct.pack("<I", 1) + b"x" + struct.pack("<I", 0)
SILENCE = b"\x18"  # a packet of 60 ms


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encoded(rate: int, **options) -> bytes:
    writer, audio = OpusWriter(rate), tone(rate, **options)
    return b"".join(writer.append(piece) for piece in audio.reshape(-1, rate // 25))


def decoded(data: bytes, rate: int = RATE, step: int | None = None) -> np.ndarray:
    reader = OpusReader(rate)
    pieces = [data] if step is None else [data[i : i + step] for i in range(0, len(data), step)]
    return np.concatenate([audio for piece in pieces for audio in reader.append(piece)] or [np.zeros(0)])


def head(channels: int = 1) -> bytes:
    return b"OpusHead" + bytes([1, channels]) + struct.pack("<HIhB", 0, 48000, 0, 0)


def page(
    packets: list[bytes] | None, number: int, serial: int = 1, flags: int = 0, lacing: bytes | None = None
) -> bytes:
    """An Ogg page of whole packets, or with its table of segments. Its checksum is 0: `sphn` does not look."""
    body = b"".join(packets)
    if lacing is None:
        lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    header = b"OggS\x00" + bytes([flags]) + struct.pack("<qIII", 0, serial, number, 0)
    return header + bytes([len(lacing)]) + lacing + body


def stream(*packets: bytes, serial: int = 1, channels: int = 1) -> bytes:
    pages = [page([head(channels)], 0, serial, flags=2), page([TAGS], 1, serial)]
    return b"".join(pages + [page([packet], 2 + i, serial) for i, packet in enumerate(packets)])


def frequency(audio: np.ndarray, rate: int) -> float:
    """The loudest, in Hz."""
    return np.abs(np.fft.rfft(audio * np.hanning(len(audio)))).argmax() * rate / len(audio)


@pytest.mark.parametrize("source", [8000, 16000, 24000, 48000])
def test_opus_of_any_rate_is_decoded_at_ours(source):
    audio = decoded(encoded(source))
    assert len(audio) > 0.9 * RATE
    assert audio.dtype == np.float32
    assert frequency(audio, RATE) == pytest.approx(440, abs=3)
    assert np.abs(audio[RATE // 2 :]).max() == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize("step", [1, 7, 100, 5000])
def test_pieces_of_any_length_give_the_same_audio(step):
    data = encoded(24000)
    np.testing.assert_array_equal(decoded(data, step=step), decoded(data))


def test_opus_that_we_write_is_what_kyutais_clients_read():
    audio = sphn.OpusStreamReader(24000).append_bytes(encoded(RATE))
    assert frequency(audio, 24000) == pytest.approx(440, abs=3)


def test_rates_that_opus_has():
    for rate in RATES:
        check_rate(rate)
        OpusWriter(rate)
    with pytest.raises(InputError, match="22050"):
        check_rate(22050)


def test_stereo_is_mixed_down():
    stereo = b"\x1c" + bytes(20)  # 60 ms of two channels, by the first byte
    assert len(decoded(stream(SILENCE, channels=2))) == 960
    assert len(decoded(stream(stereo, channels=2))) == 960


def test_a_second_stream_takes_over_and_others_are_passed_over():
    assert len(decoded(stream(SILENCE) + stream(SILENCE, SILENCE, serial=2))) == 3 * 960
    begun = stream(SILENCE)
    assert len(decoded(begun + page([SILENCE], 9, serial=5) + page([SILENCE], 3))) == 2 * 960


def test_a_message_of_many_seconds_is_decoded():
    assert len(decoded(encoded(RATE, seconds=20.0))) > 19 * RATE  # sphn alone gives up above five


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"Ogg!",
        encoded(RATE)[:-50] + b"x" * 100,
        stream(b"\xff" * 400),
        stream(*[b""]),
        stream() + page([b""] * 255, 2),
        stream(bytes(60000)),
        stream() + page([SILENCE * 2] * 255, 2),
        b"OggS" + bytes(23),
    ],
    ids=["garbage", "pattern", "cut", "packet", "empty", "empties", "large", "corrupt", "no segments"],
)
def test_what_cannot_be_decoded_is_refused_or_silent(data):
    reader = OpusReader(RATE)

    def again_and_again():
        for _ in range(10000):
            assert sum(map(len, reader.append(data))) < 10 * RATE

    with pytest.raises(InputError, match="give"):
        again_and_again()


def test_a_panic_of_the_decoder_is_refused(monkeypatch):
    class Panic(BaseException):
        """As pyo3's, no `Exception`."""

    class Reader:
        def __init__(self, rate):
            pass

        def append_bytes(self, data):
            raise Panic("index out of bounds")

    monkeypatch.setattr(sphn, "OpusStreamReader", Reader)
    with pytest.raises(InputError, match="index out of bounds"):
        list(OpusReader(RATE).append(stream(SILENCE)))


@pytest.mark.parametrize(
    "junk",
    [
        page([bytes(65025)], 2, lacing=b"\xff" * 255),  # a packet that never ends
        page([bytes(65025)], 2, serial=9, lacing=b"\xff" * 255),
        page([], 2),
        stream(),
    ],
    ids=["endless packet", "another stream", "empty pages", "headers"],
)
def test_bytes_without_audio_are_limited(junk):
    reader = OpusReader(RATE)
    assert len(list(reader.append(stream(SILENCE)))) == 1
    for _ in range(WITHOUT_AUDIO // len(junk)):
        assert list(reader.append(junk)) == []
    with pytest.raises(InputError, match="no audio"):
        list(reader.append(2 * junk))


def test_streams_that_begin_again_and_again_take_no_memory():
    """Each leaves a packet unfinished, which sphn would keep."""
    process, reader = psutil.Process(), OpusReader(RATE)

    def begin(serial):
        begun = stream(SILENCE, serial=serial) + page([bytes(30600)], 3, serial, lacing=b"\xff" * 120)
        assert sum(map(len, reader.append(begun))) == 960

    for serial in range(100):
        begin(serial)
    before = process.memory_info().rss
    for serial in range(2000):
        begin(serial)
    assert process.memory_info().rss - before < 20e6  # of 61 MB


@pytest.mark.parametrize("seed", range(4))
def test_damage_raises_input_errors_only(seed):
    rng, whole = np.random.default_rng(seed), encoded(RATE, seconds=0.4)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        cut = rng.integers(len(data))
        reader = OpusReader(RATE)
        try:
            audio = [*reader.append(bytes(data[:cut])), *reader.append(bytes(data[cut:]))]
        except InputError:
            refused += 1
        else:
            assert all(np.isfinite(piece).all() for piece in audio)
            assert sum(map(len, audio)) < 2 * RATE
    assert 0 < refused < 150


def test_much_audio_in_few_bytes_comes_piece_by_piece():
    bomb = page([SILENCE] * 83, 3) * 300
    assert len(bomb) < 60000
    reader = OpusReader(RATE)
    pieces = [len(audio) for audio in reader.append(stream() + bomb)]
    assert sum(pieces) > 1400 * RATE
    assert max(pieces) <= 5 * RATE


def test_keyboard_interrupts_pass(monkeypatch):
    class Reader:
        def __init__(self, rate):
            pass

        def append_bytes(self, data):
            raise KeyboardInterrupt

    monkeypatch.setattr(sphn, "OpusStreamReader", Reader)
    with pytest.raises(KeyboardInterrupt):
        list(OpusReader(RATE).append(stream(SILENCE)))


def test_the_limit_is_above_what_a_page_can_be():
    assert opus.WITHOUT_AUDIO > 27 + 255 + 255 * 255
