"""What the kernels of the inner loop's sequential part take and give, for the linear inner network and the 2-layer MLP.

Only the keys' side of the inner loop is sequential: weights give a gradient, the gradient gives the next weights. A
chain runs that side. It gives each frame's step as factors of outer products, and the displacement at the start of
every group of mini-batches. Whatever reads the weights is computed from those, in parallel over groups
(`ttt.fused.groups`).

Sizes: N rows times heads (n = row * heads + head), H heads, D head width, K hidden width, C = 16 slots of a step, P
steps of a mini-batch, M mini-batches, S = M P steps, U steps of a group (a multiple of P), G = S / U groups, L = U C
slots of a group, NC parts in which the hidden units are split. Tokens are the last axis of factors. "Operands" are
what products multiply: float16, or float64 to test the formulas; sums are float32, or float64.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

C = 16
"""Slots of a step."""
NC = 4
"""Parts of the hidden units: the thread blocks of a cluster on a GPU."""
EPS = 1e-8
"""Added to the variance in the inner LayerNorm."""


class Affine(NamedTuple):
    """One affine map of the inner network, or something of its shape: a displacement, an adjoint."""

    w: jax.Array
    """(out, in) of the first map, (in, out) of the second: [..., K, D] each, [..., D, D] in the linear network."""
    b: jax.Array
    """[..., K] of the MLP's first map, else [..., D]."""


Weights = tuple[Affine, ...]
"""The maps of a network, from the keys to the output: one in the linear network, two in the MLP."""


class Steps(NamedTuple):
    """What the frames of a call bring along, in slots."""

    k: jax.Array
    """Keys, operands [N, S, C, D]."""
    target: jax.Array
    """Targets [N, S, D, C]."""
    rate: jax.Array
    """Rates [N, S, C]; 0 in empty slots."""
    closes: jax.Array
    """1 where the step's mini-batch is full at the end of the call, else 0, [N, S]."""


class Start(NamedTuple):
    """The weights that a call starts from."""

    total: Weights
    """Displacement with the steps that earlier calls made in the open mini-batch, [N, ...]."""
    read: Weights
    """What the first mini-batch reads beside the base: the displacement without those steps; matrices are operands,
    [N, ...]."""


class Factors(NamedTuple):
    """The step of every slot as factors of outer products, operands; the step of an empty slot is 0."""

    inputs: tuple[jax.Array, ...]
    """Inputs of the maps behind the first, whose inputs are the keys: x2 [N, G, K, L] of the MLP."""
    steps: tuple[jax.Array, ...]
    """What a frame adds to each map at its output, minus rate times gradient: n1 [N, G, K, L] and n2 [N, G, D, L] of
    the MLP, n [N, G, D, L] of the linear network."""


class Hidden(NamedTuple):
    """What the forward pass of the MLP keeps of its hidden units."""

    w2: jax.Array
    """Displacement of the second map that each mini-batch reads, operands [N, M, K, D]."""
    z1: jax.Array
    """Output of the first map, operands [N, G, K, L]."""
    p: jax.Array
    """W2 n2, the first map's step before the slope of GELU, operands [N, G, K, L]."""


class Saved(NamedTuple):
    """What the forward pass keeps for the adjoint."""

    hidden: Hidden | None
    """None of the linear network."""
    zn: jax.Array
    """Normalised output of the network, [N, S, D, C]."""
    rstd: jax.Array
    """One over its standard deviation, [N, S, C]."""


class Given(NamedTuple):
    """What the adjoint of a chain takes beside the forward pass's arguments and results."""

    g0: jax.Array
    """e - m1 - zn m2, where e = (scale zn + bias - target) scale, [N, S, D, C]."""
    m1: jax.Array
    """Mean of e over the head's width, [N, S, C]."""
    m2: jax.Array
    """Mean of e zn, [N, S, C]."""
    factors: Factors
    """Adjoints of `Factors`: operands, as those are, but for the last map's step, [N, S, D, C]."""
    dat: Weights
    """Of the displacement at the start of every group, matrices are operands, [N, G, ...]."""
    dend: Weights
    """Of the displacement after the call, [N, ...]."""


class Adjoint(NamedTuple):
    """What the adjoint of a chain gives.

    The gradient to the base is the sum over all slots of dz1 k^T (w of the first map), dp n2^T + x2 dz2^T (w of the
    second), dz1 and dz2 (b). That to the keys needs no chain (`ttt.fused.groups.key_gradient`).
    """

    dz: tuple[jax.Array, ...]
    """Of the outputs of each map, operands: dz1 [N, G, K, L] and dz2 [N, G, D, L], or dz1 [N, G, D, L] alone."""
    dp: tuple[jax.Array, ...]
    """Of `Hidden.p`, operands [N, G, K, L]; () of the linear network."""
    de: jax.Array
    """Of e (see `Given.g0`), [N, S, D, C]."""
    drate: jax.Array
    """Of rates, [N, S, C]; arbitrary in empty slots."""
    dstart: Weights
    """Of `Start.total` and `Start.read` together, [N, ...].

    That of `total` alone is this less the first mini-batch's part of the gradient to the base and less `dat[:, 0]`.
    """
    u1: jax.Array
    """Adjoint of the first map's displacement with the steps of the last mini-batch of every group, before decay,
    operands [N, G, K, D], or [N, G, D, D]."""


def narrow(weights: Weights, operands: jnp.dtype) -> Weights:
    """Weights with matrices as operands."""
    return tuple(of._replace(w=of.w.astype(operands)) for of in weights)


def outer(k: jax.Array, factors: Factors) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Of each map the two factors of its matrix's steps, in the order of the matrix's axes.

    Args:
      k: keys, tokens last, in the slots of `factors`.
    """
    first, *rest = factors.steps
    return (first, k), *zip(factors.inputs, rest, strict=True)
