"""The inner network: a small MLP per head, its gradient, and its output after steps that are never summed.

A frame's gradient in the weights of an affine map is the outer product of the map's input and the loss gradient at its
output. The output for frame i after the steps of frames j <= i is therefore attention with a lower-triangular mask (Sun
et al. 2024, arXiv 2407.04620, section 2.5, with the mask that makes it causal). Plain functions on arrays.

Shapes: B rows, H heads, D head width, C frames of a mini-batch, I and O the widths that one affine map joins.
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
Readable = tuple[tuple[Affine, ...], ...]
"""Of each affine map the parts whose sum it is."""


class Inputs(NamedTuple):
    """Query, key, target and rate of each frame."""

    q: jax.Array  # [B, T, H, D]
    k: jax.Array  # [B, T, H, D]
    t: jax.Array  # [B, T, H, D]
    eta: jax.Array  # [B, T, H]


class Frames(NamedTuple):
    """The frames of one or more mini-batches, with all that depends on the base weights alone."""

    kq: jax.Array
    """Keys, then queries, [..., B, H, 2 C, D]."""
    t: jax.Array
    """Targets, [..., B, H, C, D]."""
    eta: jax.Array
    """Rates, [..., B, H, C]; 0 in empty slots."""
    at_base: jax.Array
    """Output of the base's first map for `kq`, [..., B, H, 2 C, O]."""
    overlap: jax.Array
    """<q_i, k_j> + 1 where j <= i, else 0, [..., B, H, C, C]."""


class Descent(NamedTuple):
    """Gradient steps of the frames of a mini-batch, all taken at the same weights, as factors of outer products.

    Here C counts slots of the mini-batch; the step in an empty slot is 0.
    """

    inputs: tuple[jax.Array, ...]
    """Inputs of each affine map, [B, H, C, I]."""
    steps: tuple[jax.Array, ...]
    """Rate times loss gradient at the output of each map, [B, H, C, O]: the step of frame c in the weights is the outer
    product."""


class Seen(NamedTuple):
    """Steps of S slots as C frames see them."""

    steps: Descent
    overlap: jax.Array
    """`overlap` of the frames' vectors with the keys of the steps, [B, H, C, S]."""
    seen: jax.Array
    """Whether a frame has seen a step, bool [C, S] or [B, 1, 1, S]."""


