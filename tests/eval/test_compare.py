"""`python -m eval compare`: what is stored and compared again, stored scores, real models, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.__main__ import main
from eval.compare import command, plots, report, results
from eval.compare import losses as stored_losses
from eval.compare.analysis import analyse
from eval.compare.experiment import LATER, Bounds
from eval.results.schema import Skipped
from eval.stats import paired
from eval.stats.verdict import EQUIVALENT, UNDECIDED
from eval.streaming import score_files
from tests.eval.test_evaluate import write_data
from tests.helpers import made_scores, micro
from tests.helpers.eval_models import tokens, write_run
from tests.helpers.made_experiment import made
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Bootstrap and sign-flip tests have tests of their own in tests/eval/test_paired.py."""
    monkeypatch.setattr(paired, "EXACT", 0)
    monkeypatch.setattr(paired, "RESAMPLES", 199)


@pytest.fixture
def undrawn(monkeypatch):
    """Draws no figures."""
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])


def write(folder, experiment, about=None):
    """Writes an experiment's results to `folder`, without report and figures."""
    folder.mkdir(exist_ok=True)
    stored_losses.write(folder, experiment)
    results.write(folder, experiment, analyse(experiment), about or {})


def content(folder):
    return json.loads((folder / "results.json").read_text())


def broken(experiment, amount):
    losses = experiment.losses["reset"].copy()
    losses[0, 3, 0] += amount
    return dataclasses.replace(experiment, losses=experiment.losses | {"reset": losses})


# Stored results


def test_a_broken_run_is_stored_with_its_reason(tmp_path, capsys, undrawn):
    write(tmp_path, broken(made({"reset": 0.05}), 0.01))
    assert command.again(tmp_path, {}) == command.BROKEN == 1
    assert "file3" in content(tmp_path)["broken"]
    for text in (capsys.readouterr().out, (tmp_path / "report.md").read_text()):
        assert "BROKEN" in text
        assert "is clearly better" not in text


def test_again_gives_the_same_numbers_without_jax(tmp_path, monkeypatch):
    experiment = made({"reset": 0.02, "off": 0.3}, noise=0.07, seeds=2)
    bounds = Bounds(experiment.losses["persist"][0] - 1, experiment.losses["off"][0], experiment.weight)
    write(tmp_path, dataclasses.replace(experiment, bounds=bounds), {"cost": {"seconds": 3.0, "peak_gigabytes": 1.0}})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])
    monkeypatch.setitem(sys.modules, "jax", None)  # an import of it fails
    assert main(["compare", "--again", str(tmp_path)]) == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after == before | {"report.md": after["report.md"]}


@pytest.mark.integration
def test_again_writes_figures_and_needs_no_jax(tmp_path):
    write(tmp_path, made({"reset": 0.02}))
    code = "import sys; from eval.__main__ import main; main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "compare", "--again", str(tmp_path)], cwd=Path.cwd())
    assert done.returncode == 0
    figures = {f"{name}.{kind}" for name in ("loss_by_chunk", "differences") for kind in ("png", "pdf")}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "losses.npz", "report.md"} | figures
    assert (tmp_path / "loss_by_chunk.png").read_bytes().startswith(b"\x89PNG")


def test_again_takes_another_margin_and_threshold(tmp_path, capsys, undrawn):
    write(tmp_path, made({"reset": 0.02, "off": 0.3}, noise=0.07, seeds=2))
    kind = content(tmp_path)["verdicts"]["reset"][LATER]["kind"]
    assert main(["compare", "--again", str(tmp_path), "--margin", "0.5", "--threshold", "0.001"]) == 0
    stored = content(tmp_path)
    assert stored["setting"]["margin"] == 0.5
    assert "less than the margin of 0.5 nats" in capsys.readouterr().out
    assert "effect asked for 0.001 %" in (tmp_path / "report.md").read_text()
    assert (kind, stored["verdicts"]["reset"][LATER]["kind"]) == (UNDECIDED, EQUIVALENT)


