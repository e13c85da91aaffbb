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
    "draw": ("eval.streaming.plots", "table and figures of stored results again"),
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

OUT = (
    "folder for the results; unset: {kind}, or {kind}-DATA with --data, in {whose} folder, DATA being the whole name; results of the"
    " same data, checkpoints and question are replaced, a folder with others is refused"
)
WEIGHTINGS = ("equal", "kyutai", "semantic", "acoustic")
"""Names in `eval.streaming.summary.WEIGHTINGS`, whose module takes a while to load."""


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


def _stream(parser: argparse.ArgumentParser) -> None:
    """Flags of `stream`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """arms (same weights, files, attention and tokens; only the fast weights differ):
  persist   memory kept from the first frame to the last
  reset     memory cleared every --reset-every frames
  frozen    fast weights held at their learned start, no updates
  off       gates closed, TTT layers add nothing
  permuted  every --reset-every frames what persist has learned on another speaker's file, as long as that goes on
            (a control; not among the default arms)

exit code: 0 done, 2 an input to mend, 3 done but some files were skipped"""
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help="folder of a run, of one of its checkpoints (RUN/checkpoints/STEP), or of converted weights; several are compared",
    )
    parser.add_argument(
        "--data",
        help="manifest, folder that `python -m eval prepare` made, audio or codes; unset: the run's own held-out files",
    )
    parser.add_argument("--arms", help="some of the arms below, joined by commas; unset: persist,reset,frozen,off")
    parser.add_argument(
        "--reset-every",
        type=int,
        metavar="N",
        help="frames between resets; unset: a training chunk of the run, or 1250",
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", help="first frames of each file that are streamed; unset: all"
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="most frames of a call, memory against time; it changes no number"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="files side by side; unset: 8, or 1 in bfloat16 (permuted: at least 2)"
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="frames that a position averages; unset: 250, or 125 for files below 2,000",
    )
    parser.add_argument(
        "--weighting",
        choices=WEIGHTINGS,
        default="equal",
        help="how the codebooks become one loss in tables and figures (kyutai: 100 on the first); all are stored",
    )
    parser.add_argument(
        "--figure5",
        action=argparse.BooleanOptionalAction,
        help="measure the inner losses; unset: where there are TTT layers",
    )
    parser.add_argument("--out", help=OUT.format(kind="eval", whose="the first checkpoint's"))


def _draw(parser: argparse.ArgumentParser) -> None:
    """Flags of `draw`."""
    parser.epilog = "results.json stays as it is: it records the evaluation."
    parser.add_argument("folder", metavar="OUT", help="folder of the results, such as runs/NAME/eval")
    parser.add_argument("--weighting", choices=WEIGHTINGS, help="of the codebooks; unset: as stored")
    parser.add_argument("--window", type=int, metavar="N", help="frames that a position averages; unset: as stored")


def _compare(parser: argparse.ArgumentParser) -> None:
    """Flags of `compare`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """a condition is [NAME=]CHECKPOINT[,CHECKPOINT...][@ARM]: several checkpoints are the seeds of one setting; ARM is one of
  persist   memory kept from the first frame to the last (unset: this)
  reset     memory cleared at the start of every chunk
  frozen    fast weights held at their learned start, no updates
  off       gates closed, TTT layers add nothing (unset, without TTT layers: this)
What exists as a path is a path, whatever =, commas and @ it has: runs/x@reset is a folder if there is one, runs/x/@reset never.
The first condition is under test, each other is compared with it: better, equivalent, worse or undecided, by the file, or by the
speaker where the manifest names them (docs/evaluation.md). A single one without @ARM stands for all four. Seeds pair in their order.

  python -m eval compare runs/NAME
  python -m eval compare kept=runs/kept-0,runs/kept-1 none=runs/none-0,runs/none-1 --data prepared --out results

exit code: 0 done, 1 broken (persist and reset differ in the first chunk), 2 an input to mend, 3 done but some files were
skipped"""
    add = parser.add_argument
    add("conditions", metavar="CONDITION", nargs="*", help="what is compared, see below")
    add(
        "--data",
        help="manifest, folder that `python -m eval prepare` made, audio or codes; unset: the runs' own held-out files",
    )
    add(
        "--reset-every",
        type=int,
        metavar="N",
        help="frames of a chunk, between resets; unset: a training chunk of the first run, or 1250",
    )
    add("--frames", type=int, metavar="N", help="first frames of each file that are streamed; unset: all")
    add("--batch", type=int, metavar="N", help="files side by side; unset: 8, or 1 in bfloat16")
    add("--weighting", choices=WEIGHTINGS, default="equal", help="how the codebooks become one loss; %(default)s")
    add("--margin", type=float, metavar="M", help="nats within which conditions are equivalent; unset: 0.02")
    add("--threshold", type=float, metavar="P", help="effect worth having, percent of the loss; unset: 10")
    add(
        "--out",
        help=OUT.format(kind="compare", whose="the first checkpoint's"),
    )
    add(
        "--again",
        metavar="FOLDER",
        help="only do the statistics on the results in FOLDER again and write its report and figures anew; takes --margin, --threshold",
    )


def _legacy(name: str, args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m eval {name}")
    {"prepare": _prepare, "stream": _stream, "draw": _draw, "compare": _compare}[name](parser)
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
