"""The inner loop: mini-batches of frames through fast weights, as a pure scan. No Flax, no parameters.

For every frame i of a mini-batch that starts at weights W, the parallel ("dual") form computes what the written-out
descent reads, W_i = W - sum_{j<=i} eta_j grad l(W; k_j, t_j), without forming W_i (`network.py`). The scan goes over
mini-batches.

Shapes: B rows, T frames, H heads, D head width, M mini-batches that a call touches, C slots in one, I and O the widths
  that
one affine map of the inner network joins. Everything here is float32, or float64 when the input is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.config import TTTConfig
from ttt_jax.distributed.sharding import per_row
from ttt_jax.ttt.measure import InnerMeasurement, measure
from ttt_jax.ttt.network import (
    Affine,
    Frames,
    Inputs,
    Network,
    apply,
    causal,
    descend,
    halves,
    layer_norm,
    prepare,
    read,
    readable,
    squared_norm,
    total,
    widths,
)


class TTTState(NamedTuple):
    """State of a TTT layer, row by row. A fresh state is zeros and needs no parameters."""

    displacement: Network
    """Fast weights minus base, [B, H, I, O] and [B, H, O]."""
    open_sum: Network
    """Rate-weighted gradients of the mini-batch that is still open, same shapes; () with b = 1, where every frame
    closes a mini-batch."""
    count: jax.Array
    """Valid frames seen, int32 [B]; modulo b it is the row's phase in its mini-batch."""


class Layout(NamedTuple):
    """Places of the frames of a call in the mini-batches of their rows."""

    frame: jax.Array
    """Frame in each slot, int32 [B, M, C]; T where the slot is empty."""
    closes: jax.Array
    """Whether the mini-batch is full at the end of the call, bool [B, M]."""
    slot: jax.Array
    """Slot of each frame in the flattened [M * C], int32 [B, T]; M * C for masked frames."""


def init_state(
    batch: int, heads: int, head_dim: int, hidden: tuple[int, ...], mini_batch: int, dtype: jnp.dtype
) -> TTTState:
    """A fresh state for `batch` rows: zeros."""

    def zeros() -> Network:
        return tuple(
            Affine(jnp.zeros((batch, heads, i, o), dtype), jnp.zeros((batch, heads, o), dtype))
            for i, o in widths(head_dim, hidden)
        )

    return TTTState(zeros(), zeros() if mini_batch > 1 else (), jnp.zeros((batch,), jnp.int32))


def scaled(network: Network, factor: jax.Array) -> Network:
    """`network` [B, H, ...] times `factor` [B, H] or [B, 1]."""
    return jax.tree.map(lambda w: w * factor.reshape(factor.shape + (1,) * (w.ndim - 2)), network)


def retain(displacement: Network, base: Network, closes: jax.Array, cfg: TTTConfig) -> Network:
    """The displacement after decay and bound in rows whose mini-batch closes (bool [B])."""
    if cfg.horizon is not None:
        kept = jnp.where(closes, math.exp(-cfg.mini_batch / cfg.horizon), 1).astype(base[0].w.dtype)
        displacement = scaled(displacement, kept[:, None])
    if cfg.max_displacement is not None:
        norm, limit = squared_norm(displacement), cfg.max_displacement**2 * squared_norm(base)
        beyond = closes[:, None] & (norm > limit) & (limit > 0)  # a base of zeros sets no bound
        displacement = scaled(displacement, jnp.sqrt(jnp.where(beyond, limit, 1) / jnp.where(beyond, norm, 1)))
    return displacement


