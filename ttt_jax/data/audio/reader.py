"""Sound files to float32 samples at one rate: wav, flac, ogg (Opus, Vorbis) and mp3 through libsndfile and soxr.

The content of a file decides, not its name nor the lengths in its headers: `ttt_jax.data.audio.containers` finds the
parts of a file and their true lengths, and libsndfile decodes each part. `ttt_jax.data.audio.levels` checks the
samples.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ttt_jax.data.audio.containers import Part, Source, Window, find_parts
from ttt_jax.data.audio.formats import advice
from ttt_jax.data.audio.levels import Levels
from ttt_jax.errors import InputError

_BLOCK = 1 << 18  # samples per channel decoded at a time; bounds the memory of `read_blocks`
_RATES = 1000, 1_000_000  # Hz; others are a damaged header


def read_audio(path: str | Path, sample_rate: int) -> np.ndarray:
    """Returns a sound file as float32 [channels, samples], full scale 1, at `sample_rate` in Hz (soxr's HQ filter).

    n samples at rate r become round(n * sample_rate / r). Corrected lengths and doubtful levels are logged. Raises
    `InputError` if the file cannot be used. docs/data/audio.md lists what is read, mended and refused.
    """
    return np.concatenate(list(read_blocks(path, sample_rate)), axis=1)


def read_blocks(path: str | Path, sample_rate: int) -> Iterator[np.ndarray]:
    """Yields the samples of `read_audio` block by block, float32 [channels, n] with n >= 0, in constant memory.

    Raises `InputError` as `read_audio`. A cut may show after the last block only: use no block before all are read.
    """
    path = Path(path)
    with _open(path) as file:
        source = Source(path, file, file.seek(0, 2))
        try:
            yield from _read(source, find_parts(source), sample_rate)
        except OSError as error:
            raise _unreadable(path, error) from None


def _open(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the path of a wav, flac, ogg or mp3 file.") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read ({error.strerror}): give the path of a wav, flac, ogg or mp3 file.")


def _read(source: Source, parts: Iterable[Part], sample_rate: int) -> Iterator[np.ndarray]:
    """Decodes parts one after the other as one recording at one rate."""
    import soxr

    levels = Levels(source.path)
    channels = rate = resampler = None
    for part in parts:
        for block, part_rate, subtype in _decode(source, part):
            if channels not in (None, block.shape[1]):
                raise InputError(
                    f"{source.path} is joined of files with {channels} and {block.shape[1]} channels: give them one by"
                    " one."
                )
            channels = block.shape[1]
            levels.add(block, part_rate, subtype in ("FLOAT", "DOUBLE"))
            if part_rate != rate:
                if resampler is not None:
                    yield np.ascontiguousarray(resampler.resample_chunk(block[:0], last=True).T)
                rate, resampler = part_rate, None
                if rate != sample_rate:
                    resampler = soxr.ResampleStream(rate, sample_rate, channels, "float32", "HQ")
            yield np.ascontiguousarray((block if resampler is None else resampler.resample_chunk(block)).T)
    if levels.samples == 0:
        raise InputError(
            f"{source.path} holds no samples (length zero): give a recording or drop it from the manifest."
        )
    if resampler is not None:
        yield np.ascontiguousarray(resampler.resample_chunk(block[:0], last=True).T)
    levels.report()


def _decode(source: Source, part: Part) -> Iterator[tuple[np.ndarray, int, str]]:
    """Yields a part's samples, float32 [n, channels], their rate and libsndfile's name of their encoding."""
    import soundfile

    window = Window(source, part)
    read, is_open = 0, False
    try:
        with soundfile.SoundFile(window) as sound:
            is_open = True
            if sound.channels > 2:
                raise InputError(
                    f"{source.path} has {sound.channels} channels: give one, or two (left Moshi's stream, right the"
                    " user's)."
                )
            if not _RATES[0] <= sound.samplerate <= _RATES[1]:
                raise InputError(
                    f"{source.path} has a rate of {sound.samplerate} Hz: give one from {_RATES[0]} to {_RATES[1]} Hz."
                )
            while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
                read += len(block)
                yield block, sound.samplerate, sound.subtype
            promised = sound.frames if part.samples is None else part.samples
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
        if is_open:
            raise source.cut_off(reason) from None
        raise InputError(
            f"{source.path} is damaged or of a codec that is not read ({reason}): copy the file again, or"
            f" {advice(source.path)}."
        ) from None
    finally:
        if window.error is not None:
            raise _unreadable(source.path, window.error)
    if read != promised:
        raise source.cut_off(f"it should hold {promised} samples, {read} can be read")
