"""The laws of the one forward: a small model of several runs, windows shorter than the stream, delays of up to 2 frames."""

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.streaming import runner as evaluation
from eval.streaming.arms import ARMS, set_params
from tests.helpers.drawing import (
    assert_close,
    assert_same_bits,
    digest,
    pieces,
    quick_jit,
    random_mask,
    random_params,
    seeds,
)
from ttt_jax.config import DepthConfig, MoshiConfig, TTTConfig, model_preset
from ttt_jax.moshi import generate, model
from ttt_jax.moshi.loss import token_losses

TOL = 1e-10
ROWS, FRAMES = 2, 40
CALLS = (*(8,) * 4, *(1,) * 8)
"""Lengths of calls that make up `FRAMES`, in any order: two of them, since each compiles for seconds."""
# A plain layer, two with TTT, one with TTT and a shorter window, one plain: rings of 6 and 3 frames wrap many times, and
# calls of 8 and 40 frames are longer than the rings.
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
"""One run of two layers: for the grid of inner networks and for gradients, whose programs take longest to compile."""
NETWORKS = {"linear": (), "mlp2": (2,), "mlp3": (2, 2)}
DEFAULT = {"mlp2-4": SMALL}  # the one of several runs


def grid(*default: str, several_runs: bool = True):
    """Inner networks and mini-batch sizes; all but `default` are slow. One pair is of several runs where `several_runs`."""
    params = []
    for (name, hidden), b in itertools.product(NETWORKS.items(), (1, 4, 16, 64)):
        label = f"{name}-{b}"
        shallow = dataclasses.replace(SHALLOW, ttt=dataclasses.replace(SHALLOW.ttt, hidden=hidden, mini_batch=b))
        marks = () if label in default else pytest.mark.slow
        cfg = DEFAULT.get(label, shallow) if several_runs else shallow
        params.append(pytest.param(cfg, id=label, marks=marks))
    return pytest.mark.parametrize("cfg", params)


configs = grid("linear-1", "mlp2-4", "mlp3-16")
OWN = 1 + SMALL.dep_q
CARDS = np.array([SMALL.text_card] + SMALL.n_q * [SMALL.card])


forward = quick_jit(model.forward, static_argnames=("cfg", "measured"))
reset_rows = quick_jit(model.reset_rows, static_argnames="cfg")
reset_ttt_rows = quick_jit(model.reset_ttt_rows)
losses_of = quick_jit(token_losses)


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


def run_split(params, frames, mask, cfg, parts, state=None, measured=False):
    """All outputs along time (axis 1), and the state at the end; from a fresh state if none is given."""
    state, outs = fresh(cfg, frames.shape[0]) if state is None else state, []
    for piece in pieces(parts):
        out, state = forward(params, frames[:, :, piece], mask[:, piece], state, cfg=cfg, measured=measured)
        outs.append(by_time(out))
    return jax.tree.map(lambda *x: np.concatenate(x, 1), *outs), state


def by_time(out):
    """Outputs with rows and frames in front."""
    out = jax.tree.map(np.asarray, out)
    return out._replace(
        targets=out.targets.swapaxes(1, 2),
        target_mask=out.target_mask.swapaxes(1, 2),
        ttt=jax.tree.map(lambda x: np.moveaxis(x, 0, 2), out.ttt),
    )


def valid(out, mask):
    """Outputs of valid frames only, all rows in one."""
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(mask)], out)


def moved_state(params, rng, cfg=SMALL):
    """State of a stream under way, its rows at different phases; by calls of 8 frames."""
    tokens, mask = random_tokens(rng, (ROWS, 16)), random_mask(rng, (ROWS, 16))
    return run_split(params, tokens, mask, cfg, (8, 8))[1]


@cache
def fresh(cfg, rows=ROWS):
    return jax.tree.map(np.asarray, model.init_state(cfg, rows))


