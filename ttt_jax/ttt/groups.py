"""Reading fast weights after the chain has run: in dual form over a group of mini-batches, for all groups in parallel.

Frame i of a group that starts at the displacement D_g reads, in the m-th of the group's mini-batches (m = 0 is the
first),

    W_i = W_0 + c^m D_g + sum over frames j <= i of c^(m - m_j) step_j,

where c is what a mini-batch's end keeps of the displacement. W_i is never formed: a step is an outer product, so its
part is attention with a fixed mask (see `network.read`, which does the same within one mini-batch).

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
from ttt_jax.ttt.network import gelu, layer_norm
from ttt_jax.ttt.slots import Plan


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
        """What the displacement at the group's start adds for x [N, G, L, I], [N, G, L, O]."""
        return product("ngli,ngio->nglo", x, self.w, self.w.dtype) + self.b[:, :, None]

    def at_base(self, x: jax.Array) -> jax.Array:
        """Output at the base."""
        return product("ngli,nio->nglo", x, self.base_w, self.w.dtype) + self.base_b[:, None, None]

    def overlap(self, x: jax.Array) -> jax.Array:
        """<x_i, input_j> + 1, [N, G, L, L]; the one is the bias, whose step does not depend on the input."""
        return product("ngli,ngij->nglj", x, self.inputs, self.w.dtype) + 1

    def moved(self, overlap: jax.Array) -> jax.Array:
        """What the steps add to the output, from `overlap` times what each frame has seen."""
        return product("nglj,ngoj->nglo", overlap, self.steps, self.w.dtype)


def maps(base: Weights, at: Weights, factors: Factors, k: jax.Array) -> tuple[Map, Map]:
    """The two maps of the MLP.

    Args:
      base: [N, ...]; at: displacement at the start of every group, [N, G, ...].
      factors: of the slots that hold frames; k: keys [N, G, L, D].
    """
    turned = partial(jnp.swapaxes, axis1=-1, axis2=-2)
    return (
        Map(turned(at.w1), at.b1, turned(base.w1), base.b1, turned(k), factors.n1),
        Map(at.w2, at.b2, base.w2, base.b2, factors.x2, factors.n2),
    )


def started(of: Map, x: jax.Array, plan: Plan) -> jax.Array:
    """Output for x [N, G, L, I] before any step of the group, its displacement decayed: [N, G, L, O]."""
    return of.at_base(x) + reach(plan, of.b.dtype).kept * of.at_start(x)


def to_keys(
    base: jax.Array,
    at: jax.Array,
    u1: jax.Array,
    dz1: jax.Array,
    n1: jax.Array,
    k: jax.Array,
    closes: jax.Array,
    own: jax.Array,
    plan: Plan,
) -> jax.Array:
    """Gradient to the keys that the chain passed through the first map, [N, G, L, D].

    A key was multiplied by the weights, to give z1, and it is a factor of the frame's own step, which all later
    mini-batches read. Neither the weights nor their adjoint of a mini-batch is formed: both are read in dual form, the
    adjoint from the group's end.

    Args:
      base: W0 of the first map [N, K, D]; at: its displacement at the groups' starts [N, G, K, D].
      u1: of `kernels.chain.Adjoint`; dz1, n1: of the frames [N, G, K, L]; k: keys [N, G, L, D].
      closes: whether the frame's mini-batch closes, bool [N, G, L, 1].
      own: whether the frame's step is the chain's, not one of an earlier call, bool [N, G, L, 1].
    """
    of = partial(product, operands=n1.dtype)
    kept = reach(plan, k.dtype).kept
    batch = np.repeat(np.arange(plan.per_group), plan.mini_batch)
    ahead = batch[:, None] - batch
    before = np.where(ahead > 0, plan.keep ** np.maximum(ahead, 0).astype(np.float64), 0).astype(k.dtype)
    # What is left of a step at the last mini-batch: those from its own on that close have decayed it.
    closing = closes[:, :, :: plan.mini_batch].sum(2, keepdims=True)
    left = plan.keep ** (jnp.minimum(closing, plan.per_group - 1) - batch[:, None]).astype(k.dtype)
    overlap = of("ngki,ngkj->ngij", dz1, n1) * before
    read = of("ngki,nkd->ngid", dz1, base) + kept * of("ngki,ngkd->ngid", dz1, at) + of("ngij,ngjd->ngid", overlap, k)
    taught = left * of("ngki,ngkd->ngid", n1, u1) + of("ngji,ngjd->ngid", overlap, k)
    return read + jnp.where(closes & own, taught, 0)


def read(network: tuple[Map, Map], scale: jax.Array, bias: jax.Array, q: jax.Array, plan: Plan) -> jax.Array:
    """q + LN(f_{W_i}(q)) for queries [N, G, L, D]; scale, bias: [N, D]."""
    first, second = network
    seen = reach(plan, q.dtype).seen
    x = gelu(started(first, q, plan) + first.moved(first.overlap(q) * seen))
    y = started(second, x, plan) + second.moved(second.overlap(x) * seen)
    return q + layer_norm(y, scale[:, None, None], bias[:, None, None])


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
