"""Reading fast weights after the chain has run: in dual form over a group of mini-batches, for all groups in parallel.

Frame i of a group that starts at weights W_g reads, in the m-th of the group's mini-batches (m = 0 is the first),

    W_i = W_0 + c^m (W_g - W_0) + sum over frames j <= i of c^(m - m_j) step_j,

from the displacement W_g - W_0, where c is what a mini-batch's end keeps of it. W_i is never formed: a step is an outer
product, so its part is attention with a fixed mask (see `network.read`, which does the same within one mini-batch).

Sizes as in `kernels.chain`, but for L, here the slots of a group that hold frames: R b, with R mini-batches of b
frames. Weights and factors are the chain's: matrices and factors are operands, tokens are the last axis of factors.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.kernels.chain import Factors, Weights
from ttt_jax.ttt.fused.slots import Plan
from ttt_jax.ttt.network import gelu, layer_norm


class Reach(NamedTuple):
    """What reaches the frames of a group, in NumPy: constants of the program."""

    kept: np.ndarray
    """c^m: what is left of the displacement at the group's start, [L, 1]."""
    seen: np.ndarray
    """c^(m_i - m_j) where frame i has seen frame j, else 0, [L, L]."""


def reach(plan: Plan, dtype: jnp.dtype) -> Reach:
    """The `Reach` of a plan."""
    batch = np.arange(plan.per_group * plan.mini_batch) // plan.mini_batch
    kept = plan.keep ** batch.astype(np.float64)
    seen = np.tril(plan.keep ** np.maximum(batch[:, None] - batch, 0).astype(np.float64))
    return Reach(kept[:, None].astype(dtype), seen.astype(dtype))


