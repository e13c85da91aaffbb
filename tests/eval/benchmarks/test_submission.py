"""Submission files in the format of ZeroSpeech 2021."""

import math

import pytest

from eval.benchmarks import submission
from eval.benchmarks.layouts import storycloze, zerospeech
from tests.helpers import benchmark_files as files
from ttt_jax.errors import InputError


def test_scores_come_back_exactly(tmp_path):
    data = files.lexical(tmp_path / "data", (1, 2), voices=("A",), split="test")
    scores = {"w0A": -1 / 3, "nw0A": -1e-17, "w1A": -123456.78901234567, "nw1A": -2, "another": 0.0}
    path = submission.write(tmp_path / "sub", zerospeech.lexical(data), scores)
    assert path == tmp_path / "sub/lexical/test.txt"
    lines = [line.split(" ") for line in path.read_text().splitlines()]
    assert [name for name, _ in lines] == ["nw0A", "nw1A", "w0A", "w1A"]
    assert {name: float(score) for name, score in lines} == {name: scores[name] for name in scores if name != "another"}


def test_files_without_a_score_have_no_line(tmp_path):
    task = zerospeech.syntactic(files.syntactic(files.mark_mini(tmp_path), (("agr", "x"),)))
    path = submission.write(tmp_path, task, {"s-agr-x-0-A": 1.5, "us-agr-x-0-A": math.nan})
    assert path == tmp_path / "syntactic/dev.txt"
    assert path.read_text() == "s-agr-x-0-A 1.5\n"


def test_other_benchmarks_have_no_submission(tmp_path):
    (task, _) = storycloze.read(files.storycloze(tmp_path))
    with pytest.raises(InputError, match="no submission files of sstorycloze"):
        submission.write(tmp_path, task, {})
