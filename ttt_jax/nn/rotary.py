"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of interleaved pairs, as in Moshi."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, position: jax.Array, max_period: float) -> jax.Array:
    """Rotary embedding of interleaved pairs (2i, 2i + 1), in float32 or wider.

    Args:
      x: [B, T, H, K]; position: int32 [B, T]; pair i turns by position * max_period^(-2i / K).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    half = x.shape[-1] // 2
    frequency = max_period ** (-jnp.arange(half, dtype=wide) / half)
    angle = (position.astype(wide)[..., None] * frequency)[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pairs = x.astype(wide).reshape(*x.shape[:-1], half, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape).astype(x.dtype)
