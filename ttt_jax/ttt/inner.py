"""The inner loop: mini-batches of frames through fast weights, as a pure scan. No Flax, no parameters.

For every frame i of a mini-batch that starts at weights W, the parallel ("dual") form computes what the written-out
descent reads, W_i = W - sum_{j<=i} eta_j grad l(W; k_j, t_j), without forming W_i (`network.py`). The scan goes over
mini-batches.

Shapes: B rows, T frames, H heads, D head width, M mini-batches that a call touches, C slots in one, I and O the widths
that one affine map of the inner network joins. Everything here is float32, or float64 when the input is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.config import TTTConfig
from ttt_jax.distributed.sharding import per_row
from ttt_jax.ttt.measure import InnerMeasurement, measure
from ttt_jax.ttt.network import (
    Descent,
    Frames,
    Inputs,
    Network,
    Seen,
    apply,
    causal,
    descend,
    halves,
    layer_norm,
    overlap,
    prepare,
    put,
    read,
    readable,
)
from ttt_jax.ttt.state import TTTState, cleared, descended


class Layout(NamedTuple):
    """Places of the frames of a call in the mini-batches of their rows."""

    frame: jax.Array
    """Frame in each slot, int32 [B, M, C]; T where the slot is empty."""
    closes: jax.Array
    """Whether the mini-batch is full at the end of the call, bool [B, M]."""
    slot: jax.Array
    """Slot of each frame in the flattened [M * C], int32 [B, T]; M * C for masked frames."""


def layout(mask: jax.Array, count: jax.Array, mini_batch: int) -> Layout:
    """Places the valid frames of a call in the mini-batches of their rows, each row from its phase.

    The first mini-batch of a call may be one that earlier calls opened: its frames lie at the left, the steps before
    them are in the state. A call of T frames thus touches at most ceil((T - 1) / b) + 1 mini-batches of min(b,
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


def advance(
    base: Network,
    scale: jax.Array,
    bias: jax.Array,
    displacement: Network,
    x: Frames,
    open_steps: Descent | tuple[()] = (),
    phase: jax.Array | None = None,
    measured: bool = False,
    apart: bool = False,
) -> tuple[Descent, tuple[jax.Array, InnerMeasurement | None]]:
    """Steps of frames of a mini-batch, and what is put out for them.

    Args:
      base, displacement: of the weights at which the mini-batch started; scale, bias: inner LayerNorm [H, 1, D].
      x: C frames, with products that `prepare` made.
      open_steps: of frames of the mini-batch before these, in the slots before the `phase` (int32 [B]).
      measured: whether to measure, too; apart: as in `network.readable`.

    Returns:
      The steps of the C frames; z [B, H, C, D] and the measurement or None.
    """
    now, q = readable(base, displacement, apart), halves(x.kq)[1]
    k_first, q_first = halves(x.at_base + apply(x.kq, *now[0]))
    own = descend(now, k_first, scale, bias, x)
    taken = [Seen(own, x.overlap, causal(q.shape[2]))]
    if open_steps:
        is_open = jnp.arange(open_steps.inputs[0].shape[2]) < phase[:, None, None, None]
        taken.append(Seen(open_steps, overlap(q, open_steps.inputs[0], is_open), is_open))
    z = q + layer_norm(read(now, q_first, *taken), scale, bias)
    return own, (z, measure(base, scale, bias, displacement, now, taken, x) if measured else None)


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
    would lose small updates to rounding. It does not carry steps: only the first mini-batch of a call may have some
    before its own, and those of the mini-batch that stays open are computed once more, at the end.

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
    batches = place.frame.shape[1]
    xs = Inputs(*(_to_slots(x, place.frame) for x in inputs))
    filled = jnp.moveaxis(place.frame < mask.shape[1], 1, 0)[:, :, None]
    xs, closes = xs._replace(eta=jnp.where(filled, xs.eta, 0)), place.closes.T

    # Over a mesh the scan reads a copy for each row, so that gradients are summed over rows, and so over devices, once
    # after the scan instead of in each of its steps.
    of_rows, row_scale, row_bias = per_row((base, scale, bias), mask.shape[0])

    def body(displacement: Network, x: tuple[Frames, jax.Array]):
        frames, closes = x
        steps, out = advance(of_rows, row_scale, row_bias, displacement, frames, measured=measured)
        return descended(displacement, steps, closes, of_rows, cfg), out

    displacement, open_steps, outs = state.displacement, state.open_steps, []
    phase, valid = state.count % cfg.mini_batch, mask.sum(1, dtype=jnp.int32)
    if open_steps:
        first = prepare(of_rows, jax.tree.map(lambda x: x[0], xs))
        own, out = advance(of_rows, row_scale, row_bias, displacement, first, open_steps, phase, measured)
        steps = put(open_steps, own, phase, first.eta)
        displacement = descended(displacement, steps, closes[0], of_rows, cfg)
        open_steps = cleared(steps, closes[0])
        outs.append(jax.tree.map(lambda y: y[None], out))
    if len(outs) < batches:
        rest = jax.tree.map(lambda x: x[len(outs) :], (xs, closes))
        ahead = lambda x: (prepare(of_rows, x[0]), x[1])  # noqa: E731
        displacement, out = _grouped_scan(body, ahead, displacement, rest, batches - len(outs), cfg.remat_group)
        outs.append(out)
    if open_steps and batches > 1:
        index = jnp.minimum((phase + valid) // cfg.mini_batch, batches - 1)
        last = prepare(of_rows, jax.tree.map(lambda x: _pick(x, index), xs))
        now = readable(of_rows, displacement)
        k_first = halves(last.at_base + apply(last.kq, *now[0]))[0]
        steps = descend(now, k_first, row_scale, row_bias, last)
        steps = put(jax.tree.map(jnp.zeros_like, open_steps), steps, jnp.zeros_like(phase), last.eta)
        open_steps = _where(index == 0, open_steps, cleared(steps, _pick(closes, index)))
    z, measurement = jax.tree.map(lambda *ys: _to_frames(jnp.concatenate(ys), place.slot, mask), *outs)
    return TTTState(displacement, open_steps, state.count + valid), z, measurement


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


def _where(rows: jax.Array, a: Descent, b: Descent) -> Descent:
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
