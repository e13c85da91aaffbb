"""The beat: one step for all talks that have a frame; who is silent holds nobody."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from ttt_jax.errors import InputError
from ttt_jax.serve.inbox import COMMANDS, Inbox
from ttt_jax.serve.metrics import Metrics
from ttt_jax.serve.talks import Reply
from ttt_jax.serve.ticks import TICK, Ticks


class Talks:
    """Notes its steps, when they were and in which thread; each takes `seconds`."""

    def __init__(self, rows: int = 4, seconds: float = 0.0) -> None:
        self.rows, self.seconds = rows, seconds
        self.steps: list[tuple[float, list[int]]] = []
        self.threads: set[int] = set()
        self.left: list[int] = []

    def step(self, frames):
        self.steps.append((time.monotonic(), sorted(frames)))
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return [Reply(row, frames[row], *[None] * 5) for row in sorted(frames)]

    def leave(self, row):
        self.threads.add(threading.get_ident())
        self.left.append(row)


def beat(talks, client, seats: int):
    """Runs `client(ticks)` with `seats` seats taken beside the beat."""

    async def job():
        ticks = Ticks(talks, Metrics())
        for row in range(seats):
            ticks.seat().row = row
        steps = asyncio.create_task(ticks.run())
        result = await client(ticks)
        steps.cancel()
        ticks.close()
        return result

    return asyncio.run(job())


def frame(row):
    return np.full(2, row, np.float32)


def test_one_step_serves_all_and_each_gets_its_own_replies():
    talks = Talks()

    async def client(ticks):
        await ticks.step(3, frame(3), False)  # alone: the others are silent
        return await asyncio.gather(*(ticks.step(row, frame(row), False) for row in range(3)))

    replies = beat(talks, client, seats=4)
    assert [[(one.row, one.audio[0]) for one in mine] for mine in replies] == [[(row, row)] for row in range(3)]
    assert [rows for _, rows in talks.steps] == [[3], [0, 1, 2]]
    first, second = (moment for moment, _ in talks.steps)
    assert second - first >= TICK * 0.9  # it waited for the silent one, a tick and no longer
    assert second - first < TICK * 3
    assert len(talks.threads) == 1
    assert threading.get_ident() not in talks.threads


@pytest.mark.parametrize(("seats", "hurries"), [(1, False), (4, True)], ids=["all have one", "more wait"])
def test_a_step_follows_at_once(seats, hurries):
    async def client(ticks):
        for _ in range(20):
            await ticks.step(0, frame(0), hurries)

    start = time.monotonic()
    beat(Talks(), client, seats)
    assert time.monotonic() - start < 10 * TICK


def test_the_event_loop_does_not_wait_for_a_step():
    async def client(ticks):
        step = asyncio.create_task(ticks.step(0, frame(0), False))
        turns = 0
        while not step.done():
            turns += 1
            await asyncio.sleep(0.005)
        return turns

    assert beat(Talks(seconds=0.3), client, 1) > 10


def test_who_goes_while_waiting_is_left_out_and_its_seat_is_free_again():
    talks = Talks(rows=2)

    async def client(ticks):
        await ticks.step(0, frame(0), False)
        assert ticks.seat() is None
        gone = asyncio.create_task(ticks.step(1, frame(1), False))
        await asyncio.sleep(TICK / 8)
        gone.cancel()
        seat = type("Seat", (), {"row": 1})()
        ticks.give_back(seat)
        await ticks.step(0, frame(0), False)
        await ticks.call(lambda _: None)
        return ticks.seat() is not None

    assert beat(talks, client, 2)
    assert [rows for _, rows in talks.steps] == [[0], [0]]
    assert talks.left == [1]


def test_an_error_of_a_step_ends_the_beat():
    class Broken(Talks):
        def step(self, frames):
            raise RuntimeError("out of memory")

    async def job():
        ticks = Ticks(Broken(), Metrics())
        ticks.seat()
        waiting = asyncio.create_task(ticks.step(0, frame(0), False))
        try:
            await ticks.run()
        finally:
            waiting.cancel()
            ticks.close()

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(job())


def test_an_inbox_drops_its_oldest_frames_and_no_commands():
    inbox: Inbox[str] = Inbox(2)
    dropped = [inbox.put(item) for item in (frame(0), "a", frame(1), "b", frame(2), frame(3))]
    assert dropped == [False, False, False, False, True, True]
    assert inbox.frames == 2

    async def take(count):
        return [await inbox.get() for _ in range(count)]

    taken = asyncio.run(take(4))
    assert [item if isinstance(item, str) else item[0] for item in taken] == ["a", "b", 2, 3]
    assert inbox.frames == 0


def test_an_inbox_refuses_commands_too_many_and_keeps_them_when_cleared():
    inbox: Inbox[str] = Inbox(2)
    for _ in range(COMMANDS):
        inbox.put("a")
    inbox.put(frame(0))
    with pytest.raises(InputError, match="more slowly"):
        inbox.put("a")
    inbox.clear()
    assert inbox.frames == 0
    assert asyncio.run(inbox.get()) == "a"


def test_quantiles():
    metrics = Metrics()
    assert metrics.quantile(0.5) == 0
    for milliseconds in range(1, 101):
        metrics.tick(milliseconds / 1000, frames=3)
    assert (metrics.quantile(0.5), metrics.quantile(0.99)) == (0.051, 0.1)
    assert metrics.frames == 300
    text = metrics.text(talks=2, rows=4)
    assert text.endswith("ttt_jax_tick_seconds_sum 5.050000\nttt_jax_tick_seconds_count 100\n")
    assert "# TYPE ttt_jax_tick_seconds summary" in text
