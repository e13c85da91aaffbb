"""The linear network's kernels in Pallas's interpreter, which needs no GPU: they equal the plain chain.

The MLP's kernels talk between thread blocks, which the interpreter cannot do.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# ruff: noqa: E402  the kernels are imported where jax has what they need
pytest.importorskip("jax", minversion="0.11.2", reason="the kernels need jax 0.11.2")

from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.helpers.hopper import HEADS, ROWS
from ttt_jax.kernels import hopper_linear, linear, linear_adjoint, plain
from ttt_jax.kernels.chain import Affine, C, Factors, Given, Start, Steps, narrow

N, D = ROWS * HEADS, 64
TOL = 1e-4
"""What one float16 rounding makes of another order of sums, relative in norm."""


def drawn(P):
    """Arguments of `forward`, adjoints of its results, and sizes: two groups of two mini-batches, of which some rows'
    last is open; empty slots."""
    rng, S = np.random.default_rng(P), 4 * P
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    weights = lambda *lead: (Affine(normal(*lead, D, D) / D**0.5, normal(*lead, D)),)  # noqa: E731
    closes = np.ones((N, S), np.float32)
    closes[1::2, -P:] = 0
    rate = rng.random((N, S, C), np.float32) / (C * P) * (rng.random((N, S, C)) < 0.8)
    k = normal(N, S, C, D) / D**0.5
    steps = Steps(jnp.asarray(k, jnp.float16), normal(N, S, D, C), rate, closes)
    half = partial(narrow, operands=jnp.float16)
    args = steps, half(weights(HEADS)), 1 + 0.1 * normal(HEADS, D), normal(HEADS, D)
    adjoints = normal(N, S, D, C), half(weights(N, 2)), weights(N)
    return (*args, Start(weights(N), half(weights(N)))), adjoints, {"P": P, "U": 2 * P, "keep": 0.7}


def adjoint_arguments(args, adjoints, sizes):
    """Arguments of `backward`, from a plain forward pass."""
    steps, base, scale, bias, _ = args
    factors, _, _, saved = jax.jit(partial(plain.forward, save=True, **sizes))(*args)
    scales, biases = (jnp.tile(x, (ROWS, 1))[:, None, :, None] for x in (scale, bias))
    e = (scales * saved.zn + biases - steps.target) * scales
    m1, m2 = e.mean(2), (e * saved.zn).mean(2)
    g0 = e - m1[:, :, None] - saved.zn * m2[:, :, None]
    dn, dat, dend = adjoints
    return steps, base, scale, factors, saved, Given(g0, m1, m2, Factors((), (dn,)), dat, dend)


class Transposed:
    """A transposed view, for products of the interpreter."""

    def __init__(self, ref):
        self.ref = ref


@pytest.fixture
def interpreted(monkeypatch):
    """The interpreter has no products of tensor cores, no layouts and no inlined code."""

    def value(x):
        if isinstance(x, Transposed):
            return x.ref[...].T
        return x if isinstance(x, jax.Array) and not isinstance(x, jax.Ref) else x[...]

    def products(*pairs):
        return sum(jnp.dot(value(a), value(b), preferred_element_type=jnp.float32) for a, b in pairs)

    def store(ref, value):
        ref[...] = value

    stand_ins = {
        "transposed": Transposed,
        "load": lambda ref, layout: ref[...],
        "store": store,
        "product": lambda shape, *pairs: products(*pairs),
        "plus": lambda start, *pairs: start + products(*pairs),
        "summing": lambda *_: lambda first, *arrays: tuple(x.sum(0) for x in arrays),
    }
    for module in (linear, linear_adjoint):
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(module, name, stand_in)
    with plgpu.force_gpu_interpret_mode():
        yield


@pytest.mark.parametrize(("P", "save"), [(1, False), (2, True)])
def test_kernels_equal_the_plain_chain(interpreted, P, save):
    args, adjoints, sizes = drawn(P)
    back = adjoint_arguments(args, adjoints, sizes)
    for name, inputs, more in (("forward", args, {"save": save}), ("backward", back, {})):
        got, expected = (
            jax.jit(partial(getattr(chain, name), **sizes, **more))(*inputs) for chain in (hopper_linear, plain)
        )
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.linalg.norm(a - b) <= TOL * np.linalg.norm(b)
