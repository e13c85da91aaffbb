"""The laws of the TTT layer, over inner networks and mini-batch sizes, against a written-out reference in float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import reference_ttt, small_step
from tests.helpers.drawing import (
    assert_close,
    assert_same_bits,
    digest,
    pieces,
    quick_jit,
    random_like,
    random_mask,
    seeds,
    splits,
)
from tests.helpers.small_ttt import (
    DIM,
    FRAMES,
    HEADS,
    ROWS,
    TOL,
    VARIANTS,
    call,
    carried_state,
    config,
    grid,
    networks,
    pairs,
    reference,
    run_split,
    setting,
    shallow_networks,
    split_grid,
    value_and_grads,
)
from ttt_jax.config import TTTConfig
from ttt_jax.moshi import model
from ttt_jax.ttt.layer import init_state

CALLS = (8, 8, 8, *(1,) * 8)
"""`FRAMES` by calls of two lengths, where each compiles for longest."""


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
    gradient = reference_ttt.inner_gradient(weights, k, t, scale, bias)
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


@grid
@given(seed=seeds)
def test_parallel_form_equals_written_out_descent(hidden, mini_batch, x64, seed):
    cfg = config(hidden, mini_batch)
    params, x, _ = setting(cfg, seed)
    state, mask = init_state(cfg, ROWS), np.ones((ROWS, FRAMES), bool)
    assert_close(call(params, x, mask, state, cfg=cfg), reference(params, x, mask, state, cfg), TOL)


@grid
@given(seed=seeds)
def test_masked_rows_at_different_phases_equal_written_out_descent(hidden, mini_batch, x64, seed):
    cfg = config(hidden, mini_batch)
    params, x, rng = setting(cfg, seed)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES))
    assert_close(call(params, x, mask, state, cfg=cfg), reference(params, x, mask, state, cfg), TOL)


# A network with a hidden layer: tests/ttt/test_measure.py.
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("hidden", "mini_batch"), [pytest.param((4,), 4, marks=pytest.mark.slow), ((), 5)])
def test_every_variant_equals_written_out_descent(hidden, mini_batch, variant, x64):
    cfg = config(hidden, mini_batch, **variant)
    params, x, rng = setting(cfg, 1)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES))
    assert_close(call(params, x, mask, state, cfg=cfg), reference(params, x, mask, state, cfg), TOL)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, id=name, marks=() if name in ("bound", "rope") else pytest.mark.slow)
        for name, variant in VARIANTS.items()
    ],
)
@given(seed=seeds, parts=st.permutations(CALLS))
def test_any_split_of_every_variant_gives_the_same(variant, x64, seed, parts):
    cfg = config((4,), 4, **variant)
    params, x, rng = setting(cfg, seed)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES))
    assert_close(run_split(params, x, mask, state, cfg, parts), call(params, x, mask, state, cfg=cfg), TOL)


@pytest.mark.parametrize("mini_batch", [pytest.param(100, marks=pytest.mark.slow), 256])
def test_mini_batches_longer_than_a_call(mini_batch, x64):
    cfg = config(mini_batch=mini_batch, horizon=400.0)
    params, x, rng = setting(cfg, 21, frames=300)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, 300))
    expected = reference(params, x, mask, state, cfg)
    assert_close(call(params, x, mask, state, cfg=cfg), expected, TOL)
    assert_close(run_split(params, x, mask, state, cfg, (*(3,) * 16, 252)), expected, TOL)


@pairs
def test_outer_gradients_equal_finite_differences(hidden, mini_batch, x64):
    cfg = config(hidden, mini_batch)
    params, x, rng = setting(cfg, 2)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES))
    weights = random_like((x, state[:2]), rng)
    point = jax.tree.map(np.asarray, (params, x, tuple(state[:2])))
    _, grads = value_and_grads(params, x, mask, state, weights, cfg=cfg)
    direction = jax.tree.map(np.asarray, random_like(point, rng))
    step = 1e-6

    def loss(sign):
        p, y, moved = jax.tree.map(lambda a, d: a + sign * step * d, point, direction)
        return value_and_grads(p, y, mask, state._replace(displacement=moved[0], open_sum=moved[1]), weights, cfg=cfg)[
            0
        ]

    expected = sum((g * d).sum() for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose((loss(1) - loss(-1)) / (2 * step), expected, rtol=1e-6)


# Law 2


@split_grid
@given(seed=seeds, parts=splits(FRAMES))
def test_any_split_gives_the_same_outputs_and_state(hidden, mini_batch, x64, seed, parts):
    cfg = config(hidden, mini_batch)
    params, x, rng = setting(cfg, seed)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES))
    assert_close(run_split(params, x, mask, state, cfg, parts), call(params, x, mask, state, cfg=cfg), TOL)


@pairs
@given(seed=seeds, parts=st.permutations(CALLS))
def test_any_split_gives_the_same_gradients(hidden, mini_batch, x64, seed, parts):
    cfg = config(hidden, mini_batch)
    params, x, rng = setting(cfg, seed)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES))
    weights = random_like((x, state[:2]), rng)

    starts = [state]
    for piece in pieces(parts):
        starts.append(call(params, x[:, piece], mask[:, piece], starts[-1], cfg=cfg)[1])
    # The chain rule over the calls, the last one first.
    of_params, of_x, of_carried = jax.tree.map(jnp.zeros_like, params), [], weights[1]
    for piece, start in zip(pieces(parts)[::-1], starts[-2::-1], strict=True):
        ahead = (np.asarray(weights[0])[:, piece], of_carried)
        _, (here, of_frames, of_carried) = value_and_grads(params, x[:, piece], mask[:, piece], start, ahead, cfg=cfg)
        of_params = jax.tree.map(jnp.add, of_params, here)
        of_x.insert(0, np.asarray(of_frames))
    got = (of_params, np.concatenate(of_x, 1), of_carried)
    assert_close(got, value_and_grads(params, x, mask, state, weights, cfg=cfg)[1], TOL)


@pytest.mark.parametrize("mini_batch", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_streaming_equals_one_chunk_in_float32_over_256_frames(mini_batch):
    cfg = config(mini_batch=mini_batch, dtype="float32")
    params, x, _ = setting(cfg, 3, frames=256)
    state, mask = init_state(cfg, ROWS), np.ones((ROWS, 256), bool)
    whole = call(params, x, mask, state, cfg=cfg)
    for parts in [(1,) * 256, (21,) * 12 + (1,) * 4]:
        streamed = run_split(params, x, mask, state, cfg, parts)
        for a, b in zip(jax.tree.leaves(streamed), jax.tree.leaves(whole), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


# Law 3


@grid
@given(seed=seeds, frame=st.integers(0, FRAMES - 1))
def test_a_frame_changes_nothing_before_it_and_everything_from_it_on(hidden, mini_batch, x64, seed, frame):
    cfg = config(hidden, mini_batch)
    params, x, rng = setting(cfg, seed)
    state, mask = carried_state(cfg, rng), np.ones((ROWS, FRAMES), bool)
    changed = x.copy()
    changed[0, frame] = rng.standard_normal(DIM)
    out, other = (np.asarray(call(params, y, mask, state, cfg=cfg)[0]) for y in (x, changed))
    assert_same_bits(other[:, :frame], out[:, :frame])
    assert (other[0, frame:] != out[0, frame:]).any(-1).all()


# Law 4


@pairs
@given(seed=seeds)
def test_rows_are_independent(hidden, mini_batch, x64, seed):
    cfg = config(hidden, mini_batch)
    params, x, rng = setting(cfg, seed)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES))
    changed = x.copy()
    changed[1] = rng.standard_normal(x.shape[1:])
    kept = lambda s: s * np.array([1, 0], s.dtype).reshape(-1, *(1,) * (s.ndim - 1))  # noqa: E731
    fresh = jax.tree.map(kept, state)
    other_mask = mask.copy()
    other_mask[1] = rng.random(FRAMES) < 0.5
    first = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[:1], tree)  # noqa: E731
    out = first(call(params, x, mask, state, cfg=cfg))
    assert_same_bits(first(call(params, changed, other_mask, fresh, cfg=cfg)), out)
    assert_close(call(params, x[:1], mask[:1], first(state), cfg=cfg), out, TOL)


@pairs
@given(seed=seeds)
def test_content_of_masked_frames_changes_no_bit(hidden, mini_batch, x64, seed):
    cfg = config(hidden, mini_batch)
    params, x, rng = setting(cfg, seed)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES)) & (np.arange(FRAMES) != 5)
    weights = random_like((x, state[:2]), rng)
    poisoned = np.where(mask[..., None], x, rng.choice([np.nan, np.inf, 1e300], x.shape))
    out, new = call(params, poisoned, mask, state, cfg=cfg)
    assert_same_bits((out, new), call(params, x, mask, state, cfg=cfg))
    assert (np.asarray(out)[~np.asarray(mask)] == 0).all()
    np.testing.assert_array_equal(new.count, state.count + mask.sum(1))
    grads = value_and_grads(params, poisoned, mask, state, weights, cfg=cfg)
    assert_same_bits(grads, value_and_grads(params, x, mask, state, weights, cfg=cfg))
    assert (np.asarray(grads[1][1])[~np.asarray(mask)] == 0).all()


@pairs
@given(seed=seeds)
def test_gaps_equal_the_compacted_sequence(hidden, mini_batch, x64, seed):
    cfg = config(hidden, mini_batch)
    params, x, rng = setting(cfg, seed)
    state, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, FRAMES))
    order = np.argsort(~mask, 1, kind="stable")
    packed = np.take_along_axis(x, order[..., None], 1)
    out, new = call(params, x, mask, state, cfg=cfg)
    compact, compact_new = call(params, packed, np.take_along_axis(mask, order, 1), state, cfg=cfg)
    assert_close((np.take_along_axis(np.asarray(out), order[..., None], 1), new), (compact, compact_new), TOL)


def test_a_call_without_valid_frames_leaves_the_state(x64):
    cfg = config()
    params, x, rng = setting(cfg, 4)
    state = carried_state(cfg, rng)
    out, new = call(params, x * np.nan, np.zeros((ROWS, FRAMES), bool), state, cfg=cfg)
    assert_same_bits(new, state)
    assert (out == 0).all()


# Laws 5 to 7


def test_parameters_keep_their_bits(x64):
    cfg = config()
    params, x, _ = setting(cfg, 5)
    before = digest(params)
    state = init_state(cfg, ROWS)
    for frame in range(6):
        _, state = call(params, x[:, frame : frame + 1], np.ones((ROWS, 1), bool), state, cfg=cfg)
    assert digest(state) != digest(init_state(cfg, ROWS))
    assert digest(params) == before


def test_queries_start_as_keys_do_and_all_else_apart():
    cfg = small_step.config(ttt=TTTConfig(layers="all", mini_batch=4)).model
    init = quick_jit(partial(model.init_params, cfg))
    layers = [
        jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], part["ttt"])
        for seed in (0, 1)
        for part in init(jax.random.key(seed))["layers"].values()
        for i in range(len(part["ttt"]["q_kernel"]))
    ]
    assert len(layers) == 2 * cfg.num_layers
    for part in ("kernel", "bias"):
        for layer in layers:
            np.testing.assert_array_equal(layer[f"q_{part}"], layer[f"k_{part}"])
            assert (layer[f"q_{part}"] != layer[f"v_{part}"]).all()
        for one, other in itertools.combinations(layers, 2):  # of layers and of seeds
            assert all((one[f"{name}_{part}"] != other[f"{name}_{part}"]).all() for name in "kv")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_closed_gate_returns_the_input_exactly(dtype):
    cfg = config(dtype=dtype)
    params, x, rng = setting(cfg, 6)
    params["gate"] = jnp.zeros_like(params["gate"])
    out, _ = call(params, x, np.ones((ROWS, FRAMES), bool), carried_state(cfg, rng), cfg=cfg)
    assert_same_bits(out, x)


@shallow_networks
def test_no_rate_leaves_the_base_weights(hidden, x64):
    cfg = config(hidden, base_lr=0.0)
    params, x, _ = setting(cfg, 7)
    mask = np.ones((ROWS, FRAMES), bool)
    out, new = call(params, x, mask, init_state(cfg, ROWS), cfg=cfg)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(new[:2]))
    # What does not learn sees each frame alone: the last one gives the same without those before.
    alone, _ = call(params, x[:, -1:], mask[:, -1:], init_state(cfg, ROWS), cfg=cfg)
    assert_close(alone, out[:, -1:], TOL)


@pytest.mark.parametrize("base_lr", [0.0, 0.5])
@shallow_networks
def test_rate_decides_whether_the_inner_loss_of_a_repeated_frame_falls(hidden, base_lr, x64):
    cfg = config(hidden, base_lr=base_lr)
    params, x, _ = setting(cfg, 8)
    repeated = np.broadcast_to(x[:, :1], x.shape)
    _, state = call(params, repeated, np.ones((ROWS, FRAMES), bool), init_state(cfg, ROWS), cfg=cfg)
    p = {name: np.asarray(value) for name, value in params.items()}
    for row in range(ROWS):
        _, k, t, _ = reference_ttt.frame_inputs(p, np.asarray(x[row, 0]), HEADS, base_lr, True)
        for h in range(HEADS):
            base = [(p[f"inner_w{n}"][h], p[f"inner_b{n}"][h]) for n in range(len(hidden) + 1)]
            fast = reference_ttt.add(
                base, [(np.asarray(w)[row, h], np.asarray(b)[row, h]) for w, b in state.displacement]
            )
            before, after = (
                reference_ttt.inner_loss(w, k[h], t[h], p["ln_scale"][h], p["ln_bias"][h]) for w in (base, fast)
            )
            assert after < before if base_lr else after == before


@pairs
def test_gradient_reaches_the_base_weights_past_a_cut_state(hidden, mini_batch, x64):
    cfg = config(hidden, mini_batch)
    frames = max(FRAMES, mini_batch)  # weights move where a mini-batch closes: one at least
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
