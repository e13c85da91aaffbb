"""Streaming evaluation: arms mean what they say, every frame is scored once and in place, and the guards can fail.

One batch of two files, all arms side by side, random weights.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.streaming import arms
from eval.streaming import runner as module
from eval.streaming.runner import _block, plan, score, stream
from eval.streaming.scores import load, not_finite, save
from tests.helpers import eval_models, micro, quick, small_step
from tests.helpers.drawing import quick_jit
from tests.helpers.micro import CONFIG, MODEL
from train import initial_params, step
from train.batches import Batches
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.moshi.delays import columns, init_history
from ttt_jax.moshi.loss import token_losses

RESET_EVERY, LENGTHS = 8, (124, 77)
UNKNOWN = slice(40, 60)
CARDS = np.array([*MODEL.target_streams.values()])
ALL = tuple(arms.ARMS)
quick_forward = quick_jit(model.forward.__wrapped__, static_argnames=("cfg", "measured"))
quick_score, quick_columns = quick_jit(score, static_argnums=1), quick_jit(columns, static_argnums=3)


def walk(length, seed):
    """Each stream counts 0 1 2 3 0 ..., now and then leaving one out: the order of frames is all there is to learn."""
    rng = np.random.default_rng(seed)
    steps = 1 + (rng.random((17, length)) < 0.1)
    return ((rng.integers(0, 4, (17, 1)) + np.cumsum(steps, 1)) % 4).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Programs that run a few times; streams are scanned part by part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "scan_calls", quick.scan_calls)
        patch.setattr(module, "SEGMENT", 50)
        yield


@pytest.fixture(scope="module")
def params():
    """Random weights with open gates; heads small, so that losses are those of a model and not of dice."""
    params = jax.tree.map(jnp.asarray, eval_models.params())
    params["text_head"] = 0.3 * params["text_head"]
    params["depth"] = params["depth"] | {"heads": 0.3 * params["depth"]["heads"]}
    return params


@pytest.fixture(scope="module")
def files():
    """The second file's text is not known in some frames."""
    computed = [walk(length, 100 + i) for i, length in enumerate(LENGTHS)]
    computed[1][0, UNKNOWN] = -1
    return computed


run = functools.partial(stream, cfg=MODEL, arms=ALL, chunk=7, reset_every=RESET_EVERY, measured=True, partners=(1, 0))


@pytest.fixture(scope="module")
def scores(params, files):
    return run(params, files)


def forward(params, files):
    """One call over whole files."""
    frames = np.stack([np.pad(file, ((0, 0), (0, max(LENGTHS) - file.shape[1]))) for file in files])
    mask = jnp.arange(max(LENGTHS)) < jnp.array([[file.shape[1]] for file in files])
    return quick_forward(params, frames, mask, model.init_state(MODEL, len(files)), MODEL)[0]


def largest(a, b):
    """Largest difference of two score trees; NaN must stand in the same places."""
    same = jax.tree.map(lambda x, y: np.array_equal(np.isnan(x), np.isnan(y)), a, b)
    assert all(jax.tree.leaves(same))
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.nanmax(np.abs(x - y), initial=0)), a, b)))


# What is scored


def test_scores_are_those_of_one_forward_over_the_whole_file(params, files, scores):
    outputs = forward(params, files)
    expected = np.where(outputs.target_mask, token_losses(outputs), np.nan)
    for row, got in enumerate(scores):
        np.testing.assert_allclose(got.arms["persist"].nats, expected[row, :, : LENGTHS[row]], atol=1e-4)


def test_entropy_rank_and_comparison_with_off_are_those_of_the_predictions(params, files, scores):
    def predictions(arm):
        outputs = forward(arms.set_params(params, (arm,)), files)
        logits = np.asarray(outputs.audio_logits, np.float64)[1, : LENGTHS[1]]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # [T, Q, V]

    logp, off = predictions("persist"), predictions("off")
    got, target = scores[1].arms["persist"], scores[1].tokens[1:].T
    scored = target >= 0
    second = np.take_along_axis(logp, np.maximum(target, 0)[..., None], -1)
    expected = {
        "entropy": -(np.exp(logp) * logp).sum(-1),
        "rank": (logp > second).sum(-1),
        "kl": (np.exp(logp) * (logp - off)).sum(-1),
        "changed": logp.argmax(-1) != off.argmax(-1),
    }
    computed = got._asdict() | got.against_off._asdict()
    np.testing.assert_allclose(computed["entropy"][1:].T[scored], expected["entropy"][scored], atol=1e-4)
    np.testing.assert_allclose(computed["kl"][1:].T[scored], expected["kl"][scored], atol=1e-4)
    assert np.mean(computed["rank"][1:].T[scored] == expected["rank"][scored]) > 0.99  # ties within rounding may turn
    assert np.mean(computed["changed"][1:].T[scored] == expected["changed"][scored]) > 0.99
    assert computed["changed"][1:].T[scored].mean() > 0.01


