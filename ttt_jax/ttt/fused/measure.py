"""Inner losses and displacement of every frame from the chain's factors, in parallel over groups (see `groups.py`)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.ttt.fused.groups import Map, output, product, reach
from ttt_jax.ttt.fused.slots import Plan
from ttt_jax.ttt.measure import InnerMeasurement
from ttt_jax.ttt.network import gelu, layer_norm


def measure(
    network: tuple[Map, ...],
    scale: jax.Array,
    bias: jax.Array,
    k: jax.Array,
    t: jax.Array,
    moved: jax.Array,
    base_norm: jax.Array,
    plan: Plan,
) -> InnerMeasurement:
    """`InnerMeasurement` of all slots, [N, G, L] each.

    Args:
      network: of `groups.maps`; scale, bias: inner LayerNorm [N, D].
      k, t: keys and targets [N, G, L, D].
      moved: squared norm of the displacement at the start of the call, [N]; base_norm: that of the base.
    """
    first, *rest = network
    seen = reach(plan, k.dtype).seen

    def loss(y: jax.Array) -> jax.Array:
        return 0.5 * ((layer_norm(y, scale[:, None, None], bias[:, None, None]) - t) ** 2).sum(-1)

    # Before and after its own step a frame has seen the same other frames.
    strict = seen - np.eye(len(seen), dtype=seen.dtype)
    at_base, before = first.at_base(k), output(first, k, strict, plan)
    after = before + ((k * k).sum(-1, keepdims=True) + 1) * jnp.swapaxes(first.steps, -1, -2)
    for of in rest:
        at_base = of.at_base(gelu(at_base))
        before, after = output(of, gelu(before), strict, plan), output(of, gelu(after), seen, plan)
    return InnerMeasurement(
        loss(at_base),
        loss(before),
        loss(after),
        jnp.sqrt(jnp.maximum(_moved(network, moved, plan), 0) / base_norm[:, None, None]),
    )


def _moved(network: tuple[Map, ...], start: jax.Array, plan: Plan) -> jax.Array:
    """Squared norm of W_i - W_0 of each frame, [N, G, L]; `start` [N] is that at the start of the call.

    Multiplied out, |c D + sum of steps|^2 = c^2 |D|^2 + 2 c sum <D, step> + sum <step, step>: none is formed. |D|^2 is
    carried from group to group in the same way. Taking it from the weights at a group's start would add what
    float16 rounds off those.
    """
    cross, gram = 0, 0
    for of in network:
        inputs, steps = jnp.swapaxes(of.inputs, -1, -2), jnp.swapaxes(of.steps, -1, -2)
        cross += (of.at_start(inputs) * steps).sum(-1)
        square = product("ngoi,ngoj->ngij", of.steps, of.steps, of.w.dtype)
        gram += of.overlap(inputs) * square
    # One row more than frames: the end of the group, decay included.
    kept, seen = (np.concatenate([x, plan.keep * x[-1:]]) for x in reach(plan, start.dtype))
    kept = kept[:, 0]
    precise = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    added = 2 * kept * precise("ij,ngj->ngi", seen, cross)
    added += (precise("ij,ngjk->ngik", seen, gram) * seen).sum(-1)
    group = np.arange(added.shape[1])
    lasting = float(kept[-1]) ** (2.0 * np.maximum(group[:, None] - 1 - group, 0))
    at_start = start[:, None] * (float(kept[-1]) ** (2.0 * group)).astype(start.dtype)
    at_start += precise("gh,nh->ng", np.tril(lasting, -1).astype(start.dtype), added[:, :, -1])
    return kept[:-1] ** 2 * at_start[:, :, None] + added[:, :, :-1]
