"""Embedding tables, one per stream, stacked."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lookup(tables: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of stacked tables [S, V, D] for int32 tokens [..., S]: [..., S, D], exactly 0 for `ABSENT` tokens (and all
    below 0)."""
    rows = tables[jnp.arange(tables.shape[0]), jnp.maximum(tokens, 0)]
    return jnp.where((tokens < 0)[..., None], 0, rows.astype(dtype))
