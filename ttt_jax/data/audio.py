"""Sound files to float32 samples at one rate: wav, flac, ogg (Opus, Vorbis) and mp3 through libsndfile and soxr.

libsndfile reads a cut-off wav or ogg as if it simply were shorter. `read_blocks` therefore compares what the container
promises (the data chunk of a wav, the end mark of an ogg, the frame counts of flac and mp3) with what is there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ttt_jax.errors import InputError

_BLOCK = 1 << 18  # samples per channel decoded at a time; bounds the memory of `read_blocks`
_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
_UNKNOWN = 0xFFFFFFFF  # data size in the header of a wav that was written to a pipe
_OGG_PAGE = 65307  # longest possible Ogg page in bytes
_OGG_END = 4  # header flag of the last page of a stream
_MP3_FRAME = 1152  # samples; encoders disagree on whether the last, padded frame counts


def read_audio(path: str | Path, sample_rate: int) -> np.ndarray:
    """Return a sound file as float32 [channels, samples] in [-1, 1], resampled with soxr's HQ filter where needed.

    Args:
        path: a wav, flac, ogg or mp3 file with one or two channels, at any rate.
        sample_rate: rate of the result in Hz; n samples at rate r become round(n * sample_rate / r).

    Raises:
        InputError: the file is missing, is not audio, is cut off or damaged, has no channel or more than two, holds no
            samples, or holds NaN or infinity.
    """
    return np.concatenate(list(read_blocks(path, sample_rate)), axis=1)


def read_blocks(path: str | Path, sample_rate: int) -> Iterator[np.ndarray]:
    """Yield the samples of `read_audio` block by block, float32 [channels, n] with n >= 0, in memory of constant size.

    Raises:
        InputError: as `read_audio`; for what only the end of a file shows, such as a cut, after the last block. So no
            block may count before all have been read.
    """
    path = Path(path)
    _check_container(path)
    import soundfile
    import soxr

    try:
        sound = soundfile.SoundFile(os.fsencode(path))  # it encodes no name that is not UTF-8
    except soundfile.LibsndfileError:
        raise InputError(f"{path} is not audio that can be read: give a wav, flac, ogg or mp3 file.") from None
    with sound:
        if sound.format not in _FORMATS:
            raise InputError(f"{path} is a {sound.format} file: give a wav, flac, ogg or mp3 file.")
        if sound.channels > 2:
            raise InputError(
                f"{path} has {sound.channels} channels: give one (the model's voice) or two (left the model's voice,"
                " right the other)."
            )
        resampler = soxr.ResampleStream(sound.samplerate, sample_rate, sound.channels, "float32", "HQ")
        read, last = 0, False
        while not last:
            try:
                block = sound.read(_BLOCK, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise _cut_off(path, error.error_string.strip().rstrip(".")) from None
            if not np.isfinite(block).all():
                raise InputError(
                    f"{path} holds NaN or infinity near second {read / sound.samplerate:.1f}: write the file again."
                )
            read += len(block)
            last = len(block) < _BLOCK
            if sound.samplerate != sample_rate:
                block = resampler.resample_chunk(block, last=last)
            yield np.ascontiguousarray(block.T)
        slack = _MP3_FRAME if sound.format == "MP3" else 0
        if read < sound.frames - slack and sound.frames < 1 << 48:  # a streamed flac states no length
            raise _cut_off(path, f"its header promises {sound.frames} samples, {read} can be read")
    if read == 0:
        raise InputError(f"{path} holds no samples (length zero): give a recording or drop it from the manifest.")


def _check_container(path: Path) -> None:
    """Raise `InputError` for what libsndfile does not report: cut-off wav and ogg files, wav headers without channels."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            magic = file.read(12)
            if size == 0:
                raise InputError(f"{path} is an empty file (0 bytes): give a wav, flac, ogg or mp3 file.")
            if magic[:4] in (b"RIFF", b"RIFX", b"RF64") and magic[8:] == b"WAVE":
                _check_wav(path, file, size, ">" if magic[:4] == b"RIFX" else "<")
            elif magic[:4] == b"OggS":
                file.seek(max(0, size - 2 * _OGG_PAGE))
                _check_ogg(path, file.read())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the path of a wav, flac, ogg or mp3 file.") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give the path of a wav, flac, ogg or mp3 file."
        ) from None


def _check_wav(path: Path, file, size: int, order: str) -> None:
    large = None  # the true data size of an RF64 file
    while len(header := file.read(8)) == 8:
        chunk, length = header[:4], struct.unpack(order + "I", header[4:])[0]
        start = file.tell()
        if chunk == b"ds64":
            large = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))[1]
        elif chunk == b"fmt ":
            channels = struct.unpack(order + "HH", file.read(4).ljust(4, b"\0"))[1]
            if channels == 0:
                raise InputError(f"{path} has no channel (its header says 0): give one or two channels.")
        elif chunk == b"data":
            promised = large if large is not None and length == _UNKNOWN else length
            if promised != _UNKNOWN and promised > size - start:
                raise _cut_off(path, f"its header promises {promised} bytes of sound, {size - start} are there")
            return
        file.seek(start + length + length % 2)
    raise _cut_off(path, "it has no sound data after its header")


def _check_ogg(path: Path, tail: bytes) -> None:
    page = tail.rfind(b"OggS")
    head = tail[page : page + 27]
    if page < 0 or len(head) < 27:
        raise _cut_off(path, "its last Ogg page is incomplete")
    lengths = tail[page + 27 : page + 27 + head[26]]
    complete = len(lengths) == head[26] and page + 27 + head[26] + sum(lengths) <= len(tail)
    if not (complete and head[5] & _OGG_END):
        raise _cut_off(path, "its last Ogg page is incomplete or lacks the end mark")


def _cut_off(path: Path, detail: str) -> InputError:
    return InputError(f"{path} is cut off or damaged ({detail}): copy or encode the file again.")