def product(spec: str, a: jax.Array, b: jax.Array, operands: jnp.dtype) -> jax.Array:
    """`einsum` of two arrays rounded to `operands`; sums are float32 (float64 for float64), in the gradient too.

    The gradient rounds what comes in as well, which `custom_vjp` users must scale for (`chained.py`), but not what
    goes out, unlike the gradient of a cast.
    """
    return _product(spec, jnp.dtype(operands), (a.dtype, b.dtype), a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(spec: str, operands: jnp.dtype, types: tuple[jnp.dtype, jnp.dtype], a: jax.Array, b: jax.Array):
    return _einsum(spec, operands, jnp.promote_types(operands, jnp.float32), a, b)


def _einsum(spec: str, operands: jnp.dtype, result: jnp.dtype, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a.astype(operands), b.astype(operands), preferred_element_type=result)


def _product_fwd(spec, operands, types, a, b):
    a, b = a.astype(operands), b.astype(operands)
    return _product(spec, operands, types, a, b), (a, b)


def _product_bwd(spec, operands, types, kept, dc):
    (of_a, of_b), of_c = spec.split("->")[0].split(","), spec.split("->")[1]
    da = _einsum(f"{of_c},{of_b}->{of_a}", operands, types[0], dc, kept[1])
    db = _einsum(f"{of_c},{of_a}->{of_b}", operands, types[1], dc, kept[0])
    return da, db


_product.defvjp(_product_fwd, _product_bwd)


class Map(NamedTuple):
    """One affine map of the inner network in a group: weights (in, out), and its part of the steps."""

    w: jax.Array
    """Displacement at the group's start, [N, G, I, O]."""
    b: jax.Array
    """[N, G, O]."""
    base_w: jax.Array
    """[N, I, O]."""
    base_b: jax.Array
    """[N, O]."""
    inputs: jax.Array
    """Inputs of the steps, [N, G, I, L]."""
    steps: jax.Array
    """What frames add at the output, [N, G, O, L]."""

    def at_start(self, x: jax.Array) -> jax.Array:
        """What the displacement at the group's start adds to the output for x [N, G, L, I], [N, G, L, O]."""
        return product("ngli,ngio->nglo", x, self.w, self.w.dtype) + self.b[:, :, None]

    def at_base(self, x: jax.Array) -> jax.Array:
        """Output at the base."""
        return product("ngli,nio->nglo", x, self.base_w, self.w.dtype) + self.base_b[:, None, None]

    def overlap(self, x: jax.Array) -> jax.Array:
        """<x_i, input_j> + 1, [N, G, L, L]; the one is the bias, whose step does not depend on the input."""
        return product("ngli,ngij->nglj", x, self.inputs, self.w.dtype) + 1


def turned(weights: Weights) -> Weights:
    """The chain's weights with all matrices (in, out), or the other way round."""
    first, *rest = weights
    return first._replace(w=jnp.swapaxes(first.w, -1, -2)), *rest


def maps(base: Weights, at: Weights, factors: Factors, k: jax.Array) -> tuple[Map, ...]:
    """The maps of the network.

    Args:
      base: [N, ...]; at: displacement at the start of every group, [N, G, ...].
      factors: of the slots that hold frames; k: keys [N, G, L, D].
    """
    inputs = jnp.swapaxes(k, -1, -2), *factors.inputs
    parts = zip(turned(at), turned(base), inputs, factors.steps, strict=True)
    return tuple(Map(*here, *start, x, step) for here, start, x, step in parts)


def output(of: Map, x: jax.Array, seen: np.ndarray, plan: Plan) -> jax.Array:
    """Output of the map for x [N, G, L, I] at the weights W_i of each frame, [N, G, L, O].

    Args:
      seen: c^(m_i - m_j) where frame i has seen frame j, else 0, [L, L].
    """
    kept = reach(plan, of.b.dtype).kept
    # Products first: XLA lets one add to another instead of writing each.
    moved = product("nglj,ngoj->nglo", of.overlap(x) * seen, of.steps, of.w.dtype)
    moved += product("ngli,ngio->nglo", kept * x, of.w, of.w.dtype)
    moved += product("ngli,nio->nglo", x, of.base_w, of.w.dtype)
    return moved + (of.base_b[:, None, None] + kept * of.b[:, :, None])


def read(network: tuple[Map, ...], scale: jax.Array, bias: jax.Array, q: jax.Array, plan: Plan) -> jax.Array:
    """q + LN(f_{W_i}(q)) for queries [N, G, L, D]; scale, bias: [N, D]."""
    seen = reach(plan, q.dtype).seen
    y = output(network[0], q, seen, plan)
    for of in network[1:]:
        y = output(of, gelu(y), seen, plan)
    return q + layer_norm(y, scale[:, None, None], bias[:, None, None])


def key_gradient(
    first: Map, dz1: jax.Array, u1: jax.Array, closes: jax.Array, summed: jax.Array, plan: Plan
) -> jax.Array:
    """What the chain's adjoint passes to the keys, in dual form like reading: [N, G, L, D].

    Keys enter the first map, whose weights are W_i less the steps of their own mini-batch, and they are the inputs of
    steps that all later mini-batches read.

    Args:
      first: the first map. dz1: adjoint of its output, operands [N, G, O, L]; u1: as in `kernels.chain.Adjoint`.
      closes: whether a mini-batch is full at the end of the call, bool [N, G, R].
      summed: 1 where the frame's step goes into the displacement by this call, else 0, [N, G, L].
    """
    operands = dz1.dtype
    times = partial(product, operands=operands)
    kept, seen = reach(plan, first.b.dtype)
    batch = np.arange(len(seen)) // plan.mini_batch
    before = seen * (batch[:, None] > batch)
    # Decays between a mini-batch's end and the place of u1: the last one's if the last one is full.
    ends = closes.sum(-1) - closes[:, :, -1]
    ahead = jnp.asarray(plan.keep, kept.dtype) ** jnp.maximum(ends[:, :, None] - batch, 0)[..., None]
    k = jnp.swapaxes(first.inputs, -1, -2)
    dk = times("ngkl,ndk->ngld", dz1, first.base_w) + kept * times("ngkl,ngdk->ngld", dz1, first.w)
    cross = times("ngki,ngkj->ngij", dz1, first.steps)
    dk += times("ngij,ngjd->ngid", cross * before, k)
    later = ahead * times("ngkl,ngkd->ngld", first.steps, u1) + times("ngji,ngjd->ngid", cross * before, k)
    return dk + summed[..., None] * later


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def pick(x: jax.Array, index: jax.Array, per_group: int) -> jax.Array:
    """Of each n the mini-batch `index` int [N] of x [N, G, X, R b]: [N, X, b]. R is `per_group`."""
    x = x.reshape(*x.shape[:3], per_group, -1)
    group = jnp.take_along_axis(x, (index // per_group).reshape(-1, 1, 1, 1, 1), 1)[:, 0]
    return jnp.take_along_axis(group, (index % per_group).reshape(-1, 1, 1, 1), 2)[:, :, 0]


def _pick_fwd(x, index, per_group):
    return pick(x, index, per_group), (index, np.arange(x.shape[1]))


def _pick_bwd(per_group, kept, d):
    index, group = kept
    here = group[:, None] * per_group + np.arange(per_group) == index[:, None, None]  # [N, G, R]
    d = jnp.where(here[:, :, None, :, None], d[:, None, :, None], 0)  # a select, which fuses with what follows
    return d.reshape(*d.shape[:3], -1), None


pick.defvjp(_pick_fwd, _pick_bwd)
