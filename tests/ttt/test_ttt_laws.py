"""The laws of the TTT layer, over inner networks and mini-batch sizes, against a written-out reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from tests.helpers import reference_ttt
from tests.helpers.contract import verify
from tests.helpers.drawing import (
    assert_close,
    assert_same_bits,
    digest,
    few,
    random_like,
    random_mask,
    seeds,
    splits,
)
from tests.helpers.small_ttt import (
    FRAMES,
    PARTS,
    ROWS,
    TOL,
    VARIANTS,
    call,
    carried_state,
    config,
    grid,
    module,
    networks,
    pairs,
    reference,
    run_split,
    setting,
    up_to,
    value_and_grads,
)
from ttt_jax.ttt.layer import init_state

FLOAT16 = 2e-3
"""Of outputs, states and gradients in units of the larger of 1 and a leaf's greatest magnitude, where products multiply
float16 numbers, off by up to 4.9e-4 each."""

# The reference itself


@networks
def test_reference_gradient_equals_finite_differences(hidden):
    rng = np.random.default_rng(0)
    sizes = (8, *(8 * m for m in hidden), 8)
    weights = [
        (rng.standard_normal((i, o)) / i**0.5, rng.standard_normal(o))
        for i, o in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    k, t, scale, bias = rng.standard_normal((4, 8))
    gradient = reference_ttt.outer(reference_ttt.inner_gradient(weights, k, t, scale, bias))
    direction = [(rng.standard_normal(w.shape), rng.standard_normal(b.shape)) for w, b in weights]
    step = 1e-6
    up, down = (
        reference_ttt.inner_loss(reference_ttt.add(weights, direction, sign * step), k, t, scale, bias)
        for sign in (1, -1)
    )
    expected = sum(
        (g * d).sum() for gs, ds in zip(gradient, direction, strict=True) for g, d in zip(gs, ds, strict=True)
    )
    assert (up - down) / (2 * step) == pytest.approx(expected, rel=1e-6)


# Law 1


@grid("mlp5-4", fused=True)  # the others: the contract below
@given(seed=seeds)
@few
def test_parallel_form_equals_written_out_descent(hidden, mini_batch, impl, x64, seed):
    cfg, frames = config(hidden, mini_batch, impl=impl), 12
    params, x, rng = setting(cfg, seed, frames)
    for state in (init_state(cfg, ROWS), carried_state(cfg, rng)):
        mask = random_mask(rng, (ROWS, frames))
        assert_close(call(params, x, mask, state, cfg=cfg), reference(params, x, mask, state, cfg), TOL)


@pytest.mark.slow
@pytest.mark.parametrize("mini_batch", [100, 256])
def test_mini_batches_longer_than_a_call(mini_batch, x64):
    cfg = config(mini_batch=mini_batch, horizon=400.0)
    params, x, rng = setting(cfg, 21, frames=300)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, 300))
    expected = reference(params, x, mask, state, cfg)
    assert_close(call(params, x, mask, state, cfg=cfg), expected, TOL)
    assert_close(run_split(params, x, mask, state, cfg, (*(3,) * 16, 252)), expected, TOL)


@pairs
def test_outer_gradients_equal_finite_differences(hidden, mini_batch, impl, x64):
    cfg, frames = config(hidden, mini_batch, impl=impl), PARTS[0][0]
    params, x, rng = setting(cfg, 2, frames)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, frames))
    weights = random_like((x, state[:2]), rng)
    point = jax.tree.map(np.asarray, (params, x, tuple(state[:2])))
    _, grads = value_and_grads(params, x, mask, state, weights, cfg=cfg)
    direction = jax.tree.map(np.asarray, random_like(point, rng))
    step = 1e-6

    def loss(sign):
        p, y, moved = jax.tree.map(lambda a, d: a + sign * step * d, point, direction)
        carried = state._replace(displacement=moved[0], open_steps=moved[1])
        return value_and_grads(p, y, mask, carried, weights, cfg=cfg)[0]

    expected = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(direction)))
    np.testing.assert_allclose((loss(1) - loss(-1)) / (2 * step), expected, rtol=1e-6)


# Laws 1 to 5 over two calls, frame by frame and mixed


@pairs
@given(seed=seeds)
@few
def test_the_layer_keeps_its_contract(hidden, mini_batch, impl, x64, seed):
    cfg = config(hidden, mini_batch, impl=impl)
    params, x, rng = setting(cfg, seed)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES))
    verify(module(cfg), params, x, mask, state, rng, PARTS)
    out, new = run_split(params, x, mask, state, cfg, PARTS[0])
    assert_close((out, new), reference(params, x, mask, state, cfg), TOL)
    assert (out[~mask] == 0).all()
    np.testing.assert_array_equal(new.count, state.count + mask.sum(1))


@pytest.mark.parametrize("mini_batch", [4, *(pytest.param(b, marks=pytest.mark.slow) for b in (1, 16))])
def test_the_fused_path_keeps_the_contract_with_float16_products(mini_batch):
    cfg = config((4,), mini_batch, dtype="float32", impl="pallas")
    params, x, rng = setting(cfg, 4)
    verify(module(cfg, FLOAT16), params, x, random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng), rng, PARTS)


def test_the_fused_path_changes_results_by_rounding_only(x64):
    params, x, rng = setting(config(), 5)
    state, mask = carried_state(config(), rng), random_mask(rng, (ROWS, FRAMES))
    scan, fused = (call(params, x, mask, state, cfg=config(impl=impl)) for impl in ("xla", "pallas"))
    assert_close(fused, scan, TOL)
    assert digest(fused) != digest(scan)


def test_an_open_mini_batch_is_filled_from_any_place(x64):
    """Calls that enter a mini-batch of 4 at each of its places, its last one included, and leave it open, full or
    beyond."""
    cfg, frames = config(), PARTS[0][0]
    params, x, rng = setting(cfg, 16, frames)
    carried = carried_state(cfg, rng)
    for phase in range(4):
        steps = jax.tree.map(lambda leaf: leaf + 0.1, carried.open_steps)
        state = carried._replace(
            open_steps=up_to(np.full(ROWS, phase), steps), count=np.full(ROWS, 8 + phase, np.int32)
        )
        for valid in range(1, 6):
            mask = np.broadcast_to(np.arange(frames) < valid, (ROWS, frames))
            expected = reference(params, x, mask, state, cfg)
            assert_close(call(params, x, mask, state, cfg=cfg), expected, TOL)
            parts = (1,) * valid
            out, new = run_split(params, x[:, :valid], mask[:, :valid], state, cfg, parts)
            assert_close((out, new), (expected[0][:, :valid], expected[1]), TOL)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_keeps_the_contract(variant, x64):
    cfg = config((4,), 4, **variant)
    params, x, rng = setting(cfg, 3)
    verify(module(cfg), params, x, random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng), rng, PARTS)


@pytest.mark.slow
@grid(fused=True)
@given(seed=seeds, parts=splits(32))
def test_any_split_gives_the_same_outputs_and_state(hidden, mini_batch, impl, x64, seed, parts):
    cfg = config(hidden, mini_batch, impl=impl)
    params, x, rng = setting(cfg, seed, frames=32)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, 32))
    assert_close(run_split(params, x, mask, state, cfg, parts), call(params, x, mask, state, cfg=cfg), TOL)


@pytest.mark.parametrize(
    ("hidden", "mini_batch"), [((), 16), *(pytest.param((4,), b, marks=pytest.mark.slow) for b in (1, 16))]
)
def test_streaming_equals_chunks_in_float32_over_256_frames(hidden, mini_batch):
    cfg = config(hidden, mini_batch, dtype="float32")
    params, x, _ = setting(cfg, 3, frames=256)
    state, mask = init_state(cfg, ROWS), np.ones((ROWS, 256), bool)
    whole = call(params, x, mask, state, cfg=cfg)
    streamed = run_split(params, x, mask, state, cfg, (1,) * 256)
    for a, b in zip(jax.tree.leaves(streamed), jax.tree.leaves(whole), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


# Laws 6 and 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_closed_gate_returns_the_input_exactly(dtype):
    cfg, frames = config((), 1, dtype=dtype), 12
    params, x, rng = setting(cfg, 6, frames)
    params["gate"] = jnp.zeros_like(params["gate"])
    out, _ = call(params, x, np.ones((ROWS, frames), bool), carried_state(cfg, rng), cfg=cfg)
    assert_same_bits(out, x)


@pairs
def test_gradient_reaches_the_base_weights_past_a_cut_state(hidden, mini_batch, impl, x64):
    cfg = config(hidden, mini_batch, impl=impl)
    frames = max(PARTS[0][0], mini_batch)  # weights move where a mini-batch closes: one at least
    params, x, rng = setting(cfg, 9, frames)
    mask = np.ones((ROWS, frames), bool)
    _, state = call(params, x, mask, init_state(cfg, ROWS), cfg=cfg)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(state.displacement))

    # The next chunk, whose loss reads its outputs alone and takes the state as a constant.
    ahead = rng.standard_normal(x.shape)
    weights = (rng.standard_normal(x.shape), jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state[:2]))

    def next_chunk(base):
        return value_and_grads({**params, **base}, ahead, mask, state, weights, cfg=cfg)

    base, step = {name: np.asarray(value) for name, value in params.items() if name.startswith("inner_")}, 1e-6
    _, (grads, _, of_state) = next_chunk({})
    assert all(np.abs(grads[name]).max() > 1e-4 for name in base)
    for name in base:
        direction = rng.standard_normal(base[name].shape)
        up, down = (next_chunk({name: base[name] + sign * step * direction})[0] for sign in (1, -1))
        np.testing.assert_allclose((up - down) / (2 * step), (grads[name] * direction).sum(), rtol=1e-5, atol=1e-8)
    # Where the state is not cut, more of it comes from the chunk before, by the chain rule.
    through_state = (np.zeros_like(x), of_state)
    _, (more, _, _) = value_and_grads(params, x, mask, init_state(cfg, ROWS), through_state, cfg=cfg)
    assert any(np.abs(more[name]).max() > 1e-3 for name in base)
