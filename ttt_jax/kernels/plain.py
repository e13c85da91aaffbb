"""The chain in plain JAX: the splitting and the roundings of the GPU kernels, on any device.

One rounding differs: in the adjoint the kernel computes x2 again, from the z1 that was saved as operands.

Slots of a mini-batch are handled at once: [N, ..., P C], tokens last.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ttt_jax.kernels.chain import (
    EPS,
    NC,
    Adjoint,
    Affine,
    C,
    Factors,
    Given,
    Hidden,
    Saved,
    Start,
    Steps,
    Weights,
    narrow,
    outer,
)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of operands of one type; sums are float32, or wider where the operands are."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def gelu(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """GELU by the tanh formula, its slope and its second derivative."""
    c, a = 0.7978845608028654, 0.044715  # sqrt(2 / pi); Hendrycks and Gimpel 2016
    tanh, inner = jnp.tanh(c * x * (1 + a * x * x)), c * (1 + 3 * a * x * x)
    bell = 1 - tanh * tanh
    curvature = bell * (inner + 0.5 * x * (6 * c * a * x - 2 * tanh * inner * inner))
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * bell * inner, curvature


def forward(
    steps: Steps,
    base: Weights,
    scale: jax.Array,
    bias: jax.Array,
    start: Start,
    *,
    P: int,
    U: int,
    keep: float,
    save: bool,
) -> tuple[Factors, Weights, Weights, Saved | None]:
    """Runs the chain over the mini-batches of a call.

    Args:
      steps: all frames of the call.
      base: W0, matrices are operands; scale, bias: of the inner LayerNorm, [D]. Their first axis is H or N long, and
        n uses entry n modulo this length.
      start: where the call starts from.
      P: steps of a mini-batch. U: steps of a group, a multiple of P that divides S.
      keep: what remains of the displacement after a mini-batch.
      save: whether to keep what `backward` needs.

    Returns:
      The steps of all slots; the displacement at the start of every group, matrices are operands [N, G, ...]; that
      after the call [N, ...]; what is saved, or None.
    """
    operands = steps.k.dtype
    base, scale, bias = _repeat((base, scale, bias), len(steps.k))

    def advance(carry: tuple[Weights, Weights], x: tuple[jax.Array, ...]):
        total, read = carry
        k, target, rate, closes = x
        matrices = [(of.w, moved.w) for of, moved in zip(base, read, strict=True)]
        biases = [(of.b + moved.b)[..., None] for of, moved in zip(base, read, strict=True)]
        first = _sum_of("nkd,ndc->nkc", matrices[0], k) + biases[0]
        inputs, last = (), first
        if len(base) == 2:
            x2, slope, _ = gelu(first)
            inputs = (x2.astype(operands),)
            last = biases[1] + _back(matrices[1], *inputs)
        centred = last - last.mean(1, keepdims=True)
        rstd = jax.lax.rsqrt((centred * centred).mean(1, keepdims=True) + EPS)
        zn = centred * rstd
        e = (scale[..., None] * zn + bias[..., None] - target) * scale[..., None]
        g0 = e - e.mean(1, keepdims=True) - zn * (e * zn).mean(1, keepdims=True)
        taken, hidden = (-rate * rstd * g0,), None
        if len(base) == 2:
            p = _sum_of("nkd,ndc->nkc", matrices[1], taken[0].astype(operands))
            taken = p * slope, *taken
            hidden = Hidden(read[1].w, first.astype(operands), p.astype(operands))
        factors = Factors(inputs, tuple(step.astype(operands) for step in taken))
        change = tuple(
            Affine(product("nkc,ndc->nkd", *pair), step.sum(-1))
            for pair, step in zip(outer(k, factors), taken, strict=True)
        )
        after = jax.tree.map(lambda w, d: jnp.where(_like(closes, w) > 0, keep * (w + d), w), total, change)
        return (after, narrow(after, operands)), (factors, (hidden, zn, rstd) if save else None)

    def group(carry: tuple[Weights, Weights], x: tuple[jax.Array, ...]):
        last, out = jax.lax.scan(advance, carry, x)
        return last, (carry[1], out)

    (end, _), (at, (factors, saved)) = jax.lax.scan(group, (start.total, start.read), _mini_batches(steps, P, U))
    factors = jax.tree.map(_to_groups, factors)
    at = jax.tree.map(lambda w: jnp.moveaxis(w, 0, 1), at)
    if save:
        hidden, zn, rstd = saved
        if hidden:
            w2 = jnp.moveaxis(hidden.w2.reshape(-1, *hidden.w2.shape[2:]), 0, 1)
            hidden = Hidden(w2, _to_groups(hidden.z1), _to_groups(hidden.p))
        saved = Saved(hidden, _to_steps(zn), _to_steps(rstd)[:, :, 0])
    return factors, at, end, saved


def backward(
    steps: Steps,
    base: Weights,
    scale: jax.Array,
    factors: Factors,
    saved: Saved,
    given: Given,
    *,
    P: int,
    U: int,
    keep: float,
) -> Adjoint:
    """The adjoint of `forward`, whose arguments and results it takes, run from the last mini-batch to the first."""
    operands = steps.k.dtype
    base, scale = _repeat((base, scale[..., None]), len(steps.k))
    width = scale.shape[1]
    in_groups = partial(_from_groups, per_group=U // P)
    in_slots = partial(_from_steps, P=P, U=U)
    hidden = None
    if saved.hidden:
        w2 = jnp.moveaxis(saved.hidden.w2, 1, 0).reshape(-1, U // P, len(steps.k), *saved.hidden.w2.shape[2:])
        hidden = Hidden(w2, in_groups(saved.hidden.z1), in_groups(saved.hidden.p))
    *inner, last = given.factors.steps
    xs = (
        _mini_batches(steps, P, U),
        jax.tree.map(in_groups, factors),
        Factors(*jax.tree.map(in_groups, (given.factors.inputs, tuple(inner)))),
        hidden,
        tuple(in_slots(x) for x in (last, saved.zn, given.g0)),
        tuple(in_slots(x[:, :, None]) for x in (saved.rstd, given.m1, given.m2)),
    )

    def mean(x: jax.Array) -> jax.Array:
        return x.mean(1, keepdims=True)

    def recede(total: Weights, x: tuple):
        (k, _, rate, closes), factors, d, hidden, (dn, zn, g0), (rstd, m1, m2) = x
        total = jax.tree.map(lambda w: jnp.where(_like(closes, w) > 0, keep * w, w), total)
        u, f = narrow(total, operands), closes[:, None, None]
        of_first = f * (product("nkd,ndc->nkc", u[0].w, k) + u[0].b[..., None])
        if hidden:
            (x2,), (_, n2), (dx2,), (dn1,) = *factors, *d
            _, slope, curvature = gelu(hidden.z1.astype(rate.dtype))
            dn1 = dn1 + of_first
            dx2 = dx2 + f * product("nkd,ndc->nkc", u[1].w, n2)
            dp = (dn1 * slope).astype(operands)
            w2 = base[1].w, hidden.w2
            dn = dn + f * (_back((u[1].w,), x2) + u[1].b[..., None]) + _back(w2, dp)
        else:
            dn = dn + of_first
        # The last map's step is -rate rstd g0, and g0 comes from e and zn.
        dg0 = -rate * rstd * dn
        mu, dg = mean(dg0 * zn), (dn * g0).sum(1, keepdims=True)
        de = dg0 - mean(dg0) - zn * mu
        dzn = scale * scale * de - dg0 * m2 - (g0 + m1 + zn * m2) * mu
        dz = (rstd * (dzn - mean(dzn) - zn * (mean(dzn * zn) - rate * dg * rstd / width)),)
        if hidden:
            dx2 = dx2 + _sum_of("nkd,ndc->nkc", w2, dz[0].astype(operands))
            dz = dx2 * slope + dn1 * hidden.p * curvature, *dz
        rounded = tuple(y.astype(operands) for y in dz)
        local = [product("nkc,ndc->nkd", rounded[0], k)]
        if hidden:
            local += [product("nkc,ndc->nkd", dp, n2) + product("nkc,ndc->nkd", x2, rounded[1])]
        local = tuple(Affine(w, y.sum(-1)) for w, y in zip(local, dz, strict=True))
        out = rounded, (dp,) if hidden else (), de, -rstd * dg
        return jax.tree.map(jnp.add, total, local), out

    def group(total: Weights, x: tuple):
        dat, x = x
        first = total[0].w
        u1 = jnp.where(_like(x[0][3][-1], first) > 0, keep * first, first).astype(operands)
        total, out = jax.lax.scan(recede, total, x, reverse=True)
        return jax.tree.map(jnp.add, total, dat), (u1, out)

    dat = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), given.dat)
    dstart, (u1, (dz, dp, de, drate)) = jax.lax.scan(group, given.dend, (dat, xs), reverse=True)
    dz, dp = jax.tree.map(_to_groups, (dz, dp))
    return Adjoint(dz, dp, _to_steps(de), _to_steps(drate)[:, :, 0], dstart, jnp.moveaxis(u1, 0, 1))


def _repeat(tree, length: int):
    """Leaves [H or N, ...] as [N, ...]."""
    return jax.tree.map(lambda x: jnp.tile(x, (length // len(x), *(1,) * (x.ndim - 1))), tree)


def _sum_of(spec: str, weights: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    """Sum of the products of each of `weights`, a base and its displacement, with x."""
    return sum(product(spec, w, x) for w in weights)


def _back(weights: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    """Products of [N, K, D] with [N, K, C] over the hidden units, part by part: [N, D, C]."""
    return _sum_of("npkd,npkc->npdc", tuple(map(_parts, weights)), _parts(x)).sum(1)


def _parts(x: jax.Array) -> jax.Array:
    """[N, K, X] -> [N, NC, K / NC, X]."""
    return x.reshape(x.shape[0], NC, -1, x.shape[-1])


def _like(x: jax.Array, w: jax.Array) -> jax.Array:
    """[N] with axes for those of w [N, ...]."""
    return x.reshape(-1, *(1,) * (w.ndim - 1))


def _mini_batches(steps: Steps, P: int, U: int) -> tuple[jax.Array, ...]:
    """Keys, targets, rates and `closes` for scans: [G, U / P, N, ...]."""
    k, rate = jnp.swapaxes(steps.k, 2, 3), steps.rate[:, :, None]
    closes = jnp.moveaxis(steps.closes[:, ::P], 1, 0).reshape(-1, U // P, len(k))
    return *(_from_steps(x, P, U) for x in (k, steps.target, rate)), closes


def _from_steps(x: jax.Array, P: int, U: int) -> jax.Array:
    """[N, S, X, C] -> [G, U / P, N, X, P C]."""
    x = x.reshape(len(x), -1, U // P, P, *x.shape[2:]).transpose(1, 2, 0, 4, 3, 5)
    return x.reshape(*x.shape[:4], P * C)


def _to_steps(x: jax.Array) -> jax.Array:
    """[G, U / P, N, X, P C] -> [N, S, X, C]."""
    x = x.reshape(*x.shape[:4], -1, C).transpose(2, 0, 1, 4, 3, 5)
    return x.reshape(len(x), -1, *x.shape[4:])


def _from_groups(x: jax.Array, per_group: int) -> jax.Array:
    """[N, G, X, L] -> [G, U / P, N, X, P C]."""
    return x.reshape(*x.shape[:3], per_group, -1).transpose(1, 3, 0, 2, 4)


def _to_groups(x: jax.Array) -> jax.Array:
    """[G, U / P, N, X, P C] -> [N, G, X, L]."""
    x = x.transpose(2, 0, 3, 1, 4)
    return x.reshape(*x.shape[:3], -1)