def carried_state(cfg, rng):
    """A state that could be met, in NumPy: rows and layers at phases of their own, rings full or not yet."""
    b = cfg.ttt.mini_batch

    def of_run(run):
        normal = lambda x: rng.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
        kv_cache, ttt = jax.tree.map(normal, run.kv_cache), run.ttt
        if ttt is None:
            return model.RunState(kv_cache, None)
        count = rng.integers(0, 3 * b, ttt.count.shape, dtype=np.int32)
        is_open = lambda x: (count % b > 0).reshape(count.shape + (1,) * (x.ndim - 2))  # noqa: E731
        return model.RunState(
            kv_cache,
            ttt._replace(
                displacement=jax.tree.map(lambda x: 0.2 * normal(x), ttt.displacement),
                open_sum=jax.tree.map(lambda x: 0.2 * normal(x) * is_open(x), ttt.open_sum),
                count=count,
            ),
        )

    layers = {name: of_run(run) for name, run in fresh(cfg).layers.items()}
    history = rng.integers(0, CARDS[None, :, None], fresh(cfg).history.shape, dtype=np.int32)
    position, key = rng.integers(0, 20, ROWS, dtype=np.int32), rng.integers(0, 9, (ROWS, 2), dtype=np.uint32)
    return model.State(history, position, key, layers)


def poisoned_floats(state, row=1):
    """The state with every float of one row NaN."""

    def poison(x):
        rows = (np.arange(ROWS) == row).reshape(-1, *(1,) * (x.ndim - 2))
        return np.where(rows, np.nan, x) if np.issubdtype(x.dtype, np.floating) else x

    return state._replace(layers=jax.tree.map(poison, state.layers))


def row_of(tree, row):
    """One row of outputs or of a state."""
    if isinstance(tree, model.State):
        rest = jax.tree.map(lambda x: x[row], tree[:3])
        return model.State(*rest, jax.tree.map(lambda x: x[:, row], tree.layers))
    return jax.tree.map(lambda x: x[row], tree)


# Splits


@grid("linear-1", "mlp2-4")
@given(seed=seeds, parts=st.permutations(CALLS))
def test_any_split_gives_the_same_outputs_and_state(cfg, x64, seed, parts):
    params, frames, rng = setting(cfg, seed)
    mask = random_mask(rng, (ROWS, FRAMES))
    start = carried_state(cfg, rng) if rng.random() < 0.7 else fresh(cfg)
    out, state = run_split(params, frames, mask, cfg, parts, start)
    whole, whole_state = run_split(params, frames, mask, cfg, (FRAMES,), start)
    assert_close(valid(out, mask), valid(whole, mask), TOL)
    assert_close(state, whole_state, TOL)


@grid("mlp2-4", several_runs=False)
def test_streaming_equals_one_chunk_in_float32_over_256_frames(cfg):
    cfg, length = dataclasses.replace(cfg, dtype="float32"), 256
    params, frames, _ = setting(cfg, 1, frames=length)
    mask = np.ones((ROWS, length), bool)
    out, state = run_split(params, frames, mask, cfg, (1,) * length)
    whole, whole_state = run_split(params, frames, mask, cfg, (length,))
    for a, b in zip(jax.tree.leaves((out, state)), jax.tree.leaves((whole, whole_state)), strict=True):
        assert np.linalg.norm(np.float64(a) - b) <= 1e-5 * np.linalg.norm(b)


# Masks and rows


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


@configs
@given(seed=seeds)
def test_rows_are_independent(cfg, x64, seed):
    params, frames, rng = setting(cfg, seed)
    mask = random_mask(rng, (ROWS, FRAMES))
    start, other, other_mask = carried_state(cfg, rng), frames.copy(), mask.copy()
    other[1], other_mask[1] = random_tokens(rng, (1, FRAMES))[0], rng.random(FRAMES) < 0.5
    out, state = run_split(params, frames, mask, cfg, (FRAMES,), start)
    for neighbour in (start, poisoned_floats(start)):
        out2, state2 = run_split(params, other, other_mask, cfg, (FRAMES,), neighbour)
        assert_same_bits(row_of(out2, 0), row_of(out, 0))
        assert_same_bits(row_of(state2, 0), row_of(state, 0))
    assert np.isnan(row_of(out2, 1).hidden[other_mask[1]]).all()


