"""`python -m eval compare`: what is compared, losses by piece, statistics end to end, verdicts, files, and what is refused."""

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from eval.__main__ import main
from eval.compare import analysis as results
from eval.compare import command as compare_command
from eval.compare import conditions, plots, report
from eval.compare.analysis import analyse
from eval.compare.experiment import (
    BEYOND,
    BOUND_NAMES,
    LATER,
    REGIONS,
    WINDOW,
    Bounds,
    Condition,
    Experiment,
    File,
    Setting,
    differences,
)
from eval.stats import paired
from eval.stats.paired import ALPHA
from eval.stats.verdict import ADVICE, BELOW, BETTER, EQUIVALENT, FIRM, UNDECIDED, WORSE, Rule, advise, p_words, verdict
from eval.streaming.scores import ArmScores, FileScores
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL

CHUNK, FRAMES = 100, 860


def made(effects, files=12, seeds=1, noise=0.01, seed=0, groups=None, reach=430, **setting):
    """Losses under conditions whose difference from the first grows to `effects` (by arm) nats on average after the first chunk.

    The window ends at frame 150 and attention's reach at `reach`; the last file is short.
    """
    rng = np.random.default_rng(seed)
    own = Setting(CHUNK, "equal", 150, reach, **setting)
    lengths = [FRAMES] * (files - 1) + [520]
    pieces = own.pieces(max(lengths))
    weight = np.stack([np.diff(np.minimum(np.append(pieces, max(lengths)), length)) * 8.0 for length in lengths])
    later = pieces >= CHUNK
    base = rng.normal(3, 0.3, (1, files, 1)) + rng.normal(0, 0.05, (1, files, len(pieces)))
    base = base + rng.normal(0, 0.02, (seeds, 1, 1))
    arms = {"persist": 0.0} | effects
    losses = {}
    for arm, effect in arms.items():
        apart = rng.normal(0, noise, (seeds, files, 1)) if effect or arm != "persist" else 0
        losses[arm] = np.where(weight > 0, np.round(base + later * (effect + apart), 9), np.nan)
    conditions = [Condition(arm, arm, tuple(f"run{i}" for i in range(seeds))) for arm in arms]
    groups = groups or [f"file{i}" for i in range(files)]
    found = [File(f"file{i}", group, length) for i, (group, length) in enumerate(zip(groups, lengths, strict=True))]
    return Experiment(own, conditions, found, weight, losses)


@pytest.fixture
def undrawn(monkeypatch):
    """No figures, where they are not looked at."""
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])


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
    found, weight = compare_command.by_piece(one, weighting, pieces)
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


def test_a_broken_run_is_stored_with_its_reason(tmp_path, capsys, undrawn):
    assert compare_command.tell(broken(0.01), {}, tmp_path) == compare_command.BROKEN == 1
    assert "file3" in json.loads((tmp_path / "results.json").read_text())["broken"]
    for said in (capsys.readouterr().out, (tmp_path / "report.md").read_text()):
        assert "BROKEN" in said
        assert "is clearly better" not in said


def test_only_reset_has_to_equal_persist_in_the_first_chunk():
    assert analyse(broken(0.5, arm="off")).first_chunk.broken is None
    alone = analyse(made({"off": 0.1}))
    assert alone.first_chunk.pairs == 0
    assert "not checked" in report.table(made({"off": 0.1}), alone)
    other = made({"reset": 0.1})
    conditions = [other.conditions[0], dataclasses.replace(other.conditions[1], checkpoints=("another",))]
    assert analyse(dataclasses.replace(other, conditions=conditions)).first_chunk.pairs == 0


# Verdicts


def judged(d, reference=3.0, threshold=10.0, margin=0.02, family=1, seeds=()):
    """The verdict on differences in a family of equal ones."""
    found = paired.compare(np.array(d, float), reference, margin, threshold / 100, ALPHA / family)
    p, same = (min(1.0, family * p) for p in (found.p.t, found.equivalence.p))
    return verdict(found, p, same, Rule(margin, threshold, "files"), ("persist", "reset"), seeds)


