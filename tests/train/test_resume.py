"""A run that was stopped ends like one that never was; checkpoints read back exactly or are refused."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest

from tests.helpers import small_tasks
from tests.helpers.commands import lines as metrics
from tests.helpers.micro import files, write_manifest
from tests.helpers.quick import interrupted, quicken
from train import loop
from train.config import DataConfig, load
from ttt_jax.checkpoints import checksums, loading
from ttt_jax.checkpoints.run_weights import load_run
from ttt_jax.codec import load_codec
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.command import PARTIAL, call

CONFIG = dataclasses.replace(small_tasks.CONFIG, data=DataConfig(chunk=64, batch=2), checkpoint_every=3)
"""A run of 6 steps, with the program of test_together.py."""
EVALUATED = []
"""Run folders that were handed over to `python -m eval stream`."""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs compile quickly; figures and evaluations at the end are left out, other tests ask for them."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        patch.setattr(loop, "call", lambda package, args: EVALUATED.append((package, *args)) or 0)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run twice: `whole` undisturbed, `parts` stopped by Ctrl-C in step 2 and resumed; exit codes."""
    folder = tmp_path_factory.mktemp("runs")
    train = write_manifest(folder, "train", files(), load_codec().digest)
    heldout = write_manifest(folder, "heldout", files((70, 50), seed=1), load_codec().digest)
    data = dataclasses.replace(CONFIG.data, train=str(train), heldout=str(heldout), cache=str(folder / "cache"))
    codes = [loop.start([dataclasses.replace(CONFIG, data=data, run_dir=str(folder / "whole"))])]
    with interrupted(2):
        codes.append(loop.start([dataclasses.replace(CONFIG, data=data, run_dir=str(folder / "parts"))]))
    shutil.copytree(folder / "parts", folder / "stopped")
    codes.append(loop.resume(folder / "parts"))
    return folder, codes


def with_meta(run_dir, copy, change):
    """A copy of a run in which the latest checkpoint's meta went through `change`."""
    shutil.copytree(run_dir, copy)
    path, seal = (copy / "checkpoints" / "6" / part / "metadata" for part in ("meta", "integrity"))
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    content = json.loads(seal.read_text())["content"]
    seal.write_text(json.dumps(checksums.seal({**content, "meta": checksums.crc(meta)})))
    return copy


def same(a, b):
    """Whether two trees are equal bit for bit."""
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.integration
def test_exit_codes_tell_done_from_interrupted_and_runs_that_are_done_are_evaluated(runs):
    folder, codes = runs
    assert codes == [0, 130, 0]
    assert EVALUATED[:2] == [("eval", "stream", str(folder / name)) for name in ("whole", "parts")]


def test_an_interrupted_run_keeps_the_step_it_was_in(runs):
    assert [line["step"] for line in metrics(runs[0] / "stopped")] == [1, 2]
    assert load_run(runs[0] / "stopped").meta["step"] == 2


def test_a_resumed_run_has_losses_and_weights_of_one_never_stopped(runs):
    whole, parts = runs[0] / "whole", runs[0] / "parts"
    assert [line["step"] for line in metrics(whole)] == list(range(1, CONFIG.steps + 1))
    assert metrics(whole) == metrics(parts)
    assert same(load_run(whole).params, load_run(parts).params)


