"""Numbers and shapes of the TTT layer: finite gradients, types, one program, equal results of all memory plans."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.drawing import assert_close, quick_jit, random_like, random_mask
from tests.helpers.small_ttt import (
    DIM,
    ROWS,
    apply,
    call,
    carried_state,
    config,
    grid,
    init_shapes,
    measured_call,
    reference,
    setting,
    value_and_grads,
)
from ttt_jax.ttt import network
from ttt_jax.ttt.layer import TTTLayer, init_state

FRAMES = 12
"""As in the tests of the laws, whose programs these share."""


@grid("mlp2-4")
@pytest.mark.parametrize("fresh", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fresh", "trained"])
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_silence_gives_finite_gradients(hidden, mini_batch, fresh, dtype, x64):
    # With biases of 0 nothing but the epsilons would bound the slopes at 0, and every further mini-batch multiplies
    # them.
    cfg = config(hidden, mini_batch, dtype=dtype)
    x, mask, state = jnp.zeros((ROWS, FRAMES, DIM), dtype), jnp.ones((ROWS, FRAMES), bool), init_state(cfg, ROWS)
    init = quick_jit(TTTLayer(cfg).init)
    params = init(jax.random.key(0), x, mask, state)["params"] if fresh else setting(cfg, 14, FRAMES)[0]
    weights = random_like((x, state[:2]), np.random.default_rng(0))
    leaves = jax.tree.leaves(value_and_grads(params, x, mask, state, weights, cfg=cfg))
    assert max(np.abs(leaf).max() for leaf in leaves) < 1e9  # NaN fails too


@pytest.mark.parametrize("frames", [1, pytest.param(3, marks=pytest.mark.slow), 21])
@grid("linear-1", "mlp2-4", "mlp2-16", "mlp5-4")
def test_state_keeps_structure_shapes_and_dtypes(hidden, mini_batch, frames):
    for dtype in ("float32", "bfloat16"):
        cfg = config(hidden, mini_batch, dtype=dtype)
        state = init_state(cfg, ROWS)
        x = jax.ShapeDtypeStruct((ROWS, frames, DIM), cfg.dtype)
        mask = jax.ShapeDtypeStruct((ROWS, frames), bool)
        out, new = jax.eval_shape(partial(apply, cfg=cfg), init_shapes(cfg), x, mask, state)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert new == jax.eval_shape(lambda s: s, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(new[:2])} == {jnp.dtype("float32")}


def test_streaming_compiles_once():
    cfg = config((), mini_batch=2, dtype="float32")
    params, x, _ = setting(cfg, 10, FRAMES)
    step = jax.jit(TTTLayer(cfg).apply)
    state = init_state(cfg, ROWS)
    for frame in range(3):
        _, state, _ = step({"params": params}, x[:, frame : frame + 1], jnp.ones((ROWS, 1), bool), state)
    assert step._cache_size() == 1


def test_a_frame_that_closes_no_mini_batch_computes_no_displacement():
    for mini_batch, computes in ((4, {"cond"}), (1, {"add", "dot_general", "mul"})):
        cfg = config((4,), mini_batch, dtype="float32")
        x, mask = jnp.zeros((ROWS, 1, DIM)), jnp.ones((ROWS, 1), bool)
        state = init_state(cfg, ROWS)
        program = jax.make_jaxpr(partial(apply, cfg=cfg))(init_shapes(cfg), x, mask, state)
        size = state.displacement[0].w.size
        made = {eqn.primitive.name for eqn in program.eqns if any(size == out.aval.size for out in eqn.outvars)}
        assert made - {"broadcast_in_dim", "squeeze", "reshape", "transpose"} == computes


def test_displacement_is_finer_than_bfloat16_in_a_bfloat16_model():
    cfg = config((), 1, dtype="bfloat16")
    params, x, _ = setting(cfg, 11, FRAMES)
    _, state = call(params, x, jnp.ones((ROWS, FRAMES), bool), init_state(cfg, ROWS), cfg=cfg)
    for leaf in jax.tree.leaves(state.displacement):
        assert leaf.dtype == jnp.float32
        assert (leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32)).any()


def test_rate_and_post_norm_are_float32_in_a_bfloat16_model(monkeypatch):
    cfg = config((), 1, dtype="bfloat16", pre_norm=False)  # the rate then reads x itself
    params, x, _ = setting(cfg, 17, FRAMES)
    params |= {name: np.float32(1.2345) * np.asarray(params[name], np.float32) for name in ("rate_weight", "rate_bias")}
    state, mask = init_state(cfg, ROWS), np.ones((ROWS, FRAMES), bool)
    rate = np.asarray(measured_call(params, x, mask, state, cfg=cfg)[2].rate)
    score = np.asarray(x, np.float64) @ np.asarray(params["rate_weight"], np.float64).T + params["rate_bias"]
    np.testing.assert_allclose(rate, cfg.inner_lr / cfg.head_dim / (1 + np.exp(-score)), rtol=1e-5)

    norms, layer_norm = [], network.layer_norm
    monkeypatch.setattr(network, "layer_norm", lambda *args: norms.append(args[:3]) or layer_norm(*args))
    jax.eval_shape(partial(apply, cfg=cfg), params, x, mask, state)
    assert len(norms) == 1  # the post-norm: `inner` holds the inner LayerNorm by name
    assert {y.dtype for y in norms[0]} == {jnp.dtype("float32")}


def test_small_updates_are_not_lost_to_rounding():
    cfg = config(dtype="float32", mini_batch=1, base_lr=1e-4)
    params, x, _ = setting(cfg, 12, FRAMES)
    mask = jnp.ones((ROWS, FRAMES), bool)
    _, (got, *_) = call(params, x, mask, init_state(cfg, ROWS), cfg=cfg)
    _, (expected, *_) = reference(params, x, mask, init_state(cfg, ROWS), cfg)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b)


@pytest.mark.slow  # by default the layer keeps its laws in groups of 5
@pytest.mark.parametrize("group", [1, 3])
def test_rematerialised_groups_change_nothing(group, x64):
    cfg = config((), mini_batch=5, remat_group=group)  # 6 mini-batches, one ahead of the scan: groups with a rest, too
    params, x, rng = setting(cfg, 13, 2 * FRAMES)
    state, mask = carried_state(cfg, rng), jnp.asarray(random_mask(rng, (ROWS, 2 * FRAMES)))
    weights = random_like((x, state[:2]), rng)
    plain = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, remat_group=16))
    got, expected = (value_and_grads(params, x, mask, state, weights, cfg=c) for c in (cfg, plain))
    assert_close(got, expected, 1e-12)


@pytest.mark.slow
def test_a_bound_on_a_base_of_zeros_has_finite_gradients(x64):
    cfg = config((), 1, max_displacement=0.5)
    params, x, rng = setting(cfg, 15, FRAMES)
    params |= {name: jnp.zeros_like(p) for name, p in params.items() if name.startswith("inner_")}
    state, mask = carried_state(cfg, rng), jnp.ones((ROWS, FRAMES), bool)
    grads = value_and_grads(params, x, mask, state, random_like((x, state[:2]), rng), cfg=cfg)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