SPREAD = np.array([-1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5]) * 0.01


@pytest.mark.parametrize(
    ("d", "kind", "said", "todo"),
    [
        (0.4 + SPREAD, BETTER, "is better than reset: by 0.4000 nats (13.33 %), p < 0.001", "Use the persistent state"),
        (0.3 + SPREAD, BETTER, "at least the 10 %", "Use the persistent state"),
        (0.29 + SPREAD, BELOW, "clearly better than reset, by 0.2900 nats (9.67 %)", "less than its complexity"),
        (0.013 + SPREAD, BELOW, "equivalent for practical purposes", "it is simpler"),
        (-0.29 + SPREAD, WORSE, "worse than reset: by 0.2900 nats (9.67 %)", "persistence hurts"),
        (-0.4 + SPREAD, WORSE, "worse than reset", "persistence hurts"),
        (-0.013 + SPREAD, WORSE, "equivalent for practical purposes", "it is simpler"),
        (0.001 + SPREAD, EQUIVALENT, "are equivalent: the difference of +0.0010 nats", "it is simpler"),
        (0.015 + 3 * SPREAD, UNDECIDED, "files would establish equivalence within 0.02", "Keep looking with"),
        (0.05 + 8 * SPREAD, UNDECIDED, "files would find a difference of this size", "Keep looking with"),
        (0.021 + 3 * SPREAD, UNDECIDED, "files would find a difference of this size.", "Keep looking with"),
        (
            0.0103 + 3.77 * np.tile(SPREAD, 4),
            UNDECIDED,
            "files would find a difference of this size.",
            "Keep looking with",
        ),
        ([0.3], UNDECIDED, "one file cannot be tested", "Keep looking."),
        ([], UNDECIDED, "no file is so long", "Keep looking."),
    ],
)
def test_every_verdict(d, kind, said, todo):
    found = judged(d)
    assert found.kind == kind
    assert said in found.text
    assert todo not in found.text
    assert todo in advise(found, "files").text
    assert ("equivalent for practical" in found.text) == (abs(abs(np.mean(d) if len(d) else 1) - 0.013) < 1e-9)


def test_threshold_margin_and_family_count():
    assert judged(0.29 + SPREAD, threshold=9).kind == BETTER
    assert judged(0.001 + SPREAD, margin=0.001).kind == UNDECIDED
    d = 0.011 + SPREAD
    assert judged(d).kind == BELOW
    assert judged(d, family=5).kind != BELOW
    few = judged(0.05 + 8 * SPREAD)
    assert few.units == paired.needed(paired.hedges(0.05 + 8 * SPREAD))
    many = judged(0.05 + 8 * SPREAD, family=3)
    assert many.units == paired.needed(paired.hedges(0.05 + 8 * SPREAD), 0.05 / 3) > few.units
    assert f"{few.units:.0f} files" in few.text


def test_next_to_nothing_is_neither_clear_nor_a_share():
    found = judged(1e-6 * (1 + SPREAD), reference=1e-6)
    assert found.kind == EQUIVALENT
    assert "asked for" not in found.text
    assert judged(1e-4 * (1 + SPREAD), reference=1e-4).kind == BELOW
    little = judged(0.0192 + SPREAD / 4, reference=0.0185)
    assert (little.kind, little.equivalent) == (BELOW, False)
    assert "by 0.0192 nats, p < 0.001, but by less than the margin of 0.02 nats." in little.text
    assert "(100.00 %)" in judged(2.7 + SPREAD, reference=2.7).text


@pytest.mark.parametrize(
    ("seeds", "kind", "said"),
    [
        ((0.8, -0.1, 0.5), UNDECIDED, "the seeds disagree (+0.8000, -0.1000, +0.5000 nats)"),
        ((0.4,) * 5 + (-0.1,), BETTER, "asked for."),
        ((0.8, -0.5) * 4, UNDECIDED, "the seeds disagree"),
    ],
)
def test_few_seeds_must_point_one_way_and_of_many_the_mean(seeds, kind, said):
    found = judged(0.4 + SPREAD, seeds=seeds)
    assert found.kind == kind
    assert said in found.text


