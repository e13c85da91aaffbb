"""Initialisers, as Kyutai trains Moshi from scratch: truncated normal by fan-in; depth transformer as PyTorch's
default."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def fan_in_normal(in_axis: int | tuple[int, ...] = -1) -> Callable:
    """Truncated normal of standard deviation 1/sqrt(fan_in), cut at three of them."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype) * _fan_in(shape, in_axis) ** -0.5

    return init


def fan_in_uniform(in_axis: int | tuple[int, ...] = -1) -> Callable:
    """Uniform in +-1/sqrt(fan_in), the default of ``torch.nn.Linear``."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        bound = _fan_in(shape, in_axis) ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


linear_kernel = fan_in_normal()
"""Matrix [..., out, in] of a linear map."""
embedding = fan_in_normal()
"""Table [..., entries, dim]: standard deviation 1/sqrt(dim)."""


def _fan_in(shape: tuple[int, ...], in_axis: int | tuple[int, ...]) -> int:
    size = 1
    for axis in (in_axis,) if isinstance(in_axis, int) else in_axis:
        size *= shape[axis]
    return size
