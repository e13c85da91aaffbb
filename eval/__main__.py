"""Entry of `python -m eval`: reads the command line first, loads jax only for what can start."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ttt_jax.command import run


def main(args: Sequence[str]) -> int:
    """Run the command line `args`; the exit code: 0 done, 2 an input to mend."""
    parser = argparse.ArgumentParser(prog="python -m eval", description="Evaluate what `python -m train` made.")
    tasks = parser.add_subparsers(dest="task", required=True)
    stream = tasks.add_parser("stream", help="held-out files frame by frame, memory kept, reset, frozen and off")
    stream.add_argument("run_dir", metavar="RUN", help="folder of a run")
    stream.add_argument("--out", help="folder for the results; unset: RUN/eval")
    options = parser.parse_args(args)
    from eval import heldout

    return heldout.of_run(options.run_dir, options.out)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
