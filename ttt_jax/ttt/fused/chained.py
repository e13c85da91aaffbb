"""The chain and what reads its weights as one function with one gradient.

The chain's adjoint is written by hand (`kernels`), the reading's is automatic; here they meet. Products round their
operands to float16 in the backward pass, too. Its smallest normal number is 6e-5 and its largest 65,504, so incoming
gradients are scaled by a power of two for each row and head, and results are scaled back.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels.chain import Adjoint, Affine, Factors, Given, Start, Steps, Weights, narrow, outer
from ttt_jax.ttt.fused.fold import over_mapped
from ttt_jax.ttt.fused.groups import Map, key_gradient, maps, pick, read
from ttt_jax.ttt.fused.measure import measure
from ttt_jax.ttt.fused.slots import Frames, Plan, from_steps, grouped, in_steps, to_steps
from ttt_jax.ttt.measure import InnerMeasurement


class Opened(NamedTuple):
    """Steps of a mini-batch as factors, tokens last; 0 in empty slots."""

    k: jax.Array
    """Keys, [N, D, b]."""
    factors: Factors
    """[N, ..., b] each."""


class Arguments(NamedTuple):
    """Of `run`."""

    base: Weights
    """W0, [H, ...]."""
    scale: jax.Array
    """Of the inner LayerNorm, as `bias`, [H, D]."""
    bias: jax.Array
    displacement: Weights
    """That the first mini-batch reads, [N, ...]."""
    total: Weights
    """The same with the steps of `opened`."""
    opened: Opened
    """Steps that earlier calls made in the first mini-batch."""
    frames: Frames
    """Those of the call; keys of `opened` are among its keys."""


class Marks(NamedTuple):
    """What is no number and has no gradient."""

    closes: jax.Array
    """Whether the mini-batch is full at the end of the call, bool [N, M]."""
    held: jax.Array
    """Slots of `opened` that hold a step, bool [N, b]."""
    last: jax.Array
    """Mini-batch whose steps are wanted, int32 [N]."""


class Results(NamedTuple):
    """Of `run`."""

    z: jax.Array
    """q + LN(f_{W_i}(q)), [N, M, b, D]."""
    end: Weights
    """Displacement after the call, [N, ...]."""
    opened: Opened
    """Steps of the mini-batch `Marks.last`; empty slots may hold any inputs."""
    measurement: InnerMeasurement | None
    """[N, M, b] each, without gradient."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run(chain: Any, plan: Plan, measured: bool, x: Arguments, marks: Marks) -> Results:
    """Runs `chain`, a module with the functions of `kernels.plain`, over M mini-batches, whole groups, and reads."""
    return _forward(chain, plan, measured, False, x, marks)[0]


def _run_fwd(chain: Any, plan: Plan, measured: bool, x: Arguments, marks: Marks) -> tuple[Results, Any]:
    results, (at, factors, saved) = _forward(chain, plan, measured, True, x, marks)
    at = at[0], *(of._replace(w=None) for of in at[1:])  # `saved` has these matrices
    return results, (x, marks, at, factors, saved)


def _forward(chain: Any, plan: Plan, measured: bool, save: bool, x: Arguments, marks: Marks):
    steps = _steps(plan, x, marks)
    base = narrow(x.base, steps.k.dtype)
    start = Start(x.total, narrow(x.displacement, steps.k.dtype))
    call = over_mapped(lambda heads, rows: chain.forward(rows[0], *heads, rows[1], **_sizes(plan), save=save))
    factors, at, end, saved = call((base, x.scale, x.bias), (steps, start))
    network, scale, bias = _network(plan, x, marks, at, factors)
    z = read(network, scale, bias, grouped(plan, x.frames.q), plan)
    measurement = None
    if measured:
        k, t = grouped(plan, x.frames.k), grouped(plan, x.frames.t)
        norms = _squared_norm(x.displacement), _squared_norm(_per_row(x.base, x))
        measurement = measure(network, scale, bias, k, t, *norms, plan)
        measurement = jax.tree.map(lambda y: y.reshape(x.frames.eta.shape), measurement)
    results = Results(z.reshape(x.frames.q.shape), end, _opened(plan, network, marks.last), measurement)
    return results, (at, factors, saved)


