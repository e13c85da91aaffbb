"""Pieces of the Hopper kernels: tiles in shared memory, products on tensor cores, broadcasts, GELU.

Arrays of a kernel live in registers of a warpgroup, in the layout of an accumulator of a `wgmma`: 64 rows and more, 8
columns and more.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F16, F32 = jnp.float16, jnp.float32
TILE = plgpu.Layout.WGMMA
ROW, COL = TILE.reduce(1), TILE.reduce(0)
"""Layouts of one number for each row, and for each column, of a `TILE`."""

TRANSFORMS = {size: (plgpu.TilingTransform((8, 32 // size)), plgpu.SwizzleTransform(32)) for size in (2, 4)}
"""Of a shared-memory tile by bytes of an element. A product over 16 slots wants tiles of 32 bytes, and both operands
of a product the same."""

Ref = Any
"""A reference to memory, of Pallas."""


def shared(*shape: int, dtype: jnp.dtype = F16) -> Ref:
    """A tile in shared memory."""
    return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS[jnp.dtype(dtype).itemsize])


def load(ref: Ref, layout: plgpu.SomeLayout) -> jax.Array:
    """Loads an array to registers. "Optimized" refuses some of the layouts here."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: Ref, value: jax.Array) -> None:
    """Stores an array to global memory. From 0.12 JAX refuses less than whole cache lines unless told."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def product(shape: tuple[int, int], *pairs: tuple[Any, Ref]) -> jax.Array:
    """Sum of the products of pairs, float32. A left operand lies in shared memory or in registers, a right one in
    shared memory."""

    def scoped(accumulator: Ref) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    # Without the barrier LLVM may move what reads the accumulator before the wait for it. ptxas then lets every single
    # `wgmma` of the kernel be waited for.
    return lax.optimization_barrier(pl.run_scoped(scoped, plgpu.ACC(shape, F32)))


def plus(init: jax.Array, *pairs: tuple[Any, Ref]) -> jax.Array:
    """`init` plus the products of pairs."""

    def scoped(accumulator: Ref) -> None:
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)

    return lax.optimization_barrier(pl.run_state(scoped)(plgpu.ACC.init(init)))


def transposed(ref: Ref) -> Ref:
    """A matrix in shared memory, read the other way round."""
    # References have the method from 0.12 on, which does not want the function any more.
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def rows(x: jax.Array, columns: int) -> jax.Array:
    """[D] as [D, columns]."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def cols(x: jax.Array, height: int) -> jax.Array:
    """[C] as [height, C]."""
    return lax.broadcast_in_dim(x, (height, x.shape[0]), (1,))


def tanh(u: jax.Array) -> jax.Array:
    """tanh to float32's precision; the GPU's own instruction is off by 5e-4."""
    root = lax.rsqrt(1.0 + jnp.exp(2.0 * u))  # one instruction, where a division takes twenty
    return 1.0 - 2.0 * (root * root)


def gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GELU by the tanh formula, and its derivative."""
    c, a = 0.7978845608028654, 0.044715
    h = tanh(c * x * (1.0 + a * x * x))
    return 0.5 * x * (1.0 + h), 0.5 * (1.0 + h) + 0.5 * x * (1.0 - h * h) * c * (1.0 + 3.0 * a * x * x)


def gelu_slope_bend(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """GELU, its first and its second derivative."""
    c, a = 0.7978845608028654, 0.044715
    h = tanh(c * x * (1.0 + a * x * x))
    inner, bell = c * (1.0 + 3.0 * a * x * x), 1.0 - h * h
    bend = bell * (inner + 0.5 * x * (6.0 * a * c * x - 2.0 * h * inner * inner))
    return 0.5 * x * (1.0 + h), 0.5 * (1.0 + h) + 0.5 * x * bell * inner, bend
