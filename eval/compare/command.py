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
from eval.results.schema import FRAMES, RESULTS, Skipped
from eval.streaming.weighting import Weighting
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, cost, keep_compiled, machine
from ttt_jax.utils.paths import local

if TYPE_CHECKING:
    from eval.compare.analysis import Analysis
    from eval.compare.conditions import Given
    from eval.compare.experiment import Experiment

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
    or undecided, by the file, or by the speaker where the manifest names them (docs/evaluation/compare.md). A single
    one without @ARM stands for all four. Seeds pair in their order.

    python -m eval compare kept=runs/kept-0,runs/kept-1 none=runs/none-0,runs/none-1 --data prepared --out results

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
        for flag, without in (("again", (*fixed, "out", "scores", "weighting")), ("scores", fixed)):
            given = [name for name in without if getattr(self, name) not in (None, "equal")]
            if getattr(self, flag) is not None and given:
                raise InputError(
                    f"--{flag} {getattr(self, flag)} streams nothing, so --{given[0].replace('_', '-')} has no"
                    f" effect: leave it out, or stream anew without --{flag}."
                )
        if not self.conditions and self.again is None and self.scores is None:
            raise InputError(
                "there is no condition: give a checkpoint, or --again or --scores and the folder of earlier results."
            )

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
    from eval.compare.conditions import ARMS, conditions, parse
    from eval.compare.experiment import plan
    from eval.compare.losses import collect
    from eval.inputs import evaluation_set
    from eval.streaming.command import RESET_EVERY
    from eval.streaming.score_files import checkpoint_info, file_infos, score_files
    from ttt_jax.checkpoints import loading

    began = time.perf_counter()
    given = _spelled_alike([parse(text) for text in options.conditions])
    paths = list(dict.fromkeys(path for condition in given for path in condition.paths))
    checkpoints = loading.load_all(paths, keep=len(paths) == 1)
    keep_compiled(checkpoints[0].cache_dir / "compiled")
    infos = [checkpoint_info(checkpoint, brief=True) for checkpoint in checkpoints]
    compared = conditions(given, dict(zip(paths, infos, strict=True)))
    files, skipped, _ = evaluation_set.load(options.data, checkpoints, options.frames)
    experiment = plan(
        compared,
        infos,
        file_infos(files),
        skipped,
        chunk=options.reset_every or checkpoints[0].chunk or RESET_EVERY,
        weighting=options.weighting,
        about={"data": options.data, "codec": files[0].codec},
        **options.rule,
    )
    folder = folders.find(options.out, "compare", paths[0], options.data)
    folders.make(folder)
    replaced(folder, experiment)  # errors are reported before the work
    several = f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) > 1)}"
    print(f"streaming {len(files)} files through {several} under {len(compared)} conditions ...", flush=True)
    arms = {
        info.name: [arm for arm in ARMS if any(pair.arm == arm and info.name in pair.checkpoints for pair in compared)]
        for info in infos
    }
    with folders.staged(folder) as new:
        outcome = score_files(
            checkpoints, files, arms, new, reset_every=experiment.setting.chunk, batch=options.batch, losses_only=True
        )
        scored = [file for file in files if file.name not in outcome.failed]
        experiment = dataclasses.replace(
            experiment,
            files=[info for info in experiment.files if info.name not in outcome.failed],
            skipped=[*skipped, *(Skipped(name, reason) for name, reason in outcome.failed.items())],
        )
        experiment = collect(new, experiment, task_bounds(experiment, scored))
        spent = cost() | {"seconds": round(time.perf_counter() - began, 1)}
        code = _finish(experiment, {"evaluated_with": machine(), "cost": spent}, folder, new)
    print(f"took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
    return code


def _from_scores(options: Options) -> int:
    """Compares scores that an evaluation has stored; returns the exit code."""
    from eval.compare import stored
    from eval.compare.bounds import stored_tokens, task_bounds
    from eval.compare.conditions import Given, conditions, parse
    from eval.compare.experiment import plan
    from eval.compare.losses import collect

    source = local(options.scores)
    evaluation = stored.read(source)
    known, data = evaluation.checkpoints, evaluation.about["data"]
    given = [parse(text, known) for text in options.conditions] or [Given(None, (name,), None) for name in known]
    compared = conditions(given, known, evaluation.arms)
    names = dict.fromkeys(name for condition in compared for name in condition.checkpoints)
    experiment = plan(
        compared,
        [known[name] for name in names],
        evaluation.files,
        evaluation.skipped,
        chunk=evaluation.reset_every,
        weighting=options.weighting,
        about=evaluation.about | {"scores": str(source)},
        **options.rule,
    )
    place = Path(os.path.abspath(source))
    kind = next((kind for kind in ("eval", "compare") if place.name.startswith(kind)), None)
    beside = place.with_name(f"compare{place.name.removeprefix(kind)}" if kind else f"compare-{place.name}")
    folder = local(options.out) if options.out is not None else beside
    if os.path.realpath(folder) == os.path.realpath(source):
        raise InputError(f"--scores {source} is the folder of the results, too: give another folder by --out.")
    folders.make(folder)
    replaced(folder, experiment)
    experiment = collect(source, experiment, task_bounds(experiment, stored_tokens(data, evaluation.files)))
    with folders.staged(folder) as new:
        return _finish(experiment, evaluation.measured_with, folder, new)


def _finish(experiment: Experiment, about: dict[str, Any], folder: Path, new: Path) -> int:
    """Compares, moves results and the files in `new` to `folder`, and reports; returns the exit code."""
    from eval.compare import losses, results
    from eval.compare.analysis import analyse

    analysis = analyse(experiment)
    losses.write(new, experiment)
    results.write(new, experiment, analysis, about)
    # Checked again: another command may have written there meanwhile.
    old = replaced(folder, experiment)
    if not (new / FRAMES).exists():  # statistics on scores that lie elsewhere: frames of the same experiment stay
        old = [name for name in old if name != FRAMES]
    folders.replace(folder, new, old)
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


def _spelled_alike(given: Sequence[Given]) -> list[Given]:
    """Returns `given` with each checkpoint under the first path that it is given by."""
    first: dict[str, str] = {}
    return [
        condition._replace(paths=tuple(first.setdefault(os.path.realpath(path), path) for path in condition.paths))
        for condition in given
    ]


def replaced(folder: Path, experiment: Experiment) -> list[str]:
    """Returns names of the earlier results in `folder` that results of `experiment` replace.

    Raises `InputError` if they are not to be replaced.
    """
    from eval.compare import losses, plots, results
    from eval.compare import report as words

    names = [FRAMES, losses.LOSSES, words.FILE, *plots.FILES]
    stored = folders.stored(folder, results.read, names)
    if stored is None:
        return []
    old, _ = stored
    folders.check(folder, _subject(old), _subject(experiment))
    folders.check_frames(folder, old.checkpoints, old.files)
    return names


def _subject(experiment: Experiment) -> folders.Subject:
    """Returns the subject of an experiment; conditions count by arm and checkpoints, not by name."""
    pairs = {info.name: folders.checkpoint(info.name, info.about) for info in experiment.checkpoints}
    by_condition = [
        (f"{pairs[name][0]} under {condition.arm}", f"{pairs[name][1]} {condition.arm}")
        for condition in experiment.conditions
        for name in condition.checkpoints
    ]
    question = {
        "seeds by condition": [len(condition.checkpoints) for condition in experiment.conditions],
        "--reset-every": experiment.setting.chunk,
        "--weighting": experiment.setting.weighting,
    }
    data = experiment.setting.about.get("data")
    return folders.subject(data, experiment.files, experiment.skipped, by_condition, question)
