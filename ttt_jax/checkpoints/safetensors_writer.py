"""Safetensors files written block by block: read, hashed and written at the same time, never whole in memory."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ttt_jax.checkpoints.safetensors_reader import QUEUE, Piece, Ring


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
    """What stands in front of the tensors `specs` in a file."""
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
    """Write safetensors files into `folder`: by name their size and digest, {"bytes": ..., "sha256": ...}.

    Blocks are read, hashed and written by a thread each. `progress` is called with the bytes of each block that went to
    disk, headers included.
    """
    written = {}
    ring = Ring()
    for name, specs in files.items():
        with _Sink(folder / name, progress) as sink:
            sink.put(memoryview(header(specs, metadata)))
            for spec in specs:
                for piece in spec.pieces:
                    for block in piece.blocks(ring, 1):
                        sink.put(block)
        written[name] = {"bytes": sink.size, "sha256": sink.digest}
    return written


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Sink:
    """A new file: of the blocks handed over one thread takes the hash, another writes them."""

    def __init__(self, path: Path, progress: Callable[[int], object]):
        self.size, self.digest = 0, ""
        self._sha = hashlib.sha256()
        self._progress = progress
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._lanes = [_Lane(self._sha.update), _Lane(self._write)]

    def __enter__(self) -> _Sink:
        return self

    def put(self, block: memoryview) -> None:
        """Hand over a block, which must stay as it is for the next `QUEUE` + 1 blocks."""
        for lane in self._lanes:
            lane.put(block)

    def __exit__(self, kind: object, *_: object) -> None:
        errors = [lane.close(give_up=kind is not None) for lane in self._lanes]
        os.close(self._fd)
        if kind is None:
            for error in filter(None, errors):
                raise error
        self.digest = self._sha.hexdigest()

    def _write(self, block: memoryview) -> None:
        write_block(self._fd, block)
        self.size += len(block)
        self._progress(len(block))


class _Lane:
    """A thread that does `work` on the blocks that it is given; what goes wrong there is raised here."""

    def __init__(self, work: Callable[[memoryview], object]):
        self._work = work
        self._blocks: queue.Queue[memoryview | None] = queue.Queue(QUEUE)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, block: memoryview) -> None:
        """Wait for a place in the queue. Raises what `work` raised."""
        self._blocks.put(block)
        if self._error is not None:
            raise self._error

    def close(self, give_up: bool) -> BaseException | None:
        """Wait until all is done, or with `give_up` leave out what is still queued. What `work` raised, if it did."""
        if give_up:
            self._error = self._error or InterruptedError()
        self._blocks.put(None)
        self._thread.join()
        return self._error

    def _run(self) -> None:
        while (block := self._blocks.get()) is not None:
            if self._error is None:  # else only empty the queue, on which `put` may wait
                try:
                    self._work(block)
                except BaseException as error:
                    self._error = error


def write_block(fd: int, block: memoryview) -> None:
    """Write all of `block`; the system may take it in parts."""
    done = 0
    while done < len(block):
        done += os.write(fd, block[done:])