def _run_bwd(chain: Any, plan: Plan, measured: bool, residuals: Any, d: Results) -> tuple[Arguments, None]:
    x, marks, at, factors, saved = residuals
    at = at[0], *(of._replace(w=saved.hidden.w2[:, :: plan.per_group]) for of in at[1:])
    d = d._replace(measurement=None)
    power = _power_of_two(d)
    d = _scaled(d, power)

    def after(base, scale, bias, at, factors, opened, q, k):
        """What `_forward` computes from the chain's results; head by row, since gradients are scaled by row."""
        x_ = x._replace(base=base, scale=scale, bias=bias, opened=opened, frames=x.frames._replace(q=q, k=k))
        network, scale, bias = _network(plan, x_, marks, at, factors)
        return read(network, scale, bias, grouped(plan, q), plan), _opened(plan, network, marks.last)

    base, scale, bias = _per_row((x.base, x.scale, x.bias), x)
    # The gradient of the last map's step goes on to targets and rates: it is not rounded to the type of operands.
    *inner, last = factors.steps
    wide = factors._replace(steps=(*inner, last.astype(x.frames.q.dtype)))
    _, pull = jax.vjp(after, base, scale, bias, at, wide, x.opened, x.frames.q, x.frames.k)
    dbase, dscale, dbias, dat, dfactors, dopened, dq, dk = pull((grouped(plan, d.z), d.opened))

    steps = _steps(plan, x, marks)
    e, pull_error = jax.vjp(partial(_error, saved.zn), scale, bias, steps.target)
    given = _given(e, saved.zn, dfactors, dat, d.end)
    call = over_mapped(lambda heads, rows: chain.backward(rows[0], *heads, *rows[1:], **_sizes(plan)))
    adjoint = call((narrow(x.base, steps.k.dtype), x.scale), (steps, factors, saved, given))
    dscale_, dbias_, dtarget = pull_error(adjoint.de)
    # The first mini-batch reads `displacement`; all others what has become of `total`.
    first = jax.tree.map(lambda w, g: w + g[:, 0], _local(adjoint, factors, steps.k, plan.slots), dat)
    of_base = _local(adjoint, factors, steps.k)
    network = _network(plan, x, marks, at, factors)[0]
    # Earlier steps of the first mini-batch are summed in `total`, not by the chain.
    closes = marks.closes.reshape(len(marks.closes), -1, plan.per_group)
    summed = jnp.repeat(marks.closes[:, :, None], plan.mini_batch, 2).at[:, 0].min(~marks.held)
    summed = grouped(plan, summed[..., None].astype(e.dtype))[..., 0]
    chain_dk = key_gradient(network[0], _of_frames(plan, adjoint.dz[0]), adjoint.u1, closes, summed, plan)
    of_frames = Frames(
        dq,
        dk + chain_dk.reshape(dk.shape),
        from_steps(plan, dtarget),
        from_steps(plan, adjoint.drate[:, :, None])[..., 0],
    )
    of_rows = Arguments(
        jax.tree.map(jnp.add, dbase, of_base),
        dscale + dscale_,
        dbias + dbias_,
        first,
        jax.tree.map(jnp.subtract, adjoint.dstart, first),
        dopened,
        of_frames,
    )
    of_rows = _scaled(of_rows, 1 / power)
    heads = len(x.scale)
    per_head = lambda g: g.reshape(-1, heads, *g.shape[1:]).sum(0)  # noqa: E731
    base, scale, bias = jax.tree.map(per_head, of_rows[:3])
    return of_rows._replace(base=base, scale=scale, bias=bias), None


run.defvjp(_run_fwd, _run_bwd, optimize_remat=True)  # under `jax.checkpoint` the first pass keeps nothing


def _sizes(plan: Plan) -> dict[str, Any]:
    """The constants of a chain."""
    return {"P": plan.steps, "U": plan.group, "keep": plan.keep}


def _error(zn: jax.Array, scale: jax.Array, bias: jax.Array, target: jax.Array) -> jax.Array:
    """e of `kernels.chain.Given`, [N, S, D, C]."""
    scale, bias = scale[:, None, :, None], bias[:, None, :, None]
    return (scale * zn + bias - target) * scale


def _given(e: jax.Array, zn: jax.Array, dfactors: Factors, dat: Weights, dend: Weights) -> Given:
    m1, m2 = e.mean(2), (e * zn).mean(2)
    g0 = e - m1[:, :, None] - zn * m2[:, :, None]
    *inner, last = dfactors.steps
    return Given(g0, m1, m2, dfactors._replace(steps=(*inner, in_steps(last, e.dtype))), dat, dend)


