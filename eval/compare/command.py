"""`python -m eval compare`: does memory help? Conditions on the same files, with statistics and a verdict in words."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from eval.results import folder as folders
from eval.results.schema import FRAMES, RESULTS, CheckpointInfo, FileInfo, Skipped
from eval.streaming.weighting import Weighting
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, cost, keep_compiled, machine
from ttt_jax.utils.paths import local

if TYPE_CHECKING:  # --again and --scores need neither jax nor models
    from eval.compare.conditions import Given
    from eval.compare.experiment import Condition, Experiment, Setting
    from eval.inputs.dataset import EvalFile

BROKEN = 1
"""Exit code if the losses of the first chunk show that the evaluation is faulty."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Does memory help? Compare conditions by file, with statistics and a verdict.

    A condition is [NAME=]CHECKPOINT[,CHECKPOINT...][@ARM]; several checkpoints are the seeds of one setting. ARM is one of

    persist: memory kept from the first frame to the last (unset: this).

    reset: memory cleared at the start of every chunk.

    frozen: fast weights stay at their learned start, no updates.

    off: gates closed, TTT layers add nothing (unset, without TTT layers: this).

    What exists as a path is a path, whatever =, commas and @ it has: runs/x@reset is a folder if there is one, runs/x/@reset never. The
    first condition is under test, each other is compared with it: better, equivalent, worse or undecided, by the file, or by the
    speaker where the manifest names them (docs/evaluation.md). A single one without @ARM stands for all four. Seeds pair in their
    order.

    python -m eval compare runs/NAME

    python -m eval compare kept=runs/kept-0,runs/kept-1 none=runs/none-0,runs/none-1 --data prepared --out results

    python -m eval compare --scores runs/NAME/eval

    Exit code: 0 done, 1 broken (persist and reset differ in the first chunk), 2 an input to mend, 3 done but some files were skipped.
    """

    conditions: Annotated[Positional[tuple[str, ...]], arg(metavar="[CONDITION ...]")] = ()
    """Conditions, as above; with --scores they name its checkpoints."""
    data: str | None = None
    """Manifest, folder that `python -m eval prepare` made, audio or codes; unset: the runs' own held-out files."""
    reset_every: Annotated[int | None, arg(metavar="N")] = None
    """Frames of a chunk, between resets; unset: a training chunk of the first run, or 1250."""
    frames: Annotated[int | None, arg(metavar="N")] = None
    """First frames of each file that are streamed; unset: all."""
    batch: Annotated[int | None, arg(metavar="N")] = None
    """Files side by side; unset: 8, or 1 in bfloat16."""
    weighting: Weighting = "equal"
    """How the codebooks become one loss."""
    margin: Annotated[float | None, arg(metavar="M")] = None
    """Nats within which conditions are equivalent; unset: 0.02."""
    threshold: Annotated[float | None, arg(metavar="P")] = None
    """Effect worth having, percent of the loss; unset: 10."""
    out: str | None = None
    """Folder for the results; unset: compare, or compare-DATA with --data, in the first checkpoint's folder. Results of the same data,
    checkpoints and question are replaced, a folder with other results is refused."""
    scores: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Compare what `python -m eval stream` or `compare` has stored in FOLDER, without streaming; unset conditions: the arms of its
    checkpoint, or its checkpoints; unset --out: beside FOLDER, with compare for eval in its name."""
    again: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Only do the statistics on the results in FOLDER again and write its report and figures anew; takes --margin, --threshold."""

    def __post_init__(self) -> None:
        for name in ("reset_every", "frames", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} is out of range: give 1 or more.")
        if self.again is not None and self.conditions:
            raise InputError(f"--again {self.again} takes no conditions (given: {self.conditions[0]}): leave them out.")
        fixed = ("data", "reset_every", "frames", "batch")
        for flag, without in (("again", (*fixed, "out", "scores")), ("scores", fixed)):
            given = [name for name in without if getattr(self, name) is not None]
            given += ["weighting"] if flag == "again" and self.weighting != "equal" else []
            if getattr(self, flag) is not None and given:
                raise InputError(
                    f"--{flag} {getattr(self, flag)} streams nothing, so --{given[0].replace('_', '-')} has no effect: leave it out, or"
                    f" stream anew without --{flag}."
                )
        if not self.conditions and self.again is None and self.scores is None:
            raise InputError("there is no condition: give a checkpoint, or --again and the folder of earlier results.")

    @property
    def rule(self) -> dict[str, float]:
        """Margin and threshold where they are given."""
        return {name: value for name in ("margin", "threshold") if (value := getattr(self, name)) is not None}


def main(options: Options) -> int:
    """Runs the command; returns the exit code: 0; 1 of a broken run; 3 if files were skipped. Raises `InputError`."""
    if options.again is not None:
        return again(local(options.again), options.rule)
    from eval.compare.stored import from_scores

    began = time.perf_counter()
    if options.scores is not None:
        experiment, about, folder = from_scores(options)
        code = finish(experiment, about, folder, _subject_of(experiment))
    else:
        code = _stream(options, began)
    print(f"took {time.perf_counter() - began:.0f} s and at most {cost()['peak_gigabytes']:.1f} GB of memory")
    return code


def again(folder: Path, rule: dict[str, float]) -> int:
    """Does the statistics on the results in `folder` again, by another margin or threshold in `rule`; returns the exit code."""
    from eval.compare import results

    experiment, about = results.read(folder)
    setting = dataclasses.replace(experiment.setting, **rule)
    return report(dataclasses.replace(experiment, setting=setting), about, folder)
