"""Moshi's delays: from undelayed frames to the delayed grid.

Stream k of frame f stands in column f + delay_k; columns before a stream's first token hold its initial token. Position
s of the model reads column s - 1 (column -1 is all initial tokens) and predicts column s. The state keeps the last
max_delay + 1 frames of each row, so a call can start anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import MoshiConfig

ABSENT = -1
"""Token whose embedding is exactly 0 and which is never scored."""


class Columns(NamedTuple):
    """What the positions of a call read and predict."""

    inputs: jax.Array
    """Tokens of column s - 1, int32 [B, T, K]."""
    targets: jax.Array
    """Tokens of column s, int32 [B, T, K]; initial tokens where a stream has not begun."""


def initial_tokens(cfg: MoshiConfig) -> np.ndarray:
    """The initial token of each stream, int32 [K]."""
    return np.array([cfg.text_card] + cfg.n_q * [cfg.card], np.int32)


def init_history(cfg: MoshiConfig, batch: int) -> jax.Array:
    """History of a stream that has not begun: initial tokens, int32 [B, K, max_delay + 1]."""
    tokens = jnp.asarray(initial_tokens(cfg))[None, :, None]
    return jnp.broadcast_to(tokens, (batch, cfg.num_streams, cfg.max_delay + 1))


def columns(history: jax.Array, frames: jax.Array, mask: jax.Array, cfg: MoshiConfig) -> tuple[Columns, jax.Array]:
    """Delays the frames of a call.

    Args:
      history: last valid frames before the call, int32 [B, K, max_delay + 1], newest last.
      frames: undelayed tokens, int32 [B, K, T].
      mask: bool [B, T]; masked frames take no place in time and read absent tokens.

    Returns:
      The columns of each position and the history after the call.
    """
    kept = history.shape[-1]
    delay = jnp.asarray(cfg.delays, jnp.int32)
    order = jnp.argsort(~mask, axis=1, stable=True)  # valid frames first, in order
    packed = jnp.concatenate([history, jnp.take_along_axis(frames, order[:, None], 2)], 2)
    rank = jnp.cumsum(mask, 1) - 1
    newest = kept + jnp.maximum(rank, 0)[:, None] - delay[None, :, None]  # [B, K, T]

    def read(index: jax.Array) -> jax.Array:
        tokens = jnp.take_along_axis(packed, index, 2)
        return jnp.where(mask[:, None], tokens, ABSENT).swapaxes(1, 2)

    history = jnp.take_along_axis(packed, mask.sum(1)[:, None, None] + jnp.arange(kept)[None, None], 2)
    return Columns(read(newest - 1), read(newest)), history
