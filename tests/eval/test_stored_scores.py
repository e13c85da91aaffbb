"""`python -m eval compare --scores`: any evaluation is asked later, from its stored frames."""

import dataclasses

import numpy as np
import pytest

from eval.__main__ import main
from eval.compare import command, plots, results
from eval.stats import paired
from eval.streaming import score_files
from tests.helpers import made_scores
from ttt_jax.errors import InputError


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Bootstrap and sign-flip tests have tests of their own in tests/eval/test_paired.py."""
    monkeypatch.setattr(paired, "EXACT", 0)
    monkeypatch.setattr(paired, "RESAMPLES", 199)


@pytest.fixture
def undrawn(monkeypatch):
    """Draws no figures."""
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])


@pytest.fixture
def evaluation(tmp_path):
    """The folder of an evaluation with made-up scores: two checkpoints, all arms of the first, persist and off of the
    other."""
    folder = tmp_path / "eval-talks"
    other = dataclasses.replace(made_scores.CHECKPOINT, name="other", about={"step": 8})
    made_scores.write(folder)
    made_scores.write(folder, other, shift=0.5, arms=("persist", "off"))
    made_scores.write_results(folder, [made_scores.CHECKPOINT, other])
    return folder


def test_any_evaluation_can_be_compared_later(evaluation, undrawn, capsys):
    assert main(["compare", "tiny@persist", "worse=other@persist", "--scores", str(evaluation)]) == 0
    out = evaluation.parent / "compare-talks"
    experiment, _ = results.read(out)
    setting = experiment.setting
    assert (setting.chunk, setting.window, setting.about["scores"]) == (40, 60, str(evaluation))
    assert [condition.name for condition in experiment.conditions] == ["tiny@persist", "worse"]
    assert "is better than worse" in capsys.readouterr().out
    # Losses are those of the stored frames.
    score = made_scores.make(200, 0, layers=made_scores.LAYERS)
    nats = score.arms["persist"].nats[1:]
    expected = [
        np.nanmean(nats[:, at:end]) for at, end in zip(experiment.pieces, [*experiment.pieces[1:], None], strict=True)
    ]
    np.testing.assert_allclose(experiment.losses["tiny@persist"][0, 0], expected, atol=1e-6)
    assert main(["compare", "--scores", str(evaluation), "--out", str(evaluation.parent / "all")]) == 0
    assert [one.name for one in results.read(evaluation.parent / "all")[0].conditions] == [
        "tiny@persist",
        "other@persist",
    ]
    # The made-up arms differ before the first reset, too.
    words = ["compare", "tiny", "--scores", str(evaluation), "--out", str(evaluation.parent / "arms")]
    assert main(words) == command.BROKEN
    names = [one.name for one in results.read(evaluation.parent / "arms")[0].conditions]
    assert names == ["persist", "reset", "frozen", "off"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["gone"], "has no scores of the checkpoint gone: give some of tiny, other"),
        (["tiny", "other@reset"], "has no scores of other under reset, only under persist, off"),
        (["tiny", "other", "--reset-every", "9"], "--reset-every has no effect"),
        (["tiny@persist"], "is a single condition"),
        (["--out", "EVALUATION"], "is the folder of the results, too: give another folder by --out"),
    ],
)
def test_what_is_not_stored_cannot_be_compared(evaluation, words, text):
    with pytest.raises(InputError, match=text):
        main(
            [
                "compare",
                *(str(evaluation) if word == "EVALUATION" else word for word in words),
                "--scores",
                str(evaluation),
            ]
        )
    assert not (evaluation.parent / "compare-talks").exists()


def test_bounds_come_with_the_scores_of_a_controlled_task(tmp_path):
    from eval.benchmarks.tasks import Settings, bounds_for, make
    from eval.compare.bounds import Tokens, stored_tokens, task_bounds
    from eval.compare.experiment import Setting
    from eval.inputs import dataset
    from ttt_jax.data.codes import read_codes

    folder = tmp_path / "task"
    make(Settings("recall", files=2, frames=128, every=3, seed=1), folder)
    codes = [read_codes(path).codes for path in sorted(folder.rglob("*.safetensors"))]
    files = [dataset.EvalFile(f"{i:05d}", "", array[:, :100], (), {}) for i, array in enumerate(codes)]
    infos = score_files.file_infos(files)
    tokens = stored_tokens(str(folder), infos)
    setting, info = Setting(64, "equal", 8, 90), dataclasses.replace(made_scores.CHECKPOINT, max_delay=40)
    found = task_bounds(str(folder), tokens, setting, [info])
    expected = bounds_for(folder, [Tokens(file.name, file.frames) for file in files], 50)
    for side, other in zip(found, expected, strict=True):
        for a, b in zip(side, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert task_bounds(None, [], setting, [info]) is None
    with pytest.raises(InputError, match="has other tokens than those that were scored"):
        stored_tokens(str(folder), [dataclasses.replace(infos[0], digest="0")])
