"""Command line of `python -m train`. It is read before jax is loaded."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.config import CHANGEABLE, PRESETS, TrainConfig, load
from ttt_jax.config import check, preset
from ttt_jax.distributed import launch
from ttt_jax.distributed.launch import Launch
from ttt_jax.utils import config_json
from ttt_jax.utils.command import parse as parse_options
from ttt_jax.utils.command import run
from ttt_jax.utils.paths import local

PROG = "python -m train"
DESCRIPTION = f"""Train a Moshi with TTT layers on speech; the layers' state is carried along each file.

  python -m train                              the preset "tiny" on the embedded corpus
  python -m train PRESET --optim.lr 1e-3       a preset with other values; presets: {", ".join(PRESETS)}
  python -m train PRESET --dry-run             parameters, memory and operations of a run; no weights needed
  python -m train PRESET --seeds 0,1,2         runs of several seeds side by side; python -m eval compare compares them
  python -m train --from RUN/config.json       a stored configuration again, in a new run folder
  python -m train --resume RUN                 go on from the latest checkpoint

The defaults below are those of the preset or of the stored configuration.
Exit code: 0 done, 2 an input is wrong, 3 done without files that are missing or whose predictions are not finite,
130 Ctrl-C, 143 SIGTERM."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run, and where."""

    from_: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN/config.json")] = None
    """Stored configuration to start from, in a new run folder; other fields override it."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Folder of the run to go on with; --mesh.*, --remat and --accumulate may change."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what a run takes, and stop."""
    seeds: Annotated[str | None, tyro.conf.arg(metavar="0,1,2")] = None
    """Seeds of runs that train side by side in one program, in folders that end in the seed."""
    launch: Annotated[Launch, tyro.conf.arg(name="")] = Launch()
    """How this process finds others."""

    def __post_init__(self) -> None:
        seeds = self.seeds.split(",") if self.seeds is not None else []
        check(
            all(seed.isdecimal() for seed in seeds) and len(set(seeds)) == len(seeds),
            f"--seeds {self.seeds!r} are no seeds: give different whole numbers from 0 on, joined by commas, such as"
            " 0,1,2.",
        )
        check(not (seeds and self.dry_run), "--dry-run shows what one run takes: leave --seeds out.")
        if self.resume is not None:
            check(self.from_ is None, "--from starts a new run and --resume goes on with one: leave one of them out.")
            check(not self.dry_run, "--dry-run is for a new run and --resume goes on with one: leave one of them out.")
            check(not seeds, f"--resume goes on with one run, but --seeds names {self.seeds}: resume each by itself.")


@dataclasses.dataclass(frozen=True)
class Command:
    """A whole command line."""

    preset: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="PRESET")] = None
    """Named configuration that the fields override; unset: tiny."""
    options: Annotated[Options, tyro.conf.arg(name="")] = Options()
    """Which run, and where."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    """Configuration of the run."""


def parse(args: Sequence[str]) -> tuple[Options, TrainConfig | None]:
    """Returns the options in `args` and the run's configuration, None if a run is resumed as it was.

    The words are read twice, since the preset, --from or --resume decides the defaults of all other fields.
    Raises `InputError`; exits with 0 on --help and with 2 on what tyro refuses.
    """
    args = list(args)
    name = args[0] if args and not args[0].startswith("-") else None
    options, fields = parse_options(Options, PROG, args, return_unknown_args=True, add_help=False)
    if options.resume is not None:
        if not fields:
            return options, None
        default = load(local(options.resume) / "config.json")
    else:
        default = preset(name or "tiny", PRESETS) if options.from_ is None else load(local(options.from_))
    # Its flags come in pairs such as --trainable.base and --trainable.no-base.
    default = Command(config=default)
    command = parse_options(Command, PROG, args, default=default, description=DESCRIPTION, config=())
    check(
        command.preset == name,
        f"the preset {command.preset} stands behind other arguments: put it first, right after `python -m train`.",
    )
    if options.from_ is not None:
        check(name is None, f"--from and the preset {name} are two configurations: leave one of them out.")
    if options.resume is not None:
        changed = name or _first_change(command.config, default.config)
        check(
            not changed,
            f"--resume goes on with the run's own configuration and takes no {changed}: use --from to change it in a"
            " new run.",
        )
    return options, command.config


def _first_change(config: TrainConfig, stored: TrainConfig) -> str | None:
    """The flag of the first field that a resumed run may not change."""
    old = _flags(config_json.to_dict(stored))
    for flag, value in _flags(config_json.to_dict(config)).items():
        field = flag.removeprefix("--").replace("-", "_")
        if value != old[flag] and not any(f"{field}.".startswith(f"{name}.") for name in CHANGEABLE):
            return flag
    return None


def _flags(values: dict, prefix: str = "--") -> dict:
    """The values of nested fields by flag."""
    flags = {}
    for name, value in values.items():
        flag = prefix + name.replace("_", "-")
        flags |= _flags(value, f"{flag}.") if isinstance(value, dict) else {flag: value}
    return flags


def main(args: Sequence[str]) -> int:
    """Runs the command line `args` and returns the exit code."""
    log = logging.getLogger("train")
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False
    options, config = parse(args)
    launch.start(options.launch)
    from train import loop, setup

    if options.resume is not None:
        fields = {name.split(".")[0] for name in CHANGEABLE}
        changes = {} if config is None else {field: getattr(config, field) for field in fields}
        return loop.resume(local(options.resume), **changes)
    if options.dry_run:
        return loop.dry_run(config)
    return loop.start(setup.over_seeds(config, map(int, options.seeds.split(","))) if options.seeds else [config])


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