@pytest.mark.parametrize(
    ("seeds", "kind", "said"),
    [
        ((0.021, 0.001, 0.001), UNDECIDED, "the seeds do not lie within 0.02 as their mean does"),
        ((0.021, 0.001, 0.001, 0.0, 0.0, 0.0), EQUIVALENT, "TOST p < 0.001."),
        ((0.05, -0.05) * 3, UNDECIDED, "the seeds disagree"),
    ],
)
def test_few_seeds_must_lie_within_the_margin_and_of_many_the_mean(seeds, kind, said):
    found = judged(SPREAD / 8, seeds=seeds)
    assert found.kind == kind
    assert said in found.text


def test_clear_over_files_but_not_over_seeds_is_told_of_what_is_equivalent():
    assert (
        "(p < 0.001 over these files, but not over the seeds)."
        in judged(0.005 + SPREAD / 8, seeds=(0.015, -0.005, 0.005)).text
    )


@pytest.mark.parametrize(
    ("d", "seeds", "said"),
    [
        (0.4 + SPREAD, (0.8, 0.3, 0.1), "with the seed as unit p = 0.19"),
        (0.4 + SPREAD, (0.41, 0.4, 0.39), ""),
        (-0.4 + SPREAD, (-0.8, -0.3, -0.1), "with the seed as unit p = 0.19"),
        (
            SPREAD,
            (0.0025, 0.0106, -0.0176),
            "with the seed as unit the 90 % interval [-0.0260, +0.0230] leaves the margin",
        ),
        (SPREAD, (0.001, 0.002, -0.001), ""),
        (0.005 + SPREAD / 8, (0.0001, 0.0002, 0.0147), "with the seed as unit p = 0.41."),
        (0.01 + SPREAD / 2, (0.001, 0.019, 0.01), "with the seed as unit p = 0.19 and the 90 % interval"),
    ],
)
def test_what_holds_for_the_seeds_at_hand_alone_says_so(d, seeds, said):
    text = judged(d, seeds=seeds).text
    assert (f"For these {len(seeds)} seeds: {said}" in text) == bool(said)
    assert ("For these" in text) == bool(said)


def test_power_is_for_the_error_rate_of_the_family():
    analysis = analyse(made({"reset": 0.004, "frozen": 0.0, "off": 0.0}))
    found = analysis.comparisons[0].regions[LATER].paired
    assert found.power.for_effect == paired.needed(found.dz, ALPHA / 3) > paired.needed(found.dz)
    assert found.power.for_equivalence == paired.needed_equivalence(found.sd, 0.02, ALPHA / 3)


def test_columns_of_the_report():
    def cells(experiment, section, name="reset"):
        told = report.markdown(experiment, analyse(experiment), {}).partition(section)[2]
        heads, row = (
            next(line for line in told.splitlines() if line.startswith(start)) for start in ("| ", f"| {name} |")
        )
        return [cell.strip() for cell in heads.split("|")], [cell.strip() for cell in row.split("|")]

    experiment = made({"reset": 0.01, "frozen": 0.01, "off": 0.0}, noise=0.03)
    heads, row = cells(experiment, f"### {LATER}")
    found = analyse(experiment).comparisons[0].regions[LATER]
    at = heads.index("TOST 0.02")
    said = [
        p_words(p).removeprefix("p ").removeprefix("= ") for p in (found.paired.equivalence.p, found.holm_equivalence)
    ]
    assert heads[at + 1] == "Holm"
    assert row[at : at + 2] == said
    assert said[0] != said[1]
    assert row[heads.index("% of loss")] == f"{100 * found.paired.relative:+.2f}"
    assert cells(experiment, "## Power")[1][-2].endswith(" %")
    tiny = {name: values * 1e-3 for name, values in experiment.losses.items()}
    nothing = dataclasses.replace(experiment, losses=tiny)
    heads, row = cells(nothing, f"### {LATER}")
    assert row[heads.index("% of loss")] == "-"
    assert cells(nothing, "## Power")[1][-2] == "-"


