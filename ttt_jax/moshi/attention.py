"""Sliding-window attention over a KV cache and the frames of the call. Plain functions on arrays.

The cache is a ring of S slots: the frame at position p lies in slot p % S; a `Sink` keeps the first frames in theirs,
and the rest is the ring. A call of many frames reads the cache and the frames of the call, then writes (`attend`,
`write`; both in `attend_fused` where cuDNN's flash attention runs). A call of one frame writes first and then reads the
cache alone (`attend_one`): the same keys in fewer steps.

Shapes: B rows, T frames of the call, S slots of the cache, H heads, K head width, L layers.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.moshi.sink import Sink

NEGATIVE = -1e30  # finite: a query without any key must not turn into NaN


class KVCache(NamedTuple):
    """Keys (rotated) and values of the last S valid frames of each row, or of its sink and the last others: [..., B, H,
    S, K]. Slots: `slot_of`."""

    k: jax.Array
    v: jax.Array


class Positions(NamedTuple):
    """Positions of the frames of a call, and the keys that each frame may see."""

    query: jax.Array
    """Position of each frame, int32 [B, T]; unbounded, never wrapped."""
    valid: jax.Array
    """bool [B, T]."""
    in_cache: jax.Array
    """bool [B, T, S]; without the sink's keys."""
    in_call: jax.Array
    """bool [B, T, T]; without the sink's keys."""


class View(NamedTuple):
    """Queries, and N keys with values of which they see some."""

    q: jax.Array
    """[B, T, H, K]."""
    k: jax.Array
    """[B, H, N, K]."""
    v: jax.Array
    """[B, H, N, K]."""
    seen: jax.Array
    """bool [B, T, N]."""


