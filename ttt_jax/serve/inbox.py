"""What a talk has still to hear and to do, in order and bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

import numpy as np

from ttt_jax.errors import InputError

Order = TypeVar("Order")

COMMANDS = 16
"""Commands that may wait."""


class Inbox(Generic[Order]):
    """Frames and commands. When `most` frames wait, the oldest gives way to the next."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: deque[np.ndarray | Order] = deque()
        self._some = asyncio.Event()
        self.frames = 0
        """Frames that wait."""

    def put(self, item: np.ndarray | Order) -> bool:
        """Adds a frame or a command; returns whether a frame was dropped. Raises `InputError` for too many commands."""
        is_frame = isinstance(item, np.ndarray)
        if not is_frame and len(self._items) - self.frames >= COMMANDS:
            raise InputError(f"{COMMANDS} commands wait: give them more slowly.")
        dropped = is_frame and self.frames == self._most
        if dropped:
            oldest = next(i for i, held in enumerate(self._items) if isinstance(held, np.ndarray))
            del self._items[oldest]
        self.frames += is_frame and not dropped
        self._items.append(item)
        self._some.set()
        return dropped

    async def get(self) -> np.ndarray | Order:
        """Takes the oldest; waits for one."""
        while not self._items:
            self._some.clear()
            await self._some.wait()
        item = self._items.popleft()
        self.frames -= isinstance(item, np.ndarray)
        return item

    def clear(self) -> None:
        """Drops all frames; commands stay."""
        commands = [item for item in self._items if not isinstance(item, np.ndarray)]
        self._items.clear()
        self._items.extend(commands)
        self.frames = 0