@configs
@given(seed=seeds)
def test_nothing_of_a_poisoned_row_is_left_after_its_reset(cfg, x64, seed):
    params, frames, rng = setting(cfg, seed)
    mask, start, rows = random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng), np.array([False, True])
    poisoned, new = poisoned_floats(start), fresh(cfg)._replace(key=start.key)  # a reset row keeps its key
    reset = reset_rows(poisoned, rows, cfg=cfg)
    assert_same_bits(row_of(reset, 0), row_of(start, 0))
    assert_same_bits(row_of(reset, 1), row_of(new, 1))
    ttt_of = lambda state: [run.ttt for run in state.layers.values()]  # noqa: E731
    assert_same_bits(ttt_of(reset_ttt_rows(poisoned, rows)), ttt_of(reset))
    (out, state), (expected, expected_state) = (
        run_split(params, frames, mask, cfg, (FRAMES,), s) for s in (reset, new)
    )
    assert_same_bits(row_of(out, 1), row_of(expected, 1))
    assert_same_bits(row_of(state, 1), row_of(expected_state, 1))


@st.composite
def schedules(draw):
    """Lengths of calls, and by row: which frames are there (a start, pauses, an end), and before which calls it is reset."""
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


@grid("mlp2-4")
@settings(max_examples=10)
@given(seed=seeds, schedule=schedules())
def test_rows_of_a_batch_come_and_go_as_if_each_were_alone(cfg, x64, seed, schedule):
    params, frames, _ = setting(cfg, seed)
    parts, mask, resets = schedule
    state, outs = fresh(cfg), []
    for call, piece in enumerate(pieces(parts)):
        state = reset_rows(state, resets[:, call], cfg=cfg)
        out, state = forward(params, frames[:, :, piece], mask[:, piece], state, cfg=cfg)
        outs.append(by_time(out))
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
                one = frames[row : row + 1, :, frame : frame + 1], np.ones((1, 1), bool)
                expected, alone = forward(params, *one, alone, cfg=cfg)
                outs.append(row_of(by_time(expected), 0))
        if outs:
            expected = jax.tree.map(lambda *x: np.concatenate(x), *outs)
            assert_close(valid(row_of(out, row), mask[row]), expected, TOL)
        assert_close(row_of(state, row), row_of(alone, 0), TOL)


def test_a_reset_row_behaves_as_fresh_and_the_other_goes_on(x64):
    params, frames, rng = setting(SMALL, 3, frames=8)
    moved, mask = moved_state(params, rng), np.ones((ROWS, 8), bool)
    reset = reset_rows(moved, np.array([False, True]), cfg=SMALL)
    outs = [by_time(forward(params, frames, mask, state, cfg=SMALL)[0]) for state in (reset, moved, fresh(SMALL))]
    row = lambda tree, r: jax.tree.map(lambda x: x[r], tree)  # noqa: E731
    assert_same_bits(row(outs[0], 0), row(outs[1], 0))
    assert_same_bits(row(outs[0], 1), row(outs[2], 1))
    assert np.abs(outs[1].text_logits[1] - outs[2].text_logits[1]).max() > 1e-3


def test_a_ttt_reset_clears_ttt_states_and_nothing_else(x64):
    params, _, rng = setting(SMALL, 4)
    moved = moved_state(params, rng)
    reset = jax.tree.map(np.asarray, reset_ttt_rows(moved, np.array([True, False])))
    moved, new = jax.tree.map(np.asarray, moved), fresh(SMALL)
    assert_same_bits(reset[:3], moved[:3])
    for name, run in reset.layers.items():
        assert_same_bits(run.kv_cache, moved.layers[name].kv_cache)
        if run.ttt is not None:
            assert_same_bits(
                jax.tree.map(lambda x: x[:, 0], run.ttt), jax.tree.map(lambda x: x[:, 0], new.layers[name].ttt)
            )
            assert_same_bits(
                jax.tree.map(lambda x: x[:, 1], run.ttt), jax.tree.map(lambda x: x[:, 1], moved.layers[name].ttt)
            )
            assert all((leaf[:, 0] != 0).any() for leaf in jax.tree.leaves(moved.layers[name].ttt.displacement))


# Causality


