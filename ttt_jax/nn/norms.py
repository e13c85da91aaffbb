"""Moshi's RMSNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp

RMS_EPS = 1e-8


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32 or wider; returns the type of `x` (Kyutai's "rms_norm_f32")."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    # In this order XLA makes one GPU kernel of it.
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + RMS_EPS)
    return (y * scale.astype(wide)).astype(x.dtype)
