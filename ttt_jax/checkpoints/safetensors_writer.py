"""Writes safetensors files block by block, so that they never lie whole in memory.

One thread reads, hashes and writes each block in turn. Threads for the three were measured
(docs/performance/streaming.md) and are not worth their queues.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ttt_jax.checkpoints.safetensors_reader import Piece


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Its bytes, one piece after another."""

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return sum(piece.nbytes for piece in self.pieces)


def header(specs: Iterable[Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the header of a file that holds the tensors `specs`."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_files(
    folder: Path,
    files: Mapping[str, list[Spec]],
    progress: Callable[[int], object] = lambda count: None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, dict[str, object]]:
    """Writes safetensors files into `folder`. Returns size and digest by name, {"bytes": ..., "sha256": ...}.

    Calls `progress` with the size of each block that was written, headers included.
    """
    return {name: _write(folder / name, blocks(specs, metadata), progress) for name, specs in files.items()}


def blocks(specs: list[Spec], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    """Yields the bytes of a file that holds the tensors `specs`. A block is valid until the next one."""
    yield memoryview(header(specs, metadata))
    for spec in specs:
        for piece in spec.pieces:
            yield from piece.blocks(1)


def _write(path: Path, blocks: Iterable[memoryview], progress: Callable[[int], object]) -> dict[str, object]:
    sha, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for block in blocks:
            sha.update(block)
            write_block(fd, block)
            size += len(block)
            progress(len(block))
    finally:
        os.close(fd)
    return {"bytes": size, "sha256": sha.hexdigest()}


def write_block(fd: int, block: memoryview) -> None:
    """Writes all of `block`; the system may take it in parts."""
    done = 0
    while done < len(block):
        done += os.write(fd, block[done:])
