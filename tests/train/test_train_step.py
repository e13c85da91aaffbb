"""The training step: what it minimises, what it carries, what it leaves alone."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import golden, micro, small_step
from tests.helpers.drawing import assert_same_bits, quick_jit
from tests.helpers.small_step import LORA, NO_STOP, ROWS, batch, config, copied, some_params, start
from train import initial_params, optim, setup, step
from train.batches import Batches
from train.config import LossConfig
from ttt_jax.data import unigram
from ttt_jax.data.corpus import Corpus
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses
from ttt_jax.utils.trees import named

SKIPPING = dataclasses.replace(small_step.CONFIG.optim, skips=3)
CONFIG = config(lora=LORA, loss=dataclasses.replace(small_step.CONFIG.loss, block=10), optim=SKIPPING)
"""All trains, the logits of 10 frames exist at once, and steps may be skipped."""
MODEL = CONFIG.model
TTT_RUN = "layers_01_01"

forward = quick_jit(partial(model.forward, cfg=MODEL))
losses_of = quick_jit(token_losses)


def compiled(cfg):
    return small_step.compiled(cfg, small_step.one_device(), {}, batch())


@pytest.fixture(scope="module")
def program():
    """The step of `CONFIG` (all trains), compiled."""
    return compiled(CONFIG)


@pytest.fixture(scope="module")
def train_step(program):
    return lambda state, batch: program(state, {}, batch, NO_STOP)


def test_two_steps_give_the_golden_numbers(train_step):
    state, numbers = start(CONFIG), {}
    for i in (1, 2):
        before = jax.tree.map(np.array, state.trainable)
        state, metrics = train_step(state, batch(seed=i))
        squares = dict.fromkeys(optim.GROUPS, 0.0)
        groups = optim.groups(before)
        for group, old, new in zip(*map(jax.tree.leaves, (groups, before, state.trainable)), strict=True):
            squares[group] += float(np.square(np.asarray(new, np.float64) - old).sum())
        numbers[f"step {i}: loss"] = float(metrics.loss)
        numbers[f"step {i}: gradient norm"] = float(metrics.grad_norm)
        numbers |= {f"step {i}: gradient norm, {group}": float(n) for group, n in metrics.grad_norms.items()}
        numbers |= {f"step {i}: update norm, {group}": float(np.sqrt(square)) for group, square in squares.items()}
    golden.check("train_step", numbers, rtol=1e-5)


def chunk(batch, k=0):
    """Chunk `k` of a batch, as `forward` takes it."""
    return batch.frames[k], batch.mask[k]


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def test_a_step_keeps_structure_and_types_and_gives_up_what_it_was_given(program, train_step):
    state = start(CONFIG)
    before = types(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for seed in range(3):
        given = state
        state, _ = train_step(state, batch(seed=seed))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert types(state) == before
    assert int(state.step) == 3
    assert program.memory_analysis().alias_size_in_bytes == size  # all of it lies where the old one lay


def test_the_stream_goes_on_where_the_last_step_left_it(train_step):
    first, second = batch(seed=1), batch(seed=2)
    begun = start(CONFIG)
    _, carried = forward(begun.trainable, *chunk(first), begun.stream)
    state, _ = train_step(begun, first)
    chex.assert_trees_all_close(state.stream, carried, atol=1e-5)
    outputs, _ = forward(state.trainable, *chunk(second), carried)
    expected = np.asarray(losses_of(outputs)).sum((0, 2)) / np.asarray(outputs.target_mask).sum((0, 2))
    _, metrics = train_step(state, second)
    np.testing.assert_allclose(metrics.streams, expected, rtol=1e-5)


def tripled(tree):
    return jax.tree.map(lambda x: 3 * x, tree)


def test_an_optimiser_step_keeps_what_was_carried_bit_for_bit_and_moves_the_weights_that_it_adds_to(train_step):
    batches = batch(seed=3), batch(seed=4)
    state, _ = train_step(start(CONFIG), batches[0])
    # The same weights and stream, but other optimiser states and learning rates, so other weights after the step.
    late = state._replace(step=jnp.int32(20), opt_state=quick_jit(tripled)(state.opt_state))
    one, _ = train_step(copied(state), batches[1])
    two, _ = train_step(copied(late), batches[1])
    assert_same_bits(one.stream, two.stream)
    name = "inner_w0"
    base = [np.asarray(s.trainable["layers"][TTT_RUN]["ttt"][name]) for s in (one, two)]
    assert np.abs(base[0] - base[1]).max() > 1e-4
    # The next chunk reads W0 + displacement: it sees the weights that moved along, and the displacement as it was.
    third = batch(seed=5)
    expected = [np.asarray(losses_of(forward(s.trainable, *chunk(third), s.stream)[0])).sum() for s in (one, two)]
    assert abs(expected[0] - expected[1]) > 1e-2
    for s, nats in zip((one, two), expected, strict=True):
        outputs, _ = forward(s.trainable, *chunk(third), s.stream)
        got = train_step(s, third)[1]
        np.testing.assert_allclose(np.nansum(got.streams * outputs.target_mask.sum((0, 2))), nats, rtol=1e-5)


def test_a_reset_row_is_as_fresh_and_the_others_go_on(train_step):
    first, second = batch(seed=6), batch(seed=7)
    state, _ = train_step(start(CONFIG), first)
    zero = start(CONFIG).stream
    only = second._replace(reset=np.array([[False, True, False, False]]))
    runs = {
        "fresh": train_step(copied(state)._replace(stream=zero), second),
        "carried": train_step(copied(state), second),
        "reset": train_step(copied(state), only),
    }
    rows = lambda name, i: (runs[name][1].rows[0, i], _row(runs[name][0].stream, i))  # noqa: E731
    for i in range(ROWS):
        same, other = ("fresh", "carried") if i == 1 else ("carried", "fresh")
        assert_same_bits(rows("reset", i), rows(same, i))
        assert abs(rows("reset", i)[0] - rows(other, i)[0]) > 1e-3


def _row(stream, i):
    return *(leaf[i] for leaf in stream[:3]), jax.tree.map(lambda leaf: leaf[:, i], stream.layers)


def test_every_parameter_learns(train_step):
    state = start(CONFIG)
    before = jax.tree.map(np.array, state.trainable)
    for seed in range(2):
        state, _ = train_step(state, batch(seed=seed))
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.trainable, before)
    assert all(jax.tree.leaves(moved)), moved


def by_hand(params, one, stream, loss: LossConfig):
    """Weighted cross-entropy of each row and the sum of weights, in NumPy, token by token."""
    outputs, _ = forward(params, *chunk(one), stream)
    logits = [np.asarray(outputs.text_logits, np.float64)[:, :, None], np.asarray(outputs.audio_logits, np.float64)]
    rows, weight_sum = np.zeros(ROWS), 0.0
    for row, frame in np.argwhere(one.mask[0]):
        for stream in range(1 + MODEL.dep_q):
            target = int(outputs.targets[row, stream, frame])
            if not 0 <= target < (MODEL.card if stream else MODEL.text_card):
                continue
            entries = logits[0][row, frame, 0] if stream == 0 else logits[1][row, frame, stream - 1]
            weight = loss.codebooks[min(stream, len(loss.codebooks)) - 1] if stream else loss.text
            if stream == 0 and target in (0, 3):
                weight *= loss.text_padding
            rows[row] += weight * (np.log(np.exp(entries).sum()) - entries[target])
            weight_sum += weight
    return rows, weight_sum


def test_loss_is_the_weighted_mean_of_the_token_losses_over_the_whole_batch(train_step):
    one, begun = batch(seed=8), start(CONFIG)
    rows, weight = by_hand(begun.trainable, one, begun.stream, CONFIG.loss)
    _, metrics = train_step(begun, one)
    np.testing.assert_allclose(metrics.rows[0], rows, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, rows.sum() / weight, rtol=1e-5)


@pytest.mark.parametrize(
    ("codebooks", "expected"),
    [
        ((1.0,), 8 * [1]),
        ((100.0, 1.0), [100] + 7 * [1]),
        ((8.0, 7, 6, 5, 4, 3, 2, 1), range(8, 0, -1)),
        ((0.0, 2.0), [0] + 7 * [2]),
    ],
)  # fmt: skip
def test_tokens_weigh_what_is_asked(codebooks, expected):
    targets = np.tile(np.array([0, 3, 5, 7, -1]), (2, 9, 1))
    weights = step.token_weights(targets, LossConfig(text=4.0, text_padding=0.5, codebooks=codebooks))
    np.testing.assert_array_equal(weights[:, 0, :4], [[2, 2, 4, 4]] * 2)
    np.testing.assert_array_equal(weights[:, 1:], np.tile(np.array(list(expected))[:, None], (2, 1, 5)))


def test_what_masked_frames_hold_changes_nothing(train_step):
    one = batch(seed=9)
    one.mask[:, :, 8:] = False
    other = one._replace(frames=np.where(one.mask[:, :, None], one.frames, 7).astype(np.int32))
    assert (other.frames != one.frames).any()
    chex.assert_trees_all_equal(train_step(start(CONFIG), one)[0], train_step(start(CONFIG), other)[0])


def test_what_has_no_targets_has_no_loss_and_the_rest_trains(train_step):
    one = batch(seed=10)
    one.frames[:, :, 0] = -1
    _, metrics = train_step(start(CONFIG), one)
    assert np.isnan(metrics.streams[0])
    assert np.isfinite([*metrics.streams[1:], metrics.loss, metrics.grad_norm]).all()
    state, metrics = train_step(start(CONFIG), one._replace(frames=np.full_like(one.frames, -1)))
    assert metrics.loss == metrics.grad_norm == 0
    np.testing.assert_array_equal(state.stream.position, one.mask[0].sum(1))


def test_metrics_tell_norms_and_rates_by_group_and_what_ttt_layers_hold(train_step):
    begun = start(CONFIG)
    before = jax.tree.map(np.array, begun.trainable)
    state, metrics = train_step(begun, batch())
    assert set(metrics.grad_norms) == set(metrics.rates) == set(optim.GROUPS)
    assert all(norm > 0 for norm in metrics.grad_norms.values())
    np.testing.assert_allclose(np.hypot.reduce(list(metrics.grad_norms.values())), metrics.grad_norm, rtol=1e-5)
    schedules = optim.schedules(CONFIG)
    for step_, reported in enumerate((metrics, train_step(state, batch())[1])):
        assert reported.rates == {name: pytest.approx(float(schedules[name](step_))) for name in optim.GROUPS}
    _, stream = forward(before, *chunk(batch()), start(CONFIG).stream)
    expected = quick_jit(partial(model.ttt_summary, cfg=MODEL))(before, stream)
    chex.assert_trees_all_close(metrics.ttt, expected, rtol=1e-4)
    assert set(metrics.ttt) == {1}


def test_one_process_that_is_to_stop_is_heard(program):
    for signal in (0, 15):
        assert program(start(CONFIG), {}, batch(), NO_STOP + np.int32(signal))[1].stop == signal


# What is not finite


def poisoned(state, row=2):
    """`state` with an infinity in the displacement of a row."""
    run = state.stream.layers[TTT_RUN]
    first, *others = run.ttt.displacement
    ttt = run.ttt._replace(displacement=(first._replace(w=first.w.at[0, row].set(jnp.inf)), *others))
    return state._replace(stream=state.stream._replace(layers={**state.stream.layers, TTT_RUN: run._replace(ttt=ttt)}))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_step_that_is_not_finite_is_left_out_and_counted_and_tells_where(train_step):
    state = poisoned(start(CONFIG))
    before = bits(state[2:])
    state, metrics = train_step(state, batch(seed=30))
    assert bits(state[2:]) == before
    assert (int(state.step), int(state.skipped)) == (1, 1)
    assert np.isfinite(metrics.rows[0]).tolist() == [True, True, False, True]
    assert not np.isfinite(metrics.loss)
    # A file's start makes the row fresh, and training goes on as if the step had not been.
    state, metrics = train_step(state, batch(seed=30, reset=[(0, 2)]))
    clean, expected = train_step(start(CONFIG), batch(seed=30))
    assert (int(state.step), int(state.skipped), int(clean.skipped)) == (2, 1, 0)
    assert bits((state.trainable, state.opt_state, metrics.rates)) == bits(
        (clean.trainable, clean.opt_state, expected.rates)
    )


def test_a_row_that_begins_a_file_in_a_step_left_out_begins_it_fresh(train_step):
    carried, _ = train_step(start(CONFIG), batch(seed=31))
    state, _ = train_step(
        poisoned(copied(carried)), batch(seed=32, reset=[(0, 1)])
    )  # row 1 begins, row 2 spoils the step
    assert int(state.skipped) == 1
    _, metrics = train_step(state, batch(seed=33, reset=[(0, 2)]))
    _, old = train_step(copied(carried), batch(seed=33, reset=[(0, 2)]))
    assert abs(metrics.rows[0, 1] - old.rows[0, 1]) > 1e-3  # nothing of the file before is read


@pytest.mark.slow
def test_without_skips_it_shows_in_state_and_metrics():
    state = start(CONFIG)
    state.trainable["text_head"] = state.trainable["text_head"].at[0, 0].set(jnp.nan)
    state, metrics = compiled(config(lora=LORA))(state, {}, batch(seed=30), NO_STOP)
    assert int(state.skipped) == 0
    assert not np.isfinite(metrics.loss)
    assert not np.isfinite(metrics.grad_norm)
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))


def test_the_group_whose_gradient_is_not_finite_is_named():
    grads = jax.tree.map(np.ones_like, some_params(CONFIG)[0])
    ttt, of_group = f"layers/{TTT_RUN}/ttt/", optim.groups(grads)
    norms_of = quick_jit(lambda tree: {name: step._group_norm(tree, of_group, name) for name in optim.GROUPS})
    expected = {
        "text_head": "base",
        "depth/out": "base",
        f"layers/{TTT_RUN}/ffn/down_lora_b": "lora",
        ttt + "gate": "gate",
    }
    for path, group in {**expected, ttt + "inner_w0": "ttt", ttt + "q_bias": "ttt"}.items():
        flags = iter([np.float32(np.nan if other == path else 1) for other in named(grads)])
        broken = jax.tree.map(lambda g: g * next(flags), grads)  # noqa: B023
        norms = norms_of(broken)
        assert [name for name in optim.GROUPS if np.isnan(norms[name])] == [group], path


# A whole run


FILES = [np.minimum(file[: MODEL.num_streams], MODEL.card - 1) for file in micro.files()]
CARDS = [MODEL.text_card] + MODEL.dep_q * [MODEL.card]


@pytest.fixture(scope="module")
def whole_run(train_step):
    """Metrics of all steps of a run."""
    batches = Batches([micro.source(FILES)], CONFIG.data.batch, CONFIG.data.chunk, CONFIG.seed)
    state, metrics = start(CONFIG), []
    for _ in range(CONFIG.steps):
        state, found = train_step(state, next(batches).batch)
        metrics.append(found)
    batches.close()
    return metrics


@pytest.mark.slow  # moshi/test_init.py has the scale of every initialiser
def test_initial_loss_is_the_cardinality_and_half_the_variance(train_step):
    weights = initial_params.initial(CONFIG, small_step.one_device()).trainable
    rng, cards, found = np.random.default_rng(0), np.array([MODEL.text_card] + MODEL.n_q * [MODEL.card])[:, None], []
    for _ in range(10):
        one = batch()
        frames = np.where(one.mask[:, :, None], rng.integers(0, cards, one.frames.shape), -1).astype(np.int32)
        found.append(train_step(start(CONFIG, weights), one._replace(frames=frames))[1])
    losses, half = (np.mean([getattr(m, name) for m in found], 0) for name in ("streams", "half_variance"))
    np.testing.assert_allclose(losses, np.log(CARDS) + half, rtol=0.05)


def test_training_lowers_every_loss_towards_the_unigram(whole_run):
    tables = unigram.fit(FILES, CARDS)
    nats = np.concatenate([unigram.nats(tables, file) for file in FILES], -1)
    baseline = np.array([np.mean(stream) for stream in nats])
    first, end = whole_run[0].streams, np.mean([metrics.streams for metrics in whole_run[-5:]], axis=0)
    assert (end - baseline < 0.5 * (first - baseline)).all(), (first, end, baseline)


def test_the_baseline_of_a_run_is_that_of_its_training_files():
    files, heldout = micro.files((30, 20)), micro.files((40,), seed=1)
    files[0][0], files[1][3] = -1, -1
    files[0][3] = -1  # a stream without tokens has no baseline
    corpus = Corpus(None, None, (micro.source(files),), (), micro.source(heldout).recordings, {})
    streams = micro.MODEL.target_streams
    nats = np.concatenate([unigram.nats(unigram.fit(files, streams.values()), file) for file in files], -1)
    expected = {name: np.nanmean(values) for name, values in zip(streams, nats, strict=True) if name != "codebook 3"}
    assert setup._unigram(micro.CONFIG, corpus) == pytest.approx(expected)
