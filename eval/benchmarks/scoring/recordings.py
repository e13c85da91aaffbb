"""Recordings of benchmarks to codes, each encoded once: what they hold is the key of a cache on disk. Imports no jax,
but for a codec that does."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.benchmarks.layouts.find import LONGEST
from ttt_jax.codec import Codec
from ttt_jax.data.audio.reader import read_blocks
from ttt_jax.errors import InputError
from ttt_jax.utils.files import file_digest, write_atomically

ROWS = 16
"""Recordings that are encoded side by side."""
PIECE = 32
"""Lengths are filled up to a multiple of these frames: few shapes, so few programs of jax."""


class Encoded(NamedTuple):
    """Recordings that could be read, and those that could not."""

    codes: dict[Path, np.ndarray]
    """int32 [num_codebooks, T], T >= 1, by path; equal recordings share one array."""
    unreadable: dict[Path, str]
    """Why, by path."""


def encode(
    paths: Iterable[Path], codec: Codec, cache_dir: Path, on_done: Callable[[int], None] = lambda count: None
) -> Encoded:
    """Encodes mono recordings, each from a fresh state and once for all paths and runs that hold the same bytes.

    Args:
      cache_dir: folder for the codes, by codec and SHA-256 of the file; on_done: called with the number of files done.
    """
    folder = cache_dir / "recordings" / codec.digest[:16]
    codes: dict[Path, np.ndarray] = {}
    unreadable: dict[Path, str] = {}
    same: dict[str, list[Path]] = {}
    for path in dict.fromkeys(paths):
        try:
            same.setdefault(file_digest(path), []).append(path)
        except InputError as error:
            unreadable[path] = str(error)
            on_done(1)
    waiting: list[tuple[str, np.ndarray]] = []

    def flush() -> None:
        for (digest, _), found in zip(waiting, _encode([audio for _, audio in waiting], codec), strict=True):
            _store(_place(folder, digest), found)
            done(digest, found)
        waiting.clear()

    def done(digest: str, found: np.ndarray) -> None:
        codes.update(dict.fromkeys(same[digest], found))
        on_done(len(same[digest]))

    for digest, members in same.items():
        if (stored := _stored(_place(folder, digest), codec)) is not None:
            done(digest, stored)
            continue
        try:
            waiting.append((digest, _read(members[0], codec)))
        except InputError as error:
            unreadable.update(dict.fromkeys(members, str(error)))
            on_done(len(members))
        if len(waiting) == ROWS:
            flush()
    if waiting:
        flush()
    return Encoded(codes, unreadable)


def _read(path: Path, codec: Codec) -> np.ndarray:
    """Returns the samples of a mono recording at the codec's rate, float32 [samples]. Raises `InputError`."""
    blocks, samples = [], 0
    for block in read_blocks(path, codec.sample_rate):
        if len(block) != 1:
            raise InputError(f"{path} has {len(block)} channels, but a benchmark's recordings have one: mix it down.")
        blocks.append(block[0])
        samples += block.shape[1]
        if samples > LONGEST * codec.sample_rate:
            raise InputError(f"{path} lasts more than {LONGEST} s, which no benchmark's recording does: leave it out.")
    if not samples:
        raise InputError(f"{path} holds no samples: bring the recording back.")
    return np.concatenate(blocks)


def _encode(recordings: Sequence[np.ndarray], codec: Codec) -> list[np.ndarray]:
    """`codec.encode` of each recording, in calls of few shapes."""
    size = codec.frame_size
    lengths = [-(-len(audio) // size) for audio in recordings]
    frames = -(-max(lengths) // PIECE) * PIECE
    padded = np.zeros((ROWS, frames * size), np.float32)
    for row, audio in zip(padded, recordings, strict=False):
        row[: len(audio)] = audio
    there = np.arange(frames) < np.array(lengths + [0] * (ROWS - len(lengths)))[:, None]
    codes, _ = codec.encode_step(padded, codec.init_encoder(ROWS), there)
    return [np.asarray(row[:, :length], np.int32) for row, length in zip(codes, lengths, strict=False)]


def _place(folder: Path, digest: str) -> Path:
    return folder / digest[:2] / f"{digest}.npy"


def _stored(path: Path, codec: Codec) -> np.ndarray | None:
    """Returns codes from the cache; None if they are not there or damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        codes = np.load(path, allow_pickle=False)
        whole = codes.ndim == 2 and len(codes) == codec.num_codebooks and codes.shape[1] and codes.dtype == np.int32
        if whole and codes.min() >= 0 and codes.max() < codec.cardinality:
            return codes
    return None


def _store(path: Path, codes: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, codes)
    write_atomically(path, content.getvalue())