def test_two_units_far_apart_from_zero_promise_no_equivalence():
    assert "no number of files can be given" in judged([0.1, 0.12]).text


@pytest.mark.parametrize("n", [3, FIRM - 1, FIRM])
def test_of_few_units_the_number_that_would_decide_is_called_a_guess(n):
    said = judged(0.05 + np.resize([-0.1, 0.1, 0.02], n)).text
    assert "files would" in said
    assert (f"a guess from {n}." in said) == (n < FIRM)


def test_what_to_do_is_said_of_persist_against_reset_alone():
    for one in analyse(made({"reset": 0.4, "frozen": 0.4, "off": 0.4})).comparisons:
        advised = any(advice in one.regions[LATER].verdict.text for advice in ADVICE.values())
        assert advised == (one.name == "reset")


def test_numbers_that_round_to_nothing_have_no_minus():
    experiment = made({"reset": -1e-7, "off": -1e-7}, noise=1e-8, seeds=2)
    analysis = analyse(experiment)
    for said in (
        report.table(experiment, analysis),
        report.markdown(experiment, analysis, {}),
    ):
        assert "+0.0000" in said
        assert not re.search(r"-0\.?0*(?![.\d])", said)


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


# The command line's conditions


@dataclasses.dataclass
class Fake:
    """What `conditions` reads of a model."""

    name: str
    ttt: bool = True

    @property
    def cfg(self):
        return argparse.Namespace(ttt_layers=(1,) if self.ttt else ())


MODELS = {name: Fake(name, name != "plain") for name in ("a", "b", "c", "plain")}


def chosen(*texts):
    return [
        (one.name, one.arm, one.checkpoints)
        for one in conditions.conditions(list(map(conditions.parse, texts)), MODELS)
    ]


def test_conditions():
    arms = ("persist", "reset", "frozen", "off")
    assert chosen("a") == [(arm, arm, ("a",)) for arm in arms]
    assert chosen("a,b") == [(arm, arm, ("a", "b")) for arm in arms]
    assert chosen("x=a")[1] == ("x reset", "reset", ("a",))
    assert chosen("a@reset", "a@off") == [("reset", "reset", ("a",)), ("off", "off", ("a",))]
    assert chosen("a", "plain") == [("a@persist", "persist", ("a",)), ("plain@off", "off", ("plain",))]
    assert chosen("kept=a,b@persist", "b,c@frozen") == [
        ("kept", "persist", ("a", "b")),
        ("b+1@frozen", "frozen", ("b", "c")),
    ]
    assert conditions.parse("runs/lr=3/x@2/y@off") == (None, ("runs/lr=3/x@2/y",), "off")
    assert conditions.parse("m=runs/x@2/y/") == ("m", ("runs/x@2/y",), None)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("a@sideways",), "'sideways' cannot be compared"),
        (("a@permuted", "a"), "'permuted' cannot be compared"),
        (("a@reset",), "single condition"),
        (("plain",), "plain has no TTT layers, so there is nothing to compare"),
        (("a", "plain@reset"), "plain has no TTT layers, so there is no arm reset"),
        (("a,b", "c"), "2 and 1 checkpoints"),
        (("a", "a"), "two conditions are called persist"),
        (("a,a", "b,c"), "names one checkpoint twice"),
        (("x=",), "names no checkpoint"),
    ],
)
def test_conditions_that_cannot_be(texts, said):
    with pytest.raises(InputError, match=said):
        chosen(*texts)


# Files


