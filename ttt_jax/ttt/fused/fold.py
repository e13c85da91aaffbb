"""`jax.vmap` over a kernel whose rows are independent: the mapped axis becomes rows of one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def over_mapped(fun: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`fun(heads, rows)` with a rule for `jax.vmap`, which a kernel has not, or only a slow one.

    Leaves of `rows` and of what `fun` returns are [N, ...]. Leaves of `heads` are [H, ...] or [N, ...], used at n % H:
    mapped ones are repeated for all n, others stay as they are.
    """
    call = jax.custom_batching.custom_vmap(fun)

    @call.def_vmap
    def _(size: int, mapped: tuple[Any, Any], heads: Any, rows: Any):
        length = next(
            x.shape[1 if is_mapped else 0]
            for x, is_mapped in zip(jax.tree.leaves(rows), jax.tree.leaves(mapped[1]), strict=True)
        )

        def fold(x: jax.Array, is_mapped: bool) -> jax.Array:
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        def fold_heads(x: jax.Array, is_mapped: bool) -> jax.Array:
            return fold(jnp.tile(x, (1, length // x.shape[1], *(1,) * (x.ndim - 2))), True) if is_mapped else x

        out = call(jax.tree.map(fold_heads, heads, mapped[0]), jax.tree.map(fold, rows, mapped[1]))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call
