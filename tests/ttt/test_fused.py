"""The fused inner loop on its plain chain: `inner_scan` in float64, and off by float16's rounding alone otherwise."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.drawing import assert_close, assert_same_bits, pieces, quick_jit
from tests.helpers.small_fused import (
    HEADS,
    LINEAR,
    MLP,
    ROWS,
    call,
    config,
    drawn,
    grads,
    loss_weights,
    narrow,
    plain_call,
    plain_grads,
    value_and_grads,
)
from ttt_jax.kernels import plain
from ttt_jax.ttt.fused import scan as module
from ttt_jax.ttt.fused.scan import fused_scan
from ttt_jax.ttt.fused.slots import plan_of

TOL = 1e-10
LENGTHS = {1: 140, 4: 140, 16: 140, 40: 170, 64: 200}
"""Frames of a call by mini-batch: two groups and more, the last one not full."""
sizes = pytest.mark.parametrize("b", LENGTHS)
NETWORKS = {"mlp": MLP, "linear": LINEAR}
networks = pytest.mark.parametrize("hidden", NETWORKS.values(), ids=NETWORKS.keys())
settings = pytest.mark.parametrize(
    ("b", "horizon", "hidden"),
    [
        pytest.param(
            *(b, horizon, hidden),
            id=f"{name}-{b}-{horizon}",
            marks=() if (b, horizon) in ((1, 100.0), (4, 100.0), (40, None)) else pytest.mark.slow,
        )
        for name, hidden in NETWORKS.items()
        for b in LENGTHS
        for horizon in (100.0, None)
    ],
)

FORWARD, BACKWARD = 8e-4, 1.5e-3
"""Bounds on relative errors with float16 operands. Rounding to float16 is off by up to 4.9e-4 of a number; over these
settings results were up to 5e-4 off in norm, gradients up to 9e-4."""


def relative(got, expected):
    """Largest error of a leaf in norm, relative to the leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs if b.any())


# Equal to the scan in float64


@settings
def test_results_are_those_of_the_scan(b, horizon, hidden, x64):
    args, cfg = drawn(b, LENGTHS[b], b, hidden=hidden), config(b, horizon, hidden=hidden)
    *got, measurement = call(*args, cfg, True)
    *expected, of_scan = plain_call(*args, cfg, True)
    assert_close(got, expected, TOL)
    assert_close(measurement[:3], of_scan[:3], TOL)
    assert_close(measurement.displacement, of_scan.displacement, 1e-7)  # a root: an error of 1e-15 near 0 makes 3e-8


@settings
def test_gradients_are_those_of_the_scan(b, horizon, hidden, x64):
    args, cfg = drawn(b, LENGTHS[b], b, hidden=hidden), config(b, horizon, hidden=hidden)
    weights = loss_weights(args)
    got, expected = (f(*args, cfg, weights) for f in (grads, plain_grads))
    assert_close(got, expected, TOL)


@networks
@pytest.mark.parametrize(
    ("b", "parts"),
    [
        (4, (1, 1, 1, 70, 1, 66)),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, (70, 1, 69)), (16, (9, 1, 130)), (40, (9, 161)))),
    ],
)
def test_any_split_gives_the_same_results(b, parts, hidden, x64):
    args, cfg = drawn(b, LENGTHS[b], b, hidden=hidden), config(b, hidden=hidden)
    *front, state, inputs, mask = args
    for tolerance, kind in ((TOL, lambda x: x), (FORWARD, narrow)):
        one, z, _ = call(*kind(args), cfg)
        new, outs = kind(state), []
        for piece in pieces(parts):
            part = jax.tree.map(lambda x, piece=piece: x[:, piece], kind(inputs))
            new, out, _ = call(*kind(front), new, part, mask[:, piece], cfg)
            outs.append(out)
        assert_close((new, np.concatenate(outs, 1)), (one, z), tolerance)


@networks
def test_one_frame_at_a_time_from_any_phase(hidden, x64):
    cfg, args = config(hidden=hidden), drawn(5, 1, 4, hidden=hidden)
    for phase in range(5):
        count = np.full(ROWS, phase, np.int32)
        held = (np.arange(4) < phase % 4)[:, None]
        steps = jax.tree.map(lambda x, held=held: np.where(held, 0.1, 0) * np.ones_like(x), args[3].open_steps)
        state = args[3]._replace(open_steps=steps, count=count)
        assert_close(
            call(*args[:3], state, *args[4:], cfg, False), plain_call(*args[:3], state, *args[4:], cfg, False), TOL
        )
        new = call(*args[:3], state, *args[4:], cfg)[0]
        filled = np.abs(np.asarray(new.open_steps.inputs[0])).sum(-1) > 0
        np.testing.assert_array_equal(filled, np.arange(4) < (new.count % 4)[:, None, None] + np.zeros((1, HEADS, 1)))