def test_again_gives_the_same_numbers_without_jax(tmp_path, capsys, monkeypatch):
    experiment = made({"reset": 0.02, "off": 0.3}, noise=0.07, seeds=2)
    bounds = Bounds(experiment.losses["persist"][0] - 1, experiment.losses["off"][0], experiment.weight)
    experiment = dataclasses.replace(experiment, bounds=bounds)
    about = {"cost": {"seconds": 3.0, "peak_gigabytes": 1.0}}
    assert compare_command.tell(experiment, about, tmp_path) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kinds = ("png", "pdf")
    figures = {f"{name}.{kind}" for name in ("loss_by_chunk", "differences") for kind in kinds}
    assert before.keys() == {"results.json", "report.md"} | figures
    code = "import sys; from eval.__main__ import main; r = main(sys.argv[1:]); assert 'jax' not in sys.modules; sys.exit(r)"
    done = subprocess.run([sys.executable, "-c", code, "compare", "--again", str(tmp_path)], cwd=Path.cwd())
    assert done.returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    capsys.readouterr()
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])  # has been seen
    kind = json.loads(before["results.json"])["verdicts"]["reset"][LATER]["kind"]
    assert main(["compare", "--again", str(tmp_path), "--margin", "0.5", "--threshold", "0.001"]) == 0
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["setting"]["margin"] == 0.5
    assert "less than the margin of 0.5 nats" in capsys.readouterr().out
    assert "effect asked for 0.001 %" in (tmp_path / "report.md").read_text()
    assert (kind, stored["verdicts"]["reset"][LATER]["kind"]) == (UNDECIDED, EQUIVALENT)
    assert stored["losses"] == json.loads(before["results.json"])["losses"]


def test_what_is_stored_and_reported(tmp_path, undrawn):
    experiment = dataclasses.replace(made({"reset": 0.05}), skipped=[{"name": "x", "reason": "x is empty."}])
    assert compare_command.tell(experiment, {}, tmp_path) == PARTIAL
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["losses"]["reset"][0][2] == experiment.losses["reset"][0, 2].tolist()
    assert stored["losses"]["reset"][0][-1][-1] is None
    assert stored["pieces"] == experiment.pieces.tolist()
    assert stored["analysis"]["comparisons"][0]["regions"][LATER]["paired"]["n"] == 12
    report = (tmp_path / "report.md").read_text()
    for words in ("# Does memory help?", "## Verdict", "clearly better than reset", "x is empty.", "## Power", "430"):
        assert words in report
    assert all(len(line) <= 150 for line in report.table(experiment, analyse(experiment)).splitlines()[:-3])


