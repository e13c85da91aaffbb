"""Sliding-window attention over a ring cache and the frames of the call. Plain functions on arrays.

Shapes: B rows, T frames of the call, S slots of the ring, H heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite: a query without any key must not turn into NaN


class Ring(NamedTuple):
    """Keys (rotated) and values of the last S valid frames of each row, frame at position p in slot p % S: [..., B, S, H, K]."""

    k: jax.Array
    v: jax.Array


class Positions(NamedTuple):
    """Where the frames of a call stand in their rows, and which keys they may see."""

    query: jax.Array
    """Position of each frame, int32 [B, T]; unbounded, never wrapped."""
    in_ring: jax.Array
    """bool [B, T, S]."""
    in_call: jax.Array
    """bool [B, T, T]."""


def init_ring(batch: int, slots: int, heads: int, width: int, dtype: jnp.dtype) -> Ring:
    """An empty ring of S = `slots` frames."""
    empty = jnp.zeros((batch, slots, heads, width), dtype)
    return Ring(empty, empty)


def positions(start: jax.Array, mask: jax.Array, context: int) -> Positions:
    """Positions of a call whose rows have seen `start` int32 [B] valid frames; `mask` bool [B, T]; window and ring of `context`."""
    query = start[:, None] + jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    slot = jnp.arange(context)[None]
    last = start[:, None] - 1
    held = last - (last - slot) % context  # newest position that the slot can hold; negative if none yet
    in_ring = (held >= 0)[:, None] & (query[:, :, None] - held[:, None] < context)
    distance = query[:, :, None] - query[:, None]
    in_call = (distance >= 0) & (distance < context) & mask[:, None]
    # A masked frame shares its position with a valid one before it: order within the call keeps it causal.
    return Positions(query, in_ring, in_call & jnp.tril(jnp.ones(in_call.shape[1:], bool)))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, ring: Ring, where: Positions) -> jax.Array:
    """Attention of the call's queries over ring and call; [B, T, H, K] each; softmax in float32 or wider.

    Ring and call are scored apart, so that the ring is read in place and never copied.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    slots = ring.k.shape[1]

    def scores(keys: jax.Array, seen: jax.Array) -> jax.Array:
        s = jnp.einsum("BTHK,BSHK->BHTS", q, keys, preferred_element_type=wide) * q.shape[-1] ** -0.5
        return jnp.where(seen[:, None], s, NEGATIVE)

    both = jnp.concatenate([scores(ring.k, where.in_ring), scores(k, where.in_call)], -1)
    weights = jax.nn.softmax(both, axis=-1).astype(q.dtype)
    read = jnp.einsum("BHTS,BSHK->BTHK", weights[..., :slots], ring.v)
    return read + jnp.einsum("BHTS,BSHK->BTHK", weights[..., slots:], v)


def write(ring: Ring, k: jax.Array, v: jax.Array, start: jax.Array, mask: jax.Array) -> Ring:
    """Puts the valid frames of a call into the rings of a run of layers.

    Args:
      ring: [L, B, S, H, K]; k, v: [L, B, T, H, K]; start, mask as in `positions`. Where more than S frames arrive only the
        last S stay.
    """
    slots = ring.k.shape[2]
    rank = jnp.cumsum(mask, 1) - 1
    stays = mask & (rank >= mask.sum(1, keepdims=True) - slots)
    slot = jnp.where(stays, (start[:, None] + rank) % slots, slots)
    rows = jnp.arange(mask.shape[0])[:, None]
    return Ring(*(old.at[:, rows, slot].set(new, mode="drop") for old, new in zip(ring, (k, v), strict=True)))
