"""The inner loss in the Hopper kernels: from the network's output to the step there, and the adjoint of that.

Arrays are tiles [D, n], tokens are columns. LayerNorm and loss are written out in the sums over rows that they need, as
many as possible of which are taken in one meeting of the warps. `sums(first, *arrays)` stands for `column_sums` behind
`first` others of the same step. Letters as in `kernels.chain`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax

from ttt_jax.kernels.chain import EPS
from ttt_jax.kernels.tiles import cols

Sums = Callable[..., tuple[jax.Array, ...]]


def descend(
    z: jax.Array, square: jax.Array, shift: jax.Array, of_shift: jax.Array, rate: jax.Array, sums: Sums
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """zn, rstd and the step -rate rstd g0 of the outputs z.

    Args:
      square, shift: e = square zn + shift; of_shift: sum of `shift`, the first of the step's sums.
      rate: [n].
    """
    d = z.shape[0]
    (of_z,) = sums(1, z)
    z -= cols(of_z * (1 / d), d)
    zz, sz, szz, hz = sums(2, z * z, square * z, square * z * z, shift * z)
    rstd = lax.rsqrt(zz * (1 / d) + EPS)
    m1 = (of_shift + rstd * sz) * (1 / d)
    m2 = rstd * (rstd * szz + hz) * (1 / d)
    z *= cols(rstd, d)
    return z, rstd, (square * z + shift - cols(m1, d) - z * cols(m2, d)) * cols(-rate * rstd, d)


class Known(NamedTuple):
    """What the adjoint knows of the tokens of a step before their step's adjoint."""

    zn: jax.Array
    g0: jax.Array
    square: jax.Array
    """scale * scale in every column."""
    rate: jax.Array
    rstd: jax.Array
    m1: jax.Array
    m2: jax.Array

    def ahead(self, sums: Sums) -> tuple[jax.Array, ...]:
        """The sums that do not need the adjoint of the step, the first three of the kernel's step."""
        return sums(0, self.square, self.square * self.zn, self.square * self.zn * self.zn)


def recede(
    dn: jax.Array,
    known: Known,
    ahead: tuple[jax.Array, ...],
    sums: Sums,
    put: Callable[[jax.Array, jax.Array], None],
) -> jax.Array:
    """Adjoint of the outputs from that of the step.

    Args:
      dn: adjoint of the step; ahead: of `Known.ahead`.
      put: takes the adjoints of e and of the rates as soon as they are there, which frees their registers.
    """
    zn, g0, square, rate, rstd, m1, m2 = known
    of_square, sq_zn, sq_zn2 = ahead
    d = dn.shape[0]
    over = 1 / d
    dg, of_v, v_zn, v_sq, v_sq_zn = sums(3, dn * g0, dn, dn * zn, dn * square, dn * square * zn)
    factor = -rate * rstd
    of_v, v_zn, v_sq, v_sq_zn = factor * of_v, factor * v_zn, factor * v_sq, factor * v_sq_zn
    v, mu, middle = dn * cols(factor, d), v_zn * over, of_v * over
    de = v - cols(middle, d) - zn * cols(mu, d)
    put(de, -dg * rstd)
    dzn = square * de - v * cols(m2, d) - (g0 + cols(m1, d) + zn * cols(m2, d)) * cols(mu, d)
    shift = (v_sq - middle * of_square - mu * sq_zn - m2 * of_v) * over - mu * m1
    turn = (v_sq_zn - middle * sq_zn - mu * sq_zn2 - m2 * v_zn - rate * dg * rstd) * over - mu * m2
    return (dzn - cols(shift, d) - zn * cols(turn, d)) * cols(rstd, d)
