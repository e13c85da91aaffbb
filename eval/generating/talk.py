"""Recordings through a model that talks: rows of one batch, each as long as its recordings.

What Moshi says in frame f is put into frame f of its input: the model has heard the frames before f then, as in
training. Step c of a talk reads frame c - 1; it makes the text of frame c and completes frame c - max_delay. Shapes: T
frames, Q codebooks, L TTT layers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from eval.generating.inputs import Input
from eval.results.schema import Skipped
from ttt_jax.errors import InputError
from ttt_jax.serve.speech import Inner
from ttt_jax.serve.talks import FirstFrame, Reply, Talk, Talks, TalkSettings
from ttt_jax.utils.paths import printable


class Plan(NamedTuple):
    """How each recording is talked to."""

    settings: TalkSettings = TalkSettings()
    first_frame: FirstFrame = "twice"
    seed: int = 0
    reset_every: int | None = None
    """Frames after which the fast weights return to their learned start; None: never."""
    begin: Talk | None = None
    """A talk that is gone on with, in place of a new one."""
    keep: bool = False
    """Whether the recordings follow each other in one talk."""
    save: bool = False
    """Whether to hand out the talk as it stands after each recording."""


class Made(NamedTuple):
    """What came of one recording."""

    source: Input
    seed: int | None
    """None where a stored talk went on."""
    user: np.ndarray
    """What was heard, float32 [samples]."""
    voice: np.ndarray
    """Moshi's voice, float32 [samples]."""
    moshi: np.ndarray
    """Tokens, int32 [1 + Q, T]; -1 where there is none."""
    codes: np.ndarray
    """The user's codes, int32 [Q, T]; -1 in a frame that was not heard."""
    log_probs: np.ndarray | None
    """Of Moshi's tokens, float32 [1 + Q, T], NaN where there is none; None unless measured."""
    inner: Inner | None
    """Of the step that read a frame, [T, L] each; None unless measured, or without TTT layers."""
    latency: np.ndarray
    """Seconds of the step that heard a frame, [T]."""
    talk: Talk | None
    """After the last frame; None unless asked for."""


def generate(
    talks: Talks,
    inputs: Sequence[Input],
    read: Callable[[Input], np.ndarray],
    plan: Plan,
    on_frames: Callable[[int], object] = lambda frames: None,
) -> Iterator[Made | Skipped]:
    """Yields what came of each recording when it is complete, or why it cannot be used.

    Args:
      talks: with all rows free.
      read: the user's samples of a recording, float32 [n], n > 0; raises `InputError` for one that cannot be used.
      on_frames: is told how many frames each step heard.
    """
    waiting = deque([deque(inputs)] if plan.keep else [deque([source]) for source in inputs])
    rows: list[_Row] = []
    while True:
        while waiting and talks.free:
            row = _Row(talks, waiting.popleft(), read, plan)
            yield from row.problems()
            if row.goes_on:
                rows.append(row)
        if not rows:
            return
        frames = {row.place: row.next_frame() for row in rows}
        start = time.perf_counter()
        replies = talks.step(frames)
        seconds = time.perf_counter() - start
        on_frames(len(frames))
        for row in rows:
            row.take([reply for reply in replies if reply.row == row.place], seconds)
            yield from row.complete()
            yield from row.problems()
            if not row.goes_on:
                talks.leave(row.place)
        rows = [row for row in rows if row.goes_on]


def warm_up(talks: Talks, settings: TalkSettings) -> None:
    """Compiles what a talk needs, so that its first frame takes no longer than others."""
    row, silence = talks.join(settings), np.zeros(talks.speech.codec.frame_size, np.float32)
    for _ in range(2):
        talks.step({row: silence})
    talks.leave(row)


class _Part(NamedTuple):
    """A recording in a talk."""

    source: Input
    samples: np.ndarray
    start: int
    """Frame of the talk at which it begins."""
    end: int
    talk: list[Talk]
    """As it stood after the last frame; empty before, or if that is not asked for."""


