"""Batches whose rows follow files: a row reads one file chunk by chunk to its end, then takes the next.

The rows take files from one endless list: each source shuffled anew in every pass, the sources mixed by their weights (both
by Grain, at random access). Everything random is a function of the seed and of a file's place in that list, so the
position is a few integers and a resumed run continues exactly. Every process keeps count of all rows, which takes the
files' lengths only, and reads tokens for its own: the position is the same in all, and another number of processes can
go on from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.data.corpus import Source
from ttt_jax.data.frames import Recording
from ttt_jax.errors import InputError

_AHEAD = 2  # windows that are read before they are asked for


class Batch(NamedTuple):
    """K chunks of every row of this process, one after the other in time."""

    frames: np.ndarray
    """int32 [K, B, S, T]: tokens of S streams; -1 past the end of a row's file."""
    mask: np.ndarray
    """bool [K, B, T]: False past the end of a row's file."""
    reset: np.ndarray
    """bool [K, B]: True where a row starts a file with this chunk."""


class Window(NamedTuple):
    """A batch, and what it was cut from."""

    batch: Batch
    files: tuple[tuple[str, ...], ...]
    """Names of the files, [K][B]; "" where a row has none."""


class Batches:
    """Endless iterator of `Window`; they are read ahead of time by a thread, which `close` ends.

    A row that takes a file starts at a random offset of less than one chunk, so that chunk boundaries, where gradients
    are cut, fall elsewhere in every pass; the frames before it are left out of that pass. With `from_start` it is 0. A
    chunk never holds frames of two files. A file is read once by each row that follows it.

    Args:
        sources: of recordings, at least one in each.
        batch: rows over all processes.
        chunk: frames T of a chunk.
        seed: of the order of files and the offsets.
        chunks: K, chunks of a window.
        rows: those of this process; None: all.
        from_start: whether every file is read from its first frame on.

    Raises:
        InputError: a source is empty; from `next`: a file cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch: int,
        chunk: int,
        seed: int,
        chunks: int = 1,
        rows: range | None = None,
        from_start: bool = False,
    ):
        empty = [source.name for source in sources if not source.recordings]
        if empty or not sources:
            raise InputError(f"the training data {', '.join(empty)} names no files: give one line per file.")
        from grain.experimental import ThreadPrefetchDatasetIterator

        found = _endless(sources, 1 if from_start else chunk, seed)
        # Grain's iterator complains when it goes together with the program, so it is let go before.
        self._ahead = [ThreadPrefetchDatasetIterator(_Follower(found, batch, chunk, chunks, rows), _AHEAD)]
        self._end = weakref.finalize(self, _close, self._ahead)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Window:
        return next(self._ahead[0])

    def get_state(self) -> dict[str, Any]:
        """The position behind the last window that was taken, as JSON holds it; the same in every process."""
        return self._ahead[0].get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that `get_state` gave for the same sources, batch, chunk and seed.

        Raises `InputError` if it is one of other rows, or of files in another order.
        """
        self._ahead[0].set_state(state)

    def close(self) -> None:
        """End the thread; nothing else can be asked of the iterator afterwards."""
        self._end()


def _close(ahead: list[Any]) -> None:
    while ahead:
        ahead.pop().close()


def validation_batches(
    recordings: Sequence[Recording], batch: int, chunk: int, rows: range | None = None
) -> Iterator[Window]:
    """One pass over `recordings`, each from its first frame to its last: windows of one chunk, as many in every process.

    Rows for which no file is left are masked, not reset, and their tokens are -1. Arguments are those of `Batches`.
    """

    def find(place: int) -> _File | None:
        return _File(0, place, 0, recordings[place]) if place < len(recordings) else None

    return _Follower(find, batch, chunk, 1, rows)


class _File(NamedTuple):
    """What stands at a place of a list of files."""

    source: int
    index: int
    """Of the recording in its source."""
    offset: int
    """First frame that is read, inside the file."""
    recording: Recording


class _Row(NamedTuple):
    """Where a row is: the next frame of the file at a place, or beyond a finite list."""

    place: int
    frame: int
    file: _File | None