def test_a_run_killed_without_warning_ends_like_one_never_stopped_and_leaves_no_remains(runs):
    """`whole` as a kill in step 5 would have left it, then resumed."""
    whole, killed = runs[0] / "whole", runs[0] / "killed"
    shutil.copytree(whole, killed)
    # Orbax's name for a checkpoint that is being written
    (killed / "checkpoints" / "6").rename(killed / "checkpoints" / "6.orbax-checkpoint-tmp")
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    assert loop.resume(killed) == 0
    assert metrics(killed) == metrics(whole)
    assert same(*(load_run(folder).params for folder in (killed, whole)))
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"3", "6"}
    assert not [path for path in killed.rglob("*") if "tmp" in path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["config"]["data"].update(heldout=None), "copy was trained without held-out files.*--data"),
        (lambda meta: meta["codec"].update(digest="0" * 64), "codec.*copy was trained with.*bring"),
        (lambda meta: meta["tokenizer"].update(digest="0" * 64), "tokenizer.*copy was trained with.*bring"),
    ],
    ids=["no held-out files", "codec", "tokenizer"],
)
def test_a_run_whose_speech_cannot_be_had_again_is_not_evaluated(runs, tmp_path, change, message):
    copy = with_meta(runs[0] / "whole", tmp_path / "copy", change)
    with pytest.raises(InputError, match=message):
        call("eval", ["stream", str(copy), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_a_finished_run_leaves_everything_it_promises(runs):
    found = {str(path.relative_to(runs[0] / "whole")) for path in (runs[0] / "whole").rglob("*") if path.is_file()}
    assert {"config.json", "meta.json", "metrics.jsonl"} <= found
    assert not [name for name in found if name.endswith((".tmp", ".partial"))]


def test_the_stored_configuration_is_the_one_that_ran(runs):
    whole = runs[0] / "whole"
    stored, run = dataclasses.replace(load(whole / "config.json"), run_dir=str(whole)), load_run(whole)
    rate = CONFIG.model.inner_lr  # stored as it was used, so that another default changes no stored run
    ttt = dataclasses.replace(CONFIG.model.ttt, base_lr=rate)
    assert stored.model == run.config == dataclasses.replace(CONFIG.model, ttt=ttt)
    assert stored.steps == CONFIG.steps
    assert run.meta["codec"]["digest"] == load_codec().digest
    assert run.meta["config"] == config_json.to_dict(stored)


def test_a_taken_run_folder_is_refused(runs):
    with pytest.raises(InputError, match="whole is taken.*--resume"):
        loop.start([dataclasses.replace(CONFIG, run_dir=str(runs[0] / "whole"))])


def test_kernels_that_cannot_run_are_refused_before_there_is_a_folder(tmp_path):
    model = dataclasses.replace(CONFIG.model, ttt=dataclasses.replace(CONFIG.model.ttt, impl="pallas"))
    with pytest.raises(InputError, match="ttt.impl=pallas cannot run here: the device is cpu"):
        loop.start([dataclasses.replace(CONFIG, model=model, run_dir=str(tmp_path / "run"))])
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_data(runs, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(runs[0] / "stopped", stopped)
    manifest = runs[0] / "train.jsonl"
    text = manifest.read_text()
    manifest.write_text("\n".join(text.splitlines()[1:]) + "\n")
    try:
        with pytest.raises(InputError, match="differ from those"):
            loop.resume(stopped)
    finally:
        manifest.write_text(text)


def test_files_that_are_not_there_are_named_and_left_out_and_end_in_exit_code_3(runs, tmp_path, caplog):
    manifest = tmp_path / "train.jsonl"
    lines = [json.loads(line) for line in (runs[0] / "train.jsonl").read_text().splitlines()]
    for line in lines:
        shutil.copy(runs[0] / line["path"], tmp_path)
    gone = {**lines[-1], "path": "gone.safetensors"}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in [gone, *lines]))
    cfg = of_runs(runs, tmp_path)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, train=str(manifest)))
    with caplog.at_level(logging.WARNING, "train"):
        assert loop.start([cfg]) == PARTIAL
    assert f"skipped: {manifest} line 1 names {tmp_path}/gone.safetensors, which is not there" in caplog.text
    assert metrics(tmp_path / "run") == metrics(runs[0] / "whole")
    assert loop.resume(tmp_path / "run") == PARTIAL
    last = tmp_path / lines[-1]["path"]
    shutil.copy(last, tmp_path / gone["path"])
    with pytest.raises(InputError, match="data, codec or tokenizer differ"):  # it is back
        loop.resume(tmp_path / "run")
    (tmp_path / gone["path"]).unlink()
    last.unlink()
    with pytest.raises(InputError, match="the data differ from those that .*run was trained on: .* line 1 names"):
        loop.resume(tmp_path / "run")


def test_a_checkpoint_can_be_read_by_its_folder(runs):
    whole = runs[0] / "whole"
    early, late = (load_run(whole / "checkpoints" / str(step)) for step in (3, 6))
    assert (early.meta["step"], late.meta["step"]) == (3, 6)
    assert same(late.params, load_run(whole).params)
    assert not same(late.params, early.params)
    assert loading.load(whole / "checkpoints" / "3").name == "whole-3"


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_in_its_folder(runs, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "meta.json", "metrics.jsonl"):
        shutil.copy(runs[0] / "whole" / name, folder)
    assert loop.start([of_runs(runs, tmp_path)]) == 0
    assert metrics(folder) == metrics(runs[0] / "whole")


def test_a_damaged_latest_checkpoint_is_named_and_the_one_before_goes_on_to_the_same_end(runs, tmp_path, caplog):
    whole, copy = runs[0] / "whole", tmp_path / "copy"
    shutil.copytree(whole, copy)
    largest = max((copy / "checkpoints" / "6" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with caplog.at_level(logging.WARNING, "train"):
        assert loop.resume(copy) == 0
    assert "checkpoints/6" in caplog.text
    assert (copy / "damaged" / "6").is_dir()
    assert metrics(copy) == metrics(whole)


def spoiled(make):
    """`parameters.initial` with a weight of the TTT layer that is no number."""

    def initial(*args):
        found = make(*args)
        ttt = found.trainable["layers"]["layers_00_00"]["ttt"]
        ttt["out_kernel"] = ttt["out_kernel"] * np.nan
        return found

    return initial


def of_runs(runs, tmp_path, **changes):
    names = {"train": str(runs[0] / "train.jsonl"), "cache": str(runs[0] / "cache")}
    data = dataclasses.replace(CONFIG.data, **names)
    return dataclasses.replace(CONFIG, data=data, run_dir=str(tmp_path / "run"), **changes)


def test_a_loss_that_is_no_number_stops_the_run_and_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.initial_params, "initial", spoiled(loop.initial_params.initial))
    with pytest.raises(
        InputError, match="step 1: loss is nan and grad_norm is nan, the gradient of .*ttt.*, in .*train"
    ):
        loop.start([of_runs(runs, tmp_path)])
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
