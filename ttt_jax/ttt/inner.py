"""The inner loop: gradient descent on a small network per head, as a pure scan. No Flax, no parameters of its own.

For every frame i of a mini-batch that starts at weights W, the parallel ("dual") form computes what the written-out descent
reads, W_i = W - sum_{j<=i} eta_j grad l(W; k_j, t_j), without forming W_i: a layer's input times a sum of outer products is
attention with a lower-triangular mask (Sun et al. 2024, section 2.5, with the mask that makes it causal).

Shapes: B rows, T frames, H heads, D head width, M mini-batches that a call touches, C slots in one, I and O the widths that
one affine map of the inner network joins. Everything here is float32, or float64 when the input is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LN_EPS = 1e-8


class Affine(NamedTuple):
    """One affine map of the inner network, or something of its shape: a displacement, a gradient."""

    w: jax.Array  # [..., H, I, O]
    b: jax.Array  # [..., H, O]


Network = tuple[Affine, ...]


class TTTState(NamedTuple):
    """What a TTT layer remembers of each row. A fresh state is zeros and needs no parameters."""

    displacement: Network
    """Fast weights minus base, [B, H, I, O] and [B, H, O]."""
    open_sum: Network
    """Rate-weighted gradients of the mini-batch that is still open, same shapes; () when every frame closes its own (b = 1)."""
    count: jax.Array
    """Valid frames seen, int32 [B]; modulo b it is the row's phase in its mini-batch."""


class Layout(NamedTuple):
    """Where the frames of a call lie in the mini-batches of their rows."""

    frame: jax.Array
    """Frame in each slot, int32 [B, M, C]; T where the slot is empty."""
    closes: jax.Array
    """Whether the mini-batch is full at the end of the call, bool [B, M]."""
    slot: jax.Array
    """Slot of each frame in the flattened [M * C], int32 [B, T]; M * C for masked frames."""


class Inputs(NamedTuple):
    """What the inner loop reads of each frame."""

    q: jax.Array  # [B, T, H, D]
    k: jax.Array  # [B, T, H, D]
    t: jax.Array  # [B, T, H, D]
    eta: jax.Array  # [B, T, H]