def test_each_token_is_scored_once_and_against_itself(files, scores):
    for file, got in zip(files, scores, strict=True):
        for k, delay in enumerate(MODEL.delays[: 1 + MODEL.dep_q]):
            n = file.shape[1]
            np.testing.assert_array_equal(got.tokens[k, delay:n], file[k, : n - delay])
            assert (got.tokens[k, :delay] == -1).all()
            assert np.isnan(got.arms["persist"].nats[k, :delay]).all()


def test_text_that_is_not_known_is_not_scored_and_all_else_is(scores):
    unknown = np.isnan(scores[1].arms["persist"].nats)
    expected = np.zeros_like(unknown)
    expected[0, UNKNOWN] = True
    expected[2:, 0] = True  # codebooks that come late
    np.testing.assert_array_equal(unknown, expected)


@pytest.fixture(scope="module")
def by_frame(params, files):
    """Scores in calls of one frame, the memory of reset cleared at each."""
    return stream(params, files, MODEL, ("persist", "reset"), chunk=7, reset_every=1, measured=True)


def test_the_length_of_calls_changes_no_number(scores, by_frame):
    for got, second in zip(scores, by_frame, strict=True):
        assert largest(got.arms["persist"].nats, second.arms["persist"].nats) < 1e-4
        assert largest(got.arms["persist"].inner, second.arms["persist"].inner) < 1e-3
        assert second.arms["reset"].against_off is None  # off was not run


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 250, 1000])
def test_the_length_of_calls_changes_no_number_of_an_arm_alone(params, files, scores, chunk):
    other = stream(params, files, MODEL, ("persist",), chunk=chunk, reset_every=RESET_EVERY)
    for got, second in zip(scores, other, strict=True):
        assert largest(got.arms["persist"].nats, second.arms["persist"].nats) < 1e-4


@pytest.mark.slow
def test_with_resets_too(params, files, scores):
    for got, other in zip(scores, run(params, files, chunk=1000), strict=True):
        for arm in ALL:
            assert largest(got.arms[arm].nats, other.arms[arm].nats) < 1e-4
            assert largest(got.arms[arm].inner, other.arms[arm].inner) < 1e-3


def test_nothing_crosses_from_file_to_file_unless_asked(params, files, scores):
    other = run(params, [files[0], walk(LENGTHS[1], 9)])
    for arm in ALL:
        apart = largest(scores[0].arms[arm].nats, other[0].arms[arm].nats)
        assert apart < 1e-6 if arm != "permuted" else apart > 1e-4


def test_progress_counts_every_frame_once(params, files):
    counts = []
    run(params, files, on_frames=counts.append)
    assert len(counts) == 3  # 31 calls of 4 frames, 12 a scan
    assert sum(counts) == sum(LENGTHS)


