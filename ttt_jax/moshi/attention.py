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
    keys, values, seen = (ring.k, k), (ring.v, v), (where.in_ring, where.in_call)
    scores = [
        jnp.where(part[:, None], _products(q, key) * q.shape[-1] ** -0.5, NEGATIVE)
        for key, part in zip(keys, seen, strict=True)
    ]
    highest = jnp.maximum(*(s.max(-1, keepdims=True) for s in scores))
    weights = [jnp.exp(s - highest) for s in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    return sum(_weighted((w / total).astype(q.dtype), value) for w, value in zip(weights, values, strict=True))


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, T, H, K], [B, S, H, K] -> [B, H, T, S] in float32 or wider."""
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def dot(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.einsum("BTHK,BSHK->BHTS", q, k, preferred_element_type=wide)

    def multiply_reduce(q: jax.Array, k: jax.Array) -> jax.Array:
        return (q.astype(wide) * k.astype(wide)).sum(-1).swapaxes(1, 2)[:, :, None]

    # One query: XLA's GPU products copy the ring out of its stack first, a reduction reads it in place.
    return jax.lax.platform_dependent(q, k, cuda=multiply_reduce, default=dot) if q.shape[1] == 1 else dot(q, k)


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """[B, H, T, S], [B, S, H, K] -> [B, T, H, K]."""
    wide = jnp.promote_types(v.dtype, jnp.float32)

    def dot(weights: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.einsum("BHTS,BSHK->BTHK", weights, v)

    def multiply_reduce(weights: jax.Array, v: jax.Array) -> jax.Array:
        rows = weights[:, :, 0].swapaxes(1, 2)[..., None].astype(wide)
        return (rows * v.astype(wide)).sum(1, keepdims=True).astype(v.dtype)

    one_query = weights.shape[2] == 1
    return jax.lax.platform_dependent(weights, v, cuda=multiply_reduce, default=dot) if one_query else dot(weights, v)


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
    return Ring(*(_put(old, new, slot) for old, new in zip(ring, (k, v), strict=True)))


def _put(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """`old` [L, B, S, H, K] with `new` [L, B, T, H, K] in the slots int32 [B, T]; slot S is nowhere."""

    def scatter(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        return old.at[:, jnp.arange(old.shape[1])[:, None], slot].set(new, mode="drop")

    def row_by_row(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        def put(row: jax.Array, old: jax.Array) -> jax.Array:
            at = (0, row, jnp.minimum(slot[row, 0], old.shape[2] - 1), 0, 0)
            size = (old.shape[0], 1, 1, *old.shape[3:])
            held, coming = jax.lax.dynamic_slice(old, at, size), jax.lax.dynamic_slice_in_dim(new, row, 1, 1)
            kept = jnp.where(slot[row, 0] < old.shape[2], coming, held)
            return jax.lax.dynamic_update_slice(old, kept, at)

        return jax.lax.fori_loop(0, old.shape[1], put, old)

    if new.shape[2] > 1:
        return scatter(old, new, slot)
    # One frame: on a CPU XLA copies all that it scatters into.
    return jax.lax.platform_dependent(old, new, slot, cpu=row_by_row, default=scatter)