def layout(mask: jax.Array, count: jax.Array, mini_batch: int) -> Layout:
    """Places the valid frames of a call in the mini-batches of their rows, each row from its phase.

    The first mini-batch of a call may be one that earlier calls opened: its frames lie at the left, the gradients
    before them are in the state. A call of T frames thus touches at most ceil((T - 1) / b) + 1 mini-batches of min(b,
    T) slots.

    Args:
      mask: bool [B, T], valid frames.
      count: int32 [B], valid frames of the row before this call.
      mini_batch: b.
    """
    rows, frames = mask.shape
    slots = min(mini_batch, frames)
    batches = -(-(frames - 1) // mini_batch) + 1
    phase = (count % mini_batch)[:, None]
    rank = jnp.cumsum(mask, 1) - 1
    batch = (phase + rank) // mini_batch
    slot = batch * slots + jnp.where(batch == 0, rank, phase + rank - batch * mini_batch)
    slot = jnp.where(mask, slot, batches * slots).astype(jnp.int32)
    frame = jnp.full((rows, batches * slots), frames, jnp.int32)
    frame = frame.at[jnp.arange(rows)[:, None], slot].set(jnp.arange(frames, dtype=jnp.int32)[None], mode="drop")
    closes = phase + mask.sum(1, keepdims=True) >= (jnp.arange(batches)[None] + 1) * mini_batch
    return Layout(frame.reshape(rows, batches, slots), closes, slot)


def inner_scan(
    base: Network,
    scale: jax.Array,
    bias: jax.Array,
    state: TTTState,
    inputs: Inputs,
    mask: jax.Array,
    cfg: TTTConfig,
    measured: bool = False,
) -> tuple[TTTState, jax.Array, InnerMeasurement | None]:
    """Runs the inner loop over a call of any length.

    The scan carries the displacement and adds the base where weights are read: forming the displacement as a difference
    would lose small updates to rounding. It does not carry the sum of the open mini-batch: only the first mini-batch of
    a call starts from one, and the sum of the mini-batch that stays open is computed once, at the end.

    Args:
      base: W0, [H, I, O] and [H, O]; scale, bias: inner LayerNorm [H, D].
      state: of B rows, at any phases.
      inputs: q, k, t, eta of T frames; masked frames hold any finite number.
      mask: bool [B, T], valid frames.
      cfg: of the layer.
      measured: whether to measure, too.

    Returns:
      The state after the call; z = q + LN(f_{W_i}(q)) [B, T, H, D], 0 where masked; the measurement or None.
    """
    scale, bias = scale[:, None], bias[:, None]
    place = layout(mask, state.count, cfg.mini_batch)
    batches, slots = place.frame.shape[1:]
    xs = Inputs(*(_to_slots(x, place.frame) for x in inputs))
    filled = jnp.moveaxis(place.frame < mask.shape[1], 1, 0)[:, :, None]
    xs, closes = xs._replace(eta=jnp.where(filled, xs.eta, 0)), place.closes.T

    # Over a mesh the scan reads a copy for each row, so that gradients are summed over rows, and so over devices, once
    # after the scan instead of in each of its steps.
    of_rows, row_scale, row_bias = per_row((base, scale, bias), mask.shape[0])

    def advance(displacement: Network, open_sum: Network, x: Frames):
        """The steps of the frames of one mini-batch, and what is put out for them."""
        now = readable(of_rows, displacement)
        k_first, q_first = halves(x.at_base + apply(x.kq, now[0]))
        descent, q = descend(now, k_first, row_scale, row_bias, x), halves(x.kq)[1]
        if open_sum:
            now, q_first = jax.tree.map(jnp.subtract, now, open_sum), q_first - apply(q, open_sum[0])
        z = q + layer_norm(read(now, q_first, x.overlap, descent, causal(x.overlap)), row_scale, row_bias)
        return descent, (z, measure(base, scale, bias, displacement, open_sum, descent, x) if measured else None)

    def body(displacement: Network, x: tuple[Frames, jax.Array]):
        frames, closes = x
        descent, out = advance(displacement, (), frames)
        displacement = jax.tree.map(jnp.add, displacement, total(descent, -closes.astype(scale.dtype)))
        return retain(displacement, of_rows, closes, cfg), out

    displacement, open_sum, outs = state.displacement, state.open_sum, []
    if open_sum:
        descent, out = advance(displacement, open_sum, prepare(of_rows, jax.tree.map(lambda x: x[0], xs)))
        open_sum = jax.tree.map(jnp.add, open_sum, total(descent, jnp.ones(mask.shape[0], scale.dtype)))
        displacement = _where(closes[0], jax.tree.map(jnp.subtract, displacement, open_sum), displacement)
        displacement = retain(displacement, base, closes[0], cfg)
        outs.append(jax.tree.map(lambda y: y[None], out))
    if len(outs) < batches:
        rest = jax.tree.map(lambda x: x[len(outs) :], (xs, closes))
        ahead = lambda x: (prepare(of_rows, x[0]), x[1])  # noqa: E731
        displacement, out = _grouped_scan(body, ahead, displacement, rest, batches - len(outs), cfg.remat_group)
        outs.append(out)
    valid = mask.sum(1, dtype=jnp.int32)
    if open_sum:
        reached = state.count % cfg.mini_batch + valid  # frames since the first mini-batch began
        index, newly_open = reached // cfg.mini_batch, jax.tree.map(jnp.zeros_like, open_sum)
        if batches > 1:
            last = prepare(of_rows, jax.tree.map(lambda x: _pick(x, jnp.minimum(index, batches - 1)), xs))
            now = readable(of_rows, displacement)
            first = halves(last.at_base + apply(last.kq, now[0]))[0]
            is_open = (reached % cfg.mini_batch > 0).astype(first.dtype)
            newly_open = total(descend(now, first, scale, bias, last), is_open)
        open_sum = _where(index == 0, open_sum, newly_open)
    z, measurement = jax.tree.map(lambda *ys: _to_frames(jnp.concatenate(ys), place.slot, mask), *outs)
    return TTTState(displacement, open_sum, state.count + valid), z, measurement


def _to_slots(x: jax.Array, frame: jax.Array) -> jax.Array:
    """[B, T, H, ...] -> [M, B, H, C, ...] by `Layout.frame`; empty slots hold some frame's."""
    rows, batches, slots = frame.shape
    index = jnp.minimum(frame, x.shape[1] - 1).reshape(rows, batches * slots, *(1,) * (x.ndim - 2))
    x = jnp.take_along_axis(x, index, 1).reshape(rows, batches, slots, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)


def _to_frames(x: jax.Array, slot: jax.Array, mask: jax.Array) -> jax.Array:
    """[M, B, H, C, ...] -> [B, T, H, ...] by `Layout.slot`; masked frames hold 0."""
    x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 3, 2)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    lift = lambda y: y.reshape(*y.shape, *(1,) * (x.ndim - 2))  # noqa: E731
    x = jnp.take_along_axis(x, lift(jnp.minimum(slot, x.shape[1] - 1)), 1)
    return jnp.where(lift(mask), x, 0)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """[M, B, ...] -> [B, ...], of each row the entry at `index` int32 [B]."""
    return jnp.take_along_axis(x, index.reshape(1, -1, *(1,) * (x.ndim - 2)), 0)[0]


def _where(rows: jax.Array, a: Network, b: Network) -> Network:
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b)


def _grouped_scan(body, ahead, carry, xs, length: int, group: int):
    """`lax.scan` of `body` over `ahead(xs)`, a group of steps at a time.

    The forward pass stores the carry at group boundaries; the backward pass stores the carry of each step of one group
    and computes all else again, which is faster than to store it.
    """
    body = jax.checkpoint(body, prevent_cse=False)

    def run(carry, xs):
        return jax.lax.scan(body, carry, ahead(xs))

    if length <= group:
        return run(carry, xs)
    run = jax.checkpoint(run, prevent_cse=False)
    whole = length - length % group
    head = jax.tree.map(lambda x: x[:whole].reshape(-1, group, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(run, carry, head)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole == length:
        return carry, ys
    carry, rest = run(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, rest)
