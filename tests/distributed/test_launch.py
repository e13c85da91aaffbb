"""The flags by which a process finds the others, and the changes that a resumed run takes."""

import dataclasses

import pytest

from train.__main__ import parse
from train.config import PRESETS, MeshConfig
from ttt_jax.distributed.launch import Launch
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

MANUAL = ["--launch", "manual", "--coordinator", "host:1234", "--processes", "4", "--process", "3"]


def test_a_process_is_alone_unless_flags_name_others_anywhere():
    assert parse(["small", "--steps", "3"])[0].launch == Launch()
    options, config = parse(["small", *MANUAL[:4], "--steps", "3", *MANUAL[4:]])
    assert options.launch == Launch("manual", "host:1234", 4, 3)
    assert config == dataclasses.replace(PRESETS["small"], steps=3)
    assert parse(["--launch=auto"])[0].launch == Launch("auto")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (MANUAL[:-2], "--process None is not"),
        ([*MANUAL[:-1], "4"], "--process 4 is not"),
        (["--coordinator", "host:1"], "are for --launch manual"),
        (["--launch", "auto", "--processes", "2"], "are for --launch manual"),
    ],
)
def test_incomplete_flags_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse(words)


def test_a_resumed_run_may_be_computed_otherwise_and_nothing_else(tmp_path):
    stored = dataclasses.replace(PRESETS["tiny"], mesh=MeshConfig(2, 1, 2))
    config_json.write_json(tmp_path / "config.json", config_json.to_dict(stored))
    options, config = parse(["--resume", str(tmp_path), "--mesh.fsdp", "2", "--remat", "dots", *MANUAL])
    assert options.resume == str(tmp_path)
    assert config == dataclasses.replace(stored, mesh=MeshConfig(2, 2, 2), remat="dots")
    assert options.launch.process == 3
    for words in (["--optim.lr", "1"], ["--mesh.fsdp", "2", "--steps", "3"]):
        with pytest.raises(InputError, match=f"takes no {words[-2]}"):
            parse(["--resume", str(tmp_path), *words])
    with pytest.raises(InputError, match="takes no small"):
        parse(["small", "--resume", str(tmp_path)])
    with pytest.raises(InputError, match="accumulate=3 does not divide"):
        parse(["--resume", str(tmp_path), "--accumulate", "3"])


def test_a_dry_run_is_of_a_configuration():
    options, config = parse(["moshi-7b", "--dry-run", "--steps", "3"])
    assert options.dry_run
    assert config.steps == 3
    with pytest.raises(InputError, match="--dry-run is for a new run"):
        parse(["--resume", "runs/x", "--dry-run"])
