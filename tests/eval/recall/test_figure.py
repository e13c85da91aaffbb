"""The figure and the table of recall: every arm at every gap, attention marked, the half where it is."""

import numpy as np
import pytest

from eval.recall import figure, table
from eval.recall.analysis import curves
from eval.recall.items import build
from eval.recall.play import CUE, play
from eval.recall.results import HEARD, WHO, CheckpointRecall, Dropped, RecallResults, Setting
from eval.results.figures import COLOURS, pyplot
from eval.results.schema import CheckpointInfo
from eval.stats.estimates import interval
from tests.helpers import recall_players as players

GAPS = (25, 75, 150, 250)
LONG = CheckpointInfo("long", contexts=(60, 60), ttt_layers=(0,))
SINK = CheckpointInfo("sink$", contexts=(60, 60), ttt_layers=(0,), attention_sink=1)


def results(infos, count=8, files=4):
    setting = Setting([HEARD, WHO], 25, count, list(GAPS), CUE, 0, "equal", {"persist": "kept", "reset": "cleared"})
    spoken = [players.voice(700, seed, seed) for seed in range(files)]
    items, dropped = build(spoken, (HEARD, WHO), 25, GAPS, count, 0)
    played = list(play(items, players.forgetting(100), CUE, 4))
    recalls = [
        CheckpointRecall(info, ["persist", "reset"], "persist", curves(played, info, "persist", setting, "speakers"))
        for info in infos
    ]
    return RecallResults(setting, recalls, dropped, [], [])


@pytest.fixture
def drawn():
    made = results([LONG, SINK])
    yield made, figure.draw(made)
    pyplot().close("all")


def test_curves_are_those_of_the_results(drawn):
    made, shown = drawn
    axes = shown.axes
    assert [axis.get_title("left") for axis in axes] == [f"{n}, {k}" for n in ("long", "sink$") for k in (HEARD, WHO)]
    for axis, (checkpoint, kind) in zip(axes, [(c, k) for c in made.checkpoints for k in (HEARD, WHO)], strict=True):
        lines = {line.get_label(): line for line in axis.get_lines()}
        for arm in ("persist", "reset"):
            points = checkpoint.curves[kind].gaps
            np.testing.assert_allclose(lines[arm].get_ydata(), [point.arms[arm].benefit.mean for point in points])
            np.testing.assert_allclose(lines[arm].get_xdata(), [point.seconds for point in points], rtol=0.03)
            assert lines[arm].get_color() == COLOURS[arm]


def test_attention_and_the_half_are_marked(drawn):
    made, shown = drawn
    half = made.checkpoints[0].curves[HEARD].half.seconds
    marks = {line.get_label(): line.get_xdata()[0] for line in shown.axes[0].get_lines()}
    assert marks["one layer's attention window"] == pytest.approx(60 / 12.5)
    assert marks["attention's reach"] == pytest.approx(119 / 12.5)
    assert marks["half of the benefit is left"] == half
    assert shown.axes[0].get_title("right") == "window 4.8 s, reach 9.5 s"
    assert shown.axes[2].get_title("right") == "window 4.8 s, reach everything (attention sink)"
    labels = {text.get_text() for text in shown.legends[0].get_texts()}
    assert labels >= {"persist", "reset", "attention's reach", "half of the benefit is left"}


def test_one_item_and_one_kind_can_be_drawn(tmp_path):
    written = figure.write_figures(results([LONG], count=1, files=1), tmp_path)
    assert [path.name for path in written] == list(figure.FILES)
    assert all(path.stat().st_size > 1000 for path in written)


def test_the_table_has_a_row_for_each_gap_and_arm():
    made = results([LONG])
    text = table.table(made)
    rows = [line for line in text.splitlines() if line.startswith(("2 s", "6 s", "12 s", "20 s"))]
    assert len(rows) == 2 * len(GAPS)
    assert "within one layer's window" in rows[0]
    assert "within attention's reach" in rows[1]
    assert "beyond attention's reach" in rows[2]
    assert sum(line.split()[0] == "reset" for line in text.splitlines() if line.strip()) == 2 * len(GAPS) + 1
    assert max(map(len, text.splitlines())) <= table.WIDTH
    for kind in (HEARD, WHO):
        curve = made.checkpoints[0].curves[kind]
        assert curve.verdict in " ".join(text.split())
        for point in curve.gaps:
            for own in point.arms.values():
                assert interval(own.benefit, table.DIGITS, signed=True) in text


def test_dropped_gaps_of_one_reason_share_a_sentence():
    dropped = [Dropped(HEARD, 125, "too short"), Dropped(WHO, 125, "one speaker"), Dropped(WHO, 250, "one speaker")]
    assert table.dropped(dropped) == ["heard-before at 10 s: too short", "who-is-it at 10, 20 s: one speaker"]
