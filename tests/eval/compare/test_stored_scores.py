"""`python -m eval compare --scores`: any evaluation is asked later, from its stored frames."""

import dataclasses

import numpy as np
import pytest

from eval.__main__ import main
from eval.compare import command, plots, results
from eval.compare.bounds import Tokens, stored_tokens, task_bounds
from eval.inputs import dataset
from eval.streaming import score_files
from eval.tasks.dataset import Settings, bounds_for, make
from tests.helpers import made_scores
from tests.helpers.made_experiment import made
from ttt_jax.data.codes import read_codes
from ttt_jax.errors import InputError


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """The folder of an evaluation with made-up scores: two checkpoints, all arms of the first, persist and off of the
    other."""
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])
    folder = tmp_path / "eval-talks"
    other = dataclasses.replace(made_scores.CHECKPOINT, name="other", about={"step": 8})
    made_scores.write(folder)
    made_scores.write(folder, other, shift=0.5, arms=("persist", "off"))
    made_scores.write_results(folder, [made_scores.CHECKPOINT, other])
    return folder


def test_any_evaluation_can_be_compared_later(evaluation, capsys):
    def compare(*words, out="compare-talks"):
        code = main(["compare", *words, "--scores", str(evaluation)])
        experiment, _ = results.read(evaluation.parent / out)
        return code, experiment, [condition.name for condition in experiment.conditions]

    code, experiment, names = compare("tiny@persist", "worse=other@persist")
    assert (code, names) == (0, ["tiny@persist", "worse"])
    setting = experiment.setting
    assert (setting.chunk, setting.window, setting.about["scores"]) == (40, 60, str(evaluation))
    assert "is better than worse" in capsys.readouterr().out
    # Losses are those of the stored frames.
    nats = made_scores.make(200, 0, layers=made_scores.LAYERS).arms["persist"].nats[1:]
    spans = zip(experiment.pieces, [*experiment.pieces[1:], None], strict=True)
    expected = [np.nanmean(nats[:, start:end]) for start, end in spans]
    np.testing.assert_allclose(experiment.losses["tiny@persist"][0, 0], expected, atol=1e-6)
    code, _, names = compare("--out", str(evaluation.parent / "all"), out="all")
    assert (code, names) == (0, ["tiny@persist", "other@persist"])
    # The made-up arms differ before the first reset, too.
    code, _, names = compare("tiny", "--out", str(evaluation.parent / "arms"), out="arms")
    assert (code, names) == (command.BROKEN, ["persist", "reset", "frozen", "off"])


def test_scores_in_the_working_folder_are_compared_beside_it(evaluation, monkeypatch):
    monkeypatch.chdir(evaluation)
    assert main(["compare", "tiny@persist", "other@persist", "--scores", "."]) == 0
    assert (evaluation.parent / "compare-talks" / "results.json").is_file()


def test_stored_scores_leave_the_frames_of_the_same_comparison(evaluation):
    words = ["compare", "tiny@persist", "other@persist", "--scores", str(evaluation)]
    main(words)
    folder = evaluation.parent / "compare-talks"
    made_scores.write(folder)
    before = sorted(path for path in folder.rglob("*.npz"))
    assert len(before) > 1
    main(words)
    assert sorted(path for path in folder.rglob("*.npz")) == before


@pytest.mark.integration
def test_real_scores_of_a_run_are_compared_later(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])
    assert main(["compare", "run", "--scores", str(tiny_run.eval), "--out", str(tmp_path)]) == 0
    assert "as it must be" in capsys.readouterr().out
    losses = results.read(tmp_path)[0].losses
    assert list(losses) == ["persist", "reset", "frozen", "off"]
    assert not np.array_equal(losses["persist"], losses["reset"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["gone"], "no scores of the checkpoint gone: give some of tiny, other"),
        (["tiny", "other@reset"], "no scores of other under reset, only under persist, off"),
        (["tiny", "other", "--reset-every", "9"], "--reset-every has no effect"),
        (["tiny@persist"], "is a single condition"),
        (["--out", "EVALUATION"], "is the folder of the results, too: give another folder by --out"),
    ],
)
def test_scores_that_are_not_stored_cannot_be_compared(evaluation, words, text):
    words = [str(evaluation) if word == "EVALUATION" else word for word in words]
    with pytest.raises(InputError, match=text):
        main(["compare", *words, "--scores", str(evaluation)])
    assert not (evaluation.parent / "compare-talks").exists()


def test_bounds_come_with_the_scores_of_a_controlled_task(tmp_path):
    folder = tmp_path / "task"
    make(Settings("recall", files=2, frames=128, every=3, seed=1), folder)
    codes = [read_codes(path).codes for path in sorted(folder.rglob("*.safetensors"))]
    files = [dataset.EvalFile(f"{i:05d}", "", array[:, :100], (), {}) for i, array in enumerate(codes)]
    infos = score_files.file_infos(files)
    info = dataclasses.replace(made_scores.CHECKPOINT, max_delay=40)
    experiment = made({"off": 0.1}, reach=90, about={"data": str(folder)})
    experiment = dataclasses.replace(experiment, checkpoints=[info])
    bounds = task_bounds(experiment, stored_tokens(str(folder), infos))
    expected = bounds_for(folder, [Tokens(file.name, file.frames) for file in files], 50)
    np.testing.assert_equal(bounds, expected)
    assert task_bounds(made({"off": 0.1}), []) is None
    with pytest.raises(InputError, match="has other tokens than those that were scored"):
        stored_tokens(str(folder), [dataclasses.replace(infos[0], digest="0")])
