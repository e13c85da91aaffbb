"""Report and figures of `python -m eval compare` show the numbers."""

import dataclasses
import re

import numpy as np
import pytest

from eval.compare import plots, report
from eval.compare.analysis import analyse
from eval.compare.experiment import BOUND_NAMES, LATER, Bounds, differences
from eval.stats import paired
from eval.stats.verdict import p_words
from tests.helpers.made_experiment import made


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Bootstrap and sign-flip tests have tests of their own in tests/eval/test_paired.py."""
    monkeypatch.setattr(paired, "EXACT", 0)
    monkeypatch.setattr(paired, "RESAMPLES", 199)


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


def test_numbers_that_round_to_nothing_have_no_minus():
    experiment = made({"reset": -1e-7, "off": -1e-7}, noise=1e-8, seeds=2)
    analysis = analyse(experiment)
    for said in (
        report.table(experiment, analysis),
        report.markdown(experiment, analysis, {}),
    ):
        assert "+0.0000" in said
        assert not re.search(r"-0\.?0*(?![.\d])", said)


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
