"""Conversions of missing and damaged files, to full disks, over the command line and from the hub."""

import errno
import functools
import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers import kyutai_files as files
from tests.helpers.converting import assert_one_sentence, cached_by_hub, nightly, refused, run
from tests.helpers.places import ROOT
from ttt_jax.checkpoints import safetensors_reader, safetensors_writer, weights
from ttt_jax.config import TTTConfig
from ttt_jax.convert import __main__ as command
from ttt_jax.convert import export, kyutai
from ttt_jax.errors import InputError


def test_files_that_are_none(source, tmp_path):
    refused(tmp_path / "nowhere", "nowhere is no folder or file here")
    refused(tmp_path / "nowhere.safetensors", "nowhere.safetensors is no folder or file")
    (source / "config.json").write_text("{")
    refused(source, "config.json is not JSON")
    (source / "config.json").write_text("[" * 99999)
    refused(source, "config.json is not JSON")
    (source / "config.json").write_text("[]")
    refused(source, "config.json holds no object")
    change = files.write(tmp_path / "source", files.config(), {})
    (change / "model.safetensors").unlink()
    refused(change, "holds no model.safetensors")
    (change / "model.pth").write_bytes(b"pickle")
    refused(change, "model.pth, which is pickled")
    refused(change / "model.pth", "model.pth is pickled")
    (change / "config.json").write_text(json.dumps(files.config(moshi_name="other.safetensors")))
    refused(change, "has no other.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999, 1.001])
def test_a_file_cut_off_or_too_long(source, keep):
    path = source / "model.safetensors"
    content = path.read_bytes()
    size = keep if isinstance(keep, int) else int(keep * len(content))
    path.write_bytes((content + bytes(1000))[:size])
    refused(source, str(path))


@pytest.mark.parametrize(
    "header",
    [
        b"[1, 2, 3]",
        b"{]",
        b"[" * 99999,
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        b'{"a":{"dtype":"X99","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":["F"],"shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}',
    ],
)
def test_a_file_that_is_no_safetensors(source, header):
    path = source / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(source, str(path))


def test_an_empty_tensor_between_others(source):
    w = {"b": np.ones(3, np.float32), "a": np.zeros((0, 4), np.float32), "c": np.ones(1, np.float32)}
    path = source / "model.safetensors"
    header = {
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "c": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
        "a": {"dtype": "F32", "shape": [0, 4], "data_offsets": [12, 12]},
    }
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + w["b"].tobytes() + w["c"].tobytes())
    with safetensors_reader.TensorFile(path) as file:
        for name, array in w.items():
            np.testing.assert_array_equal(file.array(name), array)


def test_out_must_be_new(source, tmp_path):
    refused(source, "source is not empty", out="source")
    (tmp_path / "file").touch()
    refused(source, "file is a file", out="file")
    refused(source, "cannot be made in it", out="no/where")
    (tmp_path / "link").symlink_to(tmp_path)
    refused(source, "link is a link: give a new folder.", out="link")
    (tmp_path / "empty").mkdir()
    kyutai(source, tmp_path / "empty")
    assert weights.load(tmp_path / "empty").cfg.dim == 16