def init_kv_cache(batch: int, slots: int, heads: int, width: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache of S = `slots` frames."""
    empty = jnp.zeros((batch, heads, slots, width), dtype)
    return KVCache(empty, empty)


def slot_of(position: jax.Array, slots: int, sink: Sink | None) -> jax.Array:
    """Slot of the cache in which the frame at `position` lies."""
    return position % slots if sink is None else sink.slot(position, slots)


def positions(start: jax.Array, mask: jax.Array, context: int, sink: Sink | None = None) -> Positions:
    """Positions of a call whose rows have seen `start` int32 [B] valid frames; `mask` bool [B, T]; window (a sink
    included) and cache of `context` frames."""
    first = 0 if sink is None else sink.frames
    window = context - first
    query = start[:, None] + jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    slot = jnp.arange(context)[None]
    last = start[:, None] - 1
    stored = last - (last - slot) % window  # position of the frame in the slot; below `first` if the slot is empty
    in_cache = (stored >= first)[:, None] & (query[:, :, None] - stored[:, None] < window)
    distance = query[:, :, None] - query[:, None]
    in_call = (distance >= 0) & (distance < window) & mask[:, None]
    if sink is not None:
        in_cache &= slot[:, None] >= first
        in_call &= query[:, None] >= first
    # A masked frame shares its position with a valid one before it: order within the call keeps it causal.
    return Positions(query, mask, in_cache, in_call & jnp.tril(jnp.ones(in_call.shape[1:], bool)))


def view_sink(
    q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: KVCache, start: jax.Array, where: Positions, sink: Sink
) -> View:
    """What the queries of a call see of the sink, whose frames may lie in the cache or in the call.

    Args: those of `attend`, and start: as in `positions`.
    """
    held = KVCache(*(leaf[None, :, :, : sink.frames] for leaf in kv_cache))
    first = write(held, k[None], v[None], start, where.valid & (where.query < sink.frames))
    seen = jnp.arange(sink.frames) <= where.query[..., None]
    return View(sink.turn(q, where.query, kv_cache.k.shape[2]), first.k[0], first.v[0], seen)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: KVCache, where: Positions, sink: View | None = None
) -> jax.Array:
    """Attention of the call's queries over cache and call, and over the `sink` of `view_sink`; [B, T, H, K] each;
    softmax in float32 or wider.

    Cache and call have separate scores, so that the cache is read in place and never copied.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    views = [View(q, *kv_cache, where.in_cache), View(q, k.swapaxes(1, 2), v.swapaxes(1, 2), where.in_call)]
    views += [] if sink is None else [sink]

    def score(view: View) -> jax.Array:
        s = jnp.einsum("BTHK,BHSK->BHTS", view.q, view.k, preferred_element_type=wide) * q.shape[-1] ** -0.5
        return jnp.where(view.seen[:, None], s, NEGATIVE)

    scores = [score(view) for view in views]
    highest = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in scores))
    weights = [jnp.exp(s - highest) for s in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    parts = ((w / total).astype(q.dtype) for w in weights)
    return sum(jnp.einsum("BHTS,BHSK->BTHK", w, view.v) for w, view in zip(parts, views, strict=True))


class Line(NamedTuple):
    """Cache and call in one line of places: the frames of the cache from the oldest, the call's valid frames, then the
    rest."""

    query: jax.Array
    """Position of each frame, int32 [B, T], as in `Positions`."""
    source: jax.Array
    """Source of each place of the line, int32 [B, S + T]: a slot of the cache, or S + a frame of the call."""
    frame: jax.Array
    """Frame of the call at each place, int32 [B, S + T]; T: a frame of the cache, or a place beyond the valid
    frames."""
    place: jax.Array
    """Place of each frame of the call, int32 [B, T]."""
    slot: jax.Array
    """Place of the frame that each slot of the cache holds after the call, int32 [B, S]."""
    to: jax.Array
    """Place of each slot of the cache and each frame of the call, int32 [B, S + T]; S + T: none."""
    keeper: jax.Array
    """Slot that stores the frame of each place after the call, int32 [B, S + T]; S: none."""


def can_fuse(frames: int, context: int, width: int, dtype: jnp.dtype, sink: Sink | None = None) -> bool:
    """Returns whether `attend_fused` can run: cuDNN's types and head widths, on a GPU, no sink, and a call that is long
    beside the cache.

    The line has as many queries as keys, so it also computes queries for the cache; for a short call that costs more
    than all scores.
    """
    fits = dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128 and sink is None
    return fits and 8 * frames >= context and jax.default_backend() == "gpu"


def line_up(start: jax.Array, mask: jax.Array, context: int) -> Line:
    """The `Line` of a call; arguments as for `positions`."""
    rank = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    held, valid = jnp.minimum(start, context)[:, None], mask.sum(1, keepdims=True)
    total = context + mask.shape[1]
    place = jnp.arange(total)[None]
    order = jnp.argsort(~mask, axis=1, stable=True)  # valid frames first, in order
    filler = jnp.take_along_axis(order, jnp.clip(place - held, 0, mask.shape[1] - 1), 1)
    source = jnp.where(place < held, (start[:, None] - held + place) % context, context + filler)
    frame = jnp.where((place >= held) & (place < held + valid), filler, mask.shape[1])
    last = start[:, None] + valid - 1
    age = (last - jnp.arange(context)[None]) % context  # of the frame in the slot; beyond the line if the slot is empty
    slot = jnp.maximum(held + valid - 1 - age, 0)
    oldest = (jnp.arange(context)[None] - (start[:, None] - held)) % context
    to = jnp.concatenate([jnp.where(oldest < held, oldest, total), jnp.where(mask, held + rank, total)], 1)
    stays = (place < held + valid) & (place >= held + valid - context)
    keeper = jnp.where(stays, (start[:, None] - held + place) % context, context)
    return Line(start[:, None] + rank, *(x.astype(jnp.int32) for x in (source, frame, held + rank, slot, to, keeper)))


def attend_fused(q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: KVCache, where: Line) -> tuple[jax.Array, KVCache]:
    """`attend` and `write` by cuDNN's flash attention with a sliding window, which stores no scores and skips keys out
    of reach.

    Returns:
      The read values [B, T, H, K] and the cache after the call.
    """
    context = kv_cache.k.shape[2]
    frames = k.shape[1]

    def line(held: jax.Array, new: jax.Array) -> jax.Array:
        return _move(jnp.concatenate([held.swapaxes(1, 2), new], 1), where.source, where.to)

    keys, values = line(kv_cache.k, k), line(kv_cache.v, v)
    read = jax.nn.dot_product_attention(
        _move(q, jnp.minimum(where.frame, frames - 1), where.to[:, context:]),
        keys,
        values,
        is_causal=True,
        local_window_size=(context - 1, 0),
        implementation="cudnn",
    )
    kept = KVCache(*(_move(x, where.slot, where.keeper).swapaxes(1, 2) for x in (keys, values)))
    return _move(read, where.place, where.frame), kept


@jax.custom_vjp
def _move(x: jax.Array, source: jax.Array, to: jax.Array) -> jax.Array:
    """x[b, source[b, n]], [B, N, H, K] of [B, M, H, K]; `to` int32 [B, M] is the n of each entry, N if none.

    The gradient is a gather by `to`, too: JAX's own gradient of a gather is a scatter, which takes longer than the
    attention. Copies in places beyond the valid frames get no gradient.
    """
    return jnp.take_along_axis(x, source[:, :, None, None], 1)


def _move_forward(x: jax.Array, source: jax.Array, to: jax.Array):
    return _move(x, source, to), to


def _move_backward(to: jax.Array, grad: jax.Array):
    index = jnp.minimum(to, grad.shape[1] - 1)[:, :, None, None]
    return jnp.where((to < grad.shape[1])[:, :, None, None], jnp.take_along_axis(grad, index, 1), 0), None, None


_move.defvjp(_move_forward, _move_backward)


def write(
    kv_caches: KVCache, k: jax.Array, v: jax.Array, start: jax.Array, mask: jax.Array, sink: Sink | None = None
) -> KVCache:
    """Writes the valid frames of a call into the caches of a run of layers.

    Args:
      kv_caches: [L, B, H, S, K]; k, v: [L, B, T, H, K]; start, mask: as in `positions`. Of more than S frames the last
        S stay; with a sink, its frames and the last of the others.
    """
    slots = kv_caches.k.shape[3]
    rank = jnp.cumsum(mask, 1) - 1
    ring = slots if sink is None else slots - sink.frames
    stays = mask & (rank >= mask.sum(1, keepdims=True) - ring)
    position = start[:, None] + rank
    if sink is not None:
        stays |= mask & (position < sink.frames)
    slot = jnp.where(stays, slot_of(position, slots, sink), slots)
    rows = jnp.arange(mask.shape[0])[:, None]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[:, rows, :, slot].set(jnp.moveaxis(new, 0, 2), mode="drop")

    return KVCache(put(kv_caches.k, k), put(kv_caches.v, v))


def attend_one(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_caches: KVCache,
    layer: int,
    position: jax.Array,
    mask: jax.Array,
    sink: Sink | None = None,
) -> tuple[jax.Array, KVCache]:
    """`attend` and `write` for a call of one frame in one layer of stacked caches.

    Args:
      q, k, v: [B, 1, H, K]; kv_caches: [L, B, H, S, K]; position: int32 [B], of the frame; mask: bool [B].

    Returns:
      The read values [B, 1, H, K], and the caches with the frame in the rows where `mask`.
    """
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    slots, wide = kv_caches.k.shape[3], jnp.promote_types(q.dtype, jnp.float32)
    slot = jnp.where(mask, slot_of(position, slots, sink), slots)
    kv_caches = KVCache(_put(kv_caches.k, k, layer, slot), _put(kv_caches.v, v, layer, slot))
    keys, values = kv_caches.k[layer], kv_caches.v[layer]

    # XLA's GPU products copy the caches out of their stack first; reductions read them in place.
    def dot_keys(q: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.einsum("BHK,BHSK->BHS", q, keys, preferred_element_type=wide)

    def reduce_keys(q: jax.Array, keys: jax.Array) -> jax.Array:
        return (q.astype(wide)[:, :, None] * keys.astype(wide)).sum(-1)

    def dot_values(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("BHS,BHSK->BHK", weights.astype(values.dtype), values)

    def reduce_values(weights: jax.Array, values: jax.Array) -> jax.Array:
        parts = math.gcd(slots, 8)  # more parts than heads, so that they fill the device
        split = lambda y: y.reshape(*y.shape[:2], parts, slots // parts, -1)  # noqa: E731
        return (split(weights) * split(values).astype(wide)).sum(3).sum(2).astype(values.dtype)

    def score(q: jax.Array, keys: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(q, keys, cuda=reduce_keys, default=dot_keys) * q.shape[-1] ** -0.5

    scores = score(q, keys)
    if sink is not None:
        turned = sink.turn(q[:, None], position[:, None], slots)[:, 0]
        scores = scores.at[..., : sink.frames].set(score(turned, keys[:, :, : sink.frames]))
    filled = (jnp.arange(slots) <= position[:, None])[:, None]
    weights = jax.nn.softmax(jnp.where(filled, scores, NEGATIVE), axis=-1)
    read = jax.lax.platform_dependent(weights, values, cuda=reduce_values, default=dot_values)
    return read[:, None], kv_caches


def _put(kv_caches: jax.Array, new: jax.Array, layer: int, slot: jax.Array) -> jax.Array:
    """`kv_caches` [L, B, H, S, K] with `new` [B, H, K] in the slots int32 [B] of a layer; slot S is nowhere."""
    rows, slots = new.shape[0], kv_caches.shape[3]

    def row_by_row(kv_caches: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        def put(row: int | jax.Array, kv_caches: jax.Array) -> jax.Array:
            at = tuple(jnp.int32(i) for i in (layer, row, 0, jnp.minimum(slot[row], slots - 1), 0))
            held = jax.lax.dynamic_slice(kv_caches, at, (1, 1, new.shape[1], 1, new.shape[2]))
            coming = jax.lax.dynamic_slice_in_dim(new, row, 1)[None, :, :, None]
            return jax.lax.dynamic_update_slice(kv_caches, jnp.where(slot[row] < slots, coming, held), at)

        return jax.lax.fori_loop(0, rows, put, kv_caches) if rows > 1 else put(0, kv_caches)

    def scatter(kv_caches: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        return kv_caches.at[layer, jnp.arange(rows), :, slot].set(new, mode="drop")

    if rows == 1:
        return row_by_row(kv_caches, new, slot)
    # On a CPU XLA copies the array that it scatters into.
    return jax.lax.platform_dependent(kv_caches, new, slot, cpu=row_by_row, default=scatter)
