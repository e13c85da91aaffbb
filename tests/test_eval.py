"""Streaming evaluation: arms mean what they say, frames are scored once and in place, statistics are by file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import report, statistics, unigram
from eval.arms import ARMS
from eval.stream import Scores, stream
from tests.micro import CONFIG, MODEL
from train.step import init
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses

CHUNK = 8
LENGTHS = (30, 21)


@pytest.fixture(scope="module")
def params():
    return init(CONFIG).params


@pytest.fixture(scope="module")
def files():
    rng = np.random.default_rng(0)
    return [rng.integers(0, MODEL.card, (MODEL.num_streams, n), dtype=np.int32) for n in LENGTHS]


@pytest.fixture(scope="module")
def scores(params, files):
    return {arm: stream(params, files, arm, CHUNK, MODEL) for arm in ARMS}


def test_frame_by_frame_equals_one_forward(params, files, scores):
    longest = max(LENGTHS)
    frames = np.stack([np.pad(file, ((0, 0), (0, longest - file.shape[1]))) for file in files])
    mask = jnp.arange(longest) < jnp.array(LENGTHS)[:, None]
    forward = jax.jit(model.forward, static_argnames="cfg")
    outputs, _ = forward(params, frames, mask, model.init_state(MODEL, len(files)), cfg=MODEL)
    expected = np.where(outputs.target_mask, token_losses(outputs), np.nan)
    np.testing.assert_allclose(scores["persist"].nats, expected, atol=1e-4)


def test_nothing_is_scored_past_the_end_of_a_file(scores):
    assert np.isnan(scores["persist"].nats[1, :, LENGTHS[1] :]).all()
    assert np.isfinite(scores["persist"].nats[0, 0]).all()


def test_each_token_is_scored_against_itself(files, scores):
    for row, file in enumerate(files):
        for k, delay in enumerate(MODEL.delays[: 1 + MODEL.dep_q]):
            n = file.shape[1]
            np.testing.assert_array_equal(scores["persist"].tokens[row, k, delay:n], file[k, : n - delay])


def test_reset_differs_from_persist_only_after_the_first_chunk(scores):
    persist, reset = scores["persist"].nats, scores["reset"].nats
    np.testing.assert_allclose(
        persist[:, :, :CHUNK], reset[:, :, :CHUNK], atol=5e-6
    )  # rounding: XLA may branch on a reset
    assert np.nanmax(np.abs(persist - reset)[:, :, CHUNK:]) > 1e-3


def test_frozen_fast_weights_stay_at_their_base(scores):
    assert np.nanmax(scores["frozen"].displacement) == 0
    assert np.nanmax(scores["persist"].displacement) > 0
    assert np.nanmax(np.abs(scores["frozen"].nats - scores["persist"].nats)) > 0


def test_off_does_not_depend_on_the_ttt_layers(params, files, scores):
    def scramble(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf + 0.1 if "ttt" in name and "gate" not in name else leaf

    other = jax.tree_util.tree_map_with_path(scramble, params)
    np.testing.assert_array_equal(stream(other, files, "off", CHUNK, MODEL).nats, scores["off"].nats)
    assert not np.array_equal(
        stream(other, files, "persist", CHUNK, MODEL).nats, scores["persist"].nats, equal_nan=True
    )


def test_arms_leave_the_parameters_as_they_are(params):
    before = jax.tree.map(np.array, params)
    for arm in ARMS.values():
        arm.edit(params)
    jax.tree.map(np.testing.assert_array_equal, before, params)


def test_an_estimate_is_students_interval_over_files():
    value = statistics.estimate(np.array([1.0, 2.0, 3.0, np.nan]))
    assert value.n == 3
    assert value.mean == pytest.approx(2.0)
    assert value.high - value.mean == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)  # t(0.975, 2) * 1 / sqrt(3)


def test_one_file_has_no_interval():
    value = statistics.estimate(np.array([1.0]))
    assert (value.n, value.mean) == (1, 1.0)
    assert np.isnan(value.low)


def test_windows_average_what_is_there():
    got = statistics.windows(np.array([1.0, 3.0, np.nan, 5.0, np.nan]), 2)
    np.testing.assert_array_equal(got, [2.0, 5.0, np.nan])


def test_unigram_nats_are_those_of_smoothed_counts():
    tables = unigram.fit([np.array([[0, 0, 1, -1]])], [3])
    np.testing.assert_allclose(np.exp(tables[0]), [3 / 6, 2 / 6, 1 / 6])
    np.testing.assert_allclose(unigram.nats(tables, np.array([[2, -1]])), [[np.log(6), np.nan]])


def summarise(scores, tables, names="ab", chunk=CHUNK, window=10):
    streams = list(MODEL.target_streams)[: len(tables)]
    return report.summarise(scores, tables, streams, list(names), chunk, window, MODEL.context, "a codec")


def test_results_say_what_was_measured(files, scores, tmp_path):
    results = summarise(scores, unigram.fit(files, MODEL.target_streams.values()))
    paths = report.write(results, scores, {"run": "somewhere"}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    stored = json.loads((tmp_path / "results.json").read_text())
    by_hand = np.mean([np.mean([np.nanmean(scores["off"].nats[b, k]) for k in range(9)]) for b in range(2)])
    assert stored["losses"]["off"]["mean"]["mean"] == pytest.approx(by_hand, rel=1e-6)
    assert stored["losses"]["off"]["mean"]["n"] == 2
    assert [file["frames"] for file in stored["files"]] == list(LENGTHS)
    counts = [window["n"] for window in stored["loss_by_position"]["reset"]]
    assert counts == [2, 2, 2]  # frames 20 to 29: the shorter file has one of them
    assert stored["paths"]["picture"] == str(tmp_path / "memory.png")
    assert report.verdict(results) in report.table(results)


def test_speech_without_transcripts_is_averaged_over_its_codebooks(files, scores):
    tables = unigram.fit(files, MODEL.target_streams.values())
    silent = {
        arm: s._replace(nats=np.concatenate([s.nats[:, :1] * np.nan, s.nats[:, 1:]], 1)) for arm, s in scores.items()
    }
    results = summarise(silent, tables)
    assert results.averaged == list(MODEL.target_streams)[1:]
    assert results.losses["off"]["text"].n == 0
    with_text = summarise(scores, tables).losses["off"]
    codebooks = [with_text[name].mean for name in results.averaged]
    assert results.losses["off"]["mean"].mean == pytest.approx(np.mean(codebooks))
    assert results.against_persist["reset"]["after the first chunk"].n == 2
    assert "nan" not in report.table(results)


@pytest.mark.parametrize(
    ("gain", "said"),
    [(0.01, "lowers the loss by 0.0100"), (-0.01, "raises the loss by 0.0100"), (0.0, "no clear difference")],
)
def test_the_verdict_follows_the_interval(gain, said):
    rng = np.random.default_rng(0)
    persist = rng.normal(3, 0.1, (6, 2, 40)).astype(np.float32)
    noise = rng.normal(0, 1e-3, (6, 1, 1))
    tokens, moved = np.zeros((6, 2, 40), np.int32), np.zeros((6, 1, 40))
    arms = {arm: Scores(persist if arm == "persist" else persist + gain + noise, moved, tokens) for arm in ARMS}
    results = summarise(arms, [np.log(np.ones(2) / 2)] * 2, "abcdef", chunk=10)
    assert said in report.verdict(results)
