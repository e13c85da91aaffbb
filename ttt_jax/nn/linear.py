"""Linear maps without biases, with low-rank adapters where configured. Linen declares their parameters.

Matrices are stored [out, in], as in PyTorch. For a single row the time is that of reading the matrix, and a reduction
along its rows reads it fastest (docs/performance/streaming.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.config import LoRAConfig
from ttt_jax.nn.init import fan_in_uniform

Initializer = Callable[..., jax.Array]
FEW_ROWS = 16  # up to here the time of a product is that of reading its matrix


class Kernel(NamedTuple):
    """A linear map's parameters, possibly stacked on leading axes (or in tuples:
    `ttt_jax.moshi.generate.streaming_params`)."""

    w: jax.Array
    """[..., *out, in]."""
    lora_a: jax.Array | None = None
    """[..., r, in]."""
    lora_b: jax.Array | None = None
    """[..., *out, r]."""

    def at(self, index: int | slice | jax.Array) -> Kernel:
        """The kernel at `index` of the first axis."""
        return Kernel(*(None if leaf is None else leaf[index] for leaf in self))


def kernel(params: Mapping[str, jax.Array], name: str) -> Kernel:
    """The kernel called `name` among `params`, with its adapters, if any."""
    return Kernel(params[name], params.get(f"{name}_lora_a"), params.get(f"{name}_lora_b"))


def init_kernel(
    key: jax.Array,
    name: str,
    init: Initializer,
    lora: LoRAConfig,
    out: tuple[int, ...],
    inner: int,
    lead: tuple[int, ...] = (),
) -> dict[str, jax.Array]:
    """Parameters `name`, and `name`_lora_a, `name`_lora_b with adapters, of a map of width `inner` to `out` axes,
    stacked on `lead`.

    Adapters start as Kyutai's: A like a PyTorch linear layer, B at 0, so that they change nothing.
    """
    params = {name: init(key, (*lead, *out, inner))}
    if lora.rank:
        params[f"{name}_lora_a"] = fan_in_uniform()(jax.random.fold_in(key, 1), (*lead, lora.rank, inner))
        params[f"{name}_lora_b"] = jnp.zeros((*lead, *out, lora.rank))
    return params


def declare(
    module: nn.Module, name: str, init: Initializer, lora: LoRAConfig, out: tuple[int, ...], inner: int
) -> Kernel:
    """`init_kernel` as parameters of a Linen module."""

    def one(part: str) -> Initializer:
        return lambda key: init_kernel(key, name, init, lora, out, inner)[part]

    parts = [name] + [f"{name}_lora_{half}" for half in "ab" if lora.rank]
    return Kernel(*(module.param(part, one(part)) for part in parts))


def linear(x: jax.Array, kernel: Kernel, scaling: float = 1.0, wide: bool = False) -> jax.Array:
    """W x + scaling * B (A x), the latter with adapters only.

    Args:
      x: [..., in]; kernel: without leading axes; scaling: of the adapters (`LoRAConfig`).
      wide: whether to return the type that products are summed in, at least float32, instead of the type of `x`.

    Returns:
      [..., *out].
    """
    y = product(x, kernel.w, wide)
    if kernel.lora_a is None:
        return y
    # XLA joins products that share an operand and copies their matrices together for it: the barrier forbids that.
    narrow = product(jax.lax.optimization_barrier(x), kernel.lora_a)
    return y + scaling * product(narrow, kernel.lora_b, wide)


def product(
    x: jax.Array, w: jax.Array, wide: bool = False, precision: jax.lax.Precision | None = None, reduced: int = 1
) -> jax.Array:
    """W x, [..., *out] of [..., in] and [*out, in]; `wide` as in `linear`, `precision` as in `jax.lax.dot_general`.

    On a GPU products of up to `reduced` rows are reductions along the matrix, of more the library's.
    """
    sums = jnp.promote_types(x.dtype, jnp.float32)
    out_type = sums if wide else x.dtype
    w, lead, out = w.astype(x.dtype), x.shape[:-1], w.shape[:-1]

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        contract = (((x.ndim - 1,), (w.ndim - 1,)), ((), ()))
        return jax.lax.dot_general(x, w, contract, precision, preferred_element_type=out_type)

    def multiply_reduce(x: jax.Array, w: jax.Array) -> jax.Array:
        if rows == 1:
            y = (w.astype(sums) * x.reshape(-1).astype(sums)).sum(-1)
        else:
            y = (w.astype(sums).reshape(-1, 1, x.shape[-1]) * x.reshape(1, rows, x.shape[-1]).astype(sums)).sum(-1).T
        return y.astype(out_type).reshape(*lead, *out)

    def dot_in_parts(x: jax.Array, w: jax.Array) -> jax.Array:
        size, parts = w.shape[-1], math.gcd(math.prod(out), 4)
        rows = jnp.broadcast_to(x.reshape(1, -1, size), (parts, math.prod(lead), size))
        matrices = w.reshape(parts, -1, size)
        contract = (((2,), (2,)), ((0,), (0,)))
        y = jax.lax.dot_general(matrices, rows, contract, precision, preferred_element_type=out_type)
        return jnp.moveaxis(y, -1, 0).reshape(*lead, *out)

    rows = math.prod(lead)
    if rows > FEW_ROWS:
        return dot(x, w)
    # XLA's GPU products of one row copy the matrix out of its stack first, a reduction reads it in place. Its CPU
    # products transpose a right-hand matrix of more than two axes, and occupy one core unless they come in parts.
    on_gpu = multiply_reduce if rows <= reduced else dot
    return jax.lax.platform_dependent(x, w, cuda=on_gpu, cpu=dot_in_parts, default=dot)
