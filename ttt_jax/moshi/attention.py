"""Sliding-window attention over a ring cache and the frames of the call. Plain functions on arrays.

A call of many frames reads the ring as it was and the frames of the call, and writes afterwards (`attend`, `write`); a call of
one frame writes first and reads the ring alone (`attend_one`), the same keys in fewer steps.

Shapes: B rows, T frames of the call, S slots of the ring, H heads, K head width, L layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite: a query without any key must not turn into NaN


class Ring(NamedTuple):
    """Keys (rotated) and values of the last S valid frames of each row, frame at position p in slot p % S: [..., B, H, S, K]."""

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
    empty = jnp.zeros((batch, heads, slots, width), dtype)
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
    keys, values, seen = (ring.k, k.swapaxes(1, 2)), (ring.v, v.swapaxes(1, 2)), (where.in_ring, where.in_call)

    def score(key: jax.Array, seen: jax.Array) -> jax.Array:
        s = jnp.einsum("BTHK,BHSK->BHTS", q, key, preferred_element_type=wide) * q.shape[-1] ** -0.5
        return jnp.where(seen[:, None], s, NEGATIVE)

    scores = [score(*part) for part in zip(keys, seen, strict=True)]
    highest = jnp.maximum(*(s.max(-1, keepdims=True) for s in scores))
    weights = [jnp.exp(s - highest) for s in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    parts = ((w / total).astype(q.dtype) for w in weights)
    return sum(jnp.einsum("BHTS,BHSK->BTHK", w, value) for w, value in zip(parts, values, strict=True))


def write(rings: Ring, k: jax.Array, v: jax.Array, start: jax.Array, mask: jax.Array) -> Ring:
    """Puts the valid frames of a call into the rings of a run of layers.

    Args:
      rings: [L, B, H, S, K]; k, v: [L, B, T, H, K]; start, mask as in `positions`. Where more than S frames arrive only the
        last S stay.
    """
    slots = rings.k.shape[3]
    rank = jnp.cumsum(mask, 1) - 1
    stays = mask & (rank >= mask.sum(1, keepdims=True) - slots)
    slot = jnp.where(stays, (start[:, None] + rank) % slots, slots)
    rows = jnp.arange(mask.shape[0])[:, None]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[:, rows, :, slot].set(jnp.moveaxis(new, 0, 2), mode="drop")

    return Ring(put(rings.k, k), put(rings.v, v))


def attend_one(
    q: jax.Array, k: jax.Array, v: jax.Array, rings: Ring, layer: int, position: jax.Array, mask: jax.Array
) -> tuple[jax.Array, Ring]:
    """`attend` and `write` for a call of one frame in one of the layers whose rings are stacked.

    Args:
      q, k, v: [B, 1, H, K]; rings: [L, B, H, S, K]; position: int32 [B], of the frame; mask: bool [B].

    Returns:
      What is read, [B, 1, H, K], and the rings with the frame in the rows where `mask`.
    """
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    slots, wide = rings.k.shape[3], jnp.promote_types(q.dtype, jnp.float32)
    slot = jnp.where(mask, position % slots, slots)
    rings = Ring(_put(rings.k, k, layer, slot), _put(rings.v, v, layer, slot))
    keys, values = rings.k[layer], rings.v[layer]

    # XLA's GPU products copy the rings out of their stack first, reductions read them in place.
    def dot_keys(q: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.einsum("BHK,BHSK->BHS", q, keys, preferred_element_type=wide)

    def reduce_keys(q: jax.Array, keys: jax.Array) -> jax.Array:
        return (q.astype(wide)[:, :, None] * keys.astype(wide)).sum(-1)

    def dot_values(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("BHS,BHSK->BHK", weights.astype(values.dtype), values)

    def reduce_values(weights: jax.Array, values: jax.Array) -> jax.Array:
        parts = math.gcd(slots, 8)  # more of them than heads, so that they fill the device
        split = lambda y: y.reshape(*y.shape[:2], parts, slots // parts, -1)  # noqa: E731
        return (split(weights) * split(values).astype(wide)).sum(3).sum(2).astype(values.dtype)

    scores = jax.lax.platform_dependent(q, keys, cuda=reduce_keys, default=dot_keys) * q.shape[-1] ** -0.5
    held = (jnp.arange(slots) <= position[:, None])[:, None]
    weights = jax.nn.softmax(jnp.where(held, scores, NEGATIVE), axis=-1)
    read = jax.lax.platform_dependent(weights, values, cuda=reduce_values, default=dot_values)
    return read[:, None], rings


def _put(rings: jax.Array, new: jax.Array, layer: int, slot: jax.Array) -> jax.Array:
    """`rings` [L, B, H, S, K] with `new` [B, H, K] in the slots int32 [B] of a layer; slot S is nowhere."""
    rows, slots = new.shape[0], rings.shape[3]

    def row_by_row(rings: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        def put(row: int | jax.Array, rings: jax.Array) -> jax.Array:
            at = tuple(jnp.int32(i) for i in (layer, row, 0, jnp.minimum(slot[row], slots - 1), 0))
            held = jax.lax.dynamic_slice(rings, at, (1, 1, new.shape[1], 1, new.shape[2]))
            coming = jax.lax.dynamic_slice_in_dim(new, row, 1)[None, :, :, None]
            return jax.lax.dynamic_update_slice(rings, jnp.where(slot[row] < slots, coming, held), at)

        return jax.lax.fori_loop(0, rows, put, rings) if rows > 1 else put(0, rings)

    def scatter(rings: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        return rings.at[layer, jnp.arange(rows), :, slot].set(new, mode="drop")

    if rows == 1:
        return row_by_row(rings, new, slot)
    # On a CPU XLA copies all that it scatters into.
    return jax.lax.platform_dependent(rings, new, slot, cpu=row_by_row, default=scatter)