@configs
@given(seed=seeds, frame=st.integers(0, FRAMES - 4), stream=st.integers(0, SMALL.n_q))
def test_a_token_is_read_one_position_after_its_column(cfg, x64, seed, frame, stream):
    params, frames, rng = setting(cfg, seed)
    mask, column = np.ones((ROWS, FRAMES), bool), frame + SMALL.delays[stream]
    changed, state = frames.copy(), carried_state(cfg, rng)
    changed[0, stream, frame] = (changed[0, stream, frame] + 1) % CARDS[stream]
    out, other = (run_split(params, f, mask, cfg, (FRAMES,), state)[0] for f in (frames, changed))
    assert_same_bits(other.hidden[:, : column + 1], out.hidden[:, : column + 1])
    assert_same_bits(other.targets[:, :column], out.targets[:, :column])
    assert_same_bits(row_of(other, 1), row_of(out, 1))
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
        return (token_losses(outputs) * (np.arange(FRAMES) >= first)).sum()

    grad = quick_jit(jax.grad(late_loss))
    last_seen = early + cfg.context
    assert np.abs(grad(params["text_emb"], last_seen)[token]).max() > 1e-6
    beyond = np.abs(grad(params["text_emb"], last_seen + 1)[token]).max()
    assert beyond > 1e-6 if layers == "0" else beyond == 0


# Targets


@given(parts=st.permutations(CALLS), seed=seeds)
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
    out, _ = forward(params, frames, random_mask(rng, (ROWS, FRAMES)), fresh(SMALL), cfg=SMALL)
    got, out = np.asarray(losses_of(out)), jax.tree.map(np.asarray, out)
    for row, stream, position in np.ndindex(got.shape):
        logits = out.audio_logits[row, position, stream - 1] if stream else out.text_logits[row, position]
        p = np.exp(logits)
        scored, target = out.target_mask[row, stream, position], out.targets[row, stream, position]
        expected = -np.log(p[target] / p.sum()) if scored else 0
        np.testing.assert_allclose(got[row, stream, position], expected, atol=TOL)


# Parameters, shapes, programs


@pytest.mark.parametrize(
    "calls", [pytest.param((FRAMES,), id="chunk"), pytest.param((1,) * 12, id="streaming", marks=pytest.mark.slow)]
)
def test_closed_gates_give_the_model_without_ttt_bit_for_bit(calls):
    ttt = dataclasses.replace(SMALL.ttt, layers="1-2", hidden=())
    cfg = dataclasses.replace(SMALL, dtype="float32", num_layers=3, layer_context=(), ttt=ttt)
    plain = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, layers="none"))
    params, frames, _ = setting(cfg, 10)
    params = set_params(params, ("off",))
    stacks = [{name: leaf for name, leaf in block.items() if name != "ttt"} for block in params["layers"].values()]
    (run,) = plain.runs
    stack = lambda *x: jnp.concatenate(x)  # noqa: E731
    without = {**params, "layers": {run.name: jax.tree.map(stack, *stacks)}}
    state, expected_state = model.init_state(cfg, ROWS), model.init_state(plain, ROWS)
    forward = jax.jit(model.forward, static_argnames="cfg")  # as users compile it
    for piece in pieces(calls):
        call = frames[:, :, piece], np.ones((ROWS, piece.stop - piece.start), bool)
        out, state = forward(params, *call, state, cfg=cfg)
        expected, expected_state = forward(without, *call, expected_state, cfg=plain)
        assert_same_bits(out, expected)
    kv_caches = jax.tree.map(stack, *(run.kv_cache for run in state.layers.values()))
    assert_same_bits((*state[:2], kv_caches), (*expected_state[:2], expected_state.layers[run.name].kv_cache))
    assert all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(state.layers["layers_01_02"].ttt.displacement))


