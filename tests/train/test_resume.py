"""A run that was stopped ends like one that never was; checkpoints read back exactly or are refused."""

import dataclasses
import json
import logging
import shutil
import signal

import jax
import numpy as np
import pytest

from eval.__main__ import main as eval_main
from eval.inputs import checkpoints
from eval.streaming import plots as streaming_plots
from eval.streaming import runner
from tests.helpers import micro
from tests.helpers.micro import files, write_manifest
from tests.helpers.quick import quickly, remembering, scan_calls
from train import loop, plots
from train.batches import Batches
from train.config import TrainConfig
from ttt_jax.checkpoints import checksums
from ttt_jax.checkpoints.run_weights import load_run
from ttt_jax.codec import load_codec
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.command import PARTIAL

CONFIG = micro.config(steps=12, checkpoint_every=6)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs that compile quickly; no figures: tests/train/test_killed.py and tests/eval/test_evaluate.py ask for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", quickly(loop.make_train_step))
        patch.setattr(loop.initial_params, "initial", remembering(loop.initial_params.initial))
        patch.setattr(runner, "scan_calls", scan_calls)
        patch.setattr(plots, "draw_run", lambda *_: [])
        patch.setattr(streaming_plots, "draw_all", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run twice: `whole` undisturbed, `parts` stopped by Ctrl-C in step 5 and resumed; exit codes."""
    folder = tmp_path_factory.mktemp("runs")
    train = write_manifest(folder, "train", files(), load_codec().digest)
    heldout = write_manifest(folder, "heldout", files((70, 50), seed=1), load_codec().digest)
    data = dataclasses.replace(CONFIG.data, train=str(train), heldout=str(heldout), cache=str(folder / "cache"))
    codes = [loop.start(dataclasses.replace(CONFIG, data=data, run_dir=str(folder / "whole")))]

    class Interrupted(Batches):
        """Presses Ctrl-C while step 5 is prepared; the loop looks at one batch before the first step."""

        def __next__(self):
            self.taken = getattr(self, "taken", 0) + 1
            if self.taken == 6:
                signal.raise_signal(signal.SIGINT)
            return super().__next__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Batches", Interrupted)
        codes.append(loop.start(dataclasses.replace(CONFIG, data=data, run_dir=str(folder / "parts"))))
    shutil.copytree(folder / "parts", folder / "stopped")
    codes.append(loop.resume(folder / "parts"))
    return folder, codes


@pytest.fixture(scope="module")
def killed(runs):
    """`whole` as a kill in step 10 without warning would have left it, then resumed; and its exit code."""
    folder = runs[0] / "killed"
    shutil.copytree(runs[0] / "whole", folder)
    shutil.rmtree(folder / "eval")
    # Orbax's name for a checkpoint that is being written
    (folder / "checkpoints" / "12").rename(folder / "checkpoints" / "12.orbax-checkpoint-tmp")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:9]) + lines[9][:50])
    return folder, loop.resume(folder)


def with_meta(run_dir, copy, change):
    """A copy of a run in which the latest checkpoint's meta went through `change`."""
    shutil.copytree(run_dir, copy)
    path = copy / "checkpoints" / "12" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    seal = copy / "checkpoints" / "12" / "integrity" / "metadata"
    content = json.loads(seal.read_text())["content"]
    seal.write_text(json.dumps(checksums.seal({**content, "meta": checksums.crc(meta)})))
    return copy


def metrics(run_dir):
    untimed = ("seconds", "frames_per_second")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in untimed} for line in lines]


