"""Report and figures of `python -m eval compare` show the numbers."""

import dataclasses
import re

import matplotlib
import numpy as np
import pytest

from eval.compare import plots, report
from eval.compare.analysis import analyse
from eval.compare.experiment import BOUND_NAMES, LATER, Bounds
from eval.stats.verdict import p_words
from tests.helpers.made_experiment import changed, made


def test_columns_of_the_report():
    def cells(experiment):
        text = report.markdown(experiment, analyse(experiment), {}).partition("## After the first chunk")[2]
        heads, row = (
            next(line for line in text.splitlines() if line.startswith(start)) for start in ("| ", "| reset |")
        )
        return [tuple(cell.strip() for cell in cells) for cells in zip(heads.split("|"), row.split("|"), strict=True)]

    experiment = made({"reset": 0.01, "frozen": 0.01, "off": 0.0}, noise=0.03)
    compared = analyse(experiment).comparisons[0].regions[LATER]
    paired, row = compared.paired, cells(experiment)
    p = [paired.p, compared.holm, paired.equivalence.p, compared.holm_equivalence]
    p = [p_words(value).removeprefix("p ").removeprefix("= ") for value in p]
    assert len(set(p)) == 4
    at = row.index(("p: t", p[0]))
    assert row[at : at + 4] == [("p: t", p[0]), ("Holm", p[1]), ("TOST 0.02", p[2]), ("Holm", p[3])]
    assert ("nats [95 %]", f"{paired.mean:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}]") in row
    assert ("% of loss", f"{100 * paired.relative:+.2f}") in row
    assert ("n: d_z", f"{paired.units_for_effect:,.0f}") in row
    assert ("n: TOST", f"{paired.units_for_equivalence:,.0f}") in row
    tiny = changed(experiment, **{name: losses * 1e-3 for name, losses in experiment.losses.items()})
    assert ("% of loss", "-") in cells(tiny)


def test_numbers_that_round_to_nothing_have_no_minus():
    experiment = made({"reset": -1e-7, "off": -1e-7}, noise=1e-8, seeds=2)
    analysis = analyse(experiment)
    for text in (report.table(experiment, analysis), report.markdown(experiment, analysis, {})):
        assert "+0.0000" in text
        assert not re.search(r"-0\.?0*(?![.\d])", text)


@pytest.fixture(scope="module")
def experiment():
    """Three seeds and bounds half a nat apart from the losses."""
    matplotlib.use("Agg")
    experiment = made({"reset": 0.05, "off": 0.1}, seeds=3, noise=0.02)
    bounds = Bounds(experiment.losses["persist"][0] - 0.5, experiment.losses["off"][0] + 0.5, experiment.weight)
    yield dataclasses.replace(experiment, bounds=bounds)
    matplotlib.pyplot.close("all")


def curves(axis):
    """Heights of the labelled curves by label."""
    return {line.get_label(): line.get_ydata() for line in axis.get_lines() if line.get_label()[0] != "_"}


def test_the_figure_of_losses_shows_the_numbers(experiment):
    analysis = analyse(experiment)
    upper, lower = plots.losses(experiment, analysis).axes[:2]
    expected = analysis.losses | {BOUND_NAMES[name]: bound for name, bound in analysis.bounds.items()}
    assert curves(upper).keys() == expected.keys()
    for name, heights in curves(upper).items():
        np.testing.assert_allclose(heights, [value.mean for value in expected[name].chunks])
    np.testing.assert_allclose(upper.get_lines()[0].get_xdata()[[0, -1]], [50, 830])
    np.testing.assert_allclose(curves(lower)["off"], np.nanmean(experiment.differences_by_chunk("off"), 0))
    marks = [line.get_xdata()[0] for line in lower.get_lines() if line.get_ls() in (":", "-.")]
    assert marks == [150, 430]
    assert upper.get_ylim()[1] < 6  # all curves are in sight


def test_curves_far_above_the_worth_of_memory_are_off_the_scale(experiment):
    far = changed(experiment, off=experiment.losses["off"] + 20)
    analysis = analyse(far)
    upper, lower = plots.losses(far, analysis).axes[:2]
    worth = 0.5 + 0.1 + 0.5
    top = analysis.bounds["memoryless"].regions[LATER].mean + worth
    assert upper.get_ylim()[1] == pytest.approx(top, abs=0.02)
    assert lower.get_ylim()[1] == pytest.approx(0.6 + worth, abs=0.03)
    assert "off the scale: loss of off 2" in lower.get_title("left")
    for axis in (upper, lower):
        low, high = axis.get_ylim()
        assert 0 < min(map(np.nanmin, curves(axis).values())) - low < 0.1 * (high - low)


def test_the_figure_of_differences_shows_files_and_seeds(experiment):
    (axis,) = plots.paired_differences(experiment, analyse(experiment)).axes
    dots = [dots.get_offsets()[:, 0] for dots in axis.collections if len(dots.get_offsets()) == 12]
    d = experiment.differences("reset", (100, None))
    assert len(dots) == 2 * (3 + 1)
    np.testing.assert_allclose(dots[3], np.sort(d.mean(0)))
    np.testing.assert_allclose(np.sort(dots[0]), np.sort(d[0]))


def test_few_files_and_few_scored_tokens_are_drawn(experiment):
    weight = experiment.weight.copy()
    weight[1:, 0] = 0  # of most files nothing is scored in the first chunk, as in data that ask late
    sparse = dataclasses.replace(experiment, weight=weight, bounds=None)
    assert plots.losses(sparse, analyse(sparse)).axes[0].get_lines()[0].get_xdata()[-1] == 830
    for files in (1, 2):
        few = made({"reset": 0.05}, files=files)
        plots.losses(few, analyse(few)).canvas.draw()
        plots.paired_differences(few, analyse(few)).canvas.draw()
