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

if TYPE_CHECKING:
    from eval.compare.analysis import Analysis
    from eval.compare.conditions import Given
    from eval.compare.experiment import Condition, Experiment, Setting

BROKEN = 1
"""Exit code if the losses of the first chunk show that the evaluation is faulty."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Does memory help? Compare conditions by file, with statistics and a verdict.

    A condition is [NAME=]CHECKPOINT[,CHECKPOINT...][@ARM]; several checkpoints are the seeds of one setting. ARM is one
    of

    persist: memory kept from the first frame to the last (unset: this).

    reset: memory cleared at the start of every chunk.

    frozen: fast weights stay at their learned start, no updates.

    off: gates closed, TTT layers add nothing (unset, without TTT layers: this).

    What exists as a path is a path, whatever =, commas and @ it has: runs/x@reset is a folder if there is one,
    runs/x/@reset never. The first condition is under test, each other is compared with it: better, equivalent, worse
    or undecided, by the file, or by the speaker where the manifest names them (docs/evaluation.md). A single one
    without @ARM stands for all four. Seeds pair in their order.

    python -m eval compare runs/NAME

    python -m eval compare kept=runs/kept-0,runs/kept-1 none=runs/none-0,runs/none-1 --data prepared --out results

    python -m eval compare --scores runs/NAME/eval

    Exit code: 0 done, 1 broken (persist and reset differ in the first chunk), 2 an input to mend, 3 done but some files
    were skipped.
    """

    conditions: Annotated[Positional[tuple[str, ...]], arg(metavar="[CONDITION ...]")] = ()
    """Conditions, as above; with --scores they name its checkpoints."""
    data: Annotated[str | None, arg(metavar="PATH")] = None
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
    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder for the results; unset: compare, or compare-DATA with --data, in the first checkpoint's folder. Results of
    the same data, checkpoints and question are replaced, a folder with other results is refused."""
    scores: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Compare what `python -m eval stream` or `compare` has stored in FOLDER, without streaming; unset conditions: the
    arms of its checkpoint, or its checkpoints; unset --out: beside FOLDER, with compare for eval in its name."""
    again: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Only do the statistics on the results in FOLDER again and write its report and figures anew; takes --margin,
    --threshold."""

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
                    f"--{flag} {getattr(self, flag)} streams nothing, so --{given[0].replace('_', '-')} has no"
                    f" effect: leave it out, or stream anew without --{flag}."
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
    return _from_scores(options) if options.scores is not None else _stream(options)


def again(folder: Path, rule: dict[str, float]) -> int:
    """Does the statistics on the results in `folder` again, by the margin or threshold in `rule`; returns the exit
    code."""
    from eval.compare import results
    from eval.compare.analysis import analyse

    experiment, about = results.read(folder)
    experiment = dataclasses.replace(experiment, setting=dataclasses.replace(experiment.setting, **rule))
    analysis = analyse(experiment)
    results.write(folder, experiment, analysis, about)
    return report(experiment, analysis, about, folder)


def _stream(options: Options) -> int:
    """Streams the files through the checkpoints, stores the losses, and compares; returns the exit code."""
    from eval.compare.bounds import task_bounds
    from eval.compare.conditions import conditions, parse
    from eval.compare.experiment import setting_of
    from eval.compare.losses import collect
    from eval.inputs import checkpoints as loading
    from eval.inputs import evaluation_set
    from eval.streaming.command import RESET_EVERY
    from eval.streaming.score_files import checkpoint_info, file_infos, score_files

    began = time.perf_counter()
    given = _spelled_alike([parse(text) for text in options.conditions])
    paths = list(dict.fromkeys(path for condition in given for path in condition.paths))
    checkpoints = loading.load_all(paths, keep=len(paths) == 1)
    keep_compiled(checkpoints[0].cache_dir / "compiled")
    infos = [checkpoint_info(checkpoint, brief=True) for checkpoint in checkpoints]
    compared = conditions(given, dict(zip(paths, infos, strict=True)))
    files, skipped, _ = evaluation_set.load(options.data, checkpoints, options.frames)
    file_records = file_infos(files)
    setting = setting_of(
        infos,
        file_records,
        chunk=options.reset_every or checkpoints[0].chunk or RESET_EVERY,
        weighting=options.weighting,
        about={"data": options.data, "codec": files[0].codec},
        **options.rule,
    )
    folder = folders.find(options.out, "compare", paths[0], options.data)
    subject = _subject(file_records, skipped, compared, infos, setting)
    folders.make(folder)
    replaced(folder, subject)  # errors are reported before the work
    print(
        f"streaming {len(files)} files through {len(checkpoints)} checkpoint{'s' * (len(checkpoints) > 1)} under"
        f" {len(compared)} conditions ...",
        flush=True,
    )
    arms = {info.name: arms_of(compared, info.name) for info in infos}
    with folders.staged(folder) as new:
        outcome = score_files(
            checkpoints, files, arms, new, reset_every=setting.chunk, batch=options.batch, losses_only=True
        )
        scored = [i for i, file in enumerate(files) if file.name not in outcome.failed]
        experiment = collect(
            new,
            setting,
            compared,
            infos,
            [file_records[i] for i in scored],
            [*skipped, *(Skipped(name, reason) for name, reason in outcome.failed.items())],
            task_bounds(options.data, [files[i] for i in scored], setting, infos),
        )
        spent = cost() | {"seconds": round(time.perf_counter() - began, 1)}
        code = _finish(experiment, {"evaluated_with": machine(), "cost": spent}, folder, subject, new)
    print(f"took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
    return code


def _from_scores(options: Options) -> int:
    """Compares scores that an evaluation has stored; returns the exit code."""
    from eval.compare import stored
    from eval.compare.bounds import stored_tokens, task_bounds
    from eval.compare.experiment import setting_of
    from eval.compare.losses import collect

    source = local(options.scores)
    evaluation = stored.read(source)
    compared = stored.conditions(evaluation, options.conditions, source)
    names = list(dict.fromkeys(name for condition in compared for name in condition.checkpoints))
    infos = [evaluation.checkpoints[name] for name in names]
    data, files = evaluation.about.get("data"), evaluation.files
    setting = setting_of(
        infos,
        files,
        chunk=evaluation.reset_every,
        weighting=options.weighting,
        about=evaluation.about | {"scores": str(source)},
        **options.rule,
    )
    beside = source.with_name("compare" + source.name.removeprefix("eval").removeprefix("compare"))
    folder = local(options.out) if options.out is not None else beside
    if os.path.realpath(folder) == os.path.realpath(source):
        raise InputError(f"--scores {source} is the folder of the results, too: give another folder by --out.")
    subject = _subject(files, evaluation.skipped, compared, infos, setting)
    folders.make(folder)
    replaced(folder, subject)
    bounds = task_bounds(data, stored_tokens(data, files), setting, infos)
    experiment = collect(source, setting, compared, infos, files, evaluation.skipped, bounds)
    with folders.staged(folder) as new:
        return _finish(experiment, evaluation.measured_with, folder, subject, new)


def _finish(experiment: Experiment, about: dict[str, Any], folder: Path, subject: folders.Subject, new: Path) -> int:
    """Compares, moves results and what is in `new` to `folder`, and reports; returns the exit code."""
    from eval.compare import losses, results
    from eval.compare.analysis import analyse

    analysis = analyse(experiment)
    losses.write(new, experiment)
    results.write(new, experiment, analysis, about)
    folders.replace(
        folder, new, replaced(folder, subject)
    )  # checked again: another command may have written there meanwhile
    return report(experiment, analysis, about, folder)


def report(experiment: Experiment, analysis: Analysis, about: dict[str, Any], folder: Path) -> int:
    """Prints the table and writes figures and report.md to `folder`, which holds the results; returns the exit code."""
    from eval.compare import losses, plots
    from eval.compare import report as words

    print(f"\n{words.table(experiment, analysis)}\n")
    for name in (words.FILE, *plots.FILES):
        (folder / name).unlink(missing_ok=True)  # report and figures must not stem from two experiments
    written = [*plots.draw_all(experiment, analysis, folder), words.write(folder, experiment, analysis, about)]
    for path in (folder / RESULTS, folder / losses.LOSSES, *written):
        print(path)
    if analysis.first_chunk.broken:
        return BROKEN
    return PARTIAL if experiment.skipped else 0


def arms_of(compared: Sequence[Condition], checkpoint: str) -> list[str]:
    """Returns the arms of a checkpoint in the conditions, in the order of reports."""
    from eval.compare.conditions import ARMS

    arms = {condition.arm for condition in compared if checkpoint in condition.checkpoints}
    return [arm for arm in ARMS if arm in arms]


def _spelled_alike(given: Sequence[Given]) -> list[Given]:
    """Returns `given` with each checkpoint under the first path that it is given by."""
    first: dict[str, str] = {}
    for path in (path for condition in given for path in condition.paths):
        first.setdefault(os.path.realpath(path), path)
    return [
        condition._replace(paths=tuple(first[os.path.realpath(path)] for path in condition.paths))
        for condition in given
    ]


def replaced(folder: Path, subject: folders.Subject) -> list[str]:
    """Returns names of the earlier results in `folder` that results of `subject` replace.

    Raises `InputError` if what is there is not to be replaced.
    """
    from eval.compare import losses, plots, results
    from eval.compare import report as words

    def read(folder: Path) -> tuple[Experiment, folders.Subject]:
        earlier, _ = results.read(folder)
        return earlier, _subject(
            earlier.files, earlier.skipped, earlier.conditions, earlier.checkpoints, earlier.setting
        )

    names = [FRAMES, losses.LOSSES, words.FILE, *plots.FILES]
    stored = folders.stored(folder, read, names)
    if stored is None:
        return []
    earlier, old = stored
    folders.check(folder, old, subject)
    folders.check_frames(folder, earlier.checkpoints, earlier.files)
    return names


def _subject(
    files: Sequence[FileInfo],
    skipped: Sequence[Skipped],
    compared: Sequence[Condition],
    checkpoints: Sequence[CheckpointInfo],
    setting: Setting,
) -> folders.Subject:
    """Returns the subject of an experiment; conditions count by arm and checkpoints, not by name."""
    pairs = {info.name: folders.checkpoint(info.name, info.about) for info in checkpoints}
    by_condition = [
        (f"{pairs[name][0]} under {condition.arm}", f"{pairs[name][1]} {condition.arm}")
        for condition in compared
        for name in condition.checkpoints
    ]
    question = {
        "seeds by condition": [len(condition.checkpoints) for condition in compared],
        "--reset-every": setting.chunk,
        "--weighting": setting.weighting,
    }
    return folders.subject(setting.about.get("data"), files, skipped, by_condition, question)
