"""The chain in plain JAX: its adjoint against automatic differentiation, and its roundings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.drawing import assert_close, quick_jit
from ttt_jax.kernels import plain
from ttt_jax.kernels.chain import Affine, C, Factors, Given, Start, Steps, narrow, outer
from ttt_jax.ttt.fused.groups import key_gradient, maps
from ttt_jax.ttt.fused.slots import Plan

ROWS, HEADS, D, K, P, U, GROUPS = 2, 2, 16, 64, 2, 4, 2
N, S, KEEP = ROWS * HEADS, U * GROUPS, 0.9

MLP, LINEAR = (((K, D), (K,)), ((K, D), (D,))), (((D, D), (D,)),)
networks = pytest.mark.parametrize("sizes", [MLP, LINEAR], ids=["mlp", "linear"])
"""By the shapes of each map's matrix and bias."""

forward = quick_jit(partial(plain.forward, P=P, U=U, keep=KEEP), static_argnames="save")
backward = quick_jit(partial(plain.backward, P=P, U=U, keep=KEEP))


def network(rng, sizes, *lead):
    return tuple(Affine(*(rng.standard_normal((*lead, *size)) for size in shapes)) for shapes in sizes)


def drawn(rng, sizes):
    """Arguments of `forward` in float64: rows end in their third and fourth mini-batch, the last one full."""
    base = jax.tree.map(lambda w: 0.3 * w, network(rng, sizes, HEADS))
    scale, bias = 1 + 0.2 * rng.standard_normal((HEADS, D)), 0.2 * rng.standard_normal((HEADS, D))
    k = rng.standard_normal((N, S, C, D)) / D**0.5
    rate = 0.02 * rng.random((N, S, C))
    closes = np.ones((N, S))
    closes[:HEADS, 2 * P :], rate[:HEADS, 3 * P - 1 :], rate[:, :, 13:] = 0, 0, 0
    moved = jax.tree.map(lambda w: 0.1 * w, network(rng, sizes, N))
    start = Start(moved, moved)  # no earlier steps: with some, the dual form needs those among the factors
    return Steps(k, rng.standard_normal((N, S, D, C)), rate, closes), base, scale, bias, start


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def per_head(x):
    return x.reshape(ROWS, HEADS, *x.shape[1:]).sum(0)


def slots(x):
    """[N, S, X, C] -> [N, G, X, L]."""
    return x.reshape(N, GROUPS, U, *x.shape[2:]).transpose(0, 1, 3, 2, 4).reshape(N, GROUPS, x.shape[2], -1)


def local(k, factors, got):
    """Gradient to weights that are read, from factors of the slots that read them."""
    add = lambda a, b: jnp.einsum("ngil,ngjl->nij", a, b)  # noqa: E731
    grads = [add(*pair) for pair in outer(k, factors._replace(steps=got.dz))]
    grads[1:] = [w + add(p, n) for w, p, n in zip(grads[1:], got.dp, factors.steps[1:], strict=True)]
    return tuple(Affine(w, dz.sum((1, 3))) for w, dz in zip(grads, got.dz, strict=True))


