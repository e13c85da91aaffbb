"""`python -m eval compare`: results that are stored and compared again, stored scores, real models, refusals."""

import copy
import dataclasses
import itertools
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
from eval.stats.verdict import EQUIVALENT, UNDECIDED
from eval.streaming import score_files
from eval.tasks import dataset as tasks
from tests.helpers import made_scores, micro
from tests.helpers.eval_models import tokens, write_data, write_run
from tests.helpers.made_experiment import made
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL


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


def verdict(folder):
    comparisons = {item["name"]: item for item in content(folder)["analysis"]["comparisons"]}
    return comparisons["reset"]["regions"][LATER]["verdict"]["kind"]


# Stored results


def test_again_gives_the_same_numbers_without_jax(tmp_path, monkeypatch, undrawn):
    experiment = made({"reset": 0.02, "off": 0.3}, noise=0.07, seeds=2)
    bounds = Bounds(experiment.losses["persist"][0] - 1, experiment.losses["off"][0], experiment.weight)
    experiment = dataclasses.replace(experiment, bounds=bounds, skipped=[Skipped("x", "x is empty.")])
    write(tmp_path, experiment, {"cost": {"seconds": 3.0, "peak_gigabytes": 1.0}})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setitem(sys.modules, "jax", None)  # an import of it fails
    assert main(["compare", "--again", str(tmp_path)]) == PARTIAL
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after == before | {"report.md": after["report.md"]}
    stored, _ = results.read(tmp_path)
    for field in dataclasses.fields(experiment):
        np.testing.assert_equal(getattr(stored, field.name), getattr(experiment, field.name))
    text = (tmp_path / "report.md").read_text()
    for words in ("# Does memory help?", "## Verdict", "better than off", "x is empty.", "430"):
        assert words in text
    plain = dataclasses.replace(experiment, bounds=None)
    assert all(len(line) <= 150 for line in report.table(plain, analyse(plain)).splitlines()[:-5])


@pytest.mark.integration
def test_again_writes_figures_and_needs_no_jax(tmp_path):
    write(tmp_path, made({"reset": 0.02}))
    code = "import sys; from eval.__main__ import main; main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "compare", "--again", str(tmp_path)], cwd=Path.cwd())
    assert done.returncode == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "losses.npz", "report.md", *plots.FILES}
    assert (tmp_path / "loss_by_chunk.png").read_bytes().startswith(b"\x89PNG")


def test_again_takes_another_margin_and_threshold(tmp_path, capsys, undrawn):
    write(tmp_path, made({"reset": 0.02, "off": 0.3}, noise=0.07, seeds=2))
    assert verdict(tmp_path) == UNDECIDED
    assert main(["compare", "--again", str(tmp_path), "--margin", "0.5", "--threshold", "0.001"]) == 0
    assert content(tmp_path)["setting"]["margin"] == 0.5
    assert "less than the margin of 0.5 nats" in capsys.readouterr().out
    assert "effect asked for 0.001 %" in (tmp_path / "report.md").read_text()
    assert verdict(tmp_path) == EQUIVALENT


def test_foreign_and_damaged_results_are_refused(tmp_path):
    again = ["compare", "--again", str(tmp_path)]

    def refused(text, words=again):
        with pytest.raises(InputError, match=text):
            main([*words])

    refused("is not a file")
    (tmp_path / "results.json").write_text('{"format": 3}')
    refused("format 3 of python -m eval compare")
    write(tmp_path, made({"reset": 0.05}, files=4))
    before = (tmp_path / "results.json").read_bytes()
    refused("takes no conditions", [*again, "a"])
    refused("there is no condition", ["compare"])
    for option in ("--margin 0", "--margin nan", "--threshold -1"):
        refused(f"{option.split()[0]} .* is out of range", [*again, *option.split()])
    for option in ("--data x", "--reset-every 9", "--weighting kyutai", "--out x", "--scores x"):
        refused(f"{option.split()[0]} has no effect", [*again, *option.split()])
    assert (tmp_path / "results.json").read_bytes() == before
    stored_losses.write(tmp_path, made({"reset": 0.06}, files=4))
    refused("losses.npz is not as it was written")
    (tmp_path / "losses.npz").unlink()
    refused("losses.npz cannot be read")


