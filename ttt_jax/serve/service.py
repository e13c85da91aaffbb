"""What all clients of the server share."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from ttt_jax.data.text import Tokenizer, TokenizerInfo
from ttt_jax.serve.memories import Memories
from ttt_jax.serve.metrics import Metrics
from ttt_jax.serve.speech import Speech
from ttt_jax.serve.ticks import Seat, Ticks

FORK_SECONDS = 60.0
"""How long a fork waits to be taken up."""


@dataclass(frozen=True)
class Limits:
    """What one client may use."""

    queue: int = 25
    """Frames that wait to be heard."""
    max_message: int = 1 << 16
    """Bytes of a message."""
    idle: float = 60.0
    """Seconds without a message."""


@dataclass
class Service:
    """What all clients share."""

    name: str
    """Of the checkpoint."""
    speech: Speech
    tokenizer: Tokenizer | TokenizerInfo
    ticks: Ticks
    metrics: Metrics
    memories: Memories
    limits: Limits
    every: int
    """Frames from one measurement that clients are sent to the next."""

    def __post_init__(self) -> None:
        self._forks: dict[str, tuple[Seat, int, asyncio.TimerHandle]] = {}
        self.stops = asyncio.Event()
        """Set when the server stops."""

    def keep_fork(self, seat: Seat, seed: int) -> str:
        """Keeps a talk until it is taken up; returns the key for `take_fork`."""
        key = secrets.token_urlsafe(24)
        expires = asyncio.get_running_loop().call_later(FORK_SECONDS, self._expire, key)
        self._forks[key] = seat, seed, expires
        return key

    def take_fork(self, key: str) -> tuple[Seat, int] | None:
        """Seat and seed of the talk that is kept under `key`, once; None if there is none."""
        seat, seed, expires = self._forks.pop(key, (None, 0, None))
        if seat is None or expires is None:
            return None
        expires.cancel()
        return seat, seed

    def _expire(self, key: str) -> None:
        self.ticks.give_back(self._forks.pop(key)[0])
