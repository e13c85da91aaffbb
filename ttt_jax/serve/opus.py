"""Ogg-Opus by `sphn`, from and to samples at the codec's rate. What a client sends is not trusted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ttt_jax.errors import InputError

_HEADER = 27  # bytes of an Ogg page before its table of segments
_BEGINS = 2  # flag of a stream's first page
WITHOUT_AUDIO = 1 << 17
"""Bytes that may come without audio in them: headers, half a page."""
RATES = (8000, 12000, 16000, 24000, 48000)
"""Samples a second that Opus is encoded from and decoded to."""


def check_rate(sample_rate: int) -> None:
    """Raises `InputError` for a rate that Opus lacks."""
    if sample_rate not in RATES:
        raise InputError(f"Opus has no sample rate of {sample_rate} Hz, which the codec has here: ask for audio=pcm.")


class OpusReader:
    """The audio of a stream of Ogg pages that arrives in pieces of any length.

    Opus is decoded at the given rate, whatever its source had; of stereo the mean is taken. `sphn` keeps packets that
    are not complete, of any number of streams, and gives an empty packet five seconds: here a page belongs to the
    stream that began last or is passed over, and bytes without audio are limited.
    """

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._reader = self._serial = None
        self._bytes = bytearray()
        self._without_audio = 0

    def append(self, payload: bytes) -> Iterator[np.ndarray]:
        """Yields the audio of each page that `payload` completes, float32 [S]: a few bytes may be many seconds.

        Raises `InputError` for what is no Ogg-Opus; the reader is of no use then.
        """
        self._bytes += payload
        self._without_audio += len(payload)
        while (page := self._next_page()) is not None:
            if len(audio := self._decode(page)):
                self._without_audio = len(self._bytes)
                yield audio
        if self._without_audio > WITHOUT_AUDIO:
            raise InputError(f"{self._without_audio} bytes of Ogg-Opus have no audio: give packets of Opus.")

    def _next_page(self) -> bytes | None:
        """Takes a page off the front of the bytes that have come; None until it is complete."""
        held = self._bytes
        if not b"OggS".startswith(held[:4]):
            raise InputError(
                f"the audio begins a page with {bytes(held[:4])!r}: give Ogg-Opus, whose pages begin with OggS."
            )
        if len(held) < _HEADER or len(held) < _HEADER + held[26]:
            return None
        segments = held[_HEADER : _HEADER + held[26]]
        if 0 in segments[:1] or any(b == 0 and a < 255 for a, b in zip(segments, segments[1:], strict=False)):
            raise InputError("a page of the Ogg-Opus has an empty packet: give packets of Opus.")
        size = _HEADER + len(segments) + sum(segments)
        if len(held) < size:
            return None
        page = bytes(held[:size])
        del held[:size]
        return page

    def _decode(self, page: bytes) -> np.ndarray:
        serial = page[14:18]
        if page[5] & _BEGINS or self._reader is None:
            import sphn

            self._reader, self._serial = sphn.OpusStreamReader(self._sample_rate), serial
        if serial != self._serial:
            return np.zeros(0, np.float32)
        try:
            return self._reader.append_bytes(page)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of sphn's is no Exception
            raise InputError(f"the Opus cannot be decoded ({error}): give Ogg-Opus, mono, in whole packets.") from None


class OpusWriter:
    """Samples at the codec's rate as a stream of Ogg pages."""

    def __init__(self, sample_rate: int) -> None:
        """The rate is one of `RATES`."""
        import sphn

        self._writer = sphn.OpusStreamWriter(sample_rate)

    def append(self, audio: np.ndarray) -> bytes:
        """Returns the pages that `audio`, float32 [S], completes, maybe none."""
        return self._writer.append_pcm(np.ascontiguousarray(audio, np.float32))
