"""The laws of the one forward on a small model: resets, delays, targets, closed gates, frozen weights. Contract:
test_model_gradients.py."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.streaming import runner as evaluation
from eval.streaming.arms import ARMS, set_params
from tests.helpers.contract import valid
from tests.helpers.drawing import assert_close, assert_same_bits, digest, pieces, quick_jit, random_mask, seeds
from tests.helpers.small_moshi import (
    CARDS,
    FRAMES,
    PARTS,
    PREDICTED,
    ROWS,
    SHALLOW,
    SMALL,
    TOL,
    carried_state,
    configs,
    forward,
    fresh,
    init_shapes,
    poisoned_floats,
    random_tokens,
    reset_rows,
    reset_ttt_rows,
    row_of,
    setting,
)
from ttt_jax.config import model_preset
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses


def run_split(params, frames, mask, cfg, parts=PARTS[0], state=None, measured=False):
    """All outputs along time (axis 1), their losses, and the state at the end; from a fresh state if none is given."""
    state, outs = fresh(cfg, frames.shape[0]) if state is None else state, []
    for piece in pieces(parts):
        out, state = forward(params, frames[:, :, piece], mask[:, piece], state, cfg=cfg, measured=measured)
        outs.append(jax.tree.map(np.asarray, out))
    (out, losses) = jax.tree.map(lambda *x: np.concatenate(x, 1), *outs)
    return out, losses, jax.tree.map(np.asarray, state)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [(), (2,)], ids=["linear", "mlp2"])
def test_streaming_equals_one_chunk_in_float32_over_256_frames(hidden):
    ttt = dataclasses.replace(SHALLOW.ttt, hidden=hidden)
    cfg, length = dataclasses.replace(SHALLOW, dtype="float32", ttt=ttt), 256
    params, frames, _ = setting(cfg, 1, frames=length)
    mask = np.ones((ROWS, length), bool)
    streamed = run_split(params, frames, mask, cfg, (1,) * length)
    whole = run_split(params, frames, mask, cfg, (length,))
    for a, b in zip(jax.tree.leaves(streamed), jax.tree.leaves(whole), strict=True):
        assert np.linalg.norm(np.float64(a) - b) <= 1e-5 * np.linalg.norm(b)


def test_a_ttt_reset_clears_ttt_states_and_nothing_else(x64):
    _, _, rng = setting(SMALL, 4)
    moved, rows = carried_state(SMALL, rng), np.array([True, False])
    reset, new = jax.tree.map(np.asarray, reset_ttt_rows(moved, rows)), fresh(SMALL)
    assert_same_bits(reset[:3], moved[:3])
    for name, layers in reset.layers.items():
        assert_same_bits(layers.kv_cache, moved.layers[name].kv_cache)
        if layers.ttt is not None:
            assert_same_bits(row_of(layers.ttt, 0), row_of(new.layers[name].ttt, 0))
            assert_same_bits(row_of(layers.ttt, 1), row_of(moved.layers[name].ttt, 1))
    poisoned = poisoned_floats(moved, row=0)
    ttt_of = lambda state: [layers.ttt for layers in state.layers.values()]  # noqa: E731
    assert_same_bits(ttt_of(reset_ttt_rows(poisoned, rows)), ttt_of(reset_rows(poisoned, rows, cfg=SMALL)))


def test_cleared_caches_are_empty_ones_and_all_else_goes_on(x64):
    params, frames, rng = setting(SMALL, 16, frames=8)
    state, mask = carried_state(SMALL, rng), np.ones((ROWS, 8), bool)
    cleared = model.clear_kv_caches(state)
    assert not np.asarray(cleared.position).any()
    assert_same_bits((cleared.history, cleared.key, cleared.layers), (state.history, state.key, state.layers))
    empty = {name: part._replace(kv_cache=fresh(SMALL).layers[name].kv_cache) for name, part in state.layers.items()}
    outs = [forward(params, frames, mask, s, cfg=SMALL)[0] for s in (cleared, cleared._replace(layers=empty), state)]
    assert_same_bits(outs[0], outs[1])
    assert (np.asarray(outs[0][0].hidden) != outs[2][0].hidden).any()


def test_summary_and_ratios_are_norms_of_displacement_and_base(x64):
    params, _, rng = setting(SMALL, 17)
    state, (part, _) = carried_state(SMALL, rng), SMALL.runs
    ttt = params["layers"][part.name]["ttt"]
    summary = jax.device_get(quick_jit(partial(model.ttt_summary, cfg=SMALL))(params, state))
    ratios = jax.device_get(quick_jit(partial(model.displacement_ratios, cfg=SMALL))(params, state))
    assert tuple(summary) == SMALL.ttt_layers
    for i, layer in enumerate(SMALL.ttt_layers):
        norm = lambda leaves: np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in leaves))  # noqa: E731
        base = norm(leaf[i] for name, leaf in ttt.items() if name.startswith("inner_"))
        displacement = state.layers[part.name].ttt.displacement
        moved = [norm(leaf[i, row] for leaf in jax.tree.leaves(displacement)) for row in range(ROWS)]
        gate = np.tanh(ttt["gate"][i])
        expected = {
            "gate": gate.mean(),
            "gate_abs": np.abs(gate).mean(),
            "base_norm": base,
            "displacement_norm": np.mean(moved),
            "displacement_ratio": np.mean(moved) / base,
        }
        assert summary[layer] == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(ratios[:, i], np.array(moved) / base, rtol=1e-12)


CALLS = (8, *(1,) * 8)


@st.composite
def schedules(draw):
    """Lengths of calls, and by row: which frames are there (a start, pauses, an end), and before which calls it is
    reset."""
    parts = draw(st.permutations(CALLS))
    mask, resets = np.zeros((ROWS, FRAMES), bool), np.zeros((ROWS, len(parts)), bool)
    for row in range(ROWS):
        start, end = sorted(draw(st.lists(st.integers(0, FRAMES), min_size=2, max_size=2)))
        mask[row, start:end] = True
        for _ in range(draw(st.integers(0, 3))):
            pause = draw(st.integers(0, FRAMES))
            mask[row, pause : pause + draw(st.integers(1, 9))] = False
        resets[row, draw(st.lists(st.integers(1, len(parts) - 1), max_size=2))] = True
    return parts, mask, resets


@pytest.mark.slow
@configs
@settings(max_examples=10)
@given(seed=seeds, schedule=schedules())
def test_rows_of_a_batch_come_and_go_as_if_each_were_alone(cfg, x64, seed, schedule):
    params, frames, _ = setting(cfg, seed)
    parts, mask, resets = schedule
    state, outs = fresh(cfg), []
    for call, piece in enumerate(pieces(parts)):
        state = reset_rows(state, resets[:, call], cfg=cfg)
        out, state = forward(params, frames[:, :, piece], mask[:, piece], state, cfg=cfg)
        outs.append(jax.tree.map(np.asarray, out))
    out = jax.tree.map(lambda *x: np.concatenate(x, 1), *outs)
    starts = np.array([piece.start for piece in pieces(parts)])
    for row in range(ROWS):
        # Only the frames that are there, one by one, and no mask.
        new = fresh(cfg, 1)._replace(key=fresh(cfg).key[row : row + 1])
        alone, outs = new, []
        for frame in range(FRAMES):
            if frame in starts[resets[row]]:
                alone = new
            if mask[row, frame]:
                now = frames[row : row + 1, :, frame : frame + 1], np.ones((1, 1), bool)
                expected, alone = forward(params, *now, alone, cfg=cfg)
                outs.append(jax.tree.map(lambda x: np.asarray(x)[0], expected))
        if outs:
            expected = jax.tree.map(lambda *x: np.concatenate(x), *outs)
            assert_close(jax.tree.map(lambda x, row=row: x[row][mask[row]], out), expected, TOL)
        assert_close(row_of(state, row), row_of(alone, 0), TOL)


# Causality


@given(seed=seeds, frame=st.integers(0, FRAMES - 4), stream=st.integers(0, SMALL.n_q))
def test_a_token_is_read_one_position_after_its_column(x64, seed, frame, stream):
    params, frames, rng = setting(SMALL, seed)
    mask, column = np.ones((ROWS, FRAMES), bool), frame + SMALL.delays[stream]
    changed, state = frames.copy(), carried_state(SMALL, rng)
    changed[0, stream, frame] = (changed[0, stream, frame] + 1) % CARDS[stream]
    out, later = (run_split(params, f, mask, SMALL, state=state)[0] for f in (frames, changed))
    assert_same_bits(later.hidden[:, : column + 1], out.hidden[:, : column + 1])
    assert_same_bits(later.targets[:, :column], out.targets[:, :column])
    assert_same_bits(jax.tree.map(lambda x: x[1], later), jax.tree.map(lambda x: x[1], out))
    assert_same_bits(later.text_logits[:, : column + 1], out.text_logits[:, : column + 1])
    assert_same_bits(later.audio_logits[:, :column], out.audio_logits[:, :column])
    assert (later.text_logits[0, column + 1 :] != out.text_logits[0, column + 1 :]).any(-1).all()
    # Inside the column the depth transformer reads text and the codebooks before the one that it predicts.
    differs = (later.audio_logits[0, column] != out.audio_logits[0, column]).any(-1)
    np.testing.assert_array_equal(differs, np.arange(SMALL.dep_q) >= stream)


def test_last_frame_of_a_stream_reaches_no_logits_of_columns_before(x64):
    params, frames, rng = setting(SMALL, 5)
    mask, changed = np.ones((ROWS, FRAMES), bool), frames.copy()
    changed[:, :, -1] = random_tokens(rng, (ROWS, 1))[:, :, 0]
    out, later = (run_split(params, f, mask, SMALL)[0] for f in (frames, changed))
    assert_same_bits(later.hidden, out.hidden)
    assert_same_bits(later.audio_logits[:, :-1], out.audio_logits[:, :-1])


@pytest.mark.slow  # a gradient of another program; reads of the layer: tests/ttt
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
        return (token_losses(outputs) * (np.arange(FRAMES) >= first)).sum()

    grad = quick_jit(jax.grad(late_loss))
    last_seen = early + cfg.context
    assert np.abs(grad(params["text_emb"], last_seen)[token]).max() > 1e-6
    beyond = np.abs(grad(params["text_emb"], last_seen + 1)[token]).max()
    assert beyond > 1e-6 if layers == "0" else beyond == 0


# Targets


@given(seed=seeds, parts=st.sampled_from(PARTS))
def test_a_finished_stream_scores_each_token_once(x64, parts, seed):
    params, _, rng = setting(SMALL, 7)
    frames = np.tile(np.arange(FRAMES, dtype=np.int32), (ROWS, SMALL.num_streams, 1))  # a token is its frame's number
    mask = random_mask(rng, (ROWS, FRAMES))
    absent = np.random.default_rng(seed).random(frames.shape) < 0.1
    tokens = np.where(absent, -1, frames)
    out = run_split(params, tokens, mask, SMALL, parts)[0]
    for row in range(ROWS):
        present = np.flatnonzero(mask[row])
        for stream in range(PREDICTED):
            scored = out.targets[row, :, stream][out.target_mask[row, :, stream]]
            expected = present[: len(present) - SMALL.delays[stream]]
            np.testing.assert_array_equal(scored, expected[~absent[row, stream, expected]])


def test_initial_tokens_are_never_scored(x64):
    params, frames, _ = setting(SMALL, 8)
    out = run_split(params, frames, np.ones((ROWS, FRAMES), bool), SMALL)[0]
    for stream in range(PREDICTED):
        delay = SMALL.delays[stream]
        assert (out.targets[:, :delay, stream] == CARDS[stream]).all()
        np.testing.assert_array_equal(
            out.target_mask[:, :, stream], np.broadcast_to(np.arange(FRAMES) >= delay, (ROWS, FRAMES))
        )
        np.testing.assert_array_equal(out.targets[:, delay:, stream], frames[:, stream, : FRAMES - delay])


def test_losses_are_the_cross_entropy_of_what_is_scored(x64):
    params, frames, rng = setting(SMALL, 9)
    out, got, _ = run_split(params, frames, random_mask(rng, (ROWS, FRAMES)), SMALL)
    for row, position, stream in np.ndindex(got.shape):
        logits = out.audio_logits[row, position, stream - 1] if stream else out.text_logits[row, position]
        p = np.exp(logits)
        scored, target = out.target_mask[row, position, stream], out.targets[row, position, stream]
        expected = -np.log(p[target] / p.sum()) if scored else 0
        np.testing.assert_allclose(got[row, position, stream], expected, atol=TOL)


# Parameters, shapes, programs


@pytest.mark.parametrize(
    "calls", [pytest.param((8,), id="chunk"), pytest.param((1,) * 12, id="streaming", marks=pytest.mark.slow)]
)
def test_closed_gates_give_the_model_without_ttt_bit_for_bit(calls):
    ttt = dataclasses.replace(SMALL.ttt, layers="1", hidden=())
    cfg = dataclasses.replace(SMALL, dtype="float32", num_layers=2, layer_context=(), ttt=ttt)
    plain = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, layers="none"))
    params, frames, _ = setting(cfg, 10)
    params = set_params(params, ("off",))
    stacks = [{name: leaf for name, leaf in block.items() if name != "ttt"} for block in params["layers"].values()]
    (run,) = plain.runs
    stack = lambda *x: jnp.concatenate(x)  # noqa: E731
    without = {**params, "layers": {run.name: jax.tree.map(stack, *stacks)}}
    state, expected_state = model.init_state(cfg, ROWS), model.init_state(plain, ROWS)
    as_users_compile = jax.jit(model.forward, static_argnames="cfg")
    for piece in pieces(calls):
        call = frames[:, :, piece], np.ones((ROWS, piece.stop - piece.start), bool)
        out, state = as_users_compile(params, *call, state, cfg=cfg)
        expected, expected_state = as_users_compile(without, *call, expected_state, cfg=plain)
        assert_same_bits(out, expected)
    kv_caches = jax.tree.map(stack, *(run.kv_cache for run in state.layers.values()))
    assert_same_bits((*state[:2], kv_caches), (*expected_state[:2], expected_state.layers[run.name].kv_cache))
    assert all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(state.layers["layers_01_01"].ttt.displacement))


@configs
@pytest.mark.parametrize("how", [pytest.param("no rate", marks=pytest.mark.slow), "frozen"])
def test_what_does_not_learn_knows_what_its_base_knows(how, cfg, x64):
    if how == "no rate":
        cfg = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, base_lr=0.0))
    params, frames, rng = setting(cfg, 13)
    mask = random_mask(rng, (ROWS, FRAMES))
    before = digest(params)
    edited = set_params(params, ("frozen",)) if how == "frozen" else params
    out, _, state = run_split(edited, frames, mask, cfg, measured=True)
    assert digest(params) == before
    inner = valid(out, mask).ttt.inner
    assert (inner.loss_base > 0).all()
    assert_close((inner.loss_before, inner.loss_after), (inner.loss_base,) * 2, 1e-13)
    assert (inner.displacement == 0).all()
    for layers in (layers for layers in state.layers.values() if layers.ttt is not None):
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(layers.ttt[:2]))
        np.testing.assert_array_equal(layers.ttt.count, np.broadcast_to(mask.sum(1), layers.ttt.count.shape))


@pytest.mark.slow
@configs
def test_measuring_changes_nothing_and_does_not_depend_on_the_split(cfg, x64):
    params, frames, rng = setting(cfg, 14)
    mask, state = random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng)
    measured, _, new = run_split(params, frames, mask, cfg, state=state, measured=True)
    out, _, expected = run_split(params, frames, mask, cfg, state=state)
    # Two programs: XLA may order sums differently in one that also measures.
    assert_close((valid(measured._replace(ttt=None), mask), new), (valid(out, mask), expected), 1e-12)
    streamed = run_split(params, frames, mask, cfg, PARTS[1], state, measured=True)[0]
    assert_close(streamed.ttt, measured.ttt, TOL)
    assert all((leaf[~mask] == 0).all() and (leaf[mask] != 0).any() for leaf in jax.tree.leaves(streamed.ttt))
    # Layers stand in the order of the stack, whatever run they belong to: each is made to put out its index.
    for part in (part for part in cfg.runs if part.has_ttt):
        ttt = params["layers"][part.name]["ttt"]
        index = np.broadcast_to(np.arange(part.start, part.stop)[:, None], ttt["out_bias"].shape).astype(float)
        params["layers"][part.name]["ttt"] = {**ttt, "out_kernel": 0 * ttt["out_kernel"], "out_bias": index}
    output = run_split(params, frames, mask, cfg, state=state, measured=True)[0].ttt.output
    np.testing.assert_array_equal(output[mask], np.broadcast_to(np.array(cfg.ttt_layers)[:, None], output[mask].shape))


def test_streaming_compiles_once(x64):
    params, frames, _ = setting(SMALL, 11)
    state, sizes = fresh(SMALL), []
    for frame in range(3):
        _, state = forward(params, frames[:, :, frame : frame + 1], np.ones((ROWS, 1), bool), state, cfg=SMALL)
        sizes.append(forward._cache_size())
    assert sizes[1] == sizes[2]  # the first state is NumPy's


@pytest.mark.slow  # of one arm: tests/ttt/test_flaws.py
def test_evaluation_keeps_parameters():
    cfg = dataclasses.replace(SHALLOW, dtype="float32", num_layers=1, ttt=dataclasses.replace(SHALLOW.ttt, layers="0"))
    params, frames, _ = setting(cfg, 15, frames=9)
    before = digest(params)
    files = [frames[0], frames[1, :, :5]]
    how = {"chunk": 4, "period": 4, "partners": (1, 0), "measured": True}
    scores = evaluation.stream(params, files, cfg, tuple(ARMS), **how)[0]
    assert digest(params) == before
    assert scores.arms["persist"].inner.displacement.max() > 0


@pytest.mark.parametrize("frames", [1, pytest.param(3, marks=pytest.mark.slow), 21])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_state_keeps_structure_shapes_and_dtypes(dtype, frames):
    cfg = dataclasses.replace(SMALL, dtype=dtype)
    params = init_shapes(cfg)
    tokens, mask = np.zeros((ROWS, cfg.num_streams, frames), np.int32), np.ones((ROWS, frames), bool)
    state = model.init_state(cfg, ROWS)
    outputs, new = jax.eval_shape(partial(model.forward, cfg=cfg), params, tokens, mask, state)
    assert new == jax.eval_shape(lambda s: s, state)
    assert outputs.text_logits.dtype == outputs.audio_logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    for layers in new.layers.values():
        assert layers.kv_cache.k.dtype == cfg.dtype
        assert layers.ttt is None or {leaf.dtype for leaf in jax.tree.leaves(layers.ttt[:2])} == {jnp.dtype("float32")}


@pytest.mark.slow  # of the micro model: tests/train/test_train_step.py
def test_losses_at_initialisation_are_those_of_a_model_that_knows_nothing():
    cfg = model_preset("tiny")
    params = quick_jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    rng = np.random.default_rng(0)
    cards = np.array([cfg.text_card] + cfg.n_q * [cfg.card])
    frames = rng.integers(0, cards[None, :, None], (4, cfg.num_streams, 64), dtype=np.int32)
    outputs, _ = model.forward(params, frames, np.ones((4, 64), bool), model.init_state(cfg, 4), cfg=cfg)
    losses = np.asarray(token_losses(outputs)).sum((0, 2)) / np.asarray(outputs.target_mask).sum((0, 2))
    outputs = jax.tree.map(np.asarray, outputs)
    variances = [np.var(outputs.text_logits, -1).mean(), *np.var(outputs.audio_logits, -1).mean((0, 1))]
    np.testing.assert_allclose(losses, np.log(cards[: 1 + cfg.dep_q]) + np.array(variances) / 2, rtol=0.05)
