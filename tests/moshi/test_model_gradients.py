"""The laws of the one forward for gradients: to parameters, and to all that a stream carries from call to call."""

from functools import partial

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.drawing import assert_close, assert_same_bits, pieces, quick_jit, random_mask, seeds
from tests.moshi.test_model_laws import (
    CARDS,
    OWN,
    ROWS,
    SMALL,
    TOL,
    carried_state,
    grid,
    poisoned_floats,
    random_tokens,
    setting,
)
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses

CALLS = (8, 8)
FRAMES = sum(CALLS)
"""Enough to wrap the rings of 6 frames twice, from any phase of a mini-batch; each length of a call compiles for seconds."""
configs = grid("mlp2-16")


def floats(state):
    """What of a state has gradients: rings, displacements, open sums."""
    return {name: (run.kv_cache, run.ttt[:2] if run.ttt else ()) for name, run in state.layers.items()}


def with_floats(state, moved):
    layers = {}
    for name, (kv_cache, ttt) in moved.items():
        old = state.layers[name].ttt
        layers[name] = model.RunState(kv_cache, old._replace(displacement=ttt[0], open_sum=ttt[1]) if ttt else old)
    return state._replace(layers=layers)


@partial(quick_jit, static_argnames="cfg")
def value_and_grads(params, frames, mask, state, weights, cfg):
    """A loss that weighs every token's loss and all that is carried on; the state; gradients to parameters and what was carried."""

    def loss(params, moved):
        outputs, new = model.forward(params, frames, mask, with_floats(state, moved), cfg)
        read = jax.tree.leaves((token_losses(outputs), floats(new)))
        return sum((a * b).sum() for a, b in zip(read, jax.tree.leaves(weights), strict=True)), new

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, floats(state))


def normal_like(tree, rng):
    return jax.tree.map(lambda x: rng.standard_normal(x.shape), tree)


def random_weights(state, rng):
    return rng.standard_normal((ROWS, OWN, FRAMES)), normal_like(floats(state), rng)


def zeros_like(tree):
    return jax.tree.map(np.zeros_like, tree)


# Law 2


@grid("mlp2-16")
@given(seed=seeds)
def test_two_calls_give_the_gradients_of_one(cfg, x64, seed):
    params, frames, rng = setting(cfg, seed, frames=FRAMES)
    mask, state = random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng)
    weights = random_weights(state, rng)

    zero, starts = zeros_like(weights[1]), [state]
    calls = [(frames[:, :, piece], mask[:, piece], weights[0][:, :, piece]) for piece in pieces(CALLS)]
    for tokens, seen, ahead in calls:
        starts.append(value_and_grads(params, tokens, seen, starts[-1], (ahead, zero), cfg=cfg)[0][1])
    # The chain rule over the calls, the last one first.
    of_params, of_carried = zeros_like(params), weights[1]
    for (tokens, seen, ahead), start in zip(calls[::-1], starts[-2::-1], strict=True):
        _, (of_call, of_carried) = value_and_grads(params, tokens, seen, start, (ahead, of_carried), cfg=cfg)
        of_params = jax.tree.map(np.add, of_params, of_call)
    (_, new), expected = value_and_grads(params, frames, mask, state, weights, cfg=cfg)
    assert_close((of_params, of_carried), expected, TOL)
    assert_close(starts[-1], new, TOL)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(expected))


def slope(loss, step=1e-5):
    """Derivative at 0 by central differences of fourth order."""
    return (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step)


@configs
def test_gradients_equal_finite_differences(cfg, x64):
    params, frames, rng = setting(cfg, 1, frames=FRAMES)
    mask, state = random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng)
    weights = random_weights(state, rng)
    point = jax.tree.map(np.asarray, (params, floats(state)))
    _, grads = value_and_grads(params, frames, mask, state, weights, cfg=cfg)

    def loss(direction, step):
        p, moved = jax.tree.map(lambda x, d: x + step * d, point, direction)
        return value_and_grads(p, frames, mask, with_floats(state, moved), weights, cfg=cfg)[0][0]

    of_params, of_carried = normal_like(point, rng)
    for direction in ((of_params, zeros_like(of_carried)), (zeros_like(of_params), of_carried)):
        expected = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(direction)))
        np.testing.assert_allclose(slope(partial(loss, direction)), expected, rtol=1e-6)


# Law 3