def _power_of_two(tree: Any) -> jax.Array:
    """[N]: brings the largest entry of each n's incoming gradients to between 1/8 and 1/4.

    What the backward pass computes from them spreads to both sides: sums over frames, and gradients divided by the
    deviation of the inner network's outputs, are larger; what has passed a rate is smaller. Overflow costs the whole
    step, underflow little. At width 128 over 512 frames 16 times less and 64 times more gave the same errors.
    """
    largest = [jnp.abs(g).reshape(len(g), -1).max(1) for g in jax.tree.leaves(tree)]
    exponent = jnp.frexp(jnp.stack(largest).max(0))[1]
    return jnp.ldexp(jnp.ones((), largest[0].dtype), -jnp.clip(exponent, -100, 100) - 2)


def _scaled(tree: Any, factor: jax.Array) -> Any:
    """Leaves [N, ...] times factor [N]."""
    return jax.tree.map(lambda g: g * factor.reshape(-1, *(1,) * (g.ndim - 1)), tree)


def _per_row(tree: Any, x: Arguments) -> Any:
    """Leaves [H or N, ...] as [N, ...]."""
    rows = len(x.frames.q)
    return jax.tree.map(lambda w: jnp.tile(w, (rows // len(w), *(1,) * (w.ndim - 1))), tree)


def _squared_norm(weights: Weights) -> jax.Array:
    return sum((w * w).reshape(len(w), -1).sum(1) for w in jax.tree.leaves(weights))


def _local(adjoint: Adjoint, factors: Factors, k: jax.Array, slots: int | None = None) -> Weights:
    """Gradient to the weights that mini-batches read, [N, ...]: of all slots, or of the first `slots` of them."""
    k = jnp.swapaxes(k.reshape(len(k), factors.steps[0].shape[1], -1, k.shape[-1]), 2, 3)
    parts = k, factors, adjoint.dz, adjoint.dp
    if slots:
        parts = jax.tree.map(lambda y: y[:, :1, :, :slots], parts)
    k, factors, dz, dp = parts
    sums = jnp.promote_types(k.dtype, jnp.float32)
    product = partial(jnp.einsum, "ngkl,ngdl->nkd", preferred_element_type=sums)
    # A map's matrix is read by its inputs and, but for the first map's, by the step on its way back.
    through_inputs = [product(*pair) for pair in outer(k, factors._replace(steps=dz))]
    through_steps = [0, *map(product, dp, factors.steps[1:])]
    return tuple(
        Affine(by_inputs + by_steps, y.sum((1, 3), dtype=sums))
        for by_inputs, by_steps, y in zip(through_inputs, through_steps, dz, strict=True)
    )


def _steps(plan: Plan, x: Arguments, marks: Marks) -> Steps:
    """What the chain takes."""
    wide = x.frames.q.dtype
    operands = jnp.float16 if wide == jnp.float32 else wide
    k, t = (to_steps(plan, y) for y in (x.frames.k.astype(operands), x.frames.t))
    rate = to_steps(plan, x.frames.eta[..., None])[..., 0]
    return Steps(k, jnp.swapaxes(t, 2, 3), rate, jnp.repeat(marks.closes.astype(wide), plan.steps, 1))


def _network(plan: Plan, x: Arguments, marks: Marks, at: Weights, factors: Factors):
    """The maps of `groups.maps` with scale and bias by row; steps of `opened` are put in their slots."""
    b = plan.mini_batch

    def of_frames(y: jax.Array, held: jax.Array) -> jax.Array:
        """[N, G, X, L]: empty slots left out, and the steps of earlier calls put in."""
        y = _of_frames(plan, y)
        if b == 1:
            return y
        return y.at[:, 0, :, :b].set(jnp.where(marks.held[:, None], held.astype(y.dtype), y[:, 0, :, :b]))

    factors = jax.tree.map(of_frames, factors, x.opened.factors)
    base, scale, bias = _per_row((x.base, x.scale, x.bias), x)
    return maps(base, at, factors, grouped(plan, x.frames.k)), scale, bias


def _of_frames(plan: Plan, y: jax.Array) -> jax.Array:
    """[N, G, X, L] with empty slots left out."""
    return y.reshape(*y.shape[:3], plan.per_group, plan.slots)[..., : plan.mini_batch].reshape(*y.shape[:3], -1)


def _opened(plan: Plan, network: tuple[Map, ...], last: jax.Array) -> Opened:
    """The steps of the mini-batch `last` of each n."""
    picked = lambda y: pick(y, last, plan.per_group).astype(network[0].b.dtype)  # noqa: E731
    k, *inputs = (picked(of.inputs) for of in network)
    return Opened(k, Factors(tuple(inputs), tuple(picked(of.steps) for of in network)))