class _Follower:
    """Rows following the files of a list, `find(place)`, which ends where that is None."""

    def __init__(
        self, find: Callable[[int], _File | None], batch: int, chunk: int, chunks: int, rows: range | None
    ) -> None:
        self._find = find
        self._chunk = chunk
        self._chunks = chunks
        self._own = range(batch) if rows is None else rows
        self._rows = [self._start(place) for place in range(batch)]
        self._taken = batch
        self._read: dict[int, tuple[int, np.ndarray]] = {}  # by row: place and tokens of the file it follows
        first = next((row.file.recording for row in self._rows if row.file is not None), None)
        self._streams = first.shape[0] if first is not None else 0

    def __iter__(self) -> _Follower:
        return self

    def __next__(self) -> Window:
        rows, taken = list(self._rows), self._taken  # kept as they are if a file cannot be read
        if all(row.file is None for row in rows):
            raise StopIteration
        size = (self._chunks, len(self._own))
        frames = np.full((*size, self._streams, self._chunk), -1, np.int32)
        mask = np.zeros((*size, self._chunk), bool)
        reset = np.zeros(size, bool)
        names = []
        for k in range(self._chunks):
            names.append(tuple(rows[i].file.recording.name if rows[i].file is not None else "" for i in self._own))
            for at, i in enumerate(self._own):
                row = rows[i]
                if row.file is None:
                    continue
                part = self._tokens(i, row)[:, row.frame : row.frame + self._chunk]
                frames[k, at, :, : part.shape[1]] = part
                mask[k, at, : part.shape[1]] = True
                reset[k, at] = row.frame == row.file.offset
            for i, row in enumerate(rows):
                if row.file is None:
                    continue
                rows[i] = row._replace(frame=row.frame + self._chunk)
                if rows[i].frame >= row.file.recording.num_frames:
                    rows[i] = self._start(taken)
                    taken += 1
        self._rows, self._taken = rows, taken
        return Window(Batch(frames, mask, reset), tuple(names))

    def get_state(self) -> dict[str, Any]:
        # Source and index follow from the place: by them a position in another list of files is noticed.
        rows = [[row.place, row.frame, row.file.source, row.file.index] for row in self._rows]
        return {"taken": self._taken, "rows": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        rows = [_Row(place, frame, self._find(place)) for place, frame, *_ in state["rows"]]
        if len(rows) != len(self._rows):
            raise InputError(
                f"the stored position in the data is one of {len(rows)} rows, but data.batch is {len(self._rows)}: give the"
                " same data.batch, or start a new run."
            )
        if any(
            list(stored[2:]) != [row.file.source, row.file.index]
            for stored, row in zip(state["rows"], rows, strict=True)
        ):
            raise InputError(
                "the stored position in the data is one in another order of files, as another version of grain or ttt_jax"
                " made it: go on with that version, or start a new run."
            )
        self._rows, self._taken = rows, state["taken"]

    def _start(self, place: int) -> _Row:
        file = self._find(place)
        return _Row(place, 0 if file is None else file.offset, file)

    def _tokens(self, i: int, row: _Row) -> np.ndarray:
        """The file that row `i` follows, int32 [S, frames]."""
        place, tokens = self._read.get(i, (None, None))
        if place != row.place:
            tokens = row.file.recording.read()
            self._read[i] = (row.place, tokens)
        return tokens


def _endless(sources: Sequence[Source], offsets: int, seed: int) -> Callable[[int], _File]:
    """The list that rows take files from; each is read from one of its first `offsets` frames on."""
    import grain

    def shuffled(number: int, source: Source) -> Any:
        # Grain adds the pass to the seed: those of two sources or runs must not be neighbours.
        own = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        indices = grain.MapDataset.range(len(source.recordings)).shuffle(seed=own).repeat()
        return indices.map(lambda index: (number, index))

    lists = [shuffled(number, source) for number, source in enumerate(sources)]
    mixed = grain.MapDataset.mix(lists, [source.weight for source in sources])

    def find(place: int) -> _File:
        source, index = mixed[place]
        recording = sources[source].recordings[index]
        offset = int(np.random.default_rng((seed, 0, place)).integers(min(offsets, recording.num_frames)))
        return _File(source, index, offset, recording)

    return find