# Laws


@networks
def test_masked_frames_may_hold_anything(hidden, x64):
    args, cfg = drawn(3, LENGTHS[4], 4, hidden=hidden), config(hidden=hidden)
    *front, inputs, mask = args
    spoilt = jax.tree.map(lambda x: np.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, np.nan), inputs)
    weights = loss_weights(args)
    assert_same_bits(call(*front, spoilt, mask, cfg, True), call(*args, cfg, True))
    got, clean = (grads(*front, x, mask, cfg, weights)[1] for x in (spoilt, inputs))
    assert_same_bits(got, clean)
    assert (np.asarray(clean[4].k)[~mask] == 0).all()


@networks
def test_a_row_of_nan_stays_alone(hidden, x64):
    args, cfg = drawn(4, LENGTHS[4], 4, hidden=hidden), config(hidden=hidden)
    state = args[3]._replace(displacement=jax.tree.map(lambda x: x * np.array([1, np.nan]).reshape(
        -1, *(1,) * (x.ndim - 1)), args[3].displacement))  # fmt: skip
    row = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
    *got, measurement = call(*args[:3], state, *args[4:], cfg, True)
    *clean, sound = call(*args, cfg, True)
    assert_same_bits(row((got, measurement), 0), row((clean, sound), 0))
    assert np.isnan(np.asarray(got[1])[1][args[5][1]]).all()
    assert_same_bits(measurement.loss_base, sound.loss_base)


@networks
def test_no_rate_leaves_the_weights_alone(hidden):
    args, cfg = narrow(drawn(6, LENGTHS[4], 4, fresh=True, hidden=hidden)), config(hidden=hidden)
    args = (*args[:4], args[4]._replace(eta=np.zeros_like(args[4].eta)), args[5])
    state, _, measurement = call(*args, cfg, True)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(state[:2]))
    assert_same_bits(call(*args, cfg)[0].open_steps, args[3].open_steps)
    assert not any(np.signbit(leaf).any() for leaf in jax.tree.leaves(call(*args, cfg)[0].open_steps))
    assert_close(measurement.loss_before, measurement.loss_base, 1e-5)
    assert_same_bits(measurement.loss_after, measurement.loss_before)
    assert (np.asarray(measurement.displacement) == 0).all()


# Float16


@networks
@sizes
def test_float16_is_off_by_its_rounding_alone(b, hidden, x64):
    args, cfg = drawn(b, LENGTHS[b], b, hidden=hidden), config(b, hidden=hidden)
    exact = call(*args, cfg, True)
    got = call(*narrow(args), cfg, True)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert 1e-5 < relative(got, exact) < FORWARD


