"""The statistics of `python -m eval compare` from end to end: regions, pieces, seeds, bounds, the first chunk."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from eval.compare import report
from eval.compare.analysis import analyse
from eval.compare.experiment import BEYOND, LATER, REGIONS, WINDOW, Bounds, Setting
from eval.compare.losses import by_piece
from eval.stats import paired
from eval.stats.paired import ALPHA
from eval.stats.verdict import ADVICE, BELOW, BETTER, EQUIVALENT, UNDECIDED, WORSE, p_words
from eval.streaming.scores import ArmScores, FileScores
from tests.eval.stats.test_verdict import SPREAD
from tests.helpers.made_experiment import CHUNK, changed, made, spoilt


def only(experiment, region=LATER):
    """Statistics of the one comparison of an experiment."""
    (comparison,) = analyse(experiment).comparisons
    return comparison.regions[region]


def shown(experiment):
    return report.table(experiment, analyse(experiment))


# Regions and pieces


def test_pieces_are_cut_at_chunks_and_where_attention_ends():
    setting = Setting(100, "equal", 150, 430)
    np.testing.assert_array_equal(setting.pieces(520), [0, 100, 150, 200, 300, 400, 430, 500])
    np.testing.assert_array_equal(setting.pieces(120), [0, 100])
    assert setting.regions == {LATER: (100, None), WINDOW: (150, None), BEYOND: (430, None)}
    near = Setting(100, "equal", 20, 60)
    assert near.regions == dict.fromkeys(REGIONS, (100, None))  # the first chunk is in none
    np.testing.assert_array_equal(near.pieces(250), [0, 100, 200])


@pytest.mark.parametrize("weighting", ["equal", "kyutai", "semantic", "acoustic"])
def test_losses_by_piece_weigh_scored_tokens(weighting):
    rng = np.random.default_rng(0)
    tokens = np.where(rng.uniform(size=(4, 270)) < 0.3, 5, -1).astype(np.int32)  # most tokens are not scored
    tokens[1:, 100:150] = -1
    arms = {}
    for name in ("persist", "off"):
        nats = np.where(tokens >= 0, rng.uniform(1, 4, tokens.shape), np.nan).astype(np.float32)
        arms[name] = ArmScores(nats, nats, nats, None, None)
    pieces = Setting(100, "equal", 150, 430).pieces(600)
    each = {"equal": [1, 1, 1], "kyutai": [100, 1, 1], "semantic": [1, 0, 0], "acoustic": [0, 1, 1]}[weighting]
    losses, weight = by_piece(FileScores(tokens, arms, None), weighting, pieces)
    for k, (start, end) in enumerate(zip(pieces, [*pieces[1:], 10**6], strict=True)):
        frames = range(start, min(end, 270))
        places = [(q, t) for q in range(3) for t in frames if tokens[1 + q, t] >= 0]
        assert weight[k] == sum(each[q] for q, _ in places)
        for name, arm in arms.items():
            total = sum(each[q] * float(arm.nats[1 + q, t]) for q, t in places)
            expected = total / weight[k] if weight[k] else math.nan
            assert losses[name][k] == pytest.approx(expected, abs=1e-8, nan_ok=True)
    assert weight[1] == 0  # frames 100 to 150
    assert (weight[pieces >= 270] == 0).all()


def test_means_over_pieces_are_means_over_tokens():
    experiment = made({"reset": 0.05})
    losses, weight, pieces = experiment.losses["reset"][0], experiment.weight, experiment.pieces

    def mean(file, used):
        return (losses[file] * weight[file])[used].sum() / weight[file][used].sum()

    assert experiment.loss("reset", (150, None))[0, 0] == pytest.approx(mean(0, pieces >= 150))
    assert experiment.loss("reset", (100, 200))[0, 0] == pytest.approx(mean(0, (pieces == 100) | (pieces == 150)))
    # The short file ends after a fifth of its sixth chunk: too little for a mean by chunk, but part of the file's.
    by_chunk = experiment.differences_by_chunk("reset")
    np.testing.assert_array_equal(np.isfinite(by_chunk[-1]), np.arange(9) < 5)
    assert np.isfinite(by_chunk[:-1]).all()
    assert experiment.loss("reset", (430, None))[0, -1] == pytest.approx(mean(-1, [6, 7]))


# Statistics of an experiment


def test_comparison_is_that_of_the_files_differences():
    experiment = made({"reset": 0.05, "off": 0.02}, noise=0.03)
    comparisons = analyse(experiment).comparisons
    for comparison in comparisons:
        for region, start in ((LATER, 100), (WINDOW, 150), (BEYOND, 430)):
            weight = experiment.weight * (experiment.pieces >= start)
            d = np.nan_to_num(experiment.losses[comparison.name][0] - experiment.losses["persist"][0])
            d = (weight * d).sum(1) / weight.sum(1)
            result = comparison.regions[region].paired
            assert (result.n, result.mean) == (12, pytest.approx(np.mean(d)))
            assert result.p == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    family = [comparison.regions[LATER] for comparison in comparisons]
    assert [one.holm for one in family] == pytest.approx(list(paired.holm([one.paired.p for one in family])))
    assert family[0].paired.reference == pytest.approx(experiment.loss("reset", (100, None))[0].mean())


def test_the_first_chunk_is_in_no_comparison():
    experiment = made({"frozen": 0.05})
    losses = experiment.losses["frozen"].copy()
    losses[..., 0] += 7
    assert analyse(changed(experiment, frozen=losses)).comparisons == analyse(experiment).comparisons


def test_speakers_are_the_units():
    experiment = made({"reset": 0.05}, groups=[f"speaker{i // 3}" for i in range(12)], noise=0.03)
    result = only(experiment).paired
    d = experiment.differences("reset", (100, None))[0]
    assert result.n == 4
    assert result.p == pytest.approx(stats.ttest_1samp(d.reshape(4, 3).mean(1), 0).pvalue)
    assert "speakers" in shown(experiment)


def test_files_that_end_before_a_region_are_no_part_of_it():
    assert only(made({"reset": 0.05}, reach=600), BEYOND).paired.n == 11
    beyond = made({"reset": 0.05}, reach=5000)
    result = only(beyond, BEYOND)
    assert result.paired.n == 0
    assert "no file is so long, or has anything to score there" in result.verdict.text
    assert "no file is so long" not in shown(beyond)


def test_seeds_are_averaged_by_file_and_reported_one_by_one():
    experiment = made({"reset": 0.03}, seeds=4, noise=0.04)
    result, d = only(experiment), experiment.differences("reset", (100, None))
    assert d.shape == (4, 12)
    assert result.paired.mean == pytest.approx(d.mean())
    assert result.paired.p == pytest.approx(stats.ttest_1samp(d.mean(0), 0).pvalue)
    each = [stats.ttest_1samp(seed, 0).pvalue for seed in d]
    assert [seed.test.p for seed in result.seeds] == pytest.approx(each)
    assert [seed.holm for seed in result.seeds] == pytest.approx(list(paired.holm(each)))
    assert result.over_seeds.p == pytest.approx(stats.ttest_1samp(d.mean(1), 0).pvalue)
    assert "over 4 seeds, 4 above 0" in shown(experiment)
    assert only(made({"reset": 0.03})).seeds == []


def test_the_trend_is_the_mean_of_the_files_slopes():
    experiment = made({"reset": 0.0})
    chunk = experiment.pieces // CHUNK
    steps = 0.004 * np.linspace(0.5, 1.5, 12)[:, None]
    grown = changed(experiment, reset=experiment.losses["persist"] + np.where(chunk > 0, steps * chunk, 0))
    trend = analyse(grown).comparisons[0].trend
    assert (trend.n, trend.mean) == (12, pytest.approx(0.004))


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
    experiment = made({"off": 0.05}, noise=0.001, seeds=2)
    persist = experiment.losses["persist"][1]
    experiment = changed(experiment, persist=np.stack([persist + 0.02, persist]))
    bounds = Bounds(persist - 0.03, persist + 0.07, experiment.weight)
    experiment = dataclasses.replace(experiment, bounds=bounds)
    analysis = analyse(experiment)
    losses = analysis.losses["persist"]
    assert [losses.closed[region].mean for region in REGIONS] == pytest.approx([0.6] * 3)
    assert [share.mean for share in losses.closed_by_chunk] == pytest.approx([0.6] * 9)
    assert [share.mean for share in losses.closed_by_seed] == pytest.approx([0.5, 0.7])
    off = analysis.losses["off"].closed[LATER]
    assert off.low < off.mean < off.high < 0.5
    chunks = [np.nanmean(experiment.bound("ideal", chunk)[:, experiment.filled(chunk)]) for chunk in experiment.chunks]
    assert [value.mean for value in analysis.bounds["ideal"].chunks] == pytest.approx(chunks)
    text = report.markdown(experiment, analysis, {})
    assert "## Share of the gap" in text
    assert "+50.0, +70.0" in text
    assert "| chunk from 400 |" in text
    assert "| chunk from 300 |" not in text  # attention sees it whole from the start
    assert "Memory from beyond attention is worth 0.1000 nats at best; of that each takes, in %: persist +60.0" in text
    # Where there is nothing to remember no share is given.
    none = dataclasses.replace(experiment, bounds=Bounds(persist, persist, experiment.weight))
    text = report.markdown(none, analyse(none), {})
    assert "Share of the gap" not in text
    assert "at best" not in text
    assert "best with all memory" in text


def test_seeds_that_disagree_are_no_verdict():
    experiment = made({"off": 0.0}, noise=0.001, seeds=3)
    for last, kind in ((-0.1, UNDECIDED), (0.1, BETTER)):
        steps = np.array([0.9, last, last])[:, None, None]
        result = only(changed(experiment, off=experiment.losses["off"] + steps)).verdict
        assert result.kind == kind
        assert ("the seeds disagree" in result.text) == (kind == UNDECIDED)


# The first chunk


@pytest.mark.parametrize(
    ("amount", "dtype", "bad"),
    [(0, "float32", False), (5e-5, "float32", False), (-2e-4, "float32", True), (2e-4, "bfloat16", False)]
    + [(-0.02, "bfloat16", True), (math.nan, "float32", True)],
)
def test_a_difference_in_the_first_chunk_breaks_the_run(amount, dtype, bad):
    experiment = spoilt(made({"reset": 0.05, "off": 0.1}, dtype=dtype), amount)
    analysis = analyse(experiment)
    assert (analysis.first_chunk.broken is not None) == bad
    assert analysis.first_chunk.pairs == 12
    assert all((comparison.regions[LATER].verdict is None) == bad for comparison in analysis.comparisons)
    for text, there in (("BROKEN", bad), ("as it must be", not bad), ("is clearly better", not bad)):
        assert (text in report.table(experiment, analysis)) == there


def test_only_reset_has_to_equal_persist_in_the_first_chunk():
    experiment = made({"reset": 0.05, "off": 0.1})
    assert analyse(spoilt(experiment, 0.5, "off")).first_chunk.broken is None
    alone = made({"off": 0.1})
    assert analyse(alone).first_chunk.pairs == 0
    assert "not checked" in shown(alone)
    persist, reset, _ = experiment.conditions
    other = [persist, dataclasses.replace(reset, checkpoints=("another",))]
    assert analyse(dataclasses.replace(experiment, conditions=other)).first_chunk.pairs == 0


# Families, advice, planted effects


def test_sample_sizes_are_for_the_error_rate_of_the_family():
    result = analyse(made({"reset": 0.004, "frozen": 0.0, "off": 0.0})).comparisons[0].regions[LATER].paired
    expected = paired.needed(paired.power_of, result.dz, ALPHA / 3)
    assert result.units_for_effect == expected > paired.needed(paired.power_of, result.dz)
    expected = paired.needed(paired.power_of_equivalence, 0.02 / result.sd, ALPHA / 3)
    assert result.units_for_equivalence == expected


def test_advice_is_given_on_persist_against_reset_alone():
    for comparison in analyse(made({"reset": 0.4, "frozen": 0.4, "off": 0.4})).comparisons:
        advised = any(advice in comparison.regions[LATER].verdict.text for advice in ADVICE.values())
        assert advised == (comparison.name == "reset")


def test_verdicts_are_by_adjusted_p():
    experiment = made({"reset": 0.0, "frozen": 0.0, "off": 0.0}, files=8)
    persist, later = experiment.losses["persist"], experiment.pieces >= CHUNK
    d = {"reset": 0.009 + SPREAD, "frozen": SPREAD, "off": SPREAD}  # of reset p = 0.03
    experiment = changed(experiment, **{arm: persist + later * values[:, None] for arm, values in d.items()})
    pair = dataclasses.replace(experiment, conditions=experiment.conditions[:2])
    alone, family = only(pair), [comparison.regions[LATER] for comparison in analyse(experiment).comparisons]
    among, frozen, _ = family
    assert alone.paired.p == among.paired.p < 0.05 <= among.holm == pytest.approx(3 * among.paired.p)
    expected = paired.holm([one.paired.equivalence.p for one in family])
    assert [one.holm_equivalence for one in family] == pytest.approx(list(expected))
    adjusted, raw = map(p_words, (frozen.holm_equivalence, frozen.paired.equivalence.p))
    assert adjusted != raw
    assert adjusted in frozen.verdict.text
    assert (alone.verdict.kind, among.verdict.kind) == (BELOW, EQUIVALENT)
    assert "p = 0.0" in among.verdict.text


@pytest.mark.parametrize(
    ("effect", "noise", "kind"),
    [(0.45, 0.05, BETTER), (0.1, 0.02, BELOW), (-0.1, 0.02, WORSE), (0.0, 0.004, EQUIVALENT), (0.03, 0.3, UNDECIDED)],
)
def test_a_planted_effect_is_found(effect, noise, kind):
    experiment = made({"reset": effect}, noise=noise, seed=3)
    result, beyond = only(experiment), only(experiment, BEYOND)
    assert result.verdict.kind == kind
    assert ADVICE.get(kind, "Keep looking with") in result.verdict.text
    assert not any(advice in beyond.verdict.text for advice in [*ADVICE.values(), "Keep looking"])
    assert result.paired.mean == pytest.approx(effect, abs=3 * noise / math.sqrt(12))
    if kind != UNDECIDED:
        assert result.paired.low < effect < result.paired.high or kind == EQUIVALENT
