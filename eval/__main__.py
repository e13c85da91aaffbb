"""Entry of `python -m eval`: finds the command's module and imports that one only."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ttt_jax.errors import InputError
from ttt_jax.utils.command import parse, run

COMMANDS = {
    "prepare": ("eval.prepare", "audio to files of codes"),
    "tasks": ("eval.tasks.command", "data sets for which the best possible loss is known"),
    "make-mini": ("eval.mini.command", "small benchmarks of synthetic speech, in the official layouts"),
    "stream": ("eval.streaming.command", "losses on speech, frame by frame, with memory kept, reset, frozen and off"),
    "generate": ("eval.generating.command", "recordings of the user in, Moshi's voice and text out"),
    "draw": ("eval.streaming.draw", "table and figures of stored results again"),
    "compare": ("eval.compare.command", "does memory help? conditions by file, with statistics and a verdict"),
    "check-state": ("eval.check_state.command", "whether the fast weights persist: PASS or FAIL"),
    "diagnose": ("eval.diagnose.command", "what the TTT layers do beside attention, record by record"),
    "swuggy": ("eval.benchmarks.commands.swuggy", "words against non-words: accuracy by pair"),
    "sblimp": ("eval.benchmarks.commands.sblimp", "grammatical sentences against ungrammatical ones"),
    "storycloze": ("eval.benchmarks.commands.storycloze", "right endings of spoken stories against wrong ones"),
    "salmon": ("eval.benchmarks.commands.salmon", "recordings that stay consistent against recordings that do not"),
    "suite": ("eval.benchmarks.commands.suite", "all benchmarks of pairs that lie in a folder, one summary"),
    "recall": ("eval.recall.command", "spoken recall: what is left of an excerpt that was heard before a gap"),
    "report": ("eval.report.command", "one HTML page over many results"),
}
"""Module and help of each command; a module has a dataclass `Options` and `main(options)`, returning the exit code."""


def main(args: Sequence[str]) -> int:
    """Runs the command line `args`; returns the exit code. Raises `InputError` if there is no such command."""
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: python -m eval COMMAND [--help] ...\n\nEvaluate what `python -m train` made.\n")
        print("\n".join(f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()))
        return 0 if args else 2
    name, *rest = args
    if name not in COMMANDS:
        raise InputError(f"there is no command {name}: give one of {', '.join(COMMANDS)}.")
    module = importlib.import_module(COMMANDS[name][0])
    return module.main(parse(module.Options, f"python -m eval {name}", rest))


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
