"""What the kernels of the inner loop's sequential part take and give; the inner network is a 2-layer MLP.

Only the keys' side of the inner loop is sequential: weights give a gradient, the gradient gives the next weights. A
chain runs that side. It gives each frame's step as factors of outer products, and the displacement at the start of
every group of mini-batches. Whatever reads the weights is computed from those, in parallel over groups (`ttt.groups`).

Sizes: N rows times heads (n = row * heads + head), H heads, D head width, K hidden width, C = 16 slots of a step, P
steps of a mini-batch, M mini-batches, S = M P steps, U steps of a group (a multiple of P), G = S / U groups, L = U C
slots of a group, NC parts in which the hidden units are split. Tokens are the last axis of factors. "Operands" are
what products multiply: float16, or float64 to test the formulas; sums are float32, or float64.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

C = 16
"""Slots of a step."""
NC = 4
"""Parts of the hidden units: the thread blocks of a cluster on a GPU."""
EPS = 1e-8
"""Added to the variance in the inner LayerNorm."""


class Weights(NamedTuple):
    """Weights of an MLP, or something of their shape: a displacement, an adjoint."""

    w1: jax.Array  # [..., K, D], (out, in)
    b1: jax.Array  # [..., K]
    w2: jax.Array  # [..., K, D], (in, out)
    b2: jax.Array  # [..., D]


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

    x2: jax.Array
    """Input of the second map, [N, G, K, L]."""
    n1: jax.Array
    """What a frame adds to the first map at its output, minus rate times gradient, [N, G, K, L]."""
    n2: jax.Array
    """The same of the second map, [N, G, D, L]."""


class Saved(NamedTuple):
    """What the forward pass keeps for the adjoint."""

    w2: jax.Array
    """Displacement of the second map that each mini-batch reads, operands [N, M, K, D]."""
    z1: jax.Array
    """Output of the first map, operands [N, G, K, L]."""
    p: jax.Array
    """W2 n2, the first map's step before the slope of GELU, operands [N, G, K, L]."""
    zn: jax.Array
    """Normalised output of the second map, [N, S, D, C]."""
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
    dx2: jax.Array
    """Adjoints of `Factors`: of x2 and n1 operands, [N, G, K, L]."""
    dn1: jax.Array
    dn2: jax.Array
    """Of n2, [N, S, D, C]."""
    dat: Weights
    """Of the displacement at the start of every group, matrices are operands, [N, G, ...]."""
    dend: Weights
    """Of the displacement after the call, [N, ...]."""


class Adjoint(NamedTuple):
    """What the adjoint of a chain gives.

    The gradient to the base is the sum over all slots of dz1 k^T (w1), dp n2^T + x2 dz2^T (w2), dz1 (b1) and dz2 (b2).
    That to the keys needs no chain (`ttt.groups.key_gradient`).
    """

    dz1: jax.Array
    """Of the outputs of the first map and of p, operands [N, G, K, L]."""
    dp: jax.Array
    dz2: jax.Array
    """Of the outputs of the second map, operands [N, G, D, L]."""
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
    operands [N, G, K, D]."""
