"""Batches whose rows follow files: a row reads one file chunk by chunk to its end, then takes the next.

The rows take files from one endless list. Grain shuffles each source anew in every pass and mixes the sources by their
weights, both at random access. Everything random depends on the seed and on a file's place in the list alone, so the
position is a few integers and a resumed run continues exactly. Every process counts all rows, which needs the files'
lengths only, and reads the tokens of its rows. So the position is the same in all processes, and a run can be resumed
by another number of processes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.data.corpus import Source
from ttt_jax.data.frames import Recording
from ttt_jax.errors import InputError

_AHEAD = 2  # windows that are read ahead of time


class Batch(NamedTuple):
    """K consecutive chunks of every row of this process."""

    frames: np.ndarray
    """int32 [K, B, S, T]: tokens of S streams; -1 past the end of a row's file."""
    mask: np.ndarray
    """bool [K, B, T]: False past the end of a row's file."""
    reset: np.ndarray
    """bool [K, B]: True where a row starts a file with this chunk."""


class Window(NamedTuple):
    """A batch and the names of its files."""

    batch: Batch
    files: tuple[tuple[str, ...], ...]
    """Names by chunk and row, [K][B]; "" where a row has no file."""


class Batches:
    """Endless iterator of `Window`. A thread reads them ahead of time; `close` ends it.

    A row begins a file at a random offset of less than one chunk. So chunk boundaries, where gradients are cut, fall
    elsewhere in every pass; the frames before the offset are left out of that pass. With `from_start` the offset is 0.
    A chunk never holds frames of two files. Each row that follows a file reads it once.

    A window has K = `chunks` chunks of T = `chunk` frames of the rows `rows` (None: all) of `batch`. `seed` decides the
    order of files and the offsets. Raises `InputError` if a source is empty, and in `next` if a file cannot be read.
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

        files = _endless(sources, 1 if from_start else chunk, seed)
        # Grain's iterator prints errors if the interpreter's exit destroys it, so `_close` destroys it earlier.
        self._ahead = [ThreadPrefetchDatasetIterator(_Follower(files, batch, chunk, chunks, rows), _AHEAD)]
        self._end = weakref.finalize(self, _close, self._ahead)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Window:
        return next(self._ahead[0])

    def get_state(self) -> dict[str, Any]:
        """Returns the position behind the last window taken, in JSON types; it is the same in every process."""
        return self._ahead[0].get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave for the same sources, batch, chunk and seed.

        Raises `InputError` if the position has another number of rows or another order of files.
        """
        self._ahead[0].set_state(state)

    def close(self) -> None:
        """Ends the thread; the iterator cannot be used afterwards."""
        self._end()


def _close(ahead: list[Any]) -> None:
    while ahead:
        ahead.pop().close()


def validation_batches(
    recordings: Sequence[Recording], batch: int, chunk: int, rows: range | None = None
) -> Iterator[Window]:
    """Iterates once over `recordings`, each from its first frame to its last, in windows of one chunk.

    All processes get the same number of windows. Rows without a file are masked and not reset, and their tokens are -1.
    Arguments are those of `Batches`.
    """

    def file_at(place: int) -> _File | None:
        return _File(0, place, 0, recordings[place]) if place < len(recordings) else None

    return _Follower(file_at, batch, chunk, 1, rows)


class _File(NamedTuple):
    """An entry of a list of files."""

    source: int
    """Index of the source."""
    index: int
    """Index of the recording in its source."""
    offset: int
    """First frame of the file that is read."""
    recording: Recording


class _Row(NamedTuple):
    """Position of a row: the next frame of the file at a place of the list; beyond a finite list no file."""

    place: int
    frame: int
    file: _File | None


class _Follower:
    """Iterator of windows whose rows follow the files `file_at(place)`, up to the first None."""

    def __init__(
        self, file_at: Callable[[int], _File | None], batch: int, chunk: int, chunks: int, rows: range | None
    ) -> None:
        self._file_at = file_at
        self._chunk = chunk
        self._chunks = chunks
        self._local = range(batch) if rows is None else rows
        self._rows = [self._start(place) for place in range(batch)]
        self._taken = batch
        self._tokens_of: dict[int, tuple[int, np.ndarray]] = {}  # by row: place and tokens of the file it follows
        first = next((row.file.recording for row in self._rows if row.file is not None), None)
        self._streams = first.shape[0] if first is not None else 0

    def __iter__(self) -> _Follower:
        return self

    def __next__(self) -> Window:
        rows, taken = list(self._rows), self._taken  # the iterator stays where it is if a file cannot be read
        if all(row.file is None for row in rows):
            raise StopIteration
        size = (self._chunks, len(self._local))
        frames = np.full((*size, self._streams, self._chunk), -1, np.int32)
        mask = np.zeros((*size, self._chunk), bool)
        reset = np.zeros(size, bool)
        names = []
        for k in range(self._chunks):
            names.append(tuple(rows[i].file.recording.name if rows[i].file is not None else "" for i in self._local))
            for at, i in enumerate(self._local):
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
        # Source and index follow from the place; they show whether a stored position is of another list of files.
        rows = [[row.place, row.frame, row.file.source, row.file.index] for row in self._rows]
        return {"taken": self._taken, "rows": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        rows = [_Row(place, frame, self._file_at(place)) for place, frame, *_ in state["rows"]]
        if len(rows) != len(self._rows):
            raise InputError(
                f"the stored position in the data is one of {len(rows)} rows, but data.batch is {len(self._rows)}: give"
                " the same data.batch, or start a new run."
            )
        if [list(stored[2:]) for stored in state["rows"]] != [[row.file.source, row.file.index] for row in rows]:
            raise InputError(
                "the stored position in the data is one in another order of files, as another version of grain or"
                " ttt_jax made it: go on with that version, or start a new run."
            )
        self._rows, self._taken = rows, state["taken"]

    def _start(self, place: int) -> _Row:
        file = self._file_at(place)
        return _Row(place, 0 if file is None else file.offset, file)

    def _tokens(self, i: int, row: _Row) -> np.ndarray:
        """Tokens of the file that row `i` follows, int32 [S, frames]."""
        place, tokens = self._tokens_of.get(i, (None, None))
        if place != row.place:
            tokens = row.file.recording.read()
            self._tokens_of[i] = (row.place, tokens)
        return tokens


def _endless(sources: Sequence[Source], offsets: int, seed: int) -> Callable[[int], _File]:
    """Returns the endless list of files; each is read from one of its first `offsets` frames on."""
    import grain

    def shuffled(number: int, source: Source) -> Any:
        # Grain adds the number of the pass to the seed, so seeds of two sources or runs must not be neighbours.
        mixed_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        indices = grain.MapDataset.range(len(source.recordings)).shuffle(seed=mixed_seed).repeat()
        return indices.map(lambda index: (number, index))

    lists = [shuffled(number, source) for number, source in enumerate(sources)]
    mixed = grain.MapDataset.mix(lists, [source.weight for source in sources])

    def file_at(place: int) -> _File:
        source, index = mixed[place]
        recording = sources[source].recordings[index]
        offset = int(np.random.default_rng((seed, 0, place)).integers(min(offsets, recording.num_frames)))
        return _File(source, index, offset, recording)

    return file_at
