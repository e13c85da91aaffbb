"""The table and the figure show what the results hold."""

import dataclasses

import numpy as np
import pytest

from eval.benchmarks import figure, summary, table
from eval.benchmarks.rules import DEFAULT
from eval.benchmarks.scored import View
from eval.stats.estimates import Estimate
from tests.helpers.scored_pairs import OFF, PERSIST, flat, from_outcomes, random_outcomes, results


@pytest.fixture(scope="module")
def found():
    return results()


def test_a_row_for_every_task_and_view(found):
    text = table.table(found)
    lines = text.splitlines()
    assert max(map(len, lines)) <= table.WIDTH
    assert "nan" not in text
    for task in found.tasks:
        for own in task.views:
            (row,) = [line for line in lines if line.startswith(f"{task.title} ") and f" {own.arm} " in line][:1]
            value = own.accuracies[DEFAULT]
            assert row.split()[-4:] == [str(number) for number in (value.n, own.scored, own.ties, own.failed)]
            assert table.percent(value) in row
            if own.in_vocab:
                (row,) = [
                    line for line in lines if line.startswith("swuggy (dev), in_vocab") and f" {own.arm} " in line
                ]
                assert table.percent(own.in_vocab[DEFAULT]) in row
                assert row.split()[-1] == str(own.in_vocab[DEFAULT].n)
    (mean,) = [line for line in lines if line.startswith("salmon, mean of 2") and " persist " in line]
    assert table.percent(found.means[0].accuracies[DEFAULT]) in mean
    assert "at most 100 items a task (seed 0), codec mimi" in lines[0]
    assert lines[1] == "checkpoint base", "one checkpoint is named nowhere else"
    assert found.setting.rules[DEFAULT] in " ".join(text.split())
    assert "chance is 50 %" in text
    assert lines[-1] == ("sblimp (dev): 1 not used (results.json names all), such as 12: its wrong side is missing")


def test_intervals_that_contain_chance_are_marked():
    assert table.percent(Estimate(0.55, 0.5, 0.6, 10)) == "55.0 [50.0, 60.0] *"
    assert table.percent(Estimate(0.55, 0.501, 0.6, 10)) == "55.0 [50.1, 60.0]"
    assert table.percent(Estimate(0.45, 0.41, 0.499, 10)) == "45.0 [41.0, 49.9]"
    assert table.percent(Estimate(np.nan, np.nan, np.nan, 0)) == "-"


def test_comparisons_have_a_verdict_and_say_what_is_left_out(found):
    lines = table.table(found).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("compared with persist"))
    assert "Holm: p adjusted for 4 comparisons" in lines[start + 1]
    out = sum(own.left_out for own in found.comparisons)
    assert lines[start + 2] == (
        f"pairs left out because one of the two was not scored: {out}, counted in every comparison anew"
    )
    rows = lines[start + 4 : start + 8]
    for row, own in zip(rows, found.comparisons, strict=True):
        assert row.startswith(own.task)
        assert row.endswith(summary.verdict(own))
    assert rows[-1].split()[2:] == ["-", "0", "0", "-", "-", "undecided"]
    alike = dataclasses.replace(found.comparisons[0], better=0, worse=0, difference=Estimate(0.0, 0.0, 0.0, 40))
    row = table.table(dataclasses.replace(found, comparisons=[alike])).splitlines()
    assert any(line.split()[3:5] == ["+0.0", "0"] for line in row if "undecided" in line), "no interval of no width"
    clear = dataclasses.replace(found.comparisons[0], p=1e-5, adjusted=4e-5, better=30, worse=2)
    clear = dataclasses.replace(clear, difference=Estimate(0.25, 0.2, 0.3, 40))
    row = table.table(dataclasses.replace(found, comparisons=[clear])).splitlines()
    assert any("+25.0 [+20.0, +30.0]" in line and line.endswith("< 0.001  < 0.001     better") for line in row)