def test_foreign_results_are_refused(tmp_path, undrawn):
    with pytest.raises(InputError, match="is not a file"):
        main(["compare", "--again", str(tmp_path)])
    (tmp_path / "results.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="format 1 of python -m eval compare"):
        main(["compare", "--again", str(tmp_path)])
    with pytest.raises(InputError, match="takes no conditions"):
        main(["compare", "a", "--again", str(tmp_path)])
    with pytest.raises(InputError, match="there is no condition"):
        main(["compare"])
    compare_command.tell(made({"reset": 0.05}, files=4), {}, tmp_path)
    for flag, value in (("--margin", "0"), ("--margin", "nan"), ("--threshold", "-1")):
        with pytest.raises(InputError, match=f"{flag} .* is out of range"):
            main(["compare", "--again", str(tmp_path), flag, value])


def test_figures_show_the_numbers():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    experiment = made({"reset": 0.05, "off": 0.1}, seeds=3, noise=0.02)
    bounds = Bounds(experiment.losses["persist"][0] - 0.5, experiment.losses["off"][0] + 0.5, experiment.weight)
    experiment = dataclasses.replace(experiment, bounds=bounds)
    analysis = analyse(experiment)
    upper, lower = plots.losses(experiment, analysis).axes[:2]
    lines = {line.get_label(): line for line in upper.get_lines()}
    for name, found in analysis.losses.items():
        np.testing.assert_allclose(lines[name].get_ydata(), [value.mean for value in found.chunks])
    np.testing.assert_allclose(lines["persist"].get_xdata()[[0, -1]], [50, 830])
    for name, label in BOUND_NAMES.items():
        np.testing.assert_allclose(lines[label].get_ydata(), [value.mean for value in analysis.bounds[name]])
    (off,) = [line for line in lower.get_lines() if line.get_label() == "off"]
    d = (experiment.by_chunk("off") - experiment.by_chunk("persist")).mean(0)
    np.testing.assert_allclose(off.get_ydata(), np.nanmean(d, 0))
    marks = [line.get_xdata()[0] for line in lower.get_lines() if line.get_ls() in (":", "-.")]
    assert marks == [150, 430]
    (axis,) = plots.paired_differences(experiment, analysis).axes
    dots = [own.get_offsets()[:, 0] for own in axis.collections if len(own.get_offsets()) == 12]
    d = differences(experiment, "reset", 100)
    assert len(dots) == 2 * (3 + 1)
    np.testing.assert_allclose(dots[3], np.sort(d.mean(0)))
    np.testing.assert_allclose(np.sort(dots[0]), np.sort(d[0]))
    assert upper.get_ylim()[1] < 6  # all curves are in sight
    far = dataclasses.replace(experiment, losses=experiment.losses | {"off": experiment.losses["off"] + 20})
    upper, lower = plots.losses(far, found := analyse(far)).axes[:2]
    worth = 0.5 + 0.1 + 0.5
    assert upper.get_ylim()[1] == pytest.approx(found.bounds_by_region["memoryless"][LATER].mean + worth, abs=0.02)
    assert lower.get_ylim()[1] == pytest.approx(0.6 + worth, abs=0.03)
    assert "off the scale: loss of off 2" in lower.get_title("left")
    for axis in (upper, lower):
        low, high = axis.get_ylim()
        shown = np.concatenate([line.get_ydata() for line in axis.get_lines() if line.get_label()[0] != "_"])
        assert 0 < np.nanmin(shown) - low < 0.1 * (high - low)
    rare = experiment.weight.copy()
    rare[1:, 0] = 0  # of most files nothing is scored in the first chunk, as in data that ask late
    sparse = dataclasses.replace(experiment, weight=rare, bounds=None)
    upper = plots.losses(sparse, analyse(sparse)).axes[0]
    assert upper.get_lines()[0].get_xdata()[-1] == 830
    for files in (1, 2):
        few = made({"reset": 0.05}, files=files)
        plots.losses(few, analyse(few)).canvas.draw()
        plots.paired_differences(few, analyse(few)).canvas.draw()
    plt.close("all")


# With models


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds and speech."""
    from tests.eval.test_evaluate import write_data
    from tests.helpers.eval_models import tokens, write_run

    folder = tmp_path_factory.mktemp("persistence")
    found = [write_run(folder / name, seed=i) for i, name in enumerate("ab")]
    return *found, write_data(folder / "speech", [tokens(57, 0), tokens(40, 1)])


def asked(runs, out, *more, arms=("persist", "reset")):
    a, b, data = runs
    conditions = [f"{a},{b}@{arm}" for arm in arms]
    return ["compare", *conditions, "--data", str(data), "--reset-every", "16", "--out", str(out), *more]


@pytest.fixture
def streamed(monkeypatch):
    """What the command's calls of `stream` gave, and a place for a fault in it."""
    from eval.streaming import runner as module

    whole, kept = module.stream, {"calls": [], "fault": lambda scores: scores}

    def stream(*args, **rest):
        found = [kept["fault"](scores) for scores in whole(*args, **rest)]
        kept["calls"].append((tuple(args[3]), rest["period"], found))
        return found

    monkeypatch.setattr(module, "stream", stream)
    return kept


def test_real_models_from_end_to_end(runs, streamed, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(asked(runs, out)) == 0
    shown = capsys.readouterr().out
    assert "persist against reset" in shown or "persist and reset" in shown or "than reset" in shown
    assert "as it must be" in shown
    stored = json.loads((out / "results.json").read_text())
    assert [one["name"] for one in stored["checkpoints"]] == ["a", "b"]
    assert stored["setting"]["window"] == 8
    assert stored["setting"]["reach"] == 2 * 7 + 1 + 1
    assert stored["broken"] is None
    assert stored["counts"] == {"files": 2, "units": 2, "unit": "files"}
    assert [file["frames"] for file in stored["files"]] == [57, 40]
    assert len(stored["files"][0]["digest"]) == 64
    assert stored["evaluated_with"]["versions"]["jax"]
    # Each checkpoint once, both arms at a time; the stored losses are those of the frames.
    assert [(arms, period) for arms, period, _ in streamed["calls"]] == [(("persist", "reset"), 16)] * 2
    assert stored["pieces"] == [0, 16, 32, 48]
    for seed, (_, _, found) in enumerate(streamed["calls"]):
        for arm in ("persist", "reset"):
            for i, one in enumerate(found):
                nats = one.arms[arm].nats[1:].astype(float)
                expected = [np.nanmean(nats[:, k : k + 16]) for k in range(0, nats.shape[1], 16)]
                own = [value for value in stored["losses"][arm][seed][i] if value is not None]
                np.testing.assert_allclose(own, expected, atol=1e-8)
    assert (out / "loss_by_chunk.png").read_bytes().startswith(b"\x89PNG")
    experiment, about = results.read(out)
    assert about.keys() == {"evaluated_with", "cost"}
    assert only(experiment).paired.n == 2
    main(["compare", "--again", str(out)])
    assert json.loads((out / "results.json").read_text()) == stored


def test_a_leak_before_the_first_reset_breaks_a_real_run(runs, streamed, tmp_path, capsys, undrawn):
    def leak(scores):
        nats = scores.arms["reset"].nats.copy()
        nats[1, 7] += 0.5
        return scores._replace(arms=scores.arms | {"reset": scores.arms["reset"]._replace(nats=nats)})

    streamed["fault"] = leak
    assert main(asked(runs, tmp_path / "out")) == compare_command.BROKEN
    assert "BROKEN: persist and reset differ by" in capsys.readouterr().out
    assert "BROKEN" in json.loads((tmp_path / "out" / "results.json").read_text())["broken"]


def test_a_file_that_diverges_is_left_out_everywhere(runs, streamed, tmp_path, capsys, undrawn):
    calls = []

    def diverge(scores):
        calls.append(scores.tokens.shape[1])
        if len(calls) == 1:  # the longer file, under the first checkpoint
            assert calls == [57]
            scores.arms["reset"].nats[:, 20:] = np.nan
        return scores

    streamed["fault"] = diverge
    assert main(asked(runs, tmp_path / "out")) == PARTIAL
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [file["name"] for file in stored["files"]] == ["1"]
    assert "under reset gives no finite predictions of 0 from frame 20" in stored["skipped"][0]["reason"]
    assert stored["pieces"] == [0, 16, 32]
    assert len(stored["losses"]["reset"][1][0]) == 3
    assert stored["verdicts"]["reset"][LATER]["kind"] == UNDECIDED
    assert "one file cannot be tested" in capsys.readouterr().out


def test_checkpoints_that_predict_other_tokens_are_no_pair(runs, streamed, tmp_path):
    calls = []

    def other_delays(scores):
        calls.append(scores)
        if len(calls) > 2:  # the second checkpoint
            scores.tokens[1, 0] = -1
        return scores

    streamed["fault"] = other_delays
    with pytest.raises(InputError, match="b predicts other tokens of . than a"):
        main(asked(runs, tmp_path / "out"))


def test_a_controlled_task_brings_its_bounds(runs, streamed, tmp_path, monkeypatch, undrawn):
    import types

    from eval.compare import command as module

    asked_for = []

    def bounds_for(folder, files, frames):
        asked_for.append((folder, [file.name for file in files], frames))
        rows = [np.full(file.frames.shape[1], 1.0) for file in files]
        for row in rows:
            row[::2] = np.nan
        return rows, [row + 2 for row in rows]

    monkeypatch.setitem(sys.modules, "eval.benchmarks.tasks", types.SimpleNamespace(bounds_for=bounds_for))
    import eval as package

    monkeypatch.setattr(package, "tasks", sys.modules["eval.benchmarks.tasks"], raising=False)
    data = runs[2]
    assert module.task_bounds(str(data), [], 5) is None
    (data / "task.json").write_text("{}")
    try:
        assert main(asked(runs, tmp_path / "out")) == 0
    finally:
        (data / "task.json").unlink()
    assert asked_for == [(data, ["0", "1"], 15)]  # the first codebook, which tasks ask for, has no delay
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["bounds"]["ideal"][0] == [1, 1, 1, 1]
    assert stored["bounds"]["memoryless"][1] == [3, 3, 3, None]
    assert stored["bounds"]["weight"] == [[8, 8, 8, 4], [8, 8, 4, 0]]
    losses = [stored["analysis"]["losses"]["persist"]["regions"][LATER]["mean"]]
    assert stored["analysis"]["losses"]["persist"]["closed"][LATER]["mean"] == pytest.approx(
        (3 - losses[0]) / 2, abs=1e-6
    )


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--data", "x"], "data"),
        (["--reset-every", "9"], "reset-every"),
        (["--weighting", "kyutai"], "weighting"),
        (["--out", "x"], "out"),
    ],
)
def test_again_refuses_what_only_streaming_could_obey(tmp_path, words, flag):
    experiment = made({"reset": 0.05})
    results.write(tmp_path, experiment, analyse(experiment), {})
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(InputError, match=f"--{flag} has no effect"):
        main(["compare", "--again", str(tmp_path), *words])
    assert (tmp_path / "results.json").read_bytes() == before