def test_what_is_stored_and_reported(tmp_path, undrawn):
    experiment = dataclasses.replace(made({"reset": 0.05}), skipped=[Skipped("x", "x is empty.")])
    write(tmp_path, experiment)
    assert command.again(tmp_path, {}) == PARTIAL
    stored = content(tmp_path)
    back, _ = results.read(tmp_path)
    for name, values in experiment.losses.items():
        np.testing.assert_array_equal(back.losses[name], values)
    np.testing.assert_array_equal(back.weight, experiment.weight)
    assert (back.setting, back.conditions, back.files, back.checkpoints, back.skipped) == (
        experiment.setting,
        experiment.conditions,
        experiment.files,
        experiment.checkpoints,
        experiment.skipped,
    )
    assert stored["pieces"] == experiment.pieces.tolist()
    assert stored["analysis"]["comparisons"][0]["regions"][LATER]["paired"]["n"] == 12
    text = (tmp_path / "report.md").read_text()
    for words in ("# Does memory help?", "## Verdict", "clearly better than reset", "x is empty.", "## Power", "430"):
        assert words in text
    assert all(len(line) <= 150 for line in report.table(experiment, analyse(experiment)).splitlines()[:-3])


def test_foreign_results_are_refused(tmp_path, undrawn):
    with pytest.raises(InputError, match="is not a file"):
        main(["compare", "--again", str(tmp_path)])
    (tmp_path / "results.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="format 2 of python -m eval compare"):
        main(["compare", "--again", str(tmp_path)])
    with pytest.raises(InputError, match="takes no conditions"):
        main(["compare", "a", "--again", str(tmp_path)])
    with pytest.raises(InputError, match="there is no condition"):
        main(["compare"])
    write(tmp_path, made({"reset": 0.05}, files=4))
    for flag, value in (("--margin", "0"), ("--margin", "nan"), ("--threshold", "-1")):
        with pytest.raises(InputError, match=f"{flag} .* is out of range"):
            main(["compare", "--again", str(tmp_path), flag, value])
    stored_losses.write(tmp_path, made({"reset": 0.06}, files=4))
    with pytest.raises(InputError, match="losses.npz is not as it was written"):
        main(["compare", "--again", str(tmp_path)])
    (tmp_path / "losses.npz").unlink()
    with pytest.raises(InputError, match="losses.npz cannot be read"):
        main(["compare", "--again", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--data", "x"], "data"),
        (["--reset-every", "9"], "reset-every"),
        (["--weighting", "kyutai"], "weighting"),
        (["--out", "x"], "out"),
        (["--scores", "x"], "scores"),
    ],
)
def test_again_refuses_what_only_streaming_could_obey(tmp_path, words, flag):
    write(tmp_path, made({"reset": 0.05}, files=4))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(InputError, match=f"--{flag} has no effect"):
        main(["compare", "--again", str(tmp_path), *words])
    assert (tmp_path / "results.json").read_bytes() == before


def test_what_again_starts_from_outlives_a_full_disk(tmp_path, monkeypatch):
    write(tmp_path, made({"reset": 0.05}, files=4))
    before = (tmp_path / "results.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eval.results.schema.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        main(["compare", "--again", str(tmp_path)])
    assert (tmp_path / "results.json").read_bytes() == before


# Stored scores


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
    ],
)
def test_what_is_not_stored_cannot_be_compared(evaluation, words, text):
    with pytest.raises(InputError, match=text):
        main(["compare", *words, "--scores", str(evaluation)])
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
    setting, info = Setting(64, "equal", 8, 20), made_scores.CHECKPOINT
    found = task_bounds(str(folder), tokens, setting, [info])
    expected = bounds_for(folder, [Tokens(file.name, file.frames) for file in files], 20 - info.max_delay)
    for side, other in zip(found, expected, strict=True):
        for a, b in zip(side, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert task_bounds(None, [], setting, [info]) is None
    with pytest.raises(InputError, match="has other tokens than those that were scored"):
        stored_tokens(str(folder), [dataclasses.replace(infos[0], digest="0")])


# With models


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds and speech."""
    folder = tmp_path_factory.mktemp("compare")
    runs = [write_run(folder / name, seed=i) for i, name in enumerate("ab")]
    return *runs, write_data(folder / "speech", [tokens(57, 0), tokens(40, 1)])


def words(runs, out, *more, arms=("persist", "reset")):
    a, b, data = runs
    conditions = [f"{a},{b}@{arm}" for arm in arms]
    return ["compare", *conditions, "--data", str(data), "--reset-every", "16", "--out", str(out), *more]


@pytest.fixture(scope="module")
def scored():
    """Made-up scores of both files for each checkpoint; nothing differs before the first reset."""
    files = [tokens(57, 0), tokens(40, 1)]
    by_checkpoint = [made_scores.stream(None, files, micro.MODEL, ("persist", "reset"), seed=seed) for seed in range(2)]
    for one in (one for scores in by_checkpoint for one in scores):
        one.arms["reset"].nats[:, :16] = one.arms["persist"].nats[:, :16]
    return by_checkpoint


@pytest.fixture
def streamed(monkeypatch, scored):
    """What the command's calls of `stream` get, and a place for a fault in their results."""
    calls = {"given": [], "fault": lambda scores: scores}

    def stream(params, files, cfg, arms, *, period, **_):
        copies = [
            one._replace(
                tokens=one.tokens.copy(),
                arms={name: arm._replace(nats=arm.nats.copy()) for name, arm in one.arms.items()},
            )
            for one in scored[len(calls["given"])]
        ]
        assert [file.shape[1] for file in files] == [57, 40]
        calls["given"].append((tuple(arms), period))
        return [calls["fault"](one) for one in copies]

    monkeypatch.setattr(score_files, "stream", stream)
    return calls


@pytest.mark.integration
def test_real_models_from_end_to_end(runs, tmp_path, capsys, undrawn):
    assert main(words(runs, tmp_path / "out")) == 0
    assert "as it must be" in capsys.readouterr().out
    experiment, _ = results.read(tmp_path / "out")
    assert not np.array_equal(experiment.losses["persist"][0], experiment.losses["persist"][1])
    assert not np.array_equal(experiment.losses["persist"], experiment.losses["reset"])


def test_checkpoints_and_files_from_end_to_end(runs, scored, streamed, tmp_path, capsys, undrawn):
    out = tmp_path / "out"
    assert main(words(runs, out)) == 0
    shown = capsys.readouterr().out
    assert "persist against reset" in shown or "persist and reset" in shown or "than reset" in shown
    assert "as it must be" in shown
    stored = content(out)
    assert [one["name"] for one in stored["checkpoints"]] == ["a", "b"]
    assert stored["checkpoints"][0]["about"].keys() == {"path", "step", "weights"}
    assert stored["setting"]["window"] == 8
    assert stored["setting"]["reach"] == 2 * 7 + 1 + 1
    assert stored["broken"] is None
    assert stored["counts"] == {"files": 2, "units": 2, "unit": "files"}
    assert [file["frames"] for file in stored["files"]] == [57, 40]
    assert len(stored["files"][0]["digest"]) == 64
    assert stored["evaluated_with"]["versions"]["jax"]
    # Each checkpoint once, both arms at a time; the stored losses are those of the frames.
    assert streamed["given"] == [(("persist", "reset"), 16)] * 2
    assert stored["pieces"] == [0, 16, 32, 48]
    experiment, about = results.read(out)
    for seed, files in enumerate(scored):
        for arm in ("persist", "reset"):
            for i, one in enumerate(files):
                nats = one.arms[arm].nats[1:].astype(float)
                expected = [np.nanmean(nats[:, k : k + 16]) for k in range(0, nats.shape[1], 16)]
                losses = experiment.losses[arm][seed, i]
                np.testing.assert_allclose(losses[np.isfinite(losses)], expected, atol=1e-8)
    assert about.keys() == {"evaluated_with", "cost"}
    main(["compare", "--again", str(out)])
    assert content(out) == stored
    # What it has stored can be asked another question.
    second = tmp_path / "kyutai"
    assert (
        main(["compare", "a@persist", "b@reset", "--scores", str(out), "--weighting", "kyutai", "--out", str(second)])
        == 0
    )
    assert content(second)["setting"]["weighting"] == "kyutai"


def test_a_leak_before_the_first_reset_breaks_a_real_run(runs, streamed, tmp_path, capsys, undrawn):
    def leak(scores):
        scores.arms["reset"].nats[1, 7] += 0.5
        return scores

    streamed["fault"] = leak
    assert main(words(runs, tmp_path / "out")) == command.BROKEN
    assert "BROKEN: persist and reset differ by" in capsys.readouterr().out
    assert "BROKEN" in content(tmp_path / "out")["broken"]


def test_a_file_that_diverges_is_left_out_everywhere(runs, streamed, tmp_path, capsys, undrawn):
    def diverge(scores):
        if len(streamed["given"]) == 1 and scores.tokens.shape[1] == 57:  # the longer file, under the first checkpoint
            scores.arms["reset"].nats[:, 20:] = np.nan
        return scores

    streamed["fault"] = diverge
    out = tmp_path / "out"
    assert main(words(runs, out)) == PARTIAL
    stored = content(out)
    assert [file["name"] for file in stored["files"]] == ["1"]
    assert "under reset gives no finite predictions of 0 from frame 20" in stored["skipped"][0]["reason"]
    assert stored["pieces"] == [0, 16, 32]
    assert stored["verdicts"]["reset"][LATER]["kind"] == UNDECIDED
    assert "one file cannot be tested" in capsys.readouterr().out
    assert sorted(path.name for path in out.rglob("frames/*/*")) == ["0001-1.npz"] * 2


def test_checkpoints_that_predict_other_tokens_are_no_pair(runs, streamed, tmp_path):
    def other_delays(scores):
        if len(streamed["given"]) == 2:  # the second checkpoint
            scores.tokens[1, 0] = -1
        return scores

    streamed["fault"] = other_delays
    with pytest.raises(InputError, match="b predicts other tokens of . than a"):
        main(words(runs, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_a_controlled_task_brings_its_bounds(runs, streamed, tmp_path, monkeypatch, undrawn):
    from eval.benchmarks import tasks

    given = []

    def bounds_for(folder, files, frames):
        given.append((folder, [file.name for file in files], frames))
        rows = [np.full(file.frames.shape[1], 1.0) for file in files]
        for row in rows:
            row[::2] = np.nan
        return rows, [row + 2 for row in rows]

    monkeypatch.setattr(tasks, "bounds_for", bounds_for)
    data = runs[2]
    (data / "task.json").write_text("{}")
    try:
        assert main(words(runs, tmp_path / "out")) == 0
    finally:
        (data / "task.json").unlink()
    assert given == [(data, ["0", "1"], 15)]  # the first codebook, which tasks ask for, has no delay
    experiment, _ = results.read(tmp_path / "out")
    np.testing.assert_array_equal(experiment.bounds.ideal[0], [1, 1, 1, 1])
    np.testing.assert_array_equal(experiment.bounds.memoryless[1], [3, 3, 3, np.nan])
    np.testing.assert_array_equal(experiment.bounds.weight, [[8, 8, 8, 4], [8, 8, 4, 0]])
    losses = content(tmp_path / "out")["analysis"]["losses"]["persist"]
    assert losses["closed"][LATER]["mean"] == pytest.approx((3 - losses["regions"][LATER]["mean"]) / 2, abs=1e-6)


def test_what_cannot_be_is_one_sentence(runs, tmp_path):
    def refused(text, *args):
        with pytest.raises(InputError, match=text):
            main([*args])

    out = tmp_path / "out"
    for flag in ("--reset-every", "--frames", "--batch"):
        refused(f"{flag} 0 is out of range", *words(runs, out), flag, "0")
    refused("no file is longer than a chunk of 57 frames", *words(runs, out), "--reset-every", "57")
    refused("--margin -1.0 is out of range", *words(runs, out), "--margin", "-1")
    refused("no checkpoint", "compare", str(tmp_path))
    out.mkdir()
    (out / "results.json").write_text('{"format": 2}')
    refused("is not this command's", *words(runs, out))
