"""Entry of `python -m train`: reads the command line first, loads jax only for a run that can start."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from train import config
from ttt_jax.errors import InputError


def main(args: Sequence[str]) -> int:
    """Run the command line `args`; the exit code: 0 done, 2 an input to mend, 130 interrupted."""
    log = logging.getLogger("train")
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        command = config.parse(args)
        from train import loop

        if command.resume is not None:
            return loop.resume(command.resume)
        return loop.start(command.config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