def test_an_interrupt_waits_for_the_program_on_its_way(params, files, monkeypatch):
    """An interpreter that ended under it would crash."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)

    def interrupt(frames):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(params, files, on_frames=interrupt)
    assert len(waited) == 1


# Arms


def test_arms_differ_only_after_the_first_reset(scores):
    for got in scores:
        persist = got.arms["persist"].nats
        for arm in ("reset", "permuted"):
            nats = got.arms[arm].nats
            np.testing.assert_allclose(nats[:, :RESET_EVERY], persist[:, :RESET_EVERY], atol=5e-6)
            assert np.nanmax(np.abs(nats - persist)[:, RESET_EVERY:]) > 1e-4


def test_permuted_is_what_persist_has_learned_on_the_other_file(params, files, scores):
    """By hand: a stream of its own, which at every reset takes the memory of the other row of the stream that
    persists."""
    frames, mask = np.stack([file[:, : 3 * RESET_EVERY] for file in files]), jnp.ones((2, RESET_EVERY), bool)
    kept = second = model.init_state(MODEL, 2)
    for start in range(0, 3 * RESET_EVERY, RESET_EVERY):
        layers = {
            name: layer._replace(ttt=jax.tree.map(lambda x: x[:, ::-1], kept.layers[name].ttt))
            for name, layer in second.layers.items()
        }
        call = frames[..., start : start + RESET_EVERY]
        outputs, second = quick_forward(params, call, mask, second._replace(layers=layers), MODEL)
        _, kept = quick_forward(params, call, mask, kept, MODEL)
        expected = np.where(outputs.target_mask, token_losses(outputs), np.nan)
        for row, got in enumerate(scores):
            computed = got.arms["permuted"].nats[:, start : start + RESET_EVERY]
            np.testing.assert_allclose(computed, expected[row], atol=1e-4)


def test_permuted_counts_as_long_as_the_other_file_goes_on(scores):
    """After that its memory would not grow older: it is no control for one that does."""
    last = (LENGTHS[1] // RESET_EVERY + 1) * RESET_EVERY
    nats = scores[0].arms["permuted"].nats
    assert np.isfinite(nats[0, :last]).all()
    assert np.isnan(nats[:, last:]).all()
    assert np.isnan(scores[0].arms["permuted"].inner.loss_before[:, last:]).all()
    assert np.isfinite(scores[1].arms["permuted"].nats[1]).all()


def test_frozen_fast_weights_stay_at_their_base(scores):
    for got in scores:
        inner = got.arms["frozen"].inner
        assert np.max(inner.displacement) == 0
        assert np.max(inner.rate) == 0
        # With an inner rate of 0 the three inner losses are one.
        np.testing.assert_allclose(inner.loss_before, inner.loss_base, rtol=1e-5)
        np.testing.assert_allclose(inner.loss_after, inner.loss_base, rtol=1e-5)
        assert np.max(got.arms["persist"].inner.displacement) > 1e-3


def test_off_does_not_depend_on_the_ttt_layers(params, files, scores):
    def scramble(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf + 0.1 if "ttt" in name and "gate" not in name else leaf

    other = run(jax.tree_util.tree_map_with_path(scramble, params), files)
    for got, changed in zip(scores, other, strict=True):
        assert largest(got.arms["off"].nats, changed.arms["off"].nats) < 1e-6
        assert largest(got.arms["persist"].nats, changed.arms["persist"].nats) > 1e-3


def test_arms_leave_the_parameters_as_they_are(params):
    before = jax.tree.map(np.array, params)
    arms.set_params(params, ALL)
    jax.tree.map(np.testing.assert_array_equal, before, params)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("persist", "sideways"), "the arm 'sideways' does not exist"),
        (("persist", "persist"), "name one twice"),
        (("permuted",), "add persist"),
    ],
)
def test_arms_that_cannot_be_run_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        arms.check(names, MODEL, "a checkpoint")


# Guards


def test_an_oracle_of_the_next_codes_is_right_in_place_and_at_chance_one_or_two_frames_off():
    """The oracle puts nearly all on the tokens of the grid's column that is `known` columns later."""
    file, sure = np.random.default_rng(0).integers(0, 64, (17, 4000), np.int32), 0.999
    grid, _ = quick_columns(init_history(MODEL, 1), file[None], np.ones((1, file.shape[1]), bool), MODEL)
    targets = np.asarray(grid.targets[0, :, : 1 + MODEL.dep_q])  # [T, S]
    mask = ((targets < CARDS) & (targets >= 0)).T
    for known in (0, 1, 2, -1, -2):
        predicted = np.roll(targets, -known, axis=0)
        logits = [
            np.where(np.eye(card + 1)[predicted[:, i]][:, :card], np.log(sure), np.log((1 - sure) / (card - 1)))
            for i, card in enumerate(CARDS)
        ]
        scored = of_one_arm(logits[0], np.stack(logits[1:], 1), targets.T, mask)
        nats, hits = scored.nats[1:][mask[1:]], (scored.rank == 0)[1:][mask[1:]]
        if known == 0:
            assert nats.max() < 1.1e-3  # -ln 0.999
            assert hits.all()
        else:
            assert abs(hits.mean() - 1 / 64) < 0.003  # 32,000 tokens: four standard errors
            assert nats.mean() > np.log(64)


def of_one_arm(text, audio, targets, mask):
    """Scores [S, T] of predictions of one arm in one row."""
    leaves = (
        np.asarray(leaf)[None, None] for leaf in (text.astype(np.float32), audio.astype(np.float32), targets, mask)
    )
    scored = quick_score(model.Outputs(*leaves, None, None), None)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0, 0], scored)