@grid("mlp2-4")
@pytest.mark.parametrize("how", [pytest.param("no rate", marks=pytest.mark.slow), "frozen"])
def test_what_does_not_learn_knows_what_its_base_knows(how, cfg, x64):
    if how == "no rate":
        cfg = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, base_lr=0.0))
    params, frames, rng = setting(cfg, 13)
    mask = random_mask(rng, (ROWS, FRAMES))
    before = digest(params)
    edited = set_params(params, ("frozen",)) if how == "frozen" else params
    out, state = run_split(edited, frames, mask, cfg, (8,) * 5, measured=True)
    assert digest(params) == before
    inner = valid(out, mask).ttt.inner
    assert (inner.loss_base > 0).all()
    assert_close((inner.loss_before, inner.loss_after), (inner.loss_base,) * 2, 1e-13)
    assert (inner.displacement == 0).all()
    for run in (run for run in state.layers.values() if run.ttt is not None):
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(run.ttt[:2]))
        np.testing.assert_array_equal(run.ttt.count, np.broadcast_to(mask.sum(1), run.ttt.count.shape))


@grid("mlp2-4")
def test_measuring_changes_nothing_and_does_not_depend_on_the_split(cfg, x64):
    params, frames, rng = setting(cfg, 14)
    mask, state = random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng)
    measured, new = run_split(params, frames, mask, cfg, (8,) * 5, state, measured=True)
    out, expected = run_split(params, frames, mask, cfg, (8,) * 5, state)
    # Two programs: XLA may order sums differently in one that also measures.
    assert_close((valid(measured._replace(ttt=None), mask), new), (valid(out, mask), expected), 1e-12)
    streamed, _ = run_split(params, frames, mask, cfg, (1,) * FRAMES, state, measured=True)
    assert_close(streamed.ttt, measured.ttt, TOL)
    assert all((leaf[~mask] == 0).all() and (leaf[mask] != 0).any() for leaf in jax.tree.leaves(streamed.ttt))
    # Layers stand in the order of the stack, whatever run they belong to: each is made to put out its index.
    for run in (run for run in cfg.runs if run.has_ttt):
        ttt = params["layers"][run.name]["ttt"]
        index = np.broadcast_to(np.arange(run.start, run.stop)[:, None], ttt["out_bias"].shape)
        params["layers"][run.name]["ttt"] = {
            **ttt,
            "out_kernel": 0 * ttt["out_kernel"],
            "out_bias": index.astype(float),
        }
    output = run_split(params, frames, mask, cfg, (8,) * 5, state, measured=True)[0].ttt.output
    np.testing.assert_array_equal(output[mask], np.broadcast_to(np.array(cfg.ttt_layers)[:, None], output[mask].shape))


def test_streaming_keeps_parameters_and_compiles_once():
    cfg = dataclasses.replace(SHALLOW, dtype="float32")
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
        assert run.kv_cache.k.dtype == cfg.dtype
        assert run.ttt is None or {leaf.dtype for leaf in jax.tree.leaves(run.ttt[:2])} == {jnp.dtype("float32")}


def test_streaming_step_donates_its_state_and_keeps_parameters():
    cfg = dataclasses.replace(SHALLOW, dtype="float32")
    params, _, _ = setting(cfg, 12)
    state = model.init_state(cfg, ROWS)
    other = jnp.zeros((ROWS, cfg.n_q - cfg.dep_q), jnp.int32)
    before = digest(params)
    _, new = generate.stream_step(params, other, jnp.ones((ROWS,), bool), state, cfg)
    assert digest(params) == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, params)))


@pytest.mark.slow  # of the micro model: tests/train/test_train_step.py
def test_losses_at_initialisation_are_those_of_a_model_that_knows_nothing():
    cfg = model_preset("tiny")
    params = quick_jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    rng = np.random.default_rng(0)
    cards = np.array([cfg.text_card] + cfg.n_q * [cfg.card])
    frames = rng.integers(0, cards[None, :, None], (4, cfg.num_streams, 64), dtype=np.int32)
    outputs, _ = forward(params, frames, np.ones((4, 64), bool), model.init_state(cfg, 4), cfg=cfg)
    losses = np.asarray(losses_of(outputs)).sum((0, 2)) / np.asarray(outputs.target_mask).sum((0, 2))
    outputs = jax.tree.map(np.asarray, outputs)
    variances = [np.var(outputs.text_logits, -1).mean(), *np.var(outputs.audio_logits, -1).mean((0, 1))]
    np.testing.assert_allclose(losses, np.log(cards[: 1 + cfg.dep_q]) + np.array(variances) / 2, rtol=0.05)
