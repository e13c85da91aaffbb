"""Gradients of a training step in float64: through time as far as asked, and cut where the step begins."""

import re
from functools import partial

import jax
import numpy as np
import pytest

from tests.helpers.drawing import assert_close, assert_same_bits, quick_jit, random_like
from tests.helpers.small_step import FRAMES, LORA, ROWS, batch, config, float64, some_params
from train import step
from train.batches import Batch
from train.config import TrainableConfig
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import score, token_losses
from ttt_jax.utils.trees import merge, named

pytestmark = pytest.mark.usefixtures("x64")

BLOCK = 10_000
"""Frames whose logits exist at once: all."""
TRAINS = TrainableConfig(base=False, attention="0,1", ttt=True, lora=True)
TTT_RUN = "layers_01_01"
"""Of the layer with TTT."""


def arm(**changes):
    return float64(config(trainable=TRAINS, lora=LORA, **changes))


PERSIST = arm()
RESET = arm(state="reset")
TWO = arm(bptt=2)


@partial(quick_jit, static_argnames=("cfg", "block"))
def gradient(trainable, frozen, batch, stream, cfg, block=BLOCK):
    return step.gradient(trainable, frozen, batch, stream, cfg, block)


@partial(quick_jit, static_argnames="cfg")
def sums_of(params, batch, stream, cfg):
    return step.step_sums(params, batch, stream, cfg, BLOCK)


def mean_loss(params, batch, stream, cfg):
    sums, _ = sums_of(params, batch, stream, cfg=cfg)
    return float(sums.loss / sums.weight)


def start(cfg, seed=0):
    trainable, frozen = some_params(cfg, seed, np.float64)
    return trainable, frozen, model.init_state(cfg.model, ROWS)


def carried(cfg, seed=0):
    """Parameters, and the stream after a chunk that they read."""
    trainable, frozen, stream = start(cfg, seed)
    _, _, stream = gradient(trainable, frozen, one_chunk(batch(seed=100 + seed)), stream, cfg=TWO)
    return trainable, frozen, stream


def one_chunk(one):
    """A batch of one chunk as one of two, the second without frames: what `TWO` makes of it is what `PERSIST` would."""
    empty = Batch(np.full_like(one.frames, -1), np.zeros_like(one.mask), np.zeros_like(one.reset))
    return Batch(*map(np.concatenate, zip(one, empty, strict=True)))


def norm(tree):
    return np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(tree)))


GROUPS = {
    "W0": r".*/ttt/inner_.*",
    "gates": ".*/ttt/gate",
    "queries, keys, values": ".*/ttt/([qkv]_kernel|v_bias)",
    "rates": ".*/ttt/rate_.*",
    "attention": ".*/attention/(qkv|out)",
    "adapters": ".*_lora_.*",
    "all": ".*",
}


def directions(trainable, rng):
    """By group of parameters a random direction that moves it alone."""
    noise = jax.tree.map(lambda x: rng.standard_normal(x.shape), trainable)
    for name, pattern in GROUPS.items():
        flags = iter([bool(re.fullmatch(pattern, path)) for path in named(trainable)])
        yield name, jax.tree.map(lambda x: x * next(flags), noise)  # noqa: B023


def slope(loss, size=1e-5):
    """Derivative at 0 by central differences of fourth order."""
    return (8 * (loss(size) - loss(-size)) - (loss(2 * size) - loss(-2 * size))) / (12 * size)


@pytest.mark.slow  # the gradient of an uncut forward is looked at below
@pytest.mark.parametrize(
    ("cfg", "chunks"),
    [pytest.param(PERSIST, 1, id="persist"), pytest.param(RESET, 1, id="reset"), pytest.param(TWO, 2, id="bptt")],
)
def test_gradients_equal_finite_differences_that_hold_the_state_of_the_start(cfg, chunks):
    trainable, frozen, stream = carried(cfg)
    trainable = jax.tree.map(np.asarray, trainable)
    one = batch(chunks, seed=1, reset=[(chunks - 1, 3)])
    grads, sums, _ = gradient(trainable, frozen, one, stream, cfg=cfg)
    np.testing.assert_allclose(
        sums.loss / sums.weight, mean_loss(merge(trainable, frozen), one, stream, cfg), rtol=1e-10
    )
    for name, direction in directions(trainable, np.random.default_rng(0)):

        def moved(size, direction=direction):
            params = merge(jax.tree.map(lambda x, d: x + size * d, trainable, direction), frozen)
            return mean_loss(params, one, stream, cfg)

        expected = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(direction)))
        assert abs(expected) > 1e-5, name
        np.testing.assert_allclose(slope(moved), expected, rtol=1e-5, err_msg=name)


