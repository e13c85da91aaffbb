"""The laws of the one forward for gradients: finite differences, causality, the learned start. Splits, masks and rows:
its contract."""

from functools import partial

import jax
import numpy as np
from hypothesis import given

from tests.helpers.contract import normal_like, run, verify
from tests.helpers.drawing import few, random_mask, seeds
from tests.helpers.small_moshi import (
    CARDS,
    PARTS,
    PREDICTED,
    ROWS,
    SMALL,
    carried_state,
    configs,
    floats,
    fresh,
    module,
    setting,
    value_and_grads,
    with_floats,
)

FRAMES = PARTS[0][0]
"""One call of the model's contract, whose programs these tests share."""


def zeros_like(tree):
    return jax.tree.map(np.zeros_like, tree)


def slope(loss, step=1e-5):
    """Derivative at 0 by central differences of fourth order."""
    return (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step)


def gradients_equal_finite_differences(cfg):
    params, frames, rng = setting(cfg, 1, frames=FRAMES)
    mask, state = random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng)
    weights = normal_like((np.zeros((ROWS, FRAMES, PREDICTED)), floats(state)), rng)
    point = jax.tree.map(np.asarray, (params, floats(state)))
    _, grads = value_and_grads(params, frames, mask, state, weights, cfg=cfg)

    def loss(direction, step):
        p, moved = jax.tree.map(lambda x, d: x + step * d, point, direction)
        return value_and_grads(p, frames, mask, with_floats(state, moved), weights, cfg=cfg)[0]

    of_params, of_carried = normal_like(point, rng)
    for direction in ((of_params, zeros_like(of_carried)), (zeros_like(of_params), of_carried)):
        expected = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(direction)))
        np.testing.assert_allclose(slope(partial(loss, direction)), expected, rtol=1e-6)


# Law 3


def no_gradient_reaches_a_loss_from_what_comes_later(cfg, seed):
    params, _, rng = setting(cfg, seed, frames=1)
    column = int(rng.integers(SMALL.max_delay + 1, FRAMES))
    frames = np.tile(np.arange(FRAMES, dtype=np.int32), (ROWS, cfg.num_streams, 1))  # a token is its frame's number
    state = carried_state(cfg, rng)
    before = rng.integers(FRAMES, CARDS[None, :, None], state.history.shape, dtype=np.int32)
    state, mask = state._replace(history=before), np.ones((ROWS, FRAMES), bool)
    weights = np.zeros((ROWS, FRAMES, PREDICTED))
    weights[:, column] = rng.standard_normal((ROWS, PREDICTED))
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


# Law 7


def gradient_reaches_the_base_weights_past_a_cut_state(cfg):
    params, frames, rng = setting(cfg, 2, frames=FRAMES)
    params = jax.tree.map(np.asarray, params)
    mask, state = random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng)
    weights = (np.ones((ROWS, FRAMES, PREDICTED)), zeros_like(floats(state)))

    def run(params):
        loss, (grads, _) = value_and_grads(params, frames, mask, state, weights, cfg=cfg)
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


# One test, since each program of gradients compiles for seconds and a worker may forget it between tests.


@configs
@given(seed=seeds)
@few
def test_the_model_keeps_its_contract_and_its_gradients_are_true(cfg, x64, seed):
    gradients_equal_finite_differences(cfg)
    gradient_reaches_the_base_weights_past_a_cut_state(cfg)
    no_gradient_reaches_a_loss_from_what_comes_later(cfg, seed)
    params, frames, rng = setting(cfg, seed)
    mask, state = random_mask(rng, (ROWS, frames.shape[2])), carried_state(cfg, rng)
    verify(module(cfg), params, frames.swapaxes(1, 2), mask, state, rng, PARTS)
    new = run(module(cfg), params, frames.swapaxes(1, 2), mask, fresh(cfg), PARTS[2])[1]
    np.testing.assert_array_equal(new.position, mask.sum(1))