def test_what_again_starts_from_outlives_a_full_disk(tmp_path, monkeypatch):
    experiment = made({"reset": 0.05})
    results.write(tmp_path, experiment, analyse(experiment), {})
    before = (tmp_path / "results.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eval.results.schema.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        main(["compare", "--again", str(tmp_path)])
    assert (tmp_path / "results.json").read_bytes() == before


def test_what_cannot_be_is_one_sentence(runs, tmp_path):
    def refused(said, *args):
        with pytest.raises(InputError, match=said):
            main([*args])

    out = tmp_path / "out"
    for flag in ("--reset-every", "--frames", "--batch"):
        refused(f"{flag} 0 is out of range", *asked(runs, out), flag, "0")
    refused("no file is longer than a chunk of 57 frames", *asked(runs, out), "--reset-every", "57")
    refused("--margin -1.0 is out of range", *asked(runs, out), "--margin", "-1")
    refused("no checkpoint", "compare", str(tmp_path))
    out.mkdir()
    (out / "results.json").write_text('{"format": 2}')
    refused("is not this command's", *asked(runs, out))


def test_runs_of_the_same_speech_bring_it(monkeypatch):
    from eval.streaming import command as streaming_command
    from tests.helpers.micro import CONFIG

    def model(name, codec="c", **data):
        corpus = dataclasses.replace(CONFIG.data, **data)
        return argparse.Namespace(name=name, corpus=corpus, about={"codec": codec}, cfg=CONFIG.model)

    corpus = argparse.Namespace(describe=lambda: {"codec": "c", "heldout": "h"}, heldout=["files"])
    monkeypatch.setattr(streaming_command.corpora, "load", lambda *_: corpus)
    monkeypatch.setattr(streaming_command.corpora, "load_coders", lambda *_: ())
    assert streaming_command.own_corpus([model("a"), model("b", chunk=99)]) is corpus
    for others in ([model("b", heldout="else.jsonl")], [argparse.Namespace(corpus=None)]):
        with pytest.raises(InputError, match="there is no --data"):
            streaming_command.own_corpus([model("a"), *others])
    with pytest.raises(InputError, match="codec is not what b was trained with"):
        streaming_command.own_corpus([model("a"), model("b", codec="d")])