@networks
def test_the_adjoint_is_that_of_automatic_differentiation(sizes, x64):
    rng = np.random.default_rng(0)
    steps, base, scale, bias, start = drawn(rng, sizes)
    factors, at, end, saved = forward(steps, base, scale, bias, start, save=True)
    plainly = forward(steps, base, scale, bias, start, save=False)
    assert plainly[3] is None
    assert_close(plainly[:3], (factors, at, end), 0)
    if saved.hidden:
        np.testing.assert_array_equal(saved.hidden.w2[:, :: U // P], at[1].w)

    dfactors, dat, dend = jax.tree.map(lambda x: rng.standard_normal(x.shape), (factors, at, end))
    for d in jax.tree.leaves(dfactors):  # nothing reads what lies behind a mini-batch that stays open
        d[:HEADS, -1, :, P * C :] = 0

    def loss(k, target, rate, base, scale, bias, start):
        out = plain.forward(
            Steps(k, target, rate, steps.closes), base, scale, bias, start, P=P, U=U, keep=KEEP, save=False
        )
        return sum(jax.tree.leaves(jax.tree.map(lambda x, d: (x * d).sum(), out[:3], (dfactors, dat, dend))))

    expected = quick_jit(jax.grad(loss, range(7)))(steps.k, steps.target, steps.rate, base, scale, bias, start)

    tile = lambda x: jnp.tile(x, (ROWS, 1))[:, None, :, None]  # noqa: E731
    e = (tile(scale) * saved.zn + tile(bias) - steps.target) * tile(scale)
    m1, m2 = e.mean(2), (e * saved.zn).mean(2)
    *inner, dn = dfactors.steps
    dn = dn.reshape(N, GROUPS, D, U, C).transpose(0, 1, 3, 2, 4).reshape(N, S, D, C)
    g0 = e - m1[:, :, None] - saved.zn * m2[:, :, None]
    given = Given(g0, m1, m2, Factors(dfactors.inputs, (*inner, dn)), dat, dend)
    got = backward(steps, base, scale, factors, saved, given)

    k = slots(jnp.swapaxes(steps.k, 2, 3))
    first = P * C
    of_first = lambda tree: jax.tree.map(lambda x: x[:, :1, :, :first], tree)  # noqa: E731
    dread = local(of_first(k), of_first(factors), got._replace(dz=of_first(got.dz), dp=of_first(got.dp)))
    dread = jax.tree.map(lambda w, d: w + d[:, 0], dread, dat)
    dbase = jax.tree.map(per_head, local(k, factors, got))
    dtotal = jax.tree.map(jnp.subtract, got.dstart, dread)
    by_e = slots(got.de)
    dscale = slots(2 * tile(scale) * saved.zn + tile(bias) - steps.target)
    filled = steps.rate > 0
    closes = steps.closes[:, ::P].reshape(N, GROUPS, -1)
    keys = k.swapaxes(2, 3)
    first_map = maps(jax.tree.map(lambda w: np.concatenate([w] * ROWS), base), at, factors, keys)[0]
    dk = key_gradient(first_map, got.dz[0], got.u1, closes, np.repeat(closes, first, 2), Plan(first, P, U, KEEP))
    parts = (
        (dk.reshape(N, S, C, D), expected[0]),
        (-got.de * tile(scale), expected[1]),
        (got.drate * filled, expected[2] * filled),
        (dbase, expected[3]),
        (per_head((by_e * dscale).sum((1, 3))), expected[4]),
        (per_head(got.de.sum((1, 3))) * scale, expected[5]),
        (Start(dtotal, dread), expected[6]),
    )
    for one, other in parts:
        assert_close(one, other, 1e-10)


@networks
@pytest.mark.parametrize("heads", ["shared", "of each row"])
def test_float16_operands_are_off_by_their_rounding_alone(heads, sizes, x64):
    rng = np.random.default_rng(1)
    steps, base, scale, bias, start = drawn(rng, sizes)
    exact = forward(steps, base, scale, bias, start, save=False)
    if heads == "of each row":
        base, scale, bias = jax.tree.map(lambda x: np.concatenate([x] * ROWS), (base, scale, bias))
    steps = cast(steps, jnp.float32)._replace(k=jnp.asarray(steps.k, jnp.float16))
    base, start = cast((base, start), jnp.float32)
    got = forward(
        steps,
        narrow(base, jnp.float16),
        *cast((scale, bias), jnp.float32),
        start._replace(read=narrow(start.read, jnp.float16)),
        save=True,
    )
    assert {x.dtype for x in jax.tree.leaves(got[0])} == {jnp.dtype("float16")}
    assert {x.dtype for x in jax.tree.leaves(got[2])} == {jnp.dtype("float32")}
    for a, b in zip(jax.tree.leaves(got[:3]), jax.tree.leaves(exact[:3]), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < 1e-3, error
