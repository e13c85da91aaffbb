"""The beat of the server: every 80 ms one step of all talks that have a frame, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ttt_jax.config import FRAME_RATE
from ttt_jax.serve.metrics import Metrics
from ttt_jax.serve.talks import Reply, Talks

Result = TypeVar("Result")

TICK = 1 / FRAME_RATE
"""Seconds from one step to the next."""


class Seat:
    """A place for one talk."""

    row: int | None = None
    """Of the talk in `Talks`, None before it joins. Set in the thread of the talks, in which it is always right."""


class Ticks:
    """Runs `Talks`, which is not for several threads, in one thread; the event loop never waits for it.

    A step begins 80 ms after the last one with the frames that are there, so that one step serves all talks. It begins
    at once if all talks have a frame, or if one has more frames waiting.
    """

    def __init__(self, talks: Talks, metrics: Metrics) -> None:
        self.rows, self.taken = talks.rows, 0
        self._talks, self._metrics = talks, metrics
        self._thread = ThreadPoolExecutor(1, "talks")
        self._frames: dict[int, tuple[np.ndarray, asyncio.Future[list[Reply]]]] = {}
        self._hurries = False
        self._changed = asyncio.Event()

    def seat(self) -> Seat | None:
        """A place for a talk that is about to join, to be given back; None if all are taken."""
        if self.taken == self.rows:
            return None
        self.taken += 1
        return Seat()

    def give_back(self, seat: Seat) -> None:
        """Ends the talk of a seat, also one that is only about to join; does not wait for that."""
        self.taken -= 1
        self._thread.submit(lambda: None if seat.row is None else self._talks.leave(seat.row))
        self._changed.set()

    async def call(self, do: Callable[[Talks], Result]) -> Result:
        """Returns `do(talks)`, run between two steps; what has begun runs to its end if the caller is cancelled."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, do, self._talks)

    async def step(self, row: int, frame: np.ndarray, hurries: bool) -> list[Reply]:
        """The replies to one frame of a row, finite float [S]; one at a time for each row.

        `hurries`: more frames of the row wait.
        """
        reply: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        self._frames[row] = (frame, reply)
        self._hurries |= hurries
        self._changed.set()
        try:
            return await reply
        finally:
            if self._frames.get(row, (None, None))[1] is reply:
                del self._frames[row]

    async def run(self) -> None:
        """Steps until it is cancelled. An error of a step, which no client can cause, ends it."""
        due = 0.0
        while True:
            await self._changed.wait()
            self._changed.clear()
            wait = due - time.monotonic()
            while self._frames and wait > 0 and not self._hurries and len(self._frames) < self.taken:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):  # wait_for of Python 3.11 may lose a cancellation
                        await self._changed.wait()
                self._changed.clear()
                wait = due - time.monotonic()
            if self._frames:
                due = time.monotonic() + TICK
                await self._step()

    async def _step(self) -> None:
        begun, self._frames, self._hurries = self._frames, {}, False
        start = time.monotonic()
        frames = {row: frame for row, (frame, _) in begun.items()}
        replies = await self.call(lambda talks: talks.step(frames))
        self._metrics.tick(time.monotonic() - start, len(frames))
        for row, (_, reply) in begun.items():
            if not reply.done():
                reply.set_result([one for one in replies if one.row == row])

    def close(self) -> None:
        """Waits for what runs; nothing can be run after this."""
        self._thread.shutdown()
