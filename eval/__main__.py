"""Entry of `python -m eval`: finds the command's module and imports that one only."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ttt_jax.data.sources import LAYOUTS
from ttt_jax.errors import InputError
from ttt_jax.utils.command import parse, run

COMMANDS = {
    "prepare": ("eval.prepare", "audio to files of codes"),
    "tasks": ("eval.benchmarks.tasks", "data sets for which the best possible loss is known"),
    "stream": (
        "eval.streaming.command",
        "losses on speech, frame by frame, with the memory kept, reset, frozen and off",
    ),
    "draw": ("eval.streaming.draw", "table and figures of stored results again"),
    "compare": ("eval.compare.command", "does memory help? conditions by file, with statistics and a verdict"),
    "check-state": ("eval.check_state.command", "whether the fast weights persist: PASS or FAIL"),
    "diagnose": ("eval.diagnose.command", "what the TTT layers do beside attention, record by record"),
}
"""By name: the module, which has a dataclass `Options` and a function `main(options)` that returns the exit code; its help."""


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
    if not hasattr(module, "Options"):
        return module.main(_legacy(name, rest))
    return module.main(parse(module.Options, f"python -m eval {name}", rest))


# Builders for the modules that have no `Options` yet.


def _prepare(parser: argparse.ArgumentParser) -> None:
    """Flags of `prepare`."""
    add = parser.add_argument
    add(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="audio file, folder of audio, or manifest (JSON Lines, as moshi-finetune)",
    )
    add("--out", metavar="FOLDER", required=True, help="where codes and manifest.jsonl go; may hold earlier ones")
    add("--codec", default="kmeans", help='"kmeans" (the embedded one) or a codec file; unset: kmeans')
    add("--tokenizer", metavar="FILE", help="SentencePiece model for alignments; unset: the embedded one")
    add(
        "--voice",
        choices=("own", "other"),
        default="own",
        help="which voice speaks on the left or only channel: the model's own or the other; unset: own",
    )
    add("--join", action="store_true", help="one stream for each book, speaker or folder")
    add(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="how sources are laid out; unset: seen from their files",
    )
    parser.epilog = (
        "Interrupted? Run the same again: what is encoded stays. Exit code: 0 all is encoded; 2 nothing is, an input is to"
        " be mended; 3 some recordings were unusable, were named and left out; 130 interrupted. See docs/data.md."
    )


def _legacy(name: str, args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m eval {name}")
    _prepare(parser)
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