def same(a, b):
    """Whether two trees are equal bit for bit."""
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def losses(folder):
    """By arm and stream, from the results of a run's one checkpoint."""
    (evaluated,) = results(folder)["checkpoints"]
    return evaluated["losses"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_exit_codes_tell_done_from_interrupted(runs):
    assert runs[1] == [0, 130, 0]


def test_an_interrupted_run_keeps_the_step_it_was_in(runs):
    assert [line["step"] for line in metrics(runs[0] / "stopped")] == list(range(1, 6))
    assert load_run(runs[0] / "stopped").meta["step"] == 5


def test_a_resumed_run_has_the_losses_of_one_never_stopped(runs):
    whole, parts = metrics(runs[0] / "whole"), metrics(runs[0] / "parts")
    assert [line["step"] for line in whole] == list(range(1, CONFIG.steps + 1))
    assert whole == parts


def test_a_resumed_run_has_the_weights_of_one_never_stopped(runs):
    whole, parts = (load_run(runs[0] / name).params for name in ("whole", "parts"))
    assert same(whole, parts)


def test_a_run_killed_without_warning_ends_like_one_never_stopped(runs, killed):
    whole, (resumed, code) = runs[0] / "whole", killed
    assert code == 0
    assert metrics(resumed) == metrics(whole)
    assert same(*(load_run(folder).params for folder in (resumed, whole)))
    assert losses(resumed / "eval") == losses(whole / "eval")


def test_a_run_killed_without_warning_leaves_no_remains(killed):
    assert {path.name for path in (killed[0] / "checkpoints").iterdir()} == {"6", "12"}
    assert not [path for path in killed[0].rglob("*") if "tmp" in path.name]


def test_evaluating_a_run_anew_gives_the_losses_of_its_end(runs, tmp_path):
    whole = runs[0] / "whole"
    before = (whole / "eval" / "results.json").read_bytes()
    assert eval_main(["stream", str(whole), "--out", str(tmp_path / "x")]) == 0
    assert losses(tmp_path / "x") == losses(whole / "eval")
    assert results(tmp_path / "x")["files"] == results(whole / "eval")["files"]
    assert (whole / "eval" / "results.json").read_bytes() == before


def test_evaluating_a_run_without_held_out_files_is_refused(runs, tmp_path):
    def change(meta):
        meta["config"]["data"]["heldout"] = None

    copy = with_meta(runs[0] / "whole", tmp_path / "copy", change)
    with pytest.raises(InputError, match="copy was trained without held-out files.*--data"):
        eval_main(["stream", str(copy), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("part", ["codec", "tokenizer"])
def test_evaluating_with_another_codec_or_tokenizer_is_refused(runs, tmp_path, part):
    def change(meta):
        meta[part]["digest"] = "0" * 64

    copy = with_meta(runs[0] / "whole", tmp_path / "copy", change)
    with pytest.raises(InputError, match=f"{part}.*copy was trained with.*bring"):
        eval_main(["stream", str(copy), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_a_finished_run_leaves_everything_it_promises(runs):
    found = {str(path.relative_to(runs[0] / "whole")) for path in (runs[0] / "whole").rglob("*") if path.is_file()}
    assert {"config.json", "meta.json", "metrics.jsonl", "eval/results.json"} <= found
    assert not [name for name in found if name.endswith((".tmp", ".partial"))]


def test_the_stored_configuration_is_the_one_that_ran(runs):
    stored = config_json.from_dict(TrainConfig, config_json.read_json(runs[0] / "whole" / "config.json", "it"), "it")
    rate = CONFIG.model.inner_lr  # stored as it was used, so that another default changes no stored run
    ttt = dataclasses.replace(CONFIG.model.ttt, base_lr=rate)
    assert stored.model == dataclasses.replace(CONFIG.model, ttt=ttt)
    assert stored.steps == CONFIG.steps
    run = load_run(runs[0] / "whole")
    assert run.config == stored.model
    assert run.meta["codec"]["digest"] == load_codec().digest
    assert run.meta["config"] == config_json.to_dict(stored)


def test_a_taken_run_folder_is_refused(runs):
    with pytest.raises(InputError, match="whole is taken.*--resume"):
        loop.start(dataclasses.replace(CONFIG, run_dir=str(runs[0] / "whole")))


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
        assert loop.start(cfg) == PARTIAL
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


def test_a_damaged_checkpoint_is_refused_by_name(runs, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs[0] / "stopped", damaged)
    for path in (damaged / "checkpoints" / "5" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="holds no checkpoint that is not damaged"):
        load_run(damaged)


def test_no_run_and_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not the folder of a run"):
        load_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_run(tmp_path)


def test_a_checkpoint_can_be_read_by_its_folder(runs):
    whole = runs[0] / "whole"
    early, late = (load_run(whole / "checkpoints" / str(step)) for step in (6, 12))
    assert (early.meta["step"], late.meta["step"]) == (6, 12)
    assert same(late.params, load_run(whole).params)
    assert not same(late.params, early.params)
    assert checkpoints.load(whole / "checkpoints" / "6").name == "whole-6"


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_in_its_folder(runs, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "meta.json", "metrics.jsonl"):
        shutil.copy(runs[0] / "whole" / name, folder)
    assert loop.start(of_runs(runs, tmp_path)) == 0
    assert metrics(folder) == metrics(runs[0] / "whole")


def test_a_damaged_latest_checkpoint_is_named_and_the_one_before_goes_on_to_the_same_end(runs, tmp_path, caplog):
    whole, copy = runs[0] / "whole", tmp_path / "copy"
    shutil.copytree(whole, copy)
    largest = max((copy / "checkpoints" / "12" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with caplog.at_level(logging.WARNING, "train"):
        assert loop.resume(copy) == 0
    assert "checkpoints/12" in caplog.text
    assert (copy / "damaged" / "12").is_dir()
    assert metrics(copy) == metrics(whole)


def spoiled(make):
    """`parameters.initial` with a weight of the TTT layer that is no number."""

    def initial(*args):
        found = make(*args)
        ttt = found.trainable["layers"]["layers_01_01"]["ttt"]
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
        loop.start(of_runs(runs, tmp_path))
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
