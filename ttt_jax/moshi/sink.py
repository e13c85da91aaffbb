"""Attention sinks: the first frames of a stream stay visible beside the window (Xiao et al. 2023, arXiv 2309.17453)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.nn.rotary import rotate


class Sink(NamedTuple):
    """A sink of `frames` frames in a cache of S slots: a frame at position t sees position p <= t if p < `frames` or
    t - p < S - `frames`.

    Up to position S - 1 that is all frames before it. Which frames are seen depends on positions alone, so that any
    split into calls gives the same.
    """

    frames: int
    """1 or more, fewer than the cache has slots."""
    max_period: float
    """Longest period of the rotary embedding by which queries and keys are turned."""

    def slot(self, position: jax.Array, slots: int) -> jax.Array:
        """Slot of the frame at `position`: the sink's frames keep theirs, the others take turns in the rest."""
        turns = self.frames + (position - self.frames) % (slots - self.frames)
        return jnp.where(position < self.frames, position, turns)

    def turn(self, q: jax.Array, position: jax.Array, slots: int) -> jax.Array:
        """Queries as the sink's keys meet them: as if they stood no further than slots - 1, the longest distance that
        the window knows.

        Args:
          q: [B, T, H, K], turned by `position`, int32 [B, T].
        """
        return rotate(q, jnp.minimum(slots - 1 - position, 0), self.max_period)
