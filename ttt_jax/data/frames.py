"""A manifest's entry to frames, int32 [17, T]; frames of audio are cached on disk.

Rows, for a codec of 8 codebooks: 0 the text, 1 to 8 Moshi's stream (the left or only channel), 9 to 16 the user's (the
right channel; of a mono file the codes of silence). -1 is a token that is not known. An entry names audio or a code
file (`ttt_jax.data.codes`). Without a text row the text comes from the alignments.

A `Recording` is an entry that was checked; its frames are read when they are needed, so hours of speech cost no memory.
Opening a code file reads its header only; opening audio encodes it into the cache, one safetensors file for an entry,
named by the digest of all that the frames depend on. A cached file whose checksum does not match is made again.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ttt_jax.codec import Codec, CodecInfo
from ttt_jax.data.codes import Header, read_codes, read_header
from ttt_jax.data.encode import Encoder, codec_missing, join_rows, warn
from ttt_jax.data.manifest import Entry, check_duration, read_manifest
from ttt_jax.data.text import ABSENT, Tokenizer, TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.utils.files import file_digest, write_atomically
from ttt_jax.utils.paths import printable

_VERSION = "ttt_jax.frames/3"  # to change whenever the same input would give other frames


@dataclass(frozen=True)
class Recording:
    """One recording of a manifest.

    `read` reads the frames, int32 [shape], anew at each call. It raises `InputError` if the file is damaged, has tokens
    out of range, or has changed since it was opened.
    """

    name: str  # folder and name without suffix, printable
    speaker: str | None
    shape: tuple[int, int]  # [1 + 2 * num_codebooks, T], T >= 1
    digest: str | None  # of a code file and its alignments, hex; None for audio, since decoders' versions differ
    read: Callable[[], np.ndarray]

    @property
    def num_frames(self) -> int:
        """T."""
        return self.shape[1]


def open_manifest(
    path: str | Path,
    codec: Codec | CodecInfo,
    tokenizer: Tokenizer | TokenizerInfo,
    cache_dir: str | Path,
    progress: bool = True,
) -> tuple[Recording, ...]:
    """Returns the recordings of a manifest that exist, in its order, opened by a `FrameReader`. Raises `InputError`."""
    from tqdm import tqdm

    entries, reader = read_manifest(path).entries, FrameReader(codec, tokenizer, cache_dir)
    bar = tqdm(entries, desc=f"encoding {Path(path).name}", unit="file", leave=False, disable=not progress)
    recordings = [reader.open(entry) for entry in bar]
    count = Counter(recording.name for recording in recordings)
    return tuple(
        recording if count[recording.name] == 1 else replace(recording, name=printable(str(entry.path)))
        for recording, entry in zip(recordings, entries, strict=True)
    )


class FrameReader:
    """Opens audio and code files; the codec's digest must be that of code files, `cache_dir` is for audio."""

    def __init__(self, codec: Codec | CodecInfo, tokenizer: Tokenizer | TokenizerInfo, cache_dir: str | Path) -> None:
        self.codec, self.tokenizer, self._cache_dir = codec, tokenizer, Path(cache_dir)
        self._encoder = Encoder(codec, tokenizer)

    def open(self, entry: Entry) -> Recording:
        """Returns a checked recording; only the tokens of a code file are checked later, when they are read.

        Raises `InputError` if a file is unusable or does not fit the data, or the cache cannot be written.
        """
        name = printable(f"{entry.path.parent.name}/{entry.path.stem}")
        speaker = None if entry.speaker is None else printable(entry.speaker)
        if entry.path.suffix != ".safetensors":
            cached = self._cache_path(entry)
            shape = self._read_audio(entry, cached).shape
            return Recording(name, speaker, shape, None, functools.partial(self._reread_audio, entry, shape, cached))
        header = read_header(entry.path)
        self._check_header(entry, header)
        digest = header.checksum or file_digest(entry.path)
        if header.rows != 1 + 2 * self.codec.num_codebooks and entry.alignment is not None:
            text = self._encoder.text(entry, header.seconds, header.num_frames)
            warn(entry.alignment, text.notice)
            if text.row is not None:
                digest = hashlib.sha256(f"{digest} {file_digest(entry.alignment)}".encode()).hexdigest()
        shape = (1 + 2 * self.codec.num_codebooks, header.num_frames)
        return Recording(name, speaker, shape, digest, functools.partial(self._read_codes, entry, header))

    def _read_audio(self, entry: Entry, cached: Path) -> np.ndarray:
        """Returns the frames of audio from the cache file `cached`, which is made if it is missing or damaged."""
        if isinstance(self.codec, CodecInfo):
            raise codec_missing(entry.path)
        if (stored := _read_cached(cached, self.codec.num_codebooks)) is not None:
            frames, seconds = stored
            check_duration(entry, seconds)
            return frames
        encoded = self._encoder.encode(entry)
        frames, seconds = encoded.frames, repr(encoded.seconds)
        metadata = {"seconds": seconds, "sha256": _checksum(frames, seconds)}
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, safetensors.numpy.save({"frames": frames}, metadata=metadata))
        except OSError as error:
            raise InputError(
                f"cache_dir {cached.parent} cannot be written ({error.strerror}): give a folder that can."
            ) from error
        return frames

    def _reread_audio(self, entry: Entry, shape: tuple[int, int], cached: Path) -> np.ndarray:
        if (stored := _read_cached(cached, self.codec.num_codebooks)) is not None:
            return stored[0]
        # The cache is gone, so the file is encoded again: it must be the same file.
        if self._cache_path(entry) != cached or (frames := self._read_audio(entry, cached)).shape != shape:
            raise _changed(entry)
        return frames

    def _read_codes(self, entry: Entry, header: Header) -> np.ndarray:
        path, codec, codebooks = entry.path, self.codec, self.codec.num_codebooks
        if read_header(path) != header:
            raise _changed(entry)
        codes = read_codes(path).codes
        has_text = header.rows == 1 + 2 * codebooks
        for row, values in enumerate(codes):
            is_text = has_text and row == 0
            cardinality = self.tokenizer.cardinality if is_text else codec.cardinality
            if values.min() < ABSENT or (cardinality is not None and values.max() >= cardinality):
                expected = "-1 or more" if cardinality is None else f"-1 to {cardinality - 1}"
                raise InputError(
                    f"{path} has values from {values.min()} to {values.max()} in row {row} of its codes, expected"
                    f" {expected} ({'the tokenizer' if is_text else codec.name}): encode it again."
                )
        if has_text:
            return codes
        user = codes[codebooks:] if header.rows == 2 * codebooks else self._encoder.silence(header.num_frames)
        text = self._encoder.text(entry, header.seconds, header.num_frames)
        return join_rows(text.row, codes[:codebooks], user)

    def _check_header(self, entry: Entry, stored: Header) -> None:
        path, codec, codebooks = entry.path, self.codec, self.codec.num_codebooks
        if stored.codec != codec.digest:
            raise InputError(
                f"{path} states codec {stored.codec!r} in its metadata, but the codec of the data, {codec.name}, has"
                f" the digest {codec.digest}: use code files of this codec, or give data.codec the one that made them."
            )
        if None not in (stored.cardinality, codec.cardinality) and stored.cardinality != codec.cardinality:
            raise InputError(
                f"{path} states cardinality {stored.cardinality} in its metadata, but {codec.name} has"
                f" {codec.cardinality} entries a codebook: make the file again, or leave it out."
            )
        if stored.rows not in (codebooks, 2 * codebooks, 1 + 2 * codebooks):
            raise InputError(
                f"{path} holds codes of shape {[stored.rows, stored.num_frames]}, expected [K, T] with K = {codebooks}"
                f" (Moshi's stream), {2 * codebooks} (Moshi's and the user's) or {1 + 2 * codebooks} (text first):"
                " write them so."
            )
        if stored.rows == codebooks and isinstance(codec, CodecInfo):
            raise InputError(
                f"{path} holds {codebooks} rows of codes, Moshi's stream alone, and without its codec silence cannot be"
                f" encoded for the user's: write both streams, {2 * codebooks} rows."
            )
        check_duration(entry, stored.seconds)
        stated, expected = stored.tokenizer, self.tokenizer.digest
        if stored.rows == 1 + 2 * codebooks and None not in (stated, expected) and stated != expected:
            raise InputError(
                f"{path} states tokenizer {stated!r} in its metadata, but the tokenizer of the data has the digest"
                f" {expected}: use code files of this tokenizer, or give data.tokenizer the one that made them."
            )

    def _cache_path(self, entry: Entry) -> Path:
        alignment = file_digest(entry.alignment) if entry.alignment else "none"
        parts = (_VERSION, file_digest(entry.path), alignment, self.codec.digest, self.tokenizer.digest)
        return self._cache_dir / f"{hashlib.sha256(' '.join(map(str, parts)).encode()).hexdigest()}.safetensors"


def _changed(entry: Entry) -> InputError:
    return InputError(f"{entry.path} has changed since it was opened: bring the old file back, or start a new run.")


def _read_cached(path: Path, codebooks: int) -> tuple[np.ndarray, float] | None:
    """Returns frames and seconds of audio in a cached file; None if it is missing or damaged."""
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            frames = file.get_tensor("frames")
        seconds = metadata["seconds"]
        intact = metadata["sha256"] == _checksum(frames, seconds) and len(frames) == 1 + 2 * codebooks
        return (frames, float(seconds)) if intact else None
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None


def _checksum(frames: np.ndarray, seconds: str) -> str:
    about = f"{frames.dtype.str}{frames.shape}{seconds}"
    return hashlib.sha256(about.encode() + frames.tobytes()).hexdigest()