def test_views_are_named_by_what_tells_them_apart(found):
    task = flat("t", 5)

    def named(*views):
        scores = {view: from_outcomes(np.ones(5)) for view in views}
        one = dataclasses.replace(found, tasks=[summary.summarise(task, scores, DEFAULT)])
        return list(table.view_names(one).values())

    assert named(PERSIST) == ["base, persist"]
    assert named(PERSIST, OFF) == ["persist", "off"]
    assert named(PERSIST, PERSIST._replace(text="padding")) == ["text absent", "text padding"]
    assert named(PERSIST, View("b", "off", "absent", "user")) == ["base, persist, voice moshi", "b, off, voice user"]


def test_long_names_leave_the_table_as_wide_as_it_may_be(found):
    names = [f"a-run-with-a-very-long-name-{'x' * 60}-{i}" for i in range(2)]
    task = flat(f"mini-salmon/{'part' * 20}", 1_000)
    scores = {View(name, "persist", "absent", "moshi"): from_outcomes(random_outcomes(task, 0)) for name in names}
    tasks = [summary.summarise(task, scores, DEFAULT)]
    comparisons = summary.compare([(task, scores)], DEFAULT)
    text = table.table(dataclasses.replace(found, tasks=tasks, comparisons=comparisons, means=[]))
    assert max(map(len, text.splitlines())) <= table.WIDTH
    rows = [line for line in text.splitlines() if line.startswith("mini-salmon")]
    # Names are still told apart; the second has an accuracy and a comparison.
    assert [("xx-0 " in row, "xx-1 " in row) for row in rows] == [(True, False), (False, True), (False, True)]
    assert table.cut("abcdefghij", 7) == "ab...ij"
    assert table.cut("abcdefg", 7) == "abcdefg"


def test_nothing_to_compare_is_no_block(found):
    task = flat("t", 5)
    one = summary.summarise(task, {PERSIST: from_outcomes(np.ones(5))}, DEFAULT)
    alone = dataclasses.replace(found, tasks=[one], comparisons=[], means=[])
    assert "compared" not in table.table(alone)
    assert table.table(alone).splitlines()[-1].split()[-4:] == ["5", "5", "0", "0"]


def test_a_task_of_which_everything_failed(found, tmp_path):
    task = flat("t", 5)
    scores = {view: from_outcomes(np.full(5, np.nan)) for view in (PERSIST, OFF)}
    failed = dataclasses.replace(
        found,
        tasks=[summary.summarise(task, scores, DEFAULT)],
        comparisons=summary.compare([(task, scores)], DEFAULT),
        means=[],
    )
    (row, *_) = [line for line in table.table(failed).splitlines() if line.startswith("t ")]
    assert row.split() == ["t", "persist", "-", "0", "0", "0", "5"]
    assert len(figure.draw(failed, tmp_path)) == 2


def test_the_figure_has_a_dot_for_every_number(found, tmp_path):
    drawn = figure.figure(found)
    (axis,) = drawn.axes
    rows = [
        "swuggy (dev)",
        "swuggy (dev), in_vocab",
        "sblimp (dev)",
        "salmon/gender",
        "salmon/rir",
        "salmon, mean of 2",
    ]
    assert [label.get_text() for label in axis.get_yticklabels()] == rows
    persist, off = axis.containers
    first = found.tasks[0].views[0].accuracies[DEFAULT]
    assert [container.get_label() for container in axis.containers] == ["persist", "off"]
    assert persist.lines[0].get_xdata()[0] == 100 * first.mean
    assert len(persist.lines[0].get_xdata()) == 6
    assert len(off.lines[0].get_xdata()) == 4  # one part was not scored, so there is no mean either
    bars = persist.lines[2][0].get_segments()
    np.testing.assert_allclose(np.array(bars[0])[:, 0], [100 * first.low, 100 * first.high])
    assert [path.name for path in figure.draw(found, tmp_path)] == list(figure.FILES)
    assert all((tmp_path / name).stat().st_size > 1000 for name in figure.FILES)
