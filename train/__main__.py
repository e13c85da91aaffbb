"""Entry of `python -m train`: reads the command line first, loads jax only for a run that can start."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from train import config
from ttt_jax.distributed import launch
from ttt_jax.utils.command import run


def main(args: Sequence[str]) -> int:
    """Run the command line `args`; the exit code: 0 done, 2 an input to mend, 3 done without files that are not there, 130 Ctrl-C, 143 SIGTERM."""
    log = logging.getLogger("train")
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False
    command = config.parse(args)
    launch.start(command.launch)
    from train import loop, setup

    if command.config is None:
        return loop.resume(command.resume, **command.changes or {})
    if command.dry_run:
        return loop.dry_run(command.config)
    return loop.start(setup.over_seeds(command.config, command.seeds) if command.seeds else [command.config])


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