def test_the_gradient_reaches_w0_past_a_displacement_that_is_carried():
    trainable, frozen, stream = carried(TWO)
    assert norm(stream.layers[TTT_RUN].ttt.displacement) > 0.1
    grads, _, _ = gradient(trainable, frozen, one_chunk(batch(seed=1)), stream, cfg=TWO)
    ttt = grads["layers"][TTT_RUN]["ttt"]
    assert all(norm(ttt[name]) > 1e-4 for name in ttt if name.startswith("inner_"))
    # Only what trains has a gradient, and all of it.
    assert named(grads).keys() == named(trainable).keys()
    assert all(norm(leaf) > 0 for leaf in jax.tree.leaves(grads))


def uncut(trainable, frozen, batch, stream):
    """Gradient of the weighted mean loss of one forward over all of a batch's frames, end to end."""
    cfg = PERSIST

    def loss(trainable):
        frames, mask = (np.concatenate(list(x), -1) for x in (batch.frames, batch.mask))
        outputs, _ = model.forward(merge(trainable, frozen), frames, mask, stream, cfg.model)
        weights = step.token_weights(outputs.targets, cfg.loss) * outputs.target_mask
        return (token_losses(outputs) * weights).sum() / weights.sum()

    return quick_jit(jax.value_and_grad(loss))(trainable)


def halves(one):
    return [Batch(*(x[k : k + 1] for x in one)) for k in range(2)]


def cut_in_the_middle(trainable, frozen, one, stream):
    """The gradient that two steps of one chunk each add up to."""
    total, weight = None, 0
    for half in halves(one):
        grads, sums, stream = gradient(trainable, frozen, one_chunk(half), stream, cfg=TWO)
        grads = jax.tree.map(lambda g, w=sums.weight: w * g, grads)
        total, weight = grads if total is None else jax.tree.map(np.add, total, grads), weight + sums.weight
    return jax.tree.map(lambda g: g / weight, total), stream


def test_chunks_of_one_step_have_the_gradient_of_one_uncut_forward_and_steps_of_one_chunk_have_not():
    trainable, frozen, stream = carried(TWO)
    one = batch(2, seed=2)
    grads, sums, after = gradient(trainable, frozen, one, stream, cfg=TWO)
    loss, expected = uncut(trainable, frozen, one, stream)
    np.testing.assert_allclose(sums.loss / sums.weight, loss, rtol=1e-10)
    assert_close(grads, expected, 1e-9)
    cut, last = cut_in_the_middle(trainable, frozen, one, stream)
    assert_close(after, last, 1e-10)  # what is carried is the same
    for name in ("inner_w0", "k_kernel", "v_kernel", "rate_weight"):
        of = lambda tree, name=name: np.asarray(tree["layers"][TTT_RUN]["ttt"][name])  # noqa: E731
        assert norm(of(cut) - of(grads)) > 1e-3 * norm(of(grads)), name


def test_gradients_end_where_a_row_begins_a_file_inside_a_step():
    trainable, frozen, stream = carried(TWO)
    everywhere = batch(2, seed=3, reset=[(1, row) for row in range(ROWS)])
    grads, sums, after = gradient(trainable, frozen, everywhere, stream, cfg=TWO)
    cut, last = cut_in_the_middle(trainable, frozen, everywhere, stream)
    assert_close(grads, cut, 1e-10)
    assert_close(after, last, 1e-10)
    # and not otherwise: the same tokens in one file
    other, _, _ = gradient(trainable, frozen, everywhere._replace(reset=np.zeros((2, ROWS), bool)), stream, cfg=TWO)
    assert norm(jax.tree.map(np.subtract, other, grads)) > 1e-3 * norm(grads)


def row_of(stream, i):
    return *(leaf[i] for leaf in stream[:3]), jax.tree.map(lambda leaf: leaf[:, i], stream.layers)