def widths(head_dim: int, hidden: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(I, O) of every affine map of an inner network with the given hidden widths in multiples of `head_dim`."""
    sizes = (head_dim, *(m * head_dim for m in hidden), head_dim)
    return tuple(zip(sizes[:-1], sizes[1:], strict=True))


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float = LN_EPS) -> jax.Array:
    """LayerNorm over the last axis with biased variance."""
    return scale * normalise(x, eps)[0] + bias


def normalise(x: jax.Array, eps: float = LN_EPS) -> tuple[jax.Array, jax.Array]:
    """x centred and divided by its standard deviation over the last axis, and one over that deviation."""
    centred = x - x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * rstd, rstd


def gelu(x: jax.Array) -> jax.Array:
    """GELU by the tanh formula."""
    return jax.nn.gelu(x, approximate=True)


def gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`gelu` and its derivative."""
    c, a = 0.7978845608028654, 0.044715  # sqrt(2 / pi); Hendrycks and Gimpel 2016
    tanh = jnp.tanh(c * x * (1 + a * x * x))
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * c * (1 + 3 * a * x * x)


def apply(x: jax.Array, *parts: Affine) -> jax.Array:
    """[..., H, C, I] -> [..., H, C, O] through the sum of maps, a product for each; a base's [H, I, O] serve all
    rows."""
    return sum(jnp.einsum("...HCI,...HIO->...HCO", x, w) + b[..., None, :] for w, b in parts)


def prepare(base: Network, x: Inputs) -> Frames:
    """Frames [..., B, H, C, D] with their products with the base weights: for all mini-batches at once, ahead of the
    scan."""
    kq = jnp.concatenate([x.k, x.q], -2)
    return Frames(kq, x.t, x.eta, apply(kq, base[0]), overlap(x.q, x.k, causal(x.k.shape[-2])))


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys' half and the queries' half of arrays [..., 2 C, D] as in `Frames`."""
    return x[..., : x.shape[-2] // 2, :], x[..., x.shape[-2] // 2 :, :]


def causal(frames: int) -> jax.Array:
    """Whether frame i has seen frame j <= i: bool [C, C]."""
    return jnp.tril(jnp.ones((frames, frames), bool))


def overlap(x: jax.Array, inputs: jax.Array, seen: jax.Array) -> jax.Array:
    """<x_i, x_j> + 1 where frame i has seen slot j, else 0: [..., C, S] for x [..., C, I] and inputs [..., S, I].

    The 1 is the bias: its update does not depend on the input.
    """
    return jnp.where(seen, jnp.einsum("...CI,...SI->...CS", x, inputs) + 1, 0)


def readable(base: Network, displacement: Network, apart: bool = False) -> Readable:
    """Weights that a mini-batch reads: base plus displacement; of the first map the displacement alone, since `Frames`
    hold the rest.

    The sum costs a pass over all weights, which the products of a mini-batch of many frames repay; `apart` leaves the
    summands to the products. The first map needs no sum, since its inputs are known ahead of the scan.
    """
    pairs = zip(base[1:], displacement[1:], strict=True)
    rest = tuple(pair if apart else (jax.tree.map(jnp.add, *pair),) for pair in pairs)
    return (displacement[:1], *rest)


def descend(weights: Readable, first: jax.Array, scale: jax.Array, bias: jax.Array, x: Frames) -> Descent:
    """Each frame's step on the inner loss 0.5 * |LN(f_W(k)) - t|^2, all taken at the same weights.

    Args:
      weights: of `readable`; first: output of the first map for the keys, [B, H, C, O].
      scale, bias: of the inner LayerNorm, [H, 1, D].
      x: the frames of a mini-batch; eta is 0 in empty slots.
    """
    inputs, slopes, y = [halves(x.kq)[0]], [], first
    for parts in weights[1:]:
        y, slope = gelu_and_slope(y)
        inputs.append(y)
        slopes.append(slope)
        y = apply(y, *parts)
    normed, rstd = normalise(y)
    g = (scale * normed + bias - x.t) * scale
    g = (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True)) * rstd
    grads = [g]
    for parts, slope in zip(weights[:0:-1], slopes[::-1], strict=True):
        g = sum(jnp.einsum("...HCO,...HIO->...HCI", g, w) for w, _ in parts) * slope
        grads.insert(0, g)
    return Descent(tuple(inputs), tuple(x.eta[..., None] * g for g in grads))


def read(weights: Readable, first: jax.Array, *taken: Seen) -> jax.Array:
    """f_{W_i}(x_i) [B, H, C, D], W_i being `weights` less the steps `taken` that frame i has seen, never formed.

    Args:
      weights: of `readable`; first: output of the first map for x, [B, H, C, O].
      taken: `Seen.overlap` of x with the keys.
    """
    # XLA joins products that share a factor and would copy all weights beside the steps to do so: barriers keep these
    # apart.
    taken = [part._replace(steps=jax.lax.optimization_barrier(part.steps)) for part in taken]
    x = first - sum(jnp.einsum("BHCS,BHSO->BHCO", of_keys, steps.steps[0]) for steps, of_keys, _ in taken)
    for layer, parts in enumerate(weights[1:], 1):
        x = gelu(x)
        held = jax.lax.optimization_barrier(x)
        x = apply(x, *parts)
        for steps, _, seen in taken:
            of_inputs = overlap(held, steps.inputs[layer], seen)
            x -= jnp.einsum("BHCS,BHSO->BHCO", of_inputs, steps.steps[layer])
    return x


def put(earlier: Descent, own: Descent, phase: jax.Array, eta: jax.Array) -> Descent:
    """`earlier` steps with those of `own` frames in the slots from each row's phase on.

    Args:
      earlier: S slots, those before the phase full; own: C slots.
      phase: int32 [B]; eta: rates of the own frames [B, H, C]. With a rate of 0, as in empty slots, nothing is put, so
        that a frame that teaches nothing leaves no trace.
    """
    index = jnp.arange(earlier.inputs[0].shape[2]) - phase[:, None]
    own_index = jnp.clip(index, 0, eta.shape[2] - 1)
    take = lambda x: jnp.take_along_axis(x, own_index[:, None, :, None], 2)  # noqa: E731
    is_own = (index == own_index)[:, None, :, None] & take(eta[..., None] != 0)
    return jax.tree.map(lambda old, new: jnp.where(is_own, take(new), old), earlier, own)


def total(descent: Descent, factor: jax.Array) -> Network:
    """Sum over the frames of a mini-batch of `factor` [B] times their steps."""
    steps = (step * factor[:, None, None, None] for step in descent.steps)
    return tuple(
        Affine(jnp.einsum("BHCI,BHCO->BHIO", x_k, step), step.sum(2))
        for x_k, step in zip(descent.inputs, steps, strict=True)
    )


def squared_norm(network: Network) -> jax.Array:
    """Over all weights of a head: [B, H], or [H] of a base."""
    return sum((w * w).sum((-2, -1)) + (b * b).sum(-1) for w, b in network)
