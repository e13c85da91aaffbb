"""Metrics for TensorBoard and Weights & Biases: their names, resumed runs, and that no failure of theirs ends a run."""

import importlib.machinery
import logging
import math
import sys
import types

import pytest

from train import trackers
from train.trackers import flatten, open_trackers
from ttt_jax.errors import InputError

TRAINING = {
    "step": 7,
    "loss": 3.5,
    "streams": {"text": None, "codebook 1": 2.5},
    "grad_norm": math.inf,
    "grad_norms": {"ttt": 0.5},
    "skipped": 1,
    "skipped_for": "step 7: grad_norm is inf",
    "ttt": {"29": {"gate_abs": 0.25}},
}
VALIDATION = {"step": 7, "validation": {"loss": 3.0, "frames": 100, "ttt": {"29": {"loss_base": 4.0}}}, "seconds": 1.5}


def test_lines_become_numbers_by_path():
    assert flatten(TRAINING) == {
        "loss": 3.5, "streams/codebook_1": 2.5, "grad_norms/ttt": 0.5, "skipped": 1.0, "ttt/29/gate_abs": 0.25,
    }  # fmt: skip
    assert flatten(VALIDATION) == {
        "validation/loss": 3.0, "validation/frames": 100.0, "validation/ttt/29/loss_base": 4.0, "seconds": 1.5,
    }  # fmt: skip


def test_nothing_is_imported_that_is_not_asked_for(tmp_path, monkeypatch):
    for name in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    assert open_trackers(False, None, tmp_path, {}, 0) == []


@pytest.mark.parametrize(("package", "asked"), [("tensorboardX", (True, None)), ("wandb", (False, "mine"))])
def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, package, asked):
    monkeypatch.setitem(sys.modules, package, None)
    for ask in (lambda: trackers.check(*asked), lambda: open_trackers(*asked, tmp_path, {}, 0)):
        with pytest.raises(InputError, match=rf"the package {package} is not installed: .*\[log\]"):
            ask()
    assert not list(tmp_path.iterdir())


class Failing:
    """A tracker that fails after `good` calls."""

    def __init__(self, good):
        self.good, self.calls = good, 0

    def write(self, step, values):
        self.calls += 1
        if self.calls > self.good:
            raise OSError("no space left")

    def close(self):
        raise AssertionError("a failed tracker is not called again")


def test_a_failing_tracker_is_reported_once_and_left(caplog):
    inner = Failing(2)
    sink = trackers._Guarded("TensorBoard", inner)
    with caplog.at_level(logging.WARNING, "train"):
        for step in range(5):
            sink.write(step, {"loss": 1.0})
        sink.close()
    assert inner.calls == 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert "TensorBoard failed (OSError: no space left)" in message


def test_a_failure_at_the_end_does_not_end_the_run(caplog):
    class Bad(Failing):
        def close(self):
            raise ConnectionError("gone")

    trackers._Guarded("Weights & Biases", Bad(0)).close()
    assert "gone" in caplog.text


def events(folder):
    """(step, value) of every tag, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(folder)
    )
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written_and_what_a_resumed_run_writes_anew(tmp_path):
    pytest.importorskip("tensorboardX")
    (first,) = open_trackers(True, None, tmp_path, {}, 0)
    for step in range(1, 6):
        first.write(step, {"loss": float(step), "ttt/29/gate_abs": 0.5})
    assert events(tmp_path / "tensorboard")["loss"] == [(step, step) for step in range(1, 6)]  # before it is closed
    (second,) = open_trackers(True, None, tmp_path, {}, 3)  # the first was killed: steps 4 and 5 come again
    for step in (4, 5, 6):
        second.write(step, {"loss": step + 0.5})
    second.close()
    found = events(tmp_path / "tensorboard")
    assert found["loss"] == [(1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert found["ttt/29/gate_abs"] == [(step, 0.5) for step in (1, 2, 3)]


def test_a_full_disk_takes_tensorboard_only(tmp_path, caplog, monkeypatch):
    writer = pytest.importorskip("tensorboardX.record_writer")
    (sink,) = open_trackers(True, None, tmp_path, {}, 0)
    monkeypatch.setattr(writer.RecordWriter, "flush", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
    for step in range(50):
        sink.write(step, {f"x{i}": 1.0 for i in range(50)})
    assert caplog.text.count("No space left") == 1


class FakeRun:
    def __init__(self, step):
        self.step, self.logged, self.finished = step, [], False

    def log(self, values, step):
        self.logged.append((step, values))
        self.step = max(self.step, step)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module in the place of wandb, with the arguments and runs of its `init`."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.calls, module.runs, module.begin = [], [], 0

    class Error(Exception):
        pass

    def init(**kwargs):
        module.calls.append(kwargs)
        module.runs.append(FakeRun(module.begin))
        return module.runs[-1]

    module.Error, module.init, module.Settings = Error, init, dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path, fake_wandb):
    folder = tmp_path / "tiny-1"
    folder.mkdir()
    (first,) = open_trackers(False, "mine", folder, {"steps": 9}, 0)
    first.write(1, {"loss": 2.0})
    first.write(1, {"validation/loss": 3.0})
    first.close()
    call = fake_wandb.calls[0]
    assert (call["project"], call["name"], call["dir"], call["config"]) == ("mine", "tiny-1", str(folder), {"steps": 9})
    assert fake_wandb.runs[0].logged == [(1, {"loss": 2.0}), (1, {"validation/loss": 3.0})]
    assert fake_wandb.runs[0].finished
    fake_wandb.begin = 5  # what W&B has of the run that was killed
    (second,) = open_trackers(False, "mine", folder, {"steps": 9}, 3)
    for step in (4, 5, 6):
        second.write(step, {"loss": 1.0})
    assert fake_wandb.calls[1]["id"] == call["id"] == (folder / "wandb_id.txt").read_text()
    assert fake_wandb.calls[1]["resume"] == "allow"
    assert [step for step, _ in fake_wandb.runs[1].logged] == [5, 6]


def test_two_runs_are_two_in_wandb(tmp_path, fake_wandb):
    for name in "ab":
        (tmp_path / name).mkdir()
        open_trackers(False, "mine", tmp_path / name, {}, 0)
    assert fake_wandb.calls[0]["id"] != fake_wandb.calls[1]["id"]


def test_wandb_that_refuses_is_an_input_to_mend(tmp_path, fake_wandb):
    def refuse(**_):
        raise fake_wandb.Error("api_key not configured.")

    fake_wandb.init = refuse
    with pytest.raises(InputError, match=r"--wandb mine cannot be opened \(api_key not configured\): log in"):
        open_trackers(False, "mine", tmp_path, {}, 0)
    assert not (tmp_path / "wandb_id.txt").exists()


def test_wandb_itself_takes_what_is_written(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (sink,) = open_trackers(False, "mine", tmp_path, {"steps": 9}, 0)
    run = wandb.run
    for step in (1, 2):
        sink.write(step, {"loss": float(step)})
        sink.write(step, {"validation/loss": 3.0})
    sink.write(1, {"loss": 9.0})  # W&B goes forward only
    assert run.id == (tmp_path / "wandb_id.txt").read_text()
    assert dict(run.config) == {"steps": 9}
    sink.write(3, {"seconds": 1.0})  # W&B takes a step as done when the next begins
    assert (run.summary["loss"], run.summary["validation/loss"]) == (2.0, 3.0)
    sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
