"""The statistics of `python -m eval compare` from end to end: regions, pieces, seeds, bounds, the first chunk,
figures."""

import dataclasses
import math
import re

import numpy as np
import pytest
from scipy import stats

from eval.compare import report
from eval.compare.analysis import analyse
from eval.compare.experiment import BEYOND, LATER, REGIONS, WINDOW, Bounds, Setting, differences
from eval.compare.losses import by_piece
from eval.stats import paired
from eval.stats.paired import ALPHA
from eval.stats.verdict import ADVICE, BELOW, BETTER, EQUIVALENT, UNDECIDED, WORSE, p_words
from eval.streaming.scores import ArmScores, FileScores
from tests.eval.test_verdict import SPREAD
from tests.helpers.made_experiment import CHUNK, made


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Bootstrap and sign-flip tests have tests of their own in tests/eval/test_paired.py."""
    monkeypatch.setattr(paired, "EXACT", 0)
    monkeypatch.setattr(paired, "RESAMPLES", 199)


def only(experiment, region=LATER):
    """What the one comparison of an experiment comes to."""
    (one,) = analyse(experiment).comparisons
    return one.regions[region]


# Regions and pieces


def test_pieces_are_cut_at_chunks_and_where_attention_ends():
    setting = Setting(100, "equal", 150, 430)
    np.testing.assert_array_equal(setting.pieces(520), [0, 100, 150, 200, 300, 400, 430, 500])
    np.testing.assert_array_equal(setting.pieces(120), [0, 100])
    assert setting.starts == {LATER: 100, WINDOW: 150, BEYOND: 430}
    near = Setting(100, "equal", 20, 60)
    assert near.starts == {LATER: 100, WINDOW: 100, BEYOND: 100}  # the first chunk is in none
    np.testing.assert_array_equal(near.pieces(250), [0, 100, 200])


def scored(frames=270, seed=0):
    """A file under two arms, most tokens not scored, as of a data set of questions and answers."""
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.uniform(size=(4, frames)) < 0.3, 5, -1).astype(np.int32)
    tokens[1:, 100:150] = -1

    def arm():
        nats = np.where(tokens >= 0, rng.uniform(1, 4, tokens.shape), np.nan).astype(np.float32)
        return ArmScores(nats, nats, nats, None, None)

    return FileScores(tokens, {"persist": arm(), "off": arm()}, None)


@pytest.mark.parametrize("weighting", ["equal", "kyutai", "semantic", "acoustic"])
def test_losses_by_piece_weigh_scored_tokens(weighting):
    one, pieces = scored(), Setting(100, "equal", 150, 430).pieces(600)
    each = {"equal": [1, 1, 1], "kyutai": [100, 1, 1], "semantic": [1, 0, 0], "acoustic": [0, 1, 1]}[weighting]
    found, weight = by_piece(one, weighting, pieces)
    edges = [*pieces, 10**6]
    for k in range(len(pieces)):
        pairs = [
            (each[q], float(arm.nats[1 + q, t]), name)
            for name, arm in one.arms.items()
            for q in range(3)
            for t in range(edges[k], min(edges[k + 1], 270))
            if one.tokens[1 + q, t] >= 0
        ]
        assert weight[k] == sum(pair[0] for pair in pairs) / 2
        for name in one.arms:
            own = [pair for pair in pairs if pair[2] == name]
            if weight[k]:
                expected = sum(w * nats for w, nats, _ in own) / weight[k]
                assert found[name][k] == pytest.approx(expected, abs=1e-8)
            else:
                assert math.isnan(found[name][k])
    assert weight[1] == 0  # frames 100 to 150
    assert (weight[pieces >= 270] == 0).all()


def test_means_over_pieces_are_means_over_tokens():
    experiment = made({"reset": 0.05})
    direct = experiment.losses["reset"][0, 0], experiment.weight[0]
    used = experiment.pieces >= 150
    expected = (direct[0] * direct[1])[used].sum() / direct[1][used].sum()
    assert experiment.loss("reset", 150)[0, 0] == pytest.approx(expected)
    chunks = experiment.by_chunk("reset")
    assert chunks.shape == (1, 12, 9)
    both = [k for k, at in enumerate(experiment.pieces) if at in (100, 150)]
    expected = (direct[0] * direct[1])[both].sum() / direct[1][both].sum()
    assert chunks[0, 0, 1] == pytest.approx(expected)
    # The short file ends after a fifth of its sixth chunk: too little for a mean by chunk, but part of the file's.
    np.testing.assert_array_equal(np.isfinite(chunks[0, -1]), np.arange(9) < 5)
    assert np.isfinite(chunks[0, :-1]).all()
    assert experiment.loss("reset", 430)[0, -1] == pytest.approx(
        (experiment.losses["reset"][0, -1] * experiment.weight[-1])[6:8].sum() / experiment.weight[-1, 6:8].sum()
    )


# Statistics of an experiment


def test_comparison_is_that_of_the_files_differences():
    experiment = made({"reset": 0.05, "off": 0.02}, noise=0.03)
    analysis = analyse(experiment)
    p = []
    for one in analysis.comparisons:
        for region, start in ((LATER, 100), (WINDOW, 150), (BEYOND, 430)):
            used = experiment.pieces >= start
            weight = experiment.weight * used
            d = [
                sum(w * (x - y) for w, x, y in zip(*row, strict=True) if w) / sum(row[0])
                for row in zip(weight, experiment.losses[one.name][0], experiment.losses["persist"][0], strict=True)
            ]
            found = one.regions[region].paired
            assert found.n == 12
            assert found.mean == pytest.approx(np.mean(d))
            assert found.p.t == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
        p.append(one.regions[LATER].paired.p.t)
    expected = paired.holm(p)
    assert [one.regions[LATER].holm for one in analysis.comparisons] == pytest.approx(list(expected))
    reference = analysis.comparisons[0].regions[LATER].paired.reference
    assert reference == pytest.approx(experiment.loss("reset", 100)[0].mean())


def test_the_first_chunk_is_in_no_comparison():
    experiment = made({"frozen": 0.05})
    spoilt = experiment.losses["frozen"].copy()
    spoilt[..., 0] += 7
    changed = dataclasses.replace(experiment, losses=experiment.losses | {"frozen": spoilt})
    assert only(changed) == only(experiment)
    assert only(changed, BEYOND) == only(experiment, BEYOND)
    assert analyse(changed).comparisons[0].trend == analyse(experiment).comparisons[0].trend


def test_speakers_are_the_units():
    groups = [f"speaker{i // 3}" for i in range(12)]
    experiment = made({"reset": 0.05}, groups=groups, noise=0.03)
    found = only(experiment).paired
    d = differences(experiment, "reset", 100)[0]
    assert found.n == 4
    assert found.p.t == pytest.approx(stats.ttest_1samp(d.reshape(4, 3).mean(1), 0).pvalue)
    assert "speakers" in report.table(experiment, analyse(experiment))


def test_files_that_end_before_a_region_are_no_part_of_it():
    assert only(made({"reset": 0.05}, reach=600), BEYOND).paired.n == 11
    beyond = made({"reset": 0.05}, reach=5000)
    found = only(beyond, BEYOND)
    assert found.paired.n == 0
    assert "no file is so long, or has anything to score there" in found.verdict.text
    assert "no file is so long" not in report.table(beyond, analyse(beyond))


def test_seeds_are_averaged_by_file_and_told_one_by_one():
    experiment = made({"reset": 0.03}, seeds=4, noise=0.04)
    found = only(experiment)
    d = differences(experiment, "reset", 100)
    assert d.shape == (4, 12)
    assert found.paired.mean == pytest.approx(d.mean())
    assert found.paired.p.t == pytest.approx(stats.ttest_1samp(d.mean(0), 0).pvalue)
    each = [stats.ttest_1samp(own, 0).pvalue for own in d]
    assert [seed.paired.p.t for seed in found.seeds] == pytest.approx(each)
    assert [seed.holm for seed in found.seeds] == pytest.approx(list(paired.holm(each)))
    assert found.over_seeds.p == pytest.approx(stats.ttest_1samp(d.mean(1), 0).pvalue)
    shown = report.table(experiment, analyse(experiment))
    assert "over 4 seeds, 4 above 0" in shown
    assert only(made({"reset": 0.03})).seeds == []


def test_the_trend_is_the_mean_of_the_files_slopes():
    experiment = made({"reset": 0.0})
    chunk = experiment.pieces // CHUNK
    steps = 0.004 * np.linspace(0.5, 1.5, 12)[:, None]  # ties would have the signed ranks go through all patterns
    grown = experiment.losses["persist"] + np.where(chunk > 0, steps * chunk, 0)
    trend = analyse(dataclasses.replace(experiment, losses=experiment.losses | {"reset": grown})).comparisons[0].trend
    assert trend.mean == pytest.approx(0.004)
    assert trend.n == 12


def test_a_chunk_counts_in_the_trend_by_its_tokens():
    experiment = made({"reset": 0.0}, files=1)  # 520 frames: the last chunk holds 20, less than half, and is left out
    weight = experiment.weight * (1 + experiment.pieces // CHUNK % 2)
    chunk = experiment.pieces // CHUNK
    grown = experiment.losses["persist"] + 0.01 * chunk**2
    losses = experiment.losses | {"reset": grown}
    (compared,) = analyse(dataclasses.replace(experiment, weight=weight, losses=losses)).comparisons
    chunks = np.arange(1, 5)
    expected = np.polyfit(chunks, 0.01 * chunks**2, 1, w=np.sqrt(1 + chunks % 2))[0]
    assert compared.trend.mean == pytest.approx(expected)
    assert expected != pytest.approx(np.polyfit(chunks, 0.01 * chunks**2, 1)[0])


def test_the_share_of_the_gap_that_is_closed():
    experiment = made({"off": 0.05}, noise=0.001)
    persist = experiment.losses["persist"][0]
    bounds = Bounds(persist - 0.03, persist + 0.07, experiment.weight)
    experiment = dataclasses.replace(experiment, bounds=bounds)
    analysis = analyse(experiment)
    for region in REGIONS:
        assert analysis.losses["persist"].closed[region].mean == pytest.approx(0.7)
        assert analysis.losses["off"].closed[region].mean == pytest.approx(0.2, abs=0.02)
    off = analysis.losses["off"].closed[LATER]
    assert off.low < off.mean < off.high
    assert [value.mean for value in analysis.losses["persist"].closed_by_chunk] == pytest.approx([0.7] * 9)
    assert "share of the gap" in report.table(experiment, analysis)
    told = report.markdown(experiment, analysis, {})
    by_chunk = told.partition("By chunk")[2].partition("##")[0]
    assert "| from 800 | +70.0 [" in by_chunk
    assert re.findall(r"from (\d+)", by_chunk)[0] == str(experiment.setting.starts[BEYOND] // CHUNK * CHUNK)
    assert "is worth 0.1000 nats at best; of that each takes, in %: persist +70.0 [" in told.partition("## Setting")[0]
    assert [value.mean for value in analysis.bounds["ideal"]] == pytest.approx(
        [value.mean - 0.03 for value in analysis.losses["persist"].chunks]
    )


def test_seeds_that_disagree_leave_it_undecided_however_many_files_agree():
    experiment = made({"off": 0.0}, seeds=3, noise=0.001)
    persist = experiment.losses["persist"]

    def apart(*steps):
        moved = persist + np.array(steps)[:, None, None] + experiment.losses["off"] - persist
        found = only(dataclasses.replace(experiment, losses=experiment.losses | {"off": moved}))
        return found.holm, found.verdict.kind, found.verdict.text

    p, kind, text = apart(0.9, -0.1, -0.1)
    assert p < 0.001
    assert kind == UNDECIDED
    assert "the seeds disagree (+0.89" in text
    assert "train more of them" in text
    assert apart(0.9, 0.1, 0.1)[1] == BETTER
    assert apart(-0.9, -0.1, -0.1)[1] == WORSE
    # All within the margin: equivalent, whatever their signs.
    assert apart(0.01, -0.003, -0.002)[1] == EQUIVALENT
    # Equivalent on average, not seed by seed.
    p, kind, text = apart(0.05, -0.05, 0.0)
    assert kind == UNDECIDED
    assert "the seeds disagree" in text


def test_what_lies_within_the_margin_is_not_worth_its_complexity():
    experiment = made({"reset": 0.001}, noise=0.0001)
    experiment = dataclasses.replace(experiment, setting=dataclasses.replace(experiment.setting, threshold=0.0))
    found = only(experiment).verdict
    assert found.kind == BELOW
    assert found.equivalent
    assert "but by less than the margin of 0.02 nats: equivalent for practical purposes" in found.text
    assert found.text.endswith("Reset per chunk: it is simpler.")


def test_the_share_of_the_gap_is_told_for_each_seed():
    experiment = made({"off": 0.05}, noise=0.001, seeds=2)
    second = experiment.losses["persist"][1]
    bounds = Bounds(second - 0.03, second + 0.07, experiment.weight)
    worse = experiment.losses | {"persist": np.stack([second + 0.02, second])}
    experiment = dataclasses.replace(experiment, bounds=bounds, losses=worse)
    analysis = analyse(experiment)
    assert [one.mean for one in analysis.losses["persist"].closed_by_seed] == pytest.approx([0.5, 0.7])
    assert analysis.losses["persist"].closed[BEYOND].mean == pytest.approx(0.6)
    assert "+50.0, +70.0" in report.table(experiment, analysis)


def test_where_there_is_nothing_to_remember_no_share_is_told():
    experiment = made({"off": 0.05}, noise=0.001)
    persist = experiment.losses["persist"][0]
    experiment = dataclasses.replace(experiment, bounds=Bounds(persist, persist, experiment.weight))
    told = report.table(experiment, analyse(experiment))
    assert "share of the gap" not in told
    assert "at best" not in told
    assert "best with all memory" in told


# The first chunk


def broken(amount, dtype="float32", arm="reset"):
    experiment = made({"reset": 0.05, "off": 0.1}, dtype=dtype)
    spoilt = experiment.losses[arm].copy()
    spoilt[0, 3, 0] += amount
    return dataclasses.replace(experiment, losses=experiment.losses | {arm: spoilt})


@pytest.mark.parametrize(
    ("amount", "dtype", "bad"),
    [(0, "float32", False), (5e-5, "float32", False), (-2e-4, "float32", True), (2e-4, "bfloat16", False)]
    + [(-0.02, "bfloat16", True), (math.nan, "float32", True)],
)
def test_a_difference_in_the_first_chunk_breaks_the_run(amount, dtype, bad):
    experiment = broken(amount, dtype)
    analysis = analyse(experiment)
    assert (analysis.first_chunk.broken is not None) == bad
    assert analysis.first_chunk.pairs == 12
    verdicts = [one.regions[LATER].verdict for one in analysis.comparisons]
    assert all((found is None) == bad for found in verdicts)
    shown = report.table(experiment, analysis)
    assert ("BROKEN" in shown) == bad
    assert ("as it must be" in shown) == (not bad)
    assert ("is clearly better" in shown) == (not bad)


def test_only_reset_has_to_equal_persist_in_the_first_chunk():
    assert analyse(broken(0.5, arm="off")).first_chunk.broken is None
    alone = analyse(made({"off": 0.1}))
    assert alone.first_chunk.pairs == 0
    assert "not checked" in report.table(made({"off": 0.1}), alone)
    other = made({"reset": 0.1})
    conditions = [other.conditions[0], dataclasses.replace(other.conditions[1], checkpoints=("another",))]
    assert analyse(dataclasses.replace(other, conditions=conditions)).first_chunk.pairs == 0


def test_power_is_for_the_error_rate_of_the_family():
    analysis = analyse(made({"reset": 0.004, "frozen": 0.0, "off": 0.0}))
    found = analysis.comparisons[0].regions[LATER].paired
    assert found.power.for_effect == paired.needed(found.dz, ALPHA / 3) > paired.needed(found.dz)
    assert found.power.for_equivalence == paired.needed_equivalence(found.sd, 0.02, ALPHA / 3)


def test_what_to_do_is_said_of_persist_against_reset_alone():
    for one in analyse(made({"reset": 0.4, "frozen": 0.4, "off": 0.4})).comparisons:
        advised = any(advice in one.regions[LATER].verdict.text for advice in ADVICE.values())
        assert advised == (one.name == "reset")


def test_verdicts_are_by_adjusted_p():
    experiment = made({"reset": 0.0, "frozen": 0.0, "off": 0.0}, files=8)
    persist, later = experiment.losses["persist"], experiment.pieces >= CHUNK
    d = 0.009 + SPREAD  # p = 0.03

    def compared(*arms):
        losses = {arm: persist + later * (d if arm == "reset" else SPREAD)[:, None] for arm in arms}
        kept = [one for one in experiment.conditions if one.name in ("persist", *arms)]
        own = dataclasses.replace(experiment, conditions=kept, losses={"persist": persist} | losses)
        return [one.regions[LATER] for one in analyse(own).comparisons]

    (alone,), (among, *others) = compared("reset"), compared("reset", "frozen", "off")
    assert alone.paired.p.t == among.paired.p.t < 0.05 <= among.holm == pytest.approx(3 * among.paired.p.t)
    family = [among, *others]
    expected = paired.holm([one.paired.equivalence.p for one in family])
    assert [one.holm_equivalence for one in family] == pytest.approx(list(expected))
    shown, raw = map(p_words, (others[0].holm_equivalence, others[0].paired.equivalence.p))
    assert shown != raw
    assert shown in others[0].verdict.text
    assert (alone.verdict.kind, among.verdict.kind) == (BELOW, EQUIVALENT)
    assert "p = 0.0" in among.verdict.text


@pytest.mark.parametrize(
    ("effect", "noise", "kind"),
    [(0.45, 0.05, BETTER), (0.1, 0.02, BELOW), (-0.1, 0.02, WORSE), (0.0, 0.004, EQUIVALENT), (0.03, 0.3, UNDECIDED)],
)
def test_a_planted_effect_is_found(effect, noise, kind):
    experiment = made({"reset": effect}, noise=noise, seed=3)
    found, beyond = only(experiment), only(experiment, BEYOND)
    assert ADVICE.get(kind, "Keep looking with") in found.verdict.text
    assert not any(advice in beyond.verdict.text for advice in [*ADVICE.values(), "Keep looking"])
    assert found.verdict.kind == kind
    assert found.paired.mean == pytest.approx(effect, abs=3 * noise / math.sqrt(12))
    if kind != UNDECIDED:
        assert found.paired.low < effect < found.paired.high or kind == EQUIVALENT