def test_a_model_without_knowledge_scores_the_logarithm_of_the_cardinality(params, files):
    blank = jax.tree.map(jnp.array, params)
    blank["text_head"] = jnp.zeros_like(blank["text_head"])
    blank["depth"]["heads"] = jnp.zeros_like(blank["depth"]["heads"])
    for got in run(blank, files):
        for arm in ALL:
            expected = np.where(got.tokens >= 0, np.log(CARDS)[:, None], np.nan)[:, : LENGTHS[1]]
            np.testing.assert_allclose(got.arms[arm].nats[:, : LENGTHS[1]], expected, rtol=1e-5)


def test_a_memory_that_is_reset_every_frame_knows_what_its_base_knows(by_frame):
    """The original's bug as a measurement: l(W before) = l(W0) at every frame."""
    for got in by_frame:
        reset, persist = got.arms["reset"].inner, got.arms["persist"].inner
        np.testing.assert_allclose(reset.loss_before, reset.loss_base, rtol=1e-5)
        assert np.abs(reset.loss_after / reset.loss_base - 1).max() > 1e-3
        assert np.abs(persist.loss_before / persist.loss_base - 1)[:, 1:].max() > 1e-3


def test_the_rank_of_a_token_counts_the_strictly_likelier_ones():
    """Ties count as right: a blank model would be wrong everywhere, or right by the order of its tokens."""
    logits = np.array([[2, 1, 1, 0], [1, 1, 1, 1], [0, 3, 1, 2]])  # [T, V]
    targets = np.repeat([[2, 3, 0]], 1 + MODEL.dep_q, 0)
    scored = of_one_arm(logits, np.repeat(logits[:, None], MODEL.dep_q, 1), targets, np.ones(targets.shape, bool))
    np.testing.assert_array_equal(scored.rank, np.repeat([[1, 0, 3]], 1 + MODEL.dep_q, 0))


@pytest.fixture(scope="module")
def trained():
    """Of a model that has learned `walk` for some steps."""
    mesh = small_step.one_device()
    state = step.init_state(CONFIG, mesh, initial_params.initial(CONFIG, mesh).trainable)
    source = micro.source([walk(400, i) for i in range(8)])
    with contextlib.closing(Batches([source], CONFIG.data.batch, CONFIG.data.chunk, 0)) as windows:
        lowered = quick.quickly(step.make_train_step)(CONFIG, mesh).lower(
            state, {}, next(windows).batch, small_step.NO_STOP
        )
        train = lowered.compile()
        for _ in range(CONFIG.steps):
            state, _ = train(state, {}, next(windows).batch, small_step.NO_STOP)
    return state.trainable


@pytest.mark.slow
def test_shuffled_frames_raise_the_loss_of_a_trained_model(trained, files):
    shuffled = [np.random.default_rng(0).permutation(file, axis=1) for file in files]
    for got, wrong in zip(run(trained, files), run(trained, shuffled), strict=True):
        ordered, disordered = (np.nanmean(entry.arms["persist"].nats[1:]) for entry in (got, wrong))
        assert ordered < np.log(4) - 0.1
        assert disordered > ordered + 0.1


# Cutting, batching, storing


def test_frames_past_the_end_of_a_file_are_masked(files):
    """Nobody would see it in the file's own scores, but the memory that it leaves to others would have learned from
    them."""
    calls = plan(max(LENGTHS), 7, RESET_EVERY)
    frames, mask, _ = _block(files, calls, 0, len(calls.starts))
    np.testing.assert_array_equal(mask.sum((0, 2)), LENGTHS)
    assert (np.moveaxis(frames, 2, 0)[:, ~mask] == -1).all()


def test_predictions_that_are_no_numbers_are_found(scores):
    assert not_finite(scores[0]) is None
    nats = scores[0].arms["frozen"].nats.copy()
    nats[3, 20:] = np.nan
    spoilt = scores[0].arms | {"frozen": scores[0].arms["frozen"]._replace(nats=nats)}
    assert not_finite(scores[0]._replace(arms=spoilt)) == ("frozen", 20)


def test_stored_scores_come_back(scores, tmp_path):
    for entry in (scores[0], scores[1]._replace(unigram=scores[1].arms["off"].nats)):
        save(tmp_path / "a.npz", entry)
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "a.npz"), entry)
