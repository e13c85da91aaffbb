"""The laws of the one forward: a small model of several runs, windows shorter than the stream, delays of up to 2 frames."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.drawing import (
    assert_close,
    assert_same_bits,
    digest,
    pieces,
    quick_jit,
    random_mask,
    random_params,
    seeds,
    splits,
)
from ttt_jax.config import DepthConfig, MoshiConfig, TTTConfig, model_preset
from ttt_jax.moshi import generate, model
from ttt_jax.moshi.loss import token_losses

TOL = 1e-10
ROWS, FRAMES = 2, 40
# A plain layer, two with TTT, one with TTT and a shorter window, one plain: rings of 6 and 3 frames wrap many times, and
# calls of 8 and 21 frames are longer than the rings.
SMALL = MoshiConfig(
    dim=16,
    num_layers=5,
    num_heads=2,
    hidden=24,
    context=6,
    layer_context=((3, 3),),
    n_q=4,
    dep_q=3,
    card=45,
    text_card=47,
    delays=(0, 0, 1, 2, 2),
    dtype="float64",
    depth=DepthConfig(dim=8, num_layers=1, num_heads=2, hidden=12),
    ttt=TTTConfig(layers="1-3", hidden=(2,), mini_batch=4),
)
SHALLOW = dataclasses.replace(
    SMALL, num_layers=2, layer_context=(), ttt=dataclasses.replace(SMALL.ttt, layers="0-1", hidden=())
)
"""For gradients, whose programs take longest to compile."""
OWN = 1 + SMALL.dep_q
CARDS = np.array([SMALL.text_card] + SMALL.n_q * [SMALL.card])


def full_loss(params, frames, mask, state, cfg):
    outputs, state = model.forward(params, frames, mask, state, cfg)
    return token_losses(outputs).sum(), (outputs, state)


forward = quick_jit(model.forward, static_argnames="cfg")
loss_and_grads = quick_jit(jax.value_and_grad(full_loss, has_aux=True), static_argnames="cfg")


@cache
def init_shapes(cfg):
    return jax.eval_shape(partial(model.init_params, cfg), jax.random.key(0))


def setting(cfg, seed, frames=FRAMES, rows=ROWS):
    """Random parameters and tokens, and the generator for more."""
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, (rows, frames))
    return random_params(init_shapes(cfg), rng, cfg.dtype), tokens, rng


def random_tokens(rng, shape):
    rows, frames = shape
    return rng.integers(0, CARDS[None, :, None], (rows, SMALL.num_streams, frames), dtype=np.int32)


def run_split(params, frames, mask, cfg, parts):
    """All outputs along time (axis 1), and the state at the end."""
    state, outs = model.init_state(cfg, frames.shape[0]), []
    for piece in pieces(parts):
        out, state = forward(params, frames[:, :, piece], mask[:, piece], state, cfg=cfg)
        outs.append(by_time(out))
    return jax.tree.map(lambda *x: np.concatenate(x, 1), *outs), state


def by_time(out):
    return out._replace(targets=out.targets.swapaxes(1, 2), target_mask=out.target_mask.swapaxes(1, 2))


def valid(out, mask):
    """Outputs of valid frames only, all rows in one."""
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(mask)], out)


def moved_state(params, rng, cfg=SMALL):
    """State of a stream under way, its rows at different phases; by calls of 8 frames."""
    tokens, mask = random_tokens(rng, (ROWS, 16)), random_mask(rng, (ROWS, 16))
    return run_split(params, tokens, mask, cfg, (8, 8))[1]


# Splits


@given(seed=seeds, parts=splits(FRAMES))
def test_any_split_gives_the_same_outputs_and_state(x64, seed, parts):
    params, frames, rng = setting(SMALL, seed)
    mask = random_mask(rng, (ROWS, FRAMES))
    out, state = run_split(params, frames, mask, SMALL, parts)
    whole, whole_state = run_split(params, frames, mask, SMALL, (FRAMES,))
    assert_close(valid(out, mask), valid(whole, mask), TOL)
    assert_close(state, whole_state, TOL)


def test_streaming_equals_one_chunk_in_float32():
    cfg = dataclasses.replace(SMALL, dtype="float32")
    params, frames, _ = setting(cfg, 1)
    mask = np.ones((ROWS, FRAMES), bool)
    out, state = run_split(params, frames, mask, cfg, (1,) * FRAMES)
    whole, whole_state = run_split(params, frames, mask, cfg, (FRAMES,))
    for a, b in zip(jax.tree.leaves((out, state)), jax.tree.leaves((whole, whole_state)), strict=True):
        assert np.linalg.norm(np.float64(a) - b) <= 1e-5 * np.linalg.norm(b)


def test_two_calls_give_the_gradients_of_one(x64):
    params, frames, rng = setting(SHALLOW, 2)
    mask = random_mask(rng, (ROWS, FRAMES))

    def split_loss(params):
        total, state = 0, model.init_state(SHALLOW, ROWS)
        for piece in pieces((19, 21)):
            loss, (_, state) = full_loss(params, frames[:, :, piece], mask[:, piece], state, SHALLOW)
            total += loss
        return total

    loss, grads = quick_jit(jax.value_and_grad(split_loss))(params)
    (whole, _), expected = loss_and_grads(params, frames, mask, model.init_state(SHALLOW, ROWS), cfg=SHALLOW)
    assert_close((loss, grads), (whole, expected), TOL)


# Masks and rows


@given(seed=seeds)
def test_tokens_of_masked_frames_change_no_bit(x64, seed):
    params, frames, rng = setting(SHALLOW, seed)
    mask = random_mask(rng, (ROWS, FRAMES)) & (np.arange(FRAMES) < FRAMES - 3)
    garbage = rng.choice(np.array([-(2**31), -7, -1, 3, 999, 2**31 - 1], np.int32), frames.shape)
    poisoned = np.where(mask[:, None], frames, garbage)
    (loss, (out, state)), grads = loss_and_grads(params, poisoned, mask, model.init_state(SHALLOW, ROWS), cfg=SHALLOW)
    (clean_loss, (clean, clean_state)), clean_grads = loss_and_grads(
        params, frames, mask, model.init_state(SHALLOW, ROWS), cfg=SHALLOW
    )
    assert_same_bits((loss, state, grads), (clean_loss, clean_state, clean_grads))
    assert_same_bits(valid(by_time(out), mask), valid(by_time(clean), mask))
    assert not np.asarray(out.target_mask).swapaxes(1, 2)[~mask].any()


@given(seed=seeds)
def test_gaps_equal_the_compacted_stream(x64, seed):
    params, frames, rng = setting(SMALL, seed)
    mask = random_mask(rng, (ROWS, FRAMES))
    order = np.argsort(~mask, 1, kind="stable")
    packed_mask = np.take_along_axis(mask, order, 1)
    out, state = run_split(params, frames, mask, SMALL, (FRAMES,))
    np.testing.assert_array_equal(state.position, mask.sum(1))
    packed, packed_state = run_split(
        params, np.take_along_axis(frames, order[:, None], 2), packed_mask, SMALL, (FRAMES,)
    )
    assert_close(valid(out, mask), valid(packed, packed_mask), TOL)
    assert_close(state, packed_state, TOL)


@given(seed=seeds)
def test_rows_are_independent(x64, seed):
    params, frames, rng = setting(SMALL, seed)
    mask = random_mask(rng, (ROWS, FRAMES))
    other, other_mask = frames.copy(), mask.copy()
    other[1], other_mask[1] = random_tokens(rng, (1, FRAMES))[0], rng.random(FRAMES) < 0.5
    (out, state), (out2, state2) = (
        run_split(params, f, m, SMALL, (FRAMES,)) for f, m in ((frames, mask), (other, other_mask))
    )
    assert_same_bits(jax.tree.map(lambda x: x[0], out2), jax.tree.map(lambda x: x[0], out))
    assert_same_bits(jax.tree.map(lambda x: x[:, 0], state2.layers), jax.tree.map(lambda x: x[:, 0], state.layers))


def test_a_reset_row_behaves_as_fresh_and_the_other_goes_on(x64):
    params, frames, rng = setting(SMALL, 3, frames=8)
    moved, mask = moved_state(params, rng), np.ones((ROWS, 8), bool)
    reset = model.reset_rows(moved, jnp.array([False, True]), SMALL)
    fresh = model.init_state(SMALL, ROWS)
    outs = [by_time(forward(params, frames, mask, state, cfg=SMALL)[0]) for state in (reset, moved, fresh)]
    row = lambda tree, r: jax.tree.map(lambda x: x[r], tree)  # noqa: E731
    assert_same_bits(row(outs[0], 0), row(outs[1], 0))
    assert_same_bits(row(outs[0], 1), row(outs[2], 1))
    assert np.abs(outs[1].text_logits[1] - outs[2].text_logits[1]).max() > 1e-3


def test_a_ttt_reset_clears_ttt_states_and_nothing_else(x64):
    params, _, rng = setting(SMALL, 4)
    moved = moved_state(params, rng)
    reset, fresh = model.reset_ttt_rows(moved, jnp.array([True, False])), model.init_state(SMALL, ROWS)
    assert_same_bits(reset[:2], moved[:2])
    for name, run in reset.layers.items():
        assert_same_bits(run.ring, moved.layers[name].ring)
        if run.ttt is not None:
            assert_same_bits(
                jax.tree.map(lambda x: x[:, 0], run.ttt), jax.tree.map(lambda x: x[:, 0], fresh.layers[name].ttt)
            )
            assert_same_bits(
                jax.tree.map(lambda x: x[:, 1], run.ttt), jax.tree.map(lambda x: x[:, 1], moved.layers[name].ttt)
            )
            assert all((leaf[:, 0] != 0).any() for leaf in jax.tree.leaves(moved.layers[name].ttt.displacement))


# Causality


@given(seed=seeds, frame=st.integers(0, FRAMES - 4), stream=st.integers(0, SMALL.n_q))
def test_a_token_is_read_one_position_after_its_column(x64, seed, frame, stream):
    params, frames, _ = setting(SMALL, seed)
    mask, column = np.ones((ROWS, FRAMES), bool), frame + SMALL.delays[stream]
    changed = frames.copy()
    changed[0, stream, frame] = (changed[0, stream, frame] + 1) % CARDS[stream]
    out, other = (run_split(params, f, mask, SMALL, (FRAMES,))[0] for f in (frames, changed))
    assert_same_bits(other.text_logits[:, : column + 1], out.text_logits[:, : column + 1])
    assert_same_bits(other.audio_logits[:, :column], out.audio_logits[:, :column])
    assert (other.text_logits[0, column + 1 :] != out.text_logits[0, column + 1 :]).any(-1).all()
    # Inside the column the depth transformer reads text and the codebooks before the one that it predicts.
    differs = (other.audio_logits[0, column] != out.audio_logits[0, column]).any(-1)
    np.testing.assert_array_equal(differs, np.arange(SMALL.dep_q) >= stream)


def test_last_frame_of_a_stream_reaches_no_logits_of_columns_before(x64):
    params, frames, rng = setting(SMALL, 5)
    mask, changed = np.ones((ROWS, FRAMES), bool), frames.copy()
    changed[:, :, -1] = random_tokens(rng, (ROWS, 1))[:, :, 0]
    out, other = (run_split(params, f, mask, SMALL, (FRAMES,))[0] for f in (frames, changed))
    assert_same_bits(other.hidden, out.hidden)
    assert_same_bits(other.audio_logits[:, :-1], out.audio_logits[:, :-1])


@pytest.mark.parametrize("layers", ["0", "none"])
def test_late_loss_reaches_early_tokens_through_fast_weights_alone(layers, x64):
    cfg = dataclasses.replace(
        SMALL, num_layers=1, context=4, layer_context=(), ttt=dataclasses.replace(SMALL.ttt, layers=layers)
    )
    params, frames, _ = setting(cfg, 6)
    early, token = 2, 46
    frames[:, 0] = np.minimum(frames[:, 0], token - 1)
    frames[:, 0, early] = token  # read at position early + 1 only, seen by attention up to position early + context

    def late_loss(embedding, first):
        outputs, _ = model.forward(
            {**params, "text_emb": embedding}, frames, np.ones((ROWS, FRAMES), bool), model.init_state(cfg, ROWS), cfg
        )
        return token_losses(outputs)[:, :, first:].sum()

    grad = quick_jit(jax.grad(late_loss), static_argnums=1)
    last_seen = early + cfg.context
    assert np.abs(grad(params["text_emb"], last_seen)[token]).max() > 1e-6
    beyond = np.abs(grad(params["text_emb"], last_seen + 1)[token]).max()
    assert beyond > 1e-6 if layers == "0" else beyond == 0


# Targets


@given(parts=splits(FRAMES), seed=seeds)
def test_a_finished_stream_scores_each_token_once(x64, parts, seed):
    params, _, rng = setting(SMALL, 7)
    frames = np.tile(np.arange(FRAMES, dtype=np.int32), (ROWS, SMALL.num_streams, 1))  # a token says its frame
    mask = random_mask(rng, (ROWS, FRAMES))
    absent = np.random.default_rng(seed).random(frames.shape) < 0.1
    tokens = np.where(absent, -1, frames)
    out, _ = run_split(params, tokens, mask, SMALL, parts)
    for row in range(ROWS):
        present = np.flatnonzero(mask[row])
        for stream in range(OWN):
            scored = out.targets[row, :, stream][out.target_mask[row, :, stream]]
            expected = present[: len(present) - SMALL.delays[stream]]
            np.testing.assert_array_equal(scored, expected[~absent[row, stream, expected]])


def test_initial_tokens_are_never_scored(x64):
    params, frames, _ = setting(SMALL, 8)
    out, _ = run_split(params, frames, np.ones((ROWS, FRAMES), bool), SMALL, (FRAMES,))
    for stream in range(OWN):
        delay = SMALL.delays[stream]
        assert (out.targets[:, :delay, stream] == CARDS[stream]).all()
        np.testing.assert_array_equal(
            out.target_mask[:, :, stream], np.broadcast_to(np.arange(FRAMES) >= delay, (ROWS, FRAMES))
        )
        np.testing.assert_array_equal(out.targets[:, delay:, stream], frames[:, stream, : FRAMES - delay])


def test_losses_are_the_cross_entropy_of_what_is_scored(x64):
    params, frames, rng = setting(SMALL, 9)
    out, _ = forward(params, frames, random_mask(rng, (ROWS, FRAMES)), model.init_state(SMALL, ROWS), cfg=SMALL)
    got, targets, scored = np.asarray(token_losses(out)), np.asarray(out.targets), np.asarray(out.target_mask)
    for row, stream, position in np.ndindex(got.shape):
        logits = out.audio_logits[row, position, stream - 1] if stream else out.text_logits[row, position]
        p = np.exp(np.asarray(logits))
        expected = -np.log(p[targets[row, stream, position]] / p.sum()) if scored[row, stream, position] else 0
        np.testing.assert_allclose(got[row, stream, position], expected, atol=TOL)


# Parameters, shapes, programs


def test_closed_gates_give_the_model_without_ttt_bit_for_bit():
    cfg = dataclasses.replace(SMALL, dtype="float32", layer_context=())
    plain = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, layers="none"))
    params, frames, _ = setting(cfg, 10)
    stacks = []
    for block in params["layers"].values():
        if "ttt" in block:
            block["ttt"]["gate"] = jnp.zeros_like(block["ttt"]["gate"])
        stacks.append({name: leaf for name, leaf in block.items() if name != "ttt"})
    (run,) = plain.runs
    without = {**params, "layers": {run.name: jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)}}
    mask = np.ones((ROWS, FRAMES), bool)
    run = jax.jit(model.forward, static_argnames="cfg")
    out, _ = run(params, frames, mask, model.init_state(cfg, ROWS), cfg=cfg)
    expected, _ = run(without, frames, mask, model.init_state(plain, ROWS), cfg=plain)
    assert_same_bits(out, expected)


def test_streaming_keeps_parameters_and_compiles_once():
    cfg = dataclasses.replace(SMALL, dtype="float32")
    params, frames, _ = setting(cfg, 11)
    before, state = digest(params), model.init_state(cfg, ROWS)
    step = quick_jit(
        lambda *call: model.forward(*call, cfg)
    )  # jax shares what it compiled between jits of one function
    for frame in range(3):
        _, state = step(params, frames[:, :, frame : frame + 1], np.ones((ROWS, 1), bool), state)
    assert step._cache_size() == 1
    assert digest(params) == before
    assert digest(state) != digest(model.init_state(cfg, ROWS))


@pytest.mark.parametrize("frames", [1, 3, 21])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_keeps_structure_shapes_and_dtypes(dtype, frames):
    cfg = dataclasses.replace(SMALL, dtype=dtype)
    params = init_shapes(cfg)
    tokens, mask = np.zeros((ROWS, cfg.num_streams, frames), np.int32), np.ones((ROWS, frames), bool)
    state = model.init_state(cfg, ROWS)
    outputs, new = jax.eval_shape(partial(model.forward, cfg=cfg), params, tokens, mask, state)
    assert new == jax.eval_shape(lambda s: s, state)
    assert outputs.text_logits.dtype == outputs.audio_logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    for run in new.layers.values():
        assert run.ring.k.dtype == cfg.dtype
        assert run.ttt is None or {leaf.dtype for leaf in jax.tree.leaves(run.ttt[:2])} == {jnp.dtype("float32")}


def test_streaming_step_donates_its_state():
    cfg = dataclasses.replace(SHALLOW, dtype="float32")
    params, _, _ = setting(cfg, 12)
    state = model.init_state(cfg, ROWS)
    other = jnp.zeros((ROWS, cfg.n_q - cfg.dep_q), jnp.int32)
    _, new = generate.generate_step(params, other, jnp.ones((ROWS,), bool), state, jax.random.key(0), cfg)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, params)))


def test_losses_at_initialisation_are_those_of_a_model_that_knows_nothing():
    cfg = model_preset("tiny")
    params = quick_jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    rng = np.random.default_rng(0)
    cards = np.array([cfg.text_card] + cfg.n_q * [cfg.card])
    frames = rng.integers(0, cards[None, :, None], (4, cfg.num_streams, 64), dtype=np.int32)
    outputs, _ = forward(params, frames, np.ones((4, 64), bool), model.init_state(cfg, 4), cfg=cfg)
    losses = np.asarray(token_losses(outputs)).sum((0, 2)) / np.asarray(outputs.target_mask).sum((0, 2))
    variances = [np.var(outputs.text_logits, -1).mean(), *np.var(outputs.audio_logits, -1).mean((0, 1))]
    np.testing.assert_allclose(losses, np.log(cards[: 1 + cfg.dep_q]) + np.array(variances) / 2, rtol=0.05)
