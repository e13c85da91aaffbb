"""The training step: what it minimises, what it carries, what it leaves alone."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import unigram
from tests.micro import CONFIG, MODEL, files
from train import step
from train.windows import Batch, Windows
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses

CARDS = [MODEL.text_card] + MODEL.dep_q * [MODEL.card]

forward = jax.jit(partial(model.forward, cfg=MODEL))


def batches(count):
    windows = Windows(files(), CONFIG.data.batch, CONFIG.data.chunk, CONFIG.seed)
    return [next(windows) for _ in range(count)]


@pytest.fixture(scope="module")
def train_step():
    return step.make_train_step(CONFIG)


def copy(tree):
    """`tree` in buffers of its own, since a step donates what it is given."""
    return jax.tree.map(jnp.array, tree)


def test_a_step_keeps_structure_compiles_once_and_donates(train_step):
    state = step.init(CONFIG)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
    for batch in batches(4):
        given = state
        state, _ = train_step(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state) == before
    assert train_step._cache_size() == 1
    assert int(state.step) == 4


def test_initial_loss_is_the_cardinality_and_half_the_variance(train_step):
    _, metrics = train_step(step.init(CONFIG), batches(1)[0])
    np.testing.assert_allclose(metrics.streams, np.log(CARDS) + metrics.half_variance, rtol=0.05)


def test_the_stream_goes_on_where_the_last_step_left_it(train_step):
    first, second = batches(2)
    second = second._replace(reset=np.zeros_like(second.reset))
    start = step.init(CONFIG)
    _, carried = forward(start.params, first.frames, first.mask, start.stream)
    state, _ = train_step(start, first)
    chex.assert_trees_all_close(state.stream, carried, atol=1e-5)
    outputs, _ = forward(state.params, second.frames, second.mask, carried)
    expected = token_losses(outputs).sum((0, 2)) / outputs.target_mask.sum((0, 2))
    _, metrics = train_step(state, second)
    np.testing.assert_allclose(metrics.streams, expected, rtol=1e-5)


def test_a_reset_row_is_as_fresh_and_the_others_go_on(train_step):
    first, second = batches(2)
    state, _ = train_step(step.init(CONFIG), first)
    fresh, _ = train_step(step.init(CONFIG)._replace(params=copy(state.params)), second)
    reset, _ = train_step(state, second._replace(reset=np.array([True, False, False, False])))

    def displacement(state):
        return np.asarray(state.stream.layers["layers_01_01"].ttt.displacement[0].w)[0]

    moved = np.abs(displacement(reset) - displacement(fresh)).max((1, 2, 3))
    assert moved[0] < 1e-6 < 1e-4 < moved[1:].min()


def test_every_parameter_learns(train_step):
    state = step.init(CONFIG)
    before = copy(state.params)
    for batch in batches(2):
        state, _ = train_step(state, batch)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, before)
    assert all(jax.tree.leaves(moved)), moved


def test_loss_is_the_weighted_mean_of_the_token_losses(train_step):
    batch = batches(1)[0]
    batch.mask[1, 7:] = False
    start = step.init(CONFIG)
    outputs, _ = forward(start.params, batch.frames, batch.mask, start.stream)
    losses, targets, mask = map(np.asarray, (token_losses(outputs), outputs.targets, outputs.target_mask))
    total = weight_sum = 0.0
    for row, stream, frame in np.argwhere(mask):
        weight = {0: CONFIG.loss.text, 1: CONFIG.loss.first_codebook}.get(stream, 1.0)
        if stream == 0 and targets[row, 0, frame] in (0, 3):
            weight *= CONFIG.loss.text_padding
        total, weight_sum = total + weight * losses[row, stream, frame], weight_sum + weight
    _, metrics = train_step(start, batch)
    np.testing.assert_allclose(metrics.loss, total / weight_sum, rtol=1e-5)


def test_masked_frames_do_not_train(train_step):
    batch = batches(1)[0]
    batch.mask[:, 20:] = False
    other = Batch(np.where(batch.mask[:, None], batch.frames, 7).astype(np.int32), batch.mask, batch.reset)
    assert (other.frames != batch.frames).any()
    one, _ = train_step(step.init(CONFIG), batch)
    two, _ = train_step(step.init(CONFIG), other)
    chex.assert_trees_all_equal(one.params, two.params)


def test_a_stream_without_targets_has_no_loss_and_the_rest_trains(train_step):
    batch = batches(1)[0]
    batch.frames[:, 0] = -1
    _, metrics = train_step(step.init(CONFIG), batch)
    assert np.isnan(metrics.streams[0])
    assert np.isfinite(metrics.streams[1:]).all()
    assert np.isfinite(metrics.loss)
    assert np.isfinite(metrics.grad_norm)


def test_training_lowers_every_loss_towards_the_unigram(train_step):
    state, losses = step.init(CONFIG), []
    for batch in batches(CONFIG.steps):
        state, metrics = train_step(state, batch)
        losses.append(np.asarray(metrics.streams))
    tables = unigram.fit(files(), CARDS)
    baseline = np.array(
        [np.mean(stream) for stream in np.concatenate([unigram.nats(tables, file) for file in files()], -1)]
    )
    start, end = losses[0], np.mean(losses[-5:], axis=0)
    assert (end - baseline < 0.5 * (start - baseline)).all(), (start, end, baseline)


def test_unigram_counts_with_one_added_and_leaves_absent_tokens_out():
    tables = unigram.fit([np.array([[0, 0, 1, -1], [2, 2, 2, 2]])], [2, 3])
    np.testing.assert_allclose(np.exp(tables[0]), [3 / 5, 2 / 5])
    np.testing.assert_allclose(np.exp(tables[1]), [1 / 7, 1 / 7, 5 / 7])
    nats = unigram.nats(tables, np.array([[1, -1], [2, 0], [5, 5]]))
    np.testing.assert_allclose(nats, -np.log([[2 / 5, np.nan], [5 / 7, 1 / 7]]))