@networks
@pytest.mark.parametrize("b", [4, *(pytest.param(b, marks=pytest.mark.slow) for b in (1, 64))])
def test_gradients_of_any_size_are_off_by_the_rounding_of_float16_alone(b, hidden, x64):
    args, cfg = drawn(b, LENGTHS[b], b, hidden=hidden), config(b, hidden=hidden)
    weights = loss_weights(args)
    exact = grads(*args, cfg, weights)[1]
    for size in (1.0, 1e-8, 1e4):
        got = grads(*narrow(args), cfg, narrow(jax.tree.map(lambda w, size=size: size * w, weights)))[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
        got = jax.tree.map(lambda g, size=size: np.asarray(g, np.float64) / size, got)
        assert 1e-5 < relative(got, exact) < BACKWARD


def test_two_runs_are_equal():
    args, cfg = narrow(drawn(8, LENGTHS[16], 16)), config(16)
    weights = narrow(loss_weights(args))
    assert_same_bits(grads(*args, cfg, weights), grads(*args, cfg, weights))


# Memory and transformations


def few_chunks(monkeypatch, args, cfg):
    """Lets a chunk hold two groups."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 10 * module._held(args[0], cfg, ROWS * HEADS))


@networks
def test_chunks_give_the_same_gradients(hidden, x64, monkeypatch):
    args, cfg = drawn(9, 150, 4, hidden=hidden), config(hidden=hidden)
    weights = loss_weights(args)
    expected, results = grads(*args, cfg, weights), call(*args, cfg, True)
    few_chunks(monkeypatch, args, cfg)
    assert plan_of(150, 4, 1.0, module._held(args[0], cfg, ROWS * HEADS), module.CHUNK_BYTES)[1] == 2
    for scan in (fused_scan, jax.checkpoint(fused_scan, static_argnums=6)):
        got = quick_jit(partial(value_and_grads, scan), static_argnums=6)(*args, cfg, weights)
        assert_close(got, expected, TOL)
    assert_close(quick_jit(fused_scan, static_argnums=(6, 7))(*args, cfg, True), results, TOL)


def test_a_first_pass_under_checkpoint_saves_nothing():
    args, cfg = narrow(drawn(9, LENGTHS[4], 4)), config()

    def forward(*args, save, **sizes):
        def saving(*args):
            return plain.forward(*args, **sizes, save=True)

        def passing(*args):
            return plain.forward(*args, **sizes, save=False)

        return jax.jit(saving if save else passing)(*args)

    chain = SimpleNamespace(forward=forward, backward=plain.backward)

    def passes(wrap):
        def z(q):
            return fused_scan(*args[:4], args[4]._replace(q=q), args[5], cfg, chain=chain)[1]

        text = str(jax.make_jaxpr(jax.value_and_grad(lambda q: wrap(z)(q).sum()))(args[4].q))
        return text.count("name=saving"), text.count("name=passing")

    assert passes(lambda f: f) == (1, 0)
    assert passes(jax.checkpoint) == (1, 1)


@pytest.mark.parametrize(
    ("base", "hidden"),
    [(0, MLP), (None, MLP), (None, LINEAR)],
    ids=["bases", "one base", "one base, linear"],
)
def test_arms_side_by_side(base, hidden, x64):
    cfg = config(hidden=hidden)
    arms = [drawn(seed, LENGTHS[4], 4, hidden=hidden) for seed in (1, 2)]
    if base is None:
        arms = [(arms[0][0], *arm[1:]) for arm in arms]
    weights = [loss_weights(arm, seed) for seed, arm in enumerate(arms)]
    stack = lambda *leaves: np.stack(leaves)  # noqa: E731
    expected = jax.tree.map(stack, *(grads(*arm, cfg, w) for arm, w in zip(arms, weights, strict=True)))
    side_by_side = jax.vmap(lambda *args: value_and_grads(fused_scan, *args[:6], cfg, args[6]), (base, *(0,) * 6))
    together = jax.tree.map(stack, *(arm[1:] for arm in arms))
    bases = arms[0][0] if base is None else jax.tree.map(stack, *(arm[0] for arm in arms))
    got = quick_jit(side_by_side)(bases, *together, jax.tree.map(stack, *weights))
    assert_close(got, expected, TOL)


@pytest.mark.parametrize(
    ("frames", "b", "steps", "group", "batches"),
    [
        (2048, 16, 1, 5, 130),  # 129 mini-batches
        (2048, 64, 4, 4, 33),
        (100, 40, 3, 6, 4),
        (64, 1, 1, 64, 64),
        (1, 16, 1, 2, 2),
        (300, 256, 16, 16, 3),
    ],
)
def test_calls_are_laid_out_with_few_empty_steps(frames, b, steps, group, batches):
    plan, chunks, of_chunk = plan_of(frames, b, 1.0, 1, 1e9)
    assert (plan.steps, plan.group, chunks, of_chunk) == (steps, group, 1, batches)
    assert 64 <= b * plan.per_group <= 128 or plan.per_group in (1, of_chunk)


def test_long_calls_go_in_equal_chunks():
    plan, chunks, batches = plan_of(2048, 16, 1.0, 1000, 50_000)
    assert batches % plan.per_group == 0
    assert batches * 1000 <= 50_000
    assert chunks * batches >= 129


@pytest.mark.parametrize("b", [1, 4, 16, 17, 64])
def test_no_chunk_holds_more_than_it_may(b):
    for most in (10_000, 33_000, 100_000):
        plan, _, batches = plan_of(2048, b, 1.0, 100, most)
        assert batches * 100 <= max(most, 100 * plan.per_group)