def test_stored_results_outlive_a_full_disk(tmp_path, monkeypatch):
    write(tmp_path, made({"reset": 0.05}, files=4))
    before = (tmp_path / "results.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eval.results.schema.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        main(["compare", "--again", str(tmp_path)])
    assert (tmp_path / "results.json").read_bytes() == before


# With models


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds and speech."""
    folder = tmp_path_factory.mktemp("compare")
    runs = [write_run(folder / name, seed=i) for i, name in enumerate("ab")]
    return *runs, write_data(folder / "speech", [tokens(57, 0), tokens(40, 1)])


def words(runs, out, *more):
    a, b, data = runs
    conditions = [f"{a},{b}@{arm}" for arm in ("persist", "reset")]
    return ["compare", *conditions, "--data", str(data), "--reset-every", "16", "--out", str(out), *more]


@pytest.fixture(scope="module")
def scored():
    """Made-up scores of both files for each checkpoint; nothing differs before the first reset."""
    files = [tokens(57, 0), tokens(40, 1)]
    by_checkpoint = [made_scores.stream(None, files, micro.MODEL, ("persist", "reset"), seed=seed) for seed in range(2)]
    for file in (file for scores in by_checkpoint for file in scores):
        file.arms["reset"].nats[:, :16] = file.arms["persist"].nats[:, :16]
    return by_checkpoint


@pytest.fixture
def streamed(monkeypatch, scored):
    """Replaces `stream`; records its calls, and puts a fault into its results."""
    calls = {"given": [], "fault": lambda scores: None}

    def stream(params, files, cfg, arms, *, reset_every, **_):
        assert [file.shape[1] for file in files] == [57, 40]
        scores = copy.deepcopy(scored[len(calls["given"])])
        calls["given"].append((tuple(arms), reset_every))
        for file in scores:
            calls["fault"](file)
        return scores

    monkeypatch.setattr(score_files, "stream", stream)
    return calls


def test_checkpoints_and_files_from_end_to_end(runs, scored, streamed, tmp_path, capsys, undrawn):
    out = tmp_path / "out"
    assert main(words(runs, out)) == 0
    assert "as it must be" in capsys.readouterr().out
    stored = content(out)
    assert [checkpoint["name"] for checkpoint in stored["checkpoints"]] == ["a", "b"]
    assert stored["checkpoints"][0]["about"].keys() == {"path", "step", "weights"}
    assert (stored["setting"]["window"], stored["setting"]["reach"]) == (8, 2 * 7 + 1 + 1)
    assert (stored["broken"], stored["counts"]) == (None, {"files": 2, "units": 2, "unit": "files"})
    assert [(file["frames"], len(file["digest"])) for file in stored["files"]] == [(57, 64), (40, 64)]
    assert stored["evaluated_with"]["versions"]["jax"]
    # Each checkpoint once, both arms at a time; the stored losses are those of the frames.
    assert streamed["given"] == [(("persist", "reset"), 16)] * 2
    assert stored["pieces"] == [0, 16, 32, 48]
    experiment, about = results.read(out)
    for arm, losses in experiment.losses.items():
        for seed, file in itertools.product(range(2), range(2)):
            row, nats = losses[seed, file], scored[seed][file].arms[arm].nats[1:].astype(float)
            expected = [np.nanmean(nats[:, k : k + 16]) for k in range(0, nats.shape[1], 16)]
            np.testing.assert_allclose(row[np.isfinite(row)], expected, atol=1e-8)
    assert about.keys() == {"evaluated_with", "cost"}
    main(["compare", "--again", str(out)])
    assert content(out) == stored
    # The stored scores can be asked another question.
    second = ["--scores", str(out), "--weighting", "kyutai", "--out", str(tmp_path / "kyutai")]
    assert main(["compare", "a@persist", "b@reset", *second]) == 0
    assert content(tmp_path / "kyutai")["setting"]["weighting"] == "kyutai"


def test_a_leak_before_the_first_reset_breaks_a_real_run(runs, streamed, tmp_path, capsys, undrawn):
    def leak(file):
        file.arms["reset"].nats[1, 7] += 0.5

    streamed["fault"] = leak
    out = tmp_path / "out"
    assert main(words(runs, out)) == command.BROKEN == 1
    assert main(["compare", "--again", str(out)]) == command.BROKEN
    for text in (capsys.readouterr().out, (out / "report.md").read_text(), content(out)["broken"]):
        assert "BROKEN: persist and reset differ by" in text
        assert "is clearly better" not in text


def test_a_file_that_diverges_is_left_out_everywhere(runs, streamed, tmp_path, capsys, undrawn):
    def diverge(file):
        if len(streamed["given"]) == 1 and file.tokens.shape[1] == 57:  # the longer file, under the first checkpoint
            file.arms["reset"].nats[:, 20:] = np.nan

    streamed["fault"] = diverge
    out = tmp_path / "out"
    assert main(words(runs, out)) == PARTIAL
    stored = content(out)
    assert [file["name"] for file in stored["files"]] == ["1"]
    assert "under reset gives no finite predictions of 0 from frame 20" in stored["skipped"][0]["reason"]
    assert stored["pieces"] == [0, 16, 32]
    assert verdict(out) == UNDECIDED
    assert "one file cannot be tested" in capsys.readouterr().out
    assert sorted(path.name for path in out.rglob("frames/*/*")) == ["0001-1.npz"] * 2


def test_checkpoints_that_predict_other_tokens_are_no_pair(runs, streamed, tmp_path):
    def other_delays(file):
        if len(streamed["given"]) == 2:  # the second checkpoint
            file.tokens[1, 0] = -1

    streamed["fault"] = other_delays
    with pytest.raises(InputError, match="b predicts other tokens of . than a"):
        main(words(runs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_controlled_task_brings_its_bounds(runs, streamed, tmp_path, monkeypatch, undrawn):
    given = []

    def bounds_for(folder, files, frames):
        given.append((folder, [file.name for file in files], frames))
        rows = [np.where(np.arange(file.frames.shape[1]) % 2, 1.0, np.nan) for file in files]
        return rows, [row + 2 for row in rows]

    monkeypatch.setattr(tasks, "bounds_for", bounds_for)
    data = runs[2]
    (data / "task.json").write_text("{}")
    try:
        assert main(words(runs, tmp_path / "out")) == 0
    finally:
        (data / "task.json").unlink()
    assert given == [(data, ["0", "1"], 15)]  # the first codebook, which tasks ask for, has no delay
    bounds = results.read(tmp_path / "out")[0].bounds
    np.testing.assert_array_equal(bounds.ideal[0], [1, 1, 1, 1])
    np.testing.assert_array_equal(bounds.memoryless[1], [3, 3, 3, np.nan])
    np.testing.assert_array_equal(bounds.weight, [[8, 8, 8, 4], [8, 8, 4, 0]])
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