@pytest.mark.parametrize("when", nightly(7, 1))
@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (PermissionError(errno.EACCES, "denied", "x"), PermissionError),
    ],
)
@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_write_that_fails_leaves_nothing(source, tmp_path, monkeypatch, when, error, caught, direction):
    if direction == "out":
        kyutai(source, tmp_path / "first")
    before = {path.name for path in tmp_path.iterdir()}
    real, calls = safetensors_writer.write_block, []

    def write_block(fd, block):
        calls.append(1)
        if len(calls) == when:
            raise error
        real(fd, block)

    monkeypatch.setattr(safetensors_writer, "write_block", write_block)
    with pytest.raises(caught, match="is full" if caught is InputError else None):
        kyutai(source, tmp_path / "ours") if direction == "in" else export(tmp_path / "first", tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_read_that_is_interrupted_leaves_nothing(source, tmp_path, monkeypatch):
    def read_into(self, start, view):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_reader.TensorFile, "read_into", read_into)
    with pytest.raises(KeyboardInterrupt):
        kyutai(source, tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_disk_that_is_too_small_is_noticed_before(source, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(source, "has 1,000 bytes left")


def test_a_damaged_folder_is_refused_with_everything_that_is_wrong(source, tmp_path):
    ours = tmp_path / "ours"
    kyutai(source, ours)
    info = json.loads((ours / "config.json").read_text())
    other = json.dumps({**info, "model": info["model"] | {"hidden": 45}})
    (ours / "config.json").write_text(other)
    with pytest.raises(InputError, match=r"layer_00.safetensors has ffn/gate_up of shape \[2, 44, 16\] instead of"):
        weights.load(ours)
    (ours / "config.json").write_text(json.dumps(info))
    content = (ours / "head.safetensors").read_bytes()
    (ours / "head.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    weights.load(ours)
    with pytest.raises(InputError, match=r"head.safetensors has another SHA-256"):
        weights.load(ours, verify=True)
    (ours / "layer_01.safetensors").unlink()
    (ours / "depth.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"layer_01.safetensors is missing; depth.safetensors has 5 bytes instead of"):
        weights.load(ours)
    (ours / "config.json").write_text(json.dumps({**info, "format": 2}))
    with pytest.raises(InputError, match="has format 2, this version reads 1"):
        weights.load(ours)


def test_flags_become_arguments(monkeypatch, request):
    calls = []
    monkeypatch.setattr(command, "kyutai", lambda **options: calls.append(options))
    monkeypatch.setattr(command, "export", lambda **options: calls.append(options))
    log = logging.getLogger("convert")  # which the command changes
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    request.addfinalizer(functools.partial(log.setLevel, log.level))
    flags = "--ttt-layers 0,1 --ttt.mini-batch 4 --lora a.safetensors --merge-lora --seed 3 --dry-run --config c.json"
    assert command.main(["kyutai", "some/one", "ours", *flags.split()]) == 0
    assert command.main(["export", "ours", "back", "--dtype", "bfloat16", "--merge-lora"]) == 0
    kyutai_options, export_options = calls
    assert kyutai_options == {
        **{"source": "some/one", "out": Path("ours"), "config": Path("c.json"), "lora": "a.safetensors"},
        **{"merge_lora": True, "ttt": TTTConfig(layers="0,1", mini_batch=4), "seed": 3, "dry_run": True},
    }
    assert export_options == {
        **{"checkpoint": Path("ours"), "out": Path("back"), "merge_lora": True, "dtype": "bfloat16", "dry_run": False},
    }
    with pytest.raises(InputError, match="mini_batch=0 is not a size"):
        command.main(["kyutai", "some/one", "ours", "--ttt.mini-batch", "0"])


@pytest.mark.integration
def test_the_command_line(source, tmp_path):
    done = run(tmp_path, "kyutai", "--help")
    assert done.returncode == 0
    for flag in ("--ttt-layers", "--ttt.mini-batch", "--ttt.hidden", "--lora", "--merge-lora", "--dry-run", "--config"):
        assert flag in done.stdout
    assert "--ttt.layers" not in done.stdout
    done = run(tmp_path, "kyutai", source, "ours", "--ttt-layers", "0,1", "--ttt.mini-batch", "4", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "TTT layers    0, 1" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    assert_one_sentence(run(tmp_path, "kyutai", source, "ours", "--ttt.mini-batch", "0"), "mini_batch=0 is not a size")
    assert_one_sentence(run(tmp_path, "export", "nowhere", "back"), "nowhere is not a folder of weights")
    done = run(tmp_path, "kyutai", source, "ours")
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    done = run(tmp_path, "export", "ours", "back", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "model.safetensors").is_file()


@pytest.mark.integration
def test_command_lines_are_read_without_jax():
    code = """import sys, ttt_jax.convert.__main__; from train.__main__ import parse; parse(["small", "--steps", "3"])
sys.exit("jax" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.integration
def test_the_hub_offline(source, tmp_path):
    pytest.importorskip("huggingface_hub")
    snapshot = cached_by_hub(source, tmp_path)
    done = run(tmp_path, "kyutai", "some/one", "ours", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    about = weights.load(tmp_path / "ours").info["source"]
    assert about["revision"] == snapshot.name
    assert about["mimi"] == "hf://some/one/tokenizer-e351c8d8-checkpoint125.safetensors"
    done = run(tmp_path, "kyutai", "no/such", "never", HF_HUB_OFFLINE="1")
    assert_one_sentence(done, "config.json of no/such on the hub is not in the hub's cache", "offline mode")
    config = (snapshot / "config.json").read_bytes()
    (snapshot / "config.json").unlink()  # which is not to know that the repository has none
    done = run(tmp_path, "kyutai", "some/one", "never", HF_HUB_OFFLINE="1")
    assert_one_sentence(done, "config.json of some/one on the hub is not in the hub's cache")
    (snapshot / "config.json").write_bytes(config)
    (snapshot / "model.safetensors").unlink()
    done = run(tmp_path, "kyutai", "some/one", "never", HF_HUB_OFFLINE="1")
    assert_one_sentence(done, "model.safetensors of some/one on the hub is not in the hub's cache")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "ours", "hub"}


@pytest.mark.integration
@pytest.mark.slow  # the hub's client tries six times
def test_no_network(tmp_path):
    pytest.importorskip("huggingface_hub")
    done = run(tmp_path, "kyutai", "no/such@v1", "never", HF_ENDPOINT="http://127.0.0.1:9")
    assert_one_sentence(done, "config.json of no/such on the hub is not in the hub's cache", "no network")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RepositoryNotFoundError", "nor a repository of the hub"),
        ("GatedRepoError", "is closed to you"),
        ("RevisionNotFoundError", "has no revision v1"),
        ("HfHubHTTPError", "could not be had from the hub"),
        ("OfflineModeIsEnabled", "could not be had from the hub"),
        ("an error of an HTTP client", "config.json of some/one could not be had from the hub .the read timed out."),
    ],
)
def test_what_the_hub_answers(source, monkeypatch, name, words):
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(importlib.import_module("huggingface_hub.utils"), name, Exception)

    def download(*args, **options):
        raise kind.__new__(kind, "the read timed out")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.chdir(source)
    with pytest.raises(InputError, match=words):
        kyutai("some/one@v1", source.parent / "ours")
