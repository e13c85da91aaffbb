"""The MLP chain on a Hopper GPU: `kernels.plain` as two kernels of Pallas Mosaic GPU, forward and adjoint.

Imported only where it can run (`kernels.choice`): jax 0.11.2 or newer. Arguments and results are those of
`kernels.plain`. Head widths are 64 and 128, the hidden width is four times that, operands are float16.
"""

from __future__ import annotations

import jax

from ttt_jax.kernels import mlp, mlp_adjoint
from ttt_jax.kernels.chain import Adjoint, Affine, Factors, Given, Hidden, Saved, Start, Steps, Weights
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
    shape = _shape(steps, P, U, keep, save)
    x2, n1, n2, at_w1, at_b1, at_w2, at_b2, *rest = mlp.kernel(
        shape, *steps, *jax.tree.leaves(base), scale, bias, *jax.tree.leaves(start)
    )
    end_w1, end_b1, end_w2, end_b2, *saved = rest
    if save:
        w2, z1, p, zn, rstd = saved
        saved = Saved(Hidden(w2, _in_groups(z1), _in_groups(p)), zn, rstd)
        at_w2 = w2[:, :: U // P]
    factors = Factors((_in_groups(x2),), (_in_groups(n1), _in_groups(n2)))
    # Each warpgroup sums the second bias over its own slots.
    at = Affine(at_w1, at_b1), Affine(at_w2, at_b2.sum(2))
    end = Affine(end_w1, end_b1), Affine(end_w2, end_b2.sum(1))
    return factors, at, end, saved if save else None


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
    """As `plain.backward`."""
    shape = _shape(steps, P, U, keep, True)
    of_slots = lambda x: x.reshape(*x.shape[:3], U, -1)  # noqa: E731
    (dx2,), (dn1, dn2) = given.factors
    u1, dz1, dp, dz2, de, drate, w1, b1, w2, b2 = mlp_adjoint.kernel(
        shape,
        *(steps.k, steps.rate, steps.closes, base[1].w, scale, of_slots(factors.steps[1])),
        *(saved.hidden.w2, of_slots(saved.hidden.z1), of_slots(saved.hidden.p), saved.zn, saved.rstd),
        *(given.g0, given.m1, given.m2, of_slots(dx2), of_slots(dn1), dn2),
        *jax.tree.leaves((given.dat, given.dend)),
    )
    dstart = Affine(w1, b1), Affine(w2, b2.sum(1))
    return Adjoint((_in_groups(dz1), _in_groups(dz2)), (_in_groups(dp),), de, drate, dstart, u1)


def _shape(steps: Steps, P: int, U: int, keep: float, save: bool) -> Shape:
    n, count, _, width = steps.k.shape
    return Shape(n, width, count, P, U, keep, save)


def _in_groups(x: jax.Array) -> jax.Array:
    """[N, G, X, U, C] -> [N, G, X, L]."""
    return x.reshape(*x.shape[:3], -1)
