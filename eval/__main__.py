"""Entry of `python -m eval`: reads the command line first, loads jax only for what can start."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ttt_jax.data.sources import LAYOUTS
from ttt_jax.utils.command import run

TASK_NAMES = {
    "recall": "facts told early are asked for later",
    "speaker": "a speaker's few tokens are learned once",
    "control": "nothing to remember",
}
"""Names in `eval.benchmarks.tasks.TASKS`."""
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


def _tasks(parser: argparse.ArgumentParser) -> None:
    """Flags of `tasks`."""
    add = parser.add_argument
    add("task", choices=tuple(TASK_NAMES), help="; ".join(f"{name}: {what}" for name, what in TASK_NAMES.items()))
    add(
        "--out",
        metavar="FOLDER",
        required=True,
        help="where the code files, manifest.jsonl and task.json go; new or empty",
    )
    add("--files", type=int, default=64, metavar="N", help="%(default)s")
    add("--frames", type=int, default=512, metavar="N", help="length of a file; %(default)s")
    add(
        "--every",
        type=int,
        default=16,
        metavar="N",
        help="behind the start, frames for each question (recall, control) or each token (speaker); %(default)s",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="give files to train on and files to test on different ones; %(default)s",
    )
    parser.epilog = (
        "Train on the folder with --data.train FOLDER --data.codec files --data.from-start --loss.text 0: what there is to know"
        " stands at the start of each file, and its text is padding. See docs/evaluation.md."
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


def _check_state(parser: argparse.ArgumentParser) -> None:
    """Flags of `check-state`."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", help="a run or converted weights; unset: an untrained tiny"
    )
    parser.add_argument(
        "--audio",
        metavar="FILE",
        help="audio, codes (.safetensors) or a manifest, whose first file is taken; unset: embedded speech, held out",
    )
    parser.add_argument(
        "--frames", type=int, default=50, metavar="N", help="frames to stream (80 ms each); %(default)s"
    )
    parser.epilog = (
        "Streams a recording frame by frame and prints, frame by frame, a digest of the fast weights, then a line for each"
        " property: they change at every frame, build on the frame before, survive saving, are cleared by a reset of their"
        " row alone, do not depend on other rows, leave the parameters alone, and are the same in calls of any length."
        " The last line is PASS (exit code 0) or FAIL (1)."
    )


def _diagnose(parser: argparse.ArgumentParser) -> None:
    """Flags of `diagnose`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", help="folder of a run or of converted weights")
    add(
        "--data",
        metavar="FILE",
        help="audio, codes (.safetensors) or a manifest, whose first file is taken; unset: the run's held-out files, or the"
        " embedded ones",
    )
    add("--every", type=int, default=100, metavar="N", help="frames from one record to the next; %(default)s")
    add("--frames", type=int, metavar="N", help="first frames that are streamed; unset: all")
    add("--chunk", type=int, metavar="N", help="most frames of a call between records, 1: a live stream; unset: 128")
    add("--compare", metavar="OTHER", help="a second checkpoint, on the same audio: both side by side")
    add(
        "--out",
        metavar="FOLDER",
        help=OUT.format(kind="diagnose", whose="CHECKPOINT's") + "; with --compare diagnose-OTHER",
    )
    add("--draw", metavar="FOLDER", help="only draw the figures again from the records in FOLDER")
    parser.epilog = (
        "A record of a frame and TTT layer says how large the stream after attention, which the layer reads, and the layer's"
        " output are and how they stand to each other, how far the gate is open, what has changed since the record before,"
        " how far the fast weights have moved and what they know of the frame. Printed, stored as records.jsonl and drawn as"
        " diagnose.png and diagnose.pdf. Between records nothing is measured, so they cost next to nothing."
    )


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


COMMANDS = {
    "prepare": ("eval.prepare", _prepare, "audio to cached codes"),
    "tasks": ("eval.benchmarks.tasks", _tasks, "data sets in which what memory is worth is known"),
    "stream": ("eval.streaming.command", _stream, "speech frame by frame, memory kept, reset, frozen and off"),
    "draw": ("eval.streaming.plots", _draw, "the table and the figures of stored results again"),
    "compare": (
        "eval.compare.command",
        _compare,
        "does memory help? conditions compared by file, with statistics and a verdict",
    ),
    "check-state": (
        "eval.check_state",
        _check_state,
        "whether the fast weights persist: PASS or FAIL",
    ),
    "diagnose": ("eval.diagnose.command", _diagnose, "what TTT layers do beside attention, record by record"),
}
"""By name: the module whose `main(options)` returns the exit code, its flags, and what it is for."""


def main(args: Sequence[str]) -> int:
    """Run the command line `args`; the exit code: 0 done, 2 an input to mend."""
    parser = argparse.ArgumentParser(prog="python -m eval", description="Evaluate what `python -m train` made.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, add, purpose) in COMMANDS.items():
        add(commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + "."))
    options = parser.parse_args(args)
    return importlib.import_module(COMMANDS[options.command][0]).main(options)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
