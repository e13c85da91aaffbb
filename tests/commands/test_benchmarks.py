"""The benchmarks that ship with the project, whole: the mini set, spoken recall on the embedded speech, the report."""

import pytest

from eval.__main__ import main
from eval.benchmarks import results as benchmarks
from eval.inputs import dataset
from eval.recall import results as recall

pytestmark = pytest.mark.integration


def test_the_suite_recall_and_the_report_run_on_what_is_shipped(tiny_run, tmp_path, capsys):
    run = tiny_run.copy(tmp_path)
    assert main(["suite", str(run)]) == 0  # the mini set is whole: nothing is left out
    stored = benchmarks.read(run / "suite")
    assert {task.name.split("/")[0] for task in stored.tasks} == {
        "mini-swuggy",
        "mini-sblimp",
        "mini-sstorycloze",
        "mini-tstorycloze",
        "mini-salmon",
    }
    for task in stored.tasks:
        for view in task.views:
            assert (view.scored, view.failed) == (task.pairs, 0)
    data = ["--data", str(dataset.embedded()), "--gaps", "2,10", "--excerpt", "2", "--items", "2"]
    assert main(["recall", str(run), *data, "--out", str(run / "recall")]) == 0
    (of_run,) = recall.read(run / "recall").checkpoints
    assert set(of_run.curves) == set(recall.KINDS)
    capsys.readouterr()
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "mini-swuggy" in page
    assert "heard-before" in page
    assert "not " not in capsys.readouterr().err