def widths(head_dim: int, hidden: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(I, O) of every affine map of an inner network with the given hidden widths in multiples of `head_dim`."""
    sizes = (head_dim, *(m * head_dim for m in hidden), head_dim)
    return tuple(zip(sizes[:-1], sizes[1:], strict=True))


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


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float = LN_EPS) -> jax.Array:
    """LayerNorm over the last axis with biased variance."""
    return scale * _normalise(x, eps)[0] + bias


def _normalise(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    centred = x - x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * rstd, rstd


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    c, a = 0.7978845608028654, 0.044715  # sqrt(2 / pi); Hendrycks and Gimpel 2016
    tanh = jnp.tanh(c * x * (1 + a * x * x))
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * c * (1 + 3 * a * x * x)


def _apply(x: jax.Array, affine: Affine) -> jax.Array:
    return jnp.einsum("BHCI,BHIO->BHCO", x, affine.w) + affine.b[:, :, None]


def gradients(network: Network, k: jax.Array, t: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[list, list]:
    """Factors of each frame's gradient of the inner loss 0.5 * |LN(f_W(k)) - t|^2, all taken at the same weights.

    Args:
      network: weights, [B, H, I, O] and [B, H, O].
      k, t: keys and targets [B, H, C, D].
      scale, bias: of the LayerNorm, [H, 1, D].

    Returns:
      inputs x_l [B, H, C, I] of the affine maps and the loss gradients g_l [B, H, C, O] at their outputs: the gradient of
      frame c with respect to the weights of map l is the outer product of x_l[c] and g_l[c], to its bias g_l[c].
    """
    inputs, slopes, x = [], [], k
    for affine in network[:-1]:
        inputs.append(x)
        x, slope = _gelu_and_slope(_apply(x, affine))
        slopes.append(slope)
    inputs.append(x)
    normed, rstd = _normalise(_apply(x, network[-1]), LN_EPS)
    g = (scale * normed + bias - t) * scale
    g = (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True)) * rstd
    grads = [g]
    for affine, slope in zip(network[:0:-1], slopes[::-1], strict=True):
        g = jnp.einsum("BHCO,BHIO->BHCI", g, affine.w) * slope
        grads.insert(0, g)
    return inputs, grads


def mini_batch_step(
    base: Network,
    scale: jax.Array,
    bias: jax.Array,
    displacement: Network,
    open_sum: Network,
    q: jax.Array,
    k: jax.Array,
    t: jax.Array,
    eta: jax.Array,
    closes: jax.Array,
) -> tuple[tuple[Network, Network], jax.Array]:
    """Takes the frames of one mini-batch, or those of it that a call brings.

    Args:
      base: learned initial weights W0, [H, I, O] and [H, O].
      scale, bias: of the inner LayerNorm, [H, 1, D].
      displacement, open_sum: the carried state.
      q, k, t: [B, H, C, D] in the order of time; eta: rates [B, H, C], 0 in empty slots.
      closes: bool [B], whether the mini-batch ends here.

    Returns:
      (displacement, open_sum) and the outputs q + LN(f_{W_i}(q)) [B, H, C, D].
    """
    start = jax.tree.map(lambda w0, d: w0 + d, base, displacement)
    inputs, grads = gradients(start, k, t, scale, bias)
    steps = [eta[..., None] * g for g in grads]

    causal = jnp.tril(jnp.ones((q.shape[2],) * 2, q.dtype))
    before = jax.tree.map(lambda w, g: w - g, start, open_sum) if open_sum else start
    x = q
    for layer, (affine, x_k, step) in enumerate(zip(before, inputs, steps, strict=True)):
        x = _gelu(x) if layer else x
        # The +1 is the bias: its update does not depend on the input.
        overlap = (jnp.einsum("BHCI,BHSI->BHCS", x, x_k) + 1) * causal
        x = _apply(x, affine) - jnp.einsum("BHCS,BHSO->BHCO", overlap, step)
    z = q + layer_norm(x, scale, bias)

    sums = tuple(
        Affine(jnp.einsum("BHCI,BHCO->BHIO", x_k, step), step.sum(2)) for x_k, step in zip(inputs, steps, strict=True)
    )
    if not open_sum:
        return (jax.tree.map(lambda d, s: d - s, displacement, sums), open_sum), z
    sums = jax.tree.map(jnp.add, open_sum, sums)
    keep = lambda new, old: jnp.where(closes.reshape(-1, *(1,) * (old.ndim - 1)), new, old)  # noqa: E731
    closed = jax.tree.map(lambda d, s: keep(d - s, d), displacement, sums)
    return (closed, jax.tree.map(lambda s: keep(jnp.zeros_like(s), s), sums)), z


def layout(mask: jax.Array, count: jax.Array, mini_batch: int) -> Layout:
    """Places the valid frames of a call in the mini-batches of their rows, each row from its own phase.

    The first mini-batch of a call may be one that earlier calls opened: its frames lie at the left, the gradients before them
    are in the state. A call of T frames thus touches at most ceil((T - 1) / b) + 1 mini-batches of min(b, T) slots.

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
    mini_batch: int,
    remat_group: int,
) -> tuple[TTTState, jax.Array]:
    """Runs the inner loop over a call of any length.

    The scan carries the displacement and adds the base where weights are read: forming the displacement as a difference
    would lose small updates to rounding.

    Args:
      base: W0, [H, I, O] and [H, O]; scale, bias: inner LayerNorm [H, D].
      state: of B rows, at any phases.
      inputs: q, k, t, eta of T frames; may hold anything finite where masked.
      mask: bool [B, T], valid frames.
      mini_batch: b; remat_group: mini-batches recomputed together in the backward pass.

    Returns:
      The state after the call and z = q + LN(f_{W_i}(q)) [B, T, H, D], 0 where masked.
    """
    place = layout(mask, state.count, mini_batch)
    rows, batches, slots = place.frame.shape
    frames = mask.shape[1]
    source = jnp.minimum(place.frame, frames - 1).reshape(rows, batches * slots)

    def to_slots(x: jax.Array) -> jax.Array:  # [B, T, H, ...] -> [M, B, H, C, ...]
        x = jnp.take_along_axis(x, source.reshape(source.shape + (1,) * (x.ndim - 2)), 1)
        x = x.reshape(rows, batches, slots, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)

    q, k, t, eta = (to_slots(x) for x in inputs)
    filled = jnp.moveaxis(place.frame < frames, 1, 0)[:, :, None]
    xs = (q, k, t, jnp.where(filled, eta, 0), place.closes.T)

    def body(carry, x):
        return mini_batch_step(base, scale[:, None], bias[:, None], *carry, *x)

    carry, z = _grouped_scan(body, (state.displacement, state.open_sum), xs, batches, remat_group)
    z = jnp.moveaxis(jnp.moveaxis(z, 0, 1), 3, 2).reshape(rows, batches * slots, *inputs.q.shape[2:])
    z = jnp.take_along_axis(z, jnp.minimum(place.slot, batches * slots - 1)[..., None, None], 1)
    z = jnp.where(mask[..., None, None], z, 0)
    return TTTState(*carry, state.count + mask.sum(1, dtype=jnp.int32)), z


def _grouped_scan(body, carry, xs, length: int, group: int):
    """`lax.scan` whose backward pass keeps the carry at group boundaries only; plain where a single group holds all."""
    if length <= group:
        return jax.lax.scan(body, carry, xs)
    group_body = jax.checkpoint(lambda c, x: jax.lax.scan(body, c, x), prevent_cse=False)
    whole = length - length % group
    head = jax.tree.map(lambda x: x[:whole].reshape(-1, group, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(group_body, carry, head)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole == length:
        return carry, ys
    carry, rest = group_body(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, rest)
