"""What the command line means, and what a stored configuration gives back."""

import dataclasses
import json
import os

import pytest

from train import config
from train.__main__ import parse
from train.config import PRESETS, TrainConfig
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_bears_its_name_and_survives_json(name):
    assert PRESETS[name].name == name
    assert parse([name])[1] == PRESETS[name]
    stored = json.loads(json.dumps(config_json.to_dict(PRESETS[name])))
    assert config_json.from_dict(TrainConfig, stored, "x.json") == PRESETS[name]


def test_fields_override_the_preset_or_tiny():
    cfg = parse(["small", "--optim.lr", "0.5", "--model.ttt.layers", "0,1", "--model.ttt.hidden", "2", "3"])[1]
    assert (cfg.optim.lr, cfg.model.ttt_layers, cfg.model.ttt.hidden) == (0.5, (0, 1), (2, 3))
    assert cfg.model.dim == PRESETS["small"].model.dim
    assert parse([])[1] == PRESETS["tiny"]
    assert parse(["--steps", "7"])[1] == dataclasses.replace(PRESETS["tiny"], steps=7)
    lora = parse(["--model.lora.rank", "4", "--model.lora.maps", "attention", "ffn", "--steps", "7"])[1].model.lora
    assert (lora.rank, lora.maps) == (4, ("attention", "ffn"))


def test_a_stored_configuration_runs_again_in_a_new_folder(tmp_path):
    stored = dataclasses.replace(PRESETS["small"], run_dir="old", steps=33)
    path = tmp_path / "config.json"
    config_json.write_json(path, config_json.to_dict(stored))
    cfg = parse(["--from", str(path), "--seed", "5"])[1]
    assert cfg == dataclasses.replace(stored, run_dir=None, seed=5)


def test_options_of_the_run_are_taken_from_anywhere_on_the_line():
    for words in (["tiny", "--seeds", "3,1", "--steps", "7"], ["tiny", "--steps", "7", "--seeds=3,1"]):
        options, config = parse(words)
        assert options.seeds == "3,1"
        assert config == dataclasses.replace(PRESETS["tiny"], steps=7)
    options, config = parse(["--resume", "runs/x"])
    assert (options.resume, config) == ("runs/x", None)


def test_a_resumed_run_may_be_computed_in_another_way(tmp_path):
    config_json.write_json(tmp_path / "config.json", config_json.to_dict(PRESETS["tiny"]))
    options, config = parse(["--resume", str(tmp_path), "--model.ttt.impl", "xla", "--remat", "dots"])
    ttt = dataclasses.replace(PRESETS["tiny"].model.ttt, impl="xla")
    model = dataclasses.replace(PRESETS["tiny"].model, ttt=ttt)
    assert config == dataclasses.replace(PRESETS["tiny"], model=model, remat="dots", run_dir=None)
    for field, value in (("model.ttt.mini-batch", "8"), ("model.context", "9")):
        with pytest.raises(InputError, match=f"takes no --{field}: use --from"):
            parse(["--resume", str(tmp_path), f"--{field}", value])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["smal"], 'unknown preset "smal".*"small"'),
        (["--model.ttt.layers", "9"], "names layer 9.*layers 0 to 2"),
        (["--model.ttt.mini-batch", "0"], "mini_batch=0"),
        (["--data.batch", "0"], "data.batch=0"),
        (["--optim.beta2", "1.5"], "optim.beta2=1.5"),
        (["--loss.text", "-1"], "loss.text=-1"),
        (["--steps", "0"], "steps=0"),
        (["--steps", "3", "small"], "preset small .*put it first"),
        (["--resume", "x", "--steps", "3"], "x/config.json is not a file"),
        (["--resume", "x", "--from", "y"], "leave one of them out"),
        (["small", "--from", "{stored}"], "--from and the preset small"),
        (["--from", "nowhere.json"], "nowhere.json is not a file"),
        (["--seed", "-1"], "seed=-1"),
        (["--seed", str(2**32)], "seed=4294967296"),
        (["--seeds", ""], "--seeds '' are no seeds"),
        (["--seeds", "0,1,0"], "--seeds '0,1,0'"),
        (["--seeds=1,x"], "--seeds '1,x'"),
        (["--seeds", "0,1", "--dry-run"], "leave --seeds out"),
        (["--resume", "x", "--seeds", "0,1"], "--seeds names"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, args, message):
    stored = tmp_path / "config.json"
    config_json.write_json(stored, config_json.to_dict(PRESETS["tiny"]))
    with pytest.raises(InputError, match=message) as error:
        parse([word.format(stored=stored) for word in args])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args", [["--resume"], ["--launch", "slurm"], ["--processes", "one"], ["--steps"], ["--stepz", "3"]]
)
def test_words_that_are_no_flags_and_values_end_with_exit_code_2_and_are_named(args, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(args)
    assert exit_.value.code == 2
    assert args[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, 'key "stepz".*"steps"'),
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": True}, "steps is True"),
        ({"optim": {"lr": None}}, "optim.lr is None"),
        ({"model": {"dtype": "float8"}}, "model.dtype is 'float8'"),
        ({"model": {"layer_context": [[1]]}}, "model.layer_context is"),
        ({"data": 3}, "data is 3"),
        (None, "is not JSON"),
    ],
)
def test_a_spoiled_stored_configuration_is_refused_by_key(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config_json.to_dict(PRESETS["tiny"]), **change}) if change else "{")
    with pytest.raises(InputError, match=message):
        config.load(path)


def test_json_is_written_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    config_json.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        config_json.write_json(path, {"a": 2})
    assert config_json.read_json(path, "x") == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
