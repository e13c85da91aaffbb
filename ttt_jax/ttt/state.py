"""The state of a TTT layer, and the end of a mini-batch: its steps go into the displacement.

Shapes: B rows, H heads, b frames of a mini-batch, I and O the widths that one affine map of the inner network joins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.config import TTTConfig
from ttt_jax.ttt.network import Affine, Descent, Network, squared_norm, total, widths


class TTTState(NamedTuple):
    """State of a TTT layer, row by row. A fresh state is zeros and needs no parameters."""

    displacement: Network
    """Fast weights minus base after the mini-batches that are full, [B, H, I, O] and [B, H, O]."""
    open_steps: Descent | tuple[()]
    """Steps of the mini-batch that is still open, [B, H, b, I] and [B, H, b, O], frame after frame from slot 0; 0 from
    the row's phase on, and where the rate was 0. () with b = 1, where every frame closes a mini-batch."""
    count: jax.Array
    """Valid frames seen, int32 [B]; modulo b it is the row's phase in its mini-batch."""


def init_state(
    batch: int, heads: int, head_dim: int, hidden: tuple[int, ...], mini_batch: int, dtype: jnp.dtype
) -> TTTState:
    """A fresh state for `batch` rows: zeros."""
    zeros = lambda *shape: jnp.zeros((batch, heads, *shape), dtype)  # noqa: E731
    maps = widths(head_dim, hidden)
    displacement = tuple(Affine(zeros(i, o), zeros(o)) for i, o in maps)
    open_steps = Descent(*(tuple(zeros(mini_batch, size) for size in sizes) for sizes in zip(*maps, strict=True)))
    return TTTState(displacement, open_steps if mini_batch > 1 else (), jnp.zeros((batch,), jnp.int32))


def descended(displacement: Network, steps: Descent, closes: jax.Array, base: Network, cfg: TTTConfig) -> Network:
    """The displacement after the steps of a mini-batch, decay and bound in rows where it `closes` (bool [B])."""
    taken = total(steps, -closes.astype(displacement[0].w.dtype))
    return _retained(jax.tree.map(jnp.add, displacement, taken), base, closes, cfg)


def close(before: TTTState, after: TTTState, base: Sequence[Network], cfg: TTTConfig) -> TTTState:
    """The state after one frame: its step joins the open mini-batch, and mini-batches that are full are closed.

    One frame in b fills a mini-batch. All others would read and write the displacement for nothing, hence the
    condition. Steps are joined in it once more, so that nothing is written ahead for a branch that is not taken.

    Args:
      before: of a run of L layers before the frame, leaves [L, B, ...]; after: of `one_frame`.
      base: W0 of each layer; cfg: of the layers.
    """
    b = cfg.mini_batch
    slot = jnp.where(after.count > before.count, before.count % b, b)  # b: of no step
    closes = slot == b - 1

    def joined() -> Descent:
        if b == 1:
            return after.open_steps
        own = (jnp.arange(b) == slot[..., None])[:, :, None, :, None]
        return jax.tree.map(lambda old, new: jnp.where(own, new, old), before.open_steps, after.open_steps)

    def closed(displacement: Network) -> Network:
        # The bound alone reads the base.
        of_run = jax.tree.map(lambda *leaves: jnp.stack(leaves), *base) if cfg.max_displacement is not None else ()
        return jax.vmap(partial(descended, cfg=cfg))(displacement, joined(), closes, of_run)

    if b == 1:
        return TTTState(closed(before.displacement), (), after.count)
    displacement = jax.lax.cond(closes.any(), closed, lambda displacement: displacement, before.displacement)
    return TTTState(displacement, jax.vmap(cleared)(joined(), closes), after.count)


def cleared(steps: Descent, rows: jax.Array) -> Descent:
    """`steps` with 0 in `rows` (bool [B])."""
    return jax.tree.map(lambda x: jnp.where(rows[:, None, None, None], 0, x), steps)


def _retained(displacement: Network, base: Network, closes: jax.Array, cfg: TTTConfig) -> Network:
    """The displacement after decay and bound in rows whose mini-batch closes (bool [B])."""
    if cfg.horizon is not None:
        kept = jnp.where(closes, math.exp(-cfg.mini_batch / cfg.horizon), 1).astype(displacement[0].w.dtype)
        displacement = _scaled(displacement, kept[:, None])
    if cfg.max_displacement is not None:
        norm, limit = squared_norm(displacement), cfg.max_displacement**2 * squared_norm(base)
        beyond = closes[:, None] & (norm > limit) & (limit > 0)  # a base of zeros sets no bound
        displacement = _scaled(displacement, jnp.sqrt(jnp.where(beyond, limit, 1) / jnp.where(beyond, norm, 1)))
    return displacement


def _scaled(network: Network, factor: jax.Array) -> Network:
    """`network` [B, H, ...] times `factor` [B, H] or [B, 1]."""
    return jax.tree.map(lambda w: w * factor.reshape(factor.shape + (1,) * (w.ndim - 2)), network)
