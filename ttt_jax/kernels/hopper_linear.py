"""The linear chain on a Hopper GPU: `kernels.plain` as two kernels of Pallas Mosaic GPU, forward and adjoint.

Imported only where it can run (`kernels.choice`): jax 0.11.2 or newer. Arguments and results are those of
`kernels.plain`. Head widths are 64 and 128, operands are float16.
"""

from __future__ import annotations

import jax

from ttt_jax.kernels import linear, linear_adjoint
from ttt_jax.kernels.chain import Adjoint, Affine, Factors, Given, Saved, Start, Steps, Weights
from ttt_jax.kernels.cluster import Shape


def forward(
    steps: Steps,
    base: Weights,
    scale: jax.Array,
    bias: jax.Array,
    start: Start,
    *,
    P: int,
    U: int,
    keep: float,
    save: bool,
) -> tuple[Factors, Weights, Weights, Saved | None]:
    """As `plain.forward`."""
    shape = Shape(*_sizes(steps), P, U, keep, save)
    n, at_w, at_b, end_w, end_b, *saved = linear.kernel(
        shape, *steps, *jax.tree.leaves(base), scale, bias, *jax.tree.leaves(start)
    )
    factors = Factors((), (_in_groups(n),))
    return factors, (Affine(at_w, at_b),), (Affine(end_w, end_b),), Saved(None, *saved) if save else None


def backward(
    steps: Steps,
    base: Weights,
    scale: jax.Array,
    factors: Factors,
    saved: Saved,
    given: Given,
    *,
    P: int,
    U: int,
    keep: float,
) -> Adjoint:
    """As `plain.backward`. It reads neither `base` nor `factors`: through one map only the keys pass those on."""
    u, dz, de, drate, w, b = linear_adjoint.kernel(
        Shape(*_sizes(steps), P, U, keep, True),
        *(steps.k, steps.rate, steps.closes, scale, saved.zn, saved.rstd),
        *(given.g0, given.m1, given.m2, *given.factors.steps),
        *jax.tree.leaves((given.dat, given.dend)),
    )
    return Adjoint((_in_groups(dz),), (), de, drate, (Affine(w, b),), u)


def _sizes(steps: Steps) -> tuple[int, int, int]:
    """N, D and S."""
    n, count, _, width = steps.k.shape
    return n, width, count


def _in_groups(x: jax.Array) -> jax.Array:
    """[N, G, D, U, C] -> [N, G, D, L]."""
    return x.reshape(*x.shape[:3], -1)