@pytest.mark.slow
def test_a_row_that_begins_a_file_and_its_neighbours_are_as_if_each_ran_alone():
    trainable, frozen, stream = jax.tree.map(np.asarray, carried(TWO))
    one = batch(2, seed=4, reset=[(1, 1)])
    grads, sums, after = gradient(trainable, frozen, one, stream, cfg=TWO)
    total, weight = jax.tree.map(np.zeros_like, trainable), 0
    for row in range(ROWS):
        # All rows are this one: what the step makes of it alone, by the same program.
        alone = Batch(*(np.repeat(x[:, row : row + 1], ROWS, 1) for x in one))
        layers = jax.tree.map(lambda leaf, row=row: np.repeat(leaf[:, row : row + 1], ROWS, 1), stream.layers)
        begun = model.State(*(np.repeat(leaf[row : row + 1], ROWS, 0) for leaf in stream[:3]), layers)
        own, of_row, ended = gradient(trainable, frozen, alone, begun, cfg=TWO)
        np.testing.assert_allclose(sums.rows[:, row], of_row.rows[:, 0], rtol=1e-12)
        assert_close(row_of(after, row), row_of(ended, 0), 1e-12)
        total = jax.tree.map(lambda a, b, w=of_row.weight: a + w * b / ROWS, total, own)
        weight += of_row.weight / ROWS
    np.testing.assert_allclose(sums.weight, weight)
    assert_close(grads, jax.tree.map(lambda g: g / weight, total), 1e-10)
    fresh = model.init_state(PERSIST.model, ROWS)
    _, last, _ = gradient(trainable, frozen, one_chunk(halves(one)[1]), fresh, cfg=TWO)
    np.testing.assert_allclose(sums.rows[1, 1], last.rows[0, 1], rtol=1e-12)
    others = [row for row in range(ROWS) if row != 1]
    assert (np.abs(sums.rows[1, others] - last.rows[0, others]) > 1e-3).all()


@pytest.mark.slow
def test_the_cut_holds_where_steps_are_chained_under_one_gradient():
    trainable, frozen, stream = start(PERSIST)
    first, second = batch(seed=5), batch(seed=6)

    def chained(trainable):
        _, _, passed = step.gradient(trainable, frozen, first, stream, PERSIST, BLOCK)
        _, sums, _ = step.gradient(trainable, frozen, second, passed, PERSIST, BLOCK)
        return sums.loss / sums.weight

    _, _, passed = gradient(trainable, frozen, first, stream, cfg=PERSIST)
    expected, _, _ = gradient(trainable, frozen, second, passed, cfg=PERSIST)
    assert_close(quick_jit(jax.grad(chained))(trainable), expected, 1e-10)


# What crosses the end of a chunk


def second_chunk(cfg, first, seed=8, poison=False):
    """The losses of rows in a chunk whose stream read `first` before, and the TTT states after it."""
    trainable, frozen, stream = start(cfg)
    params = merge(trainable, frozen)
    _, stream = sums_of(params, first, stream, cfg=cfg)
    if poison:
        run = stream.layers[TTT_RUN]
        noise, steps = random_like(run.ttt[:2], np.random.default_rng(1))
        layers = {**stream.layers, TTT_RUN: run._replace(ttt=run.ttt._replace(displacement=noise, open_steps=steps))}
        stream = stream._replace(layers=layers)
    sums, stream = sums_of(params, batch(seed=seed), stream, cfg=cfg)
    return sums.rows, stream.layers[TTT_RUN].ttt


def other_past(first):
    """`first` with other tokens but for the last frames of every row, which the delays still need."""
    frames = first.frames.copy()
    keep = PERSIST.model.max_delay + 1
    for row in range(ROWS):
        old = frames[0, row, :, : first.mask[0, row].sum() - keep]
        old[:] = np.where(old >= 0, (old + 1) % 12, old)
    return first._replace(frames=frames)


WHOLE = batch(seed=7)
APART = arm(state="reset", carry_attention=False)
TTT_ALONE = arm(carry_attention=False)


