"""Metrics for TensorBoard and Weights & Biases: their names, resumed runs, and that no failure of theirs ends a run."""

import importlib.machinery
import logging
import math
import sys
from unittest import mock

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
def test_a_missing_package_is_named_with_the_extra(monkeypatch, package, asked):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"the package {package} is not installed: .*\[log\]"):
        trackers.check(*asked)


def test_a_failing_tracker_is_reported_once_and_left(caplog):
    service = mock.Mock()
    service.write.side_effect = [None, None, OSError("no space left")]
    tracker = trackers.Tracker("TensorBoard", service)
    with caplog.at_level(logging.WARNING, "train"):
        for step in range(5):
            tracker.write(step, {"loss": 1.0})
        tracker.close()
    assert service.write.call_count == 3
    assert not service.close.called
    (message,) = [record.getMessage() for record in caplog.records]
    assert "TensorBoard failed (OSError: no space left)" in message
    service.close.side_effect = ConnectionError("gone")
    trackers.Tracker("Weights & Biases", service).close()
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
    (tracker,) = open_trackers(True, None, tmp_path, {}, 0)
    monkeypatch.setattr(writer.RecordWriter, "flush", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
    for step in range(50):
        tracker.write(step, {f"x{i}": 1.0 for i in range(50)})
    assert caplog.text.count("No space left") == 1


@pytest.fixture
def fake_wandb(monkeypatch):
    """In the place of wandb."""
    module = mock.Mock(__spec__=importlib.machinery.ModuleSpec("wandb", None), Error=type("Error", (Exception,), {}))
    module.init.return_value.step = 0
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path, fake_wandb):
    run, folder = fake_wandb.init.return_value, tmp_path / "tiny-1"
    folder.mkdir()
    (first,) = open_trackers(False, "mine", folder, {"steps": 9}, 0)
    first.write(1, {"loss": 2.0})
    first.write(1, {"validation/loss": 3.0})
    first.close()
    begun = fake_wandb.init.call_args.kwargs
    names = ("project", "name", "dir", "config")
    assert [begun[name] for name in names] == ["mine", "tiny-1", str(folder), {"steps": 9}]
    assert run.log.mock_calls == [mock.call({"loss": 2.0}, step=1), mock.call({"validation/loss": 3.0}, step=1)]
    assert run.finish.called
    run.log.reset_mock()
    run.step = 5  # what W&B has of the run that was killed
    (second,) = open_trackers(False, "mine", folder, {"steps": 9}, 3)
    for step in (4, 5, 6):
        second.write(step, {"loss": 1.0})
    resumed = fake_wandb.init.call_args.kwargs
    assert resumed["id"] == begun["id"] == (folder / "wandb_id.txt").read_text()
    assert resumed["resume"] == "allow"
    assert [call.kwargs["step"] for call in run.log.mock_calls] == [5, 6]
    # Another run is another one there.
    open_trackers(False, "mine", tmp_path, {}, 0)
    assert fake_wandb.init.call_args.kwargs["id"] != begun["id"]


def test_wandb_that_refuses_is_an_input_to_mend(tmp_path, fake_wandb):
    fake_wandb.init.side_effect = fake_wandb.Error("api_key not configured.")
    with pytest.raises(InputError, match=r"--wandb mine cannot be opened \(api_key not configured\): log in"):
        open_trackers(False, "mine", tmp_path, {}, 0)
    assert not (tmp_path / "wandb_id.txt").exists()


def test_wandb_itself_takes_what_is_written(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tracker,) = open_trackers(False, "mine", tmp_path, {"steps": 9}, 0)
    run = wandb.run
    for step in (1, 2):
        tracker.write(step, {"loss": float(step)})
        tracker.write(step, {"validation/loss": 3.0})
    tracker.write(1, {"loss": 9.0})  # W&B goes forward only
    assert run.id == (tmp_path / "wandb_id.txt").read_text()
    assert dict(run.config) == {"steps": 9}
    tracker.write(3, {"seconds": 1.0})  # W&B takes a step as done when the next begins
    assert (run.summary["loss"], run.summary["validation/loss"]) == (2.0, 3.0)
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