@configs
@given(seed=seeds, column=st.integers(SMALL.max_delay + 1, FRAMES - 1))
def test_no_gradient_reaches_a_loss_from_what_comes_later(cfg, x64, seed, column):
    params, _, rng = setting(cfg, seed, frames=1)
    frames = np.tile(np.arange(FRAMES, dtype=np.int32), (ROWS, cfg.num_streams, 1))  # a token says its frame
    state = carried_state(cfg, rng)
    before = rng.integers(FRAMES, CARDS[None, :, None], state.history.shape, dtype=np.int32)
    state, mask = state._replace(history=before), np.ones((ROWS, FRAMES), bool)
    weights = np.zeros((ROWS, OWN, FRAMES))
    weights[:, :, column] = rng.standard_normal((ROWS, OWN))
    nothing = zeros_like(floats(state))
    _, (grads, of_carried) = value_and_grads(params, frames, mask, state, (weights, nothing), cfg=cfg)
    reached = lambda table: np.flatnonzero((np.asarray(table)[:FRAMES] != 0).any(-1))  # noqa: E731
    # The temporal transformer: all columns before, by the fast weights, and none from the loss's own on.
    for stream, table in enumerate([grads["text_emb"], *grads["audio_emb"]]):
        np.testing.assert_array_equal(reached(table), np.arange(column - cfg.delays[stream]))
    # The depth transformer: of its own column the codebooks before the last.
    for stream, table in enumerate([grads["depth"]["text_emb"], *grads["depth"]["audio_emb"]]):
        np.testing.assert_array_equal(reached(table), [column - cfg.delays[stream]])
    assert all(np.asarray(leaf).any() for _, ttt in of_carried.values() for leaf in jax.tree.leaves(ttt))


# Law 4


@configs
@given(seed=seeds)
def test_tokens_of_masked_frames_change_no_bit(cfg, x64, seed):
    params, frames, rng = setting(cfg, seed, frames=FRAMES)
    mask = random_mask(rng, (ROWS, FRAMES)) & (np.arange(FRAMES) < FRAMES - 3)
    state = carried_state(cfg, rng)
    weights = random_weights(state, rng)
    garbage = rng.choice(np.array([-(2**31), -7, -1, 3, 999, 2**31 - 1], np.int32), frames.shape)
    poisoned = np.where(mask[:, None], frames, garbage)
    got = value_and_grads(params, poisoned, mask, state, weights, cfg=cfg)
    assert_same_bits(got, value_and_grads(params, frames, mask, state, weights, cfg=cfg))


@configs
@given(seed=seeds)
def test_gradients_of_a_row_are_its_own(cfg, x64, seed):
    params, frames, rng = setting(cfg, seed, frames=FRAMES)
    mask, state = random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng)
    weights = random_weights(state, rng)
    other, other_mask = frames.copy(), mask.copy()
    other[1], other_mask[1] = random_tokens(rng, (1, FRAMES))[0], rng.random(FRAMES) < 0.5
    first = lambda got: jax.tree.map(lambda x: np.asarray(x)[:, 0], (got[0][1].layers, got[1][1]))  # noqa: E731
    expected = first(value_and_grads(params, frames, mask, state, weights, cfg=cfg))
    for neighbour in (state, poisoned_floats(state)):
        assert_same_bits(first(value_and_grads(params, other, other_mask, neighbour, weights, cfg=cfg)), expected)
    # A row without weights of its own leaves no trace in the parameters' gradients.
    only = np.array([1.0, 0.0])
    of_first = lambda x: x * only.reshape(-1, *(1,) * (x.ndim - 2))  # noqa: E731
    alone = (weights[0] * only[:, None, None], jax.tree.map(of_first, weights[1]))
    a, b = (
        value_and_grads(params, *call, state, alone, cfg=cfg)[1][0] for call in ((frames, mask), (other, other_mask))
    )
    assert_close(a, b, TOL)


# Law 7


@configs
def test_gradient_reaches_the_base_weights_past_a_cut_state(cfg, x64):
    params, frames, rng = setting(cfg, 2, frames=FRAMES)
    params = jax.tree.map(np.asarray, params)
    mask, state = random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng)
    weights = (np.ones((ROWS, OWN, FRAMES)), zeros_like(floats(state)))

    def run(params):
        (loss, _), (grads, _) = value_and_grads(params, frames, mask, state, weights, cfg=cfg)
        return loss, grads

    def moved(name, leaf, direction, step):
        block = params["layers"][name]
        block = {**block, "ttt": {**block["ttt"], leaf: block["ttt"][leaf] + step * direction}}
        return run({**params, "layers": {**params["layers"], name: block}})[0]

    _, grads = run(params)
    tried = 0
    for name, block in params["layers"].items():
        for leaf in (leaf for leaf in block.get("ttt", ()) if leaf.startswith("inner_")):
            gradient = np.asarray(grads["layers"][name]["ttt"][leaf])
            assert (np.abs(gradient).max(tuple(range(1, gradient.ndim))) > 1e-4).all()  # in every layer
            direction = rng.standard_normal(gradient.shape)
            expected = (gradient * direction).sum()
            np.testing.assert_allclose(slope(partial(moved, name, leaf, direction)), expected, rtol=1e-6, atol=1e-8)
            tried += len(gradient)
    assert tried == 2 * (1 + len(cfg.ttt.hidden)) * len(cfg.ttt_layers)
