"""How a process is told of the others, and what the command line makes of it."""

import dataclasses

import pytest

from train.config import PRESETS, Changes, MeshConfig, parse
from ttt_jax.distributed import launch
from ttt_jax.distributed.launch import Launch
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

MANUAL = ["--launch", "manual", "--coordinator", "host:1234", "--processes", "4", "--process", "3"]


def test_a_process_is_alone_unless_told():
    assert launch.take(["small", "--steps", "3"]) == (Launch(), ["small", "--steps", "3"])


def test_the_flags_may_stand_anywhere_and_the_other_words_stay_in_order():
    found, rest = launch.take(["small", *MANUAL[:4], "--steps", "3", *MANUAL[4:]])
    assert found == Launch("manual", "host:1234", 4, 3)
    assert rest == ["small", "--steps", "3"]
    assert launch.take(["--launch=auto"]) == (Launch("auto"), [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--launch", "slurm"], "--launch slurm is not known"),
        (MANUAL[:-2], "--process None is not"),
        ([*MANUAL[:-1], "4"], "--process 4 is not"),
        ([*MANUAL[:-1], "one"], "invalid int value: 'one'"),
        (["--coordinator", "host:1"], "are for --launch manual"),
        (["--launch", "auto", "--processes", "2"], "are for --launch manual"),
        (["--launch"], "expected one argument"),
    ],
)
def test_what_is_not_complete_is_refused(words, said):
    with pytest.raises(InputError, match=said):
        launch.take(words)


def test_a_resumed_run_may_be_computed_otherwise_and_nothing_else(tmp_path):
    stored = dataclasses.replace(PRESETS["tiny"], mesh=MeshConfig(2, 1, 2))
    config_json.write_json(tmp_path / "config.json", config_json.to_dict(stored))
    command = parse(["--resume", str(tmp_path), "--mesh.fsdp", "2", "--remat", "dots", *MANUAL])
    assert command.resume == tmp_path
    assert command.changes == Changes(MeshConfig(2, 2, 2), 1, "dots")
    assert command.launch.process == 3
    assert parse(["--resume", "runs/x"]).changes is None
    for words in (["--optim.lr", "1"], ["more"], ["--mesh.fsdp", "2", "--steps", "3"]):
        with pytest.raises(InputError, match="takes no"):
            parse(["--resume", str(tmp_path), *words])
    with pytest.raises(InputError, match="accumulate=3 does not divide"):
        parse(["--resume", str(tmp_path), "--accumulate", "3"])


def test_a_dry_run_is_of_a_configuration():
    command = parse(["moshi-7b", "--dry-run", "--steps", "3"])
    assert command.dry_run
    assert command.config.steps == 3
    with pytest.raises(InputError, match="--dry-run is for a new run"):
        parse(["--resume", "runs/x", "--dry-run"])