class _Row:
    """A talk with one recording, or with several behind each other."""

    def __init__(self, talks: Talks, sources: deque[Input], read: Callable[[Input], np.ndarray], plan: Plan) -> None:
        self._talks, self._sources, self._read, self._plan = talks, sources, read, plan
        self._size = talks.speech.codec.frame_size
        self._delay = talks.speech.cfg.max_delay
        self._parts: deque[_Part] = deque()
        self._end = 0  # frames of all recordings so far
        self._heard = 0
        self._replies: dict[int, Reply] = {}
        self._seconds: dict[int, float] = {}
        self._skipped: list[Skipped] = []
        self._seed = None
        self._next_recording()
        if self.goes_on:
            if plan.begin is None:
                self._seed = self._parts[0].source.seed(plan.seed)
            self.place = talks.join(plan.settings, self._seed or 0, plan.first_frame, plan.begin)

    @property
    def goes_on(self) -> bool:
        """Whether there is a recording that is not complete."""
        return bool(self._parts)

    def problems(self) -> Iterable[Skipped]:
        """Returns the recordings that turned out to be unusable since the last call."""
        found, self._skipped = self._skipped, []
        return found

    def next_frame(self) -> np.ndarray:
        """Returns the user's next frame: of a recording, or silence in which the last frames become complete."""
        frame = np.zeros(self._size, np.float32)
        if self._heard < self._end:
            part = self._parts[-1]
            place = (self._heard - part.start) * self._size
            piece = part.samples[place : place + self._size]
            frame[: len(piece)] = piece
        every = self._plan.reset_every
        if every and self._heard and self._heard % every == 0:
            self._talks.put_memory(self.place, None)
        return frame

    def take(self, replies: Sequence[Reply], seconds: float) -> None:
        """Notes the replies to a frame: one, or two where a talk begins."""
        self._heard += 1
        for step, reply in enumerate(replies, self._heard + 1 - len(replies)):
            self._replies[step], self._seconds[step] = reply, seconds
        last = self._parts[-1]
        if self._heard == last.end:
            if self._plan.save:
                last.talk.append(self._talks.take(self.place))
            self._next_recording()

    def complete(self) -> Iterator[Made]:
        """Yields the recordings that the last reply has completed."""
        while self._parts and self._heard >= max(self._parts[0].end, self._parts[0].end - 1 + self._delay):
            part = self._parts.popleft()
            yield self._made(part)
            for step in [step for step in self._replies if step < part.end]:
                del self._replies[step], self._seconds[step]

    def _next_recording(self) -> None:
        while self._sources:
            source = self._sources.popleft()
            try:
                samples = self._read(source)
            except InputError as error:
                self._skipped.append(Skipped(source.name, printable(str(error))))
                continue
            start, self._end = self._end, self._end - (-len(samples) // self._size)
            self._parts.append(_Part(source, samples, start, self._end, []))
            return

    def _made(self, part: _Part) -> Made:
        cfg, frames = self._talks.speech.cfg, range(part.start, part.end)
        streams = 1 + cfg.dep_q
        tokens = np.full((streams, len(frames)), -1, np.int32)
        codes = np.full((cfg.n_q - cfg.dep_q, len(frames)), -1, np.int32)
        log_probs = np.full((streams, len(frames)), np.nan, np.float32)
        voice = np.zeros((len(frames), self._size), np.float32)
        for i, frame in enumerate(frames):
            codes[:, i] = self._replies[frame + 1].user
            whole = self._replies.get(frame + self._delay)
            if whole is not None and whole.audio is not None:
                voice[i], tokens[:, i] = whole.audio, whole.moshi
            for stream in range(streams) if self._talks.measured else ():
                reply = self._replies.get(frame + cfg.delays[stream])
                if reply is not None and reply.column[stream] >= 0:
                    log_probs[stream, i] = reply.log_probs[stream]
        measured = [self._replies[frame + 1].inner for frame in frames]
        inner = None if measured[0] is None else Inner(*map(np.stack, zip(*measured, strict=True)))
        return Made(
            part.source,
            self._seed,
            part.samples,
            voice.reshape(-1)[: len(part.samples)],
            tokens,
            codes,
            log_probs if self._talks.measured else None,
            inner,
            np.array([self._seconds[frame + 1] for frame in frames]),
            part.talk[0] if part.talk else None,
        )