@pytest.mark.parametrize(
    ("cfg", "by_ttt", "by_any"),
    [
        pytest.param(PERSIST, True, True, id="persist", marks=pytest.mark.slow),
        pytest.param(RESET, False, True, id="reset", marks=pytest.mark.slow),
        pytest.param(TTT_ALONE, True, True, id="persist, attention apart", marks=pytest.mark.slow),
        pytest.param(APART, False, False, id="reset, attention apart"),
    ],
)
def test_what_of_a_chunk_the_next_one_sees(cfg, by_ttt, by_any):
    plain = second_chunk(cfg, WHOLE)
    for found, seen in (
        (second_chunk(cfg, WHOLE, poison=True), by_ttt),
        (second_chunk(cfg, other_past(WHOLE)), by_any),
    ):
        if seen:
            assert (np.abs(found[0] - plain[0]) > 1e-3).all()
        else:
            assert_same_bits(found, plain)
    # The delayed tokens cross in any case.
    last = WHOLE._replace(frames=WHOLE.frames.copy())
    last.frames[0, 0, :, -1] = (last.frames[0, 0, :, -1] + 1) % 12
    assert abs(second_chunk(cfg, last)[0][0, 0] - plain[0][0, 0]) > 1e-3


# Less memory, the same numbers


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "layers"])
def test_computing_again_changes_no_gradient_of_stacked_layers_over_several_chunks(remat):
    of = lambda remat: float64(config(lora=LORA, num_layers=4, bptt=2, remat=remat))  # noqa: E731
    trainable, frozen, stream = start(of("none"))
    one = batch(2, seed=10)
    expected = gradient(trainable, frozen, one, stream, cfg=of("none"))
    assert_close(gradient(trainable, frozen, one, stream, cfg=of(remat)), expected, 1e-10)


@pytest.mark.slow
def test_parts_of_a_batch_have_its_gradient_and_carry_every_row():
    trainable, frozen, stream = carried(TWO)
    one = batch(seed=12, reset=[(0, 2)])
    grads, sums, after = gradient(trainable, frozen, one_chunk(one), stream, cfg=TWO)
    expected = grads, sums._replace(rows=sums.rows[:1]), after
    assert_close(gradient(trainable, frozen, one, stream, cfg=arm(accumulate=2)), expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_several_chunks_have_their_gradient_and_carry_every_row(parts):
    trainable, frozen, stream = carried(TWO)
    one = batch(2, seed=12, reset=[(0, 2), (1, 2)])
    assert len(set(one.mask[0].sum(1))) == ROWS
    expected = gradient(trainable, frozen, one, stream, cfg=TWO)
    assert_close(gradient(trainable, frozen, one, stream, cfg=arm(bptt=2, accumulate=parts)), expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("block", [ROWS * FRAMES // 3, 10, 1], ids="blocks of {}".format)
def test_scores_of_blocks_are_the_token_losses_and_have_their_gradient(block):
    cfg = PERSIST.model
    trainable, frozen, stream = start(PERSIST)
    one, params = batch(seed=13, frames=FRAMES - 1), merge(trainable, frozen)  # 11: the last of the blocks is filled up
    weights = np.random.default_rng(0).standard_normal((ROWS, 1 + cfg.dep_q, FRAMES - 1))

    def in_blocks(params):
        encoded, _ = model.encode(params, one.frames[0], one.mask[0], stream, cfg)
        found = score(params, encoded, cfg, block)
        return (found.nats * weights).sum(), found

    (_, found), got = quick_jit(jax.value_and_grad(in_blocks, has_aux=True))(params)
    (nats, variance), expected = at_once(params, one, stream, cfg, weights)
    assert_close(found.nats, nats, 1e-12)
    assert_close(found.half_variance, variance, 1e-12)
    assert_close(got, expected, 1e-10)


def at_once(params, one, stream, cfg, weights):
    """Losses, half variances and gradients of all logits at once."""

    def loss(params):
        outputs, _ = model.forward(params, one.frames[0], one.mask[0], stream, cfg)
        variance = [outputs.text_logits.var(-1)[:, None], outputs.audio_logits.var(-1).swapaxes(1, 2)]
        half = 0.5 * jax.numpy.concatenate(variance, 1) * outputs.target_mask
        nats = token_losses(outputs)
        return (nats * weights).sum(), (nats, half)

    (_, losses), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    return losses, grads


@pytest.mark.slow
def test_each_block_makes_its_logits_again():
    """The logits of all frames exist nowhere in the step's program where blocks are smaller."""
    trainable, frozen, stream = start(PERSIST)
    one = batch(seed=13)
    shape = f"{ROWS},{FRAMES},{PERSIST.model.text_card}"

    def text(block):
        lowered = jax.jit(partial(step.gradient, cfg=PERSIST, block=block)).lower(trainable, frozen, one, stream)
        return lowered.as_text().replace("x", ",")

    assert f"<{shape},f64>" in text(10_000)
    assert f"<{shape},f64>" not in text(ROWS * 4)
