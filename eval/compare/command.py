"""`python -m eval compare`: does memory help? Conditions on the same files, loss by chunk, statistics and a verdict in words."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.compare import plots as draw
from eval.compare import report
from eval.compare.analysis import analyse, read, write
from eval.compare.conditions import ARMS, conditions, parse
from eval.compare.experiment import MARGIN, THRESHOLD, Bounds, Condition, Experiment, File, Setting
from eval.results import folder as folders
from eval.streaming.summary import weights
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, cost, keep_compiled, machine, shortened
from ttt_jax.utils.paths import local

if TYPE_CHECKING:  # --again needs neither jax nor models
    from eval.compare.conditions import Asked
    from eval.inputs.checkpoints import Checkpoint
    from eval.inputs.dataset import EvalFile
    from eval.streaming.scores import FileScores

BROKEN = 1
"""Exit code of a run whose first chunk says that something is wrong."""

DIGITS = 9
"""Decimals of losses: what is stored is what is analysed, so that --again gives the same numbers."""


def main(options: argparse.Namespace) -> int:
    """Compare what `options` ask for, or do the statistics of an earlier comparison again.

    Returns:
      The exit code: 0; 1 of a broken run; 3 if files were skipped.

    Raises:
      InputError: something asked for cannot be.
    """
    if options.again is not None:
        if options.conditions:
            raise InputError(
                f"--again {options.again} takes no conditions (given: {options.conditions[0]}): leave them out."
            )
        streaming = ("data", "reset_every", "frames", "batch", "out")
        given = [name for name in streaming if getattr(options, name) is not None]
        if given or options.weighting != "equal":
            flag = (given or ["weighting"])[0].replace("_", "-")
            raise InputError(
                f"--again {options.again} streams nothing, so --{flag} has no effect: leave it out, or stream anew without --again."
            )
        folder = local(options.again)
        experiment, about = read(folder)
        chosen = {name: value for name in ("margin", "threshold") if (value := getattr(options, name)) is not None}
        setting = dataclasses.replace(experiment.setting, **chosen)
        return tell(dataclasses.replace(experiment, setting=setting), about, folder)
    if not options.conditions:
        raise InputError("there is no condition: give a checkpoint, or --again and the folder of earlier results.")
    for name in ("reset_every", "frames", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range: give 1 or more.")
    asked = [parse(text) for text in options.conditions]
    began = time.perf_counter()
    experiment, folder = _experiment(asked, options)
    spent = cost() | {"seconds": round(time.perf_counter() - began, 1)}
    code = tell(experiment, {"evaluated_with": machine(), "cost": spent}, folder)
    print(f"took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
    return code


def tell(experiment: Experiment, about: dict, folder: Path) -> int:
    """Analyse an experiment, print what it comes to and write everything to `folder`; the exit code."""
    analysis = analyse(experiment)
    print(f"\n{report.table(experiment, analysis)}\n")
    results = write(folder, experiment, analysis, about)  # which keeps what --again starts from, whatever fails here
    for name in (report.FILE, *draw.FILES):
        (folder / name).unlink(missing_ok=True)  # none are to stem from two experiments
    written = [
        results,
        *draw.draw_all(experiment, analysis, folder),
        report.write(folder, experiment, analysis, about),
    ]
    for path in written:
        print(path)
    if analysis.first_chunk.broken:
        return BROKEN
    return PARTIAL if experiment.skipped else 0


def _experiment(asked: Sequence[Asked], options: argparse.Namespace) -> tuple[Experiment, Path]:
    """Everything streamed, and the folder of the results."""
    from eval.inputs import dataset as speech_
    from eval.streaming import command

    asked = _spelled_alike(asked)
    paths = list(dict.fromkeys(path for one in asked for path in one.paths))
    models = _described(paths)
    keep_compiled(models[paths[0]].cache_dir / "compiled")
    compared = conditions(asked, models)
    several = list(models.values())
    skipped: list[speech_.Skipped] = []
    if options.data:
        files, skipped = speech_.read(options.data, several, options.frames)
    else:
        files, skipped = speech_.of_corpus(command.own_corpus(several))
        files = [
            file._replace(
                frames=file.frames[:, : options.frames],
                boundaries=tuple(
                    joint for joint in file.boundaries if options.frames is None or joint < options.frames
                ),
            )
            for file in files
        ]
    for reason in shortened([one.reason for one in skipped]):
        print(f"skipped: {reason}", file=sys.stderr)
    setting = _setting(several, files, options)
    folder = folders.find(options.out, "compare", paths[0], options.data)
    folders.make(folder)  # what cannot be is told before the work
    subject = _subject(
        options.data, files, [one._asdict() for one in skipped], compared, [_about(model) for model in several], setting
    )
    _check_replaced(folder, subject)
    print(
        f"streaming {len(files)} files through {len(models)} checkpoint{'s' * (len(models) > 1)} under"
        f" {len(compared)} conditions ...",
        flush=True,
    )
    found, weight, failed = _stream(compared, models, files, setting, options.batch)
    kept = [i for i, file in enumerate(files) if file.name not in failed]
    if not kept:
        raise InputError(next(iter(failed.values())))
    # The first codebook, which tasks are about, has no delay.
    bounds = task_bounds(options.data, files, setting.reach - max(model.cfg.max_delay for model in several))
    experiment = Experiment(
        setting,
        compared,
        [File(files[i].name, files[i].group, files[i].frames.shape[1], files[i].digest) for i in kept],
        weight[kept],
        {one.name: np.stack([found[name, one.arm] for name in one.checkpoints])[:, kept] for one in compared},
        None if bounds is None else _bounds(bounds, setting, weight.shape[1], kept),
        [_about(model) for model in several],
        [
            *(one._asdict() for one in skipped),
            *({"name": name, "reason": reason} for name, reason in failed.items()),
        ],
    )
    _check_replaced(folder, subject)  # another command may have written there meanwhile
    # Files that were left out may have been the longest.
    count = len(experiment.pieces)
    cut = lambda values: values[..., :count]  # noqa: E731
    bounds = experiment.bounds
    return dataclasses.replace(
        experiment,
        weight=cut(experiment.weight),
        losses={name: cut(values) for name, values in experiment.losses.items()},
        bounds=bounds and Bounds(*(cut(getattr(bounds, name)) for name in ("ideal", "memoryless", "weight"))),
    ), folder


def _described(paths: Sequence[str]) -> dict[str, Checkpoint]:
    """The checkpoints by path, each of a name of its own; of several the weights are let go until they are needed."""
    from eval.inputs import checkpoints as models_

    return dict(zip(paths, models_.load_all(paths, keep=len(paths) == 1), strict=True))


def _spelled_alike(asked: Sequence[Asked]) -> list[Asked]:
    """`asked` with each checkpoint under the first path that it is given by."""
    first: dict[str, str] = {}
    for path in (path for one in asked for path in one.paths):
        first.setdefault(os.path.realpath(path), path)
    return [one._replace(paths=tuple(first[os.path.realpath(path)] for path in one.paths)) for one in asked]


def _setting(models: Sequence[Checkpoint], files: Sequence[EvalFile], options: argparse.Namespace) -> Setting:
    """What was asked for, completed by what the first run was trained with and by what models are."""
    from eval.streaming.command import PERIOD

    chunk = options.reset_every or models[0].chunk or PERIOD
    if all(file.frames.shape[1] <= chunk for file in files):
        raise InputError(
            f"no file is longer than a chunk of {chunk} frames, so nothing is left to compare: give longer files or a smaller --reset-every."
        )
    return Setting(
        chunk,
        options.weighting,
        max(max(model.cfg.contexts) for model in models),
        max(reach(model) for model in models),
        MARGIN if options.margin is None else options.margin,
        THRESHOLD if options.threshold is None else options.threshold,
        "bfloat16" if any(model.cfg.dtype == "bfloat16" for model in models) else "float32",
        {"data": options.data, "codec": files[0].codec},
    )


def reach(model: Checkpoint) -> int:
    """Frames that attention can look back at most: each layer hands on what its window shows, and codebooks come with their delay."""
    return sum(context - 1 for context in model.cfg.contexts) + 1 + model.cfg.max_delay


def _check_replaced(folder: Path, subject: folders.Subject) -> None:
    """Raise `InputError` if what `folder` holds is not to be replaced by results of `subject`."""
    old = folders.stored(folder, folders.RESULTS, _subject_of, (report.FILE, *draw.FILES))
    if old is not None:
        folders.check(folder, old, subject)


def _subject_of(folder: Path) -> folders.Subject:
    """What stored results are of."""
    old, _ = read(folder)
    data = old.setting.about.get("data")
    return _subject(data, old.files, old.skipped, old.conditions, old.checkpoints, old.setting)


def _subject(
    data: str | None,
    files: Sequence[File | EvalFile],
    skipped: Sequence[dict[str, str]],
    compared: Sequence[Condition],
    checkpoints: Sequence[dict[str, Any]],
    setting: Setting,
) -> folders.Subject:
    """What an experiment is about; the conditions count by arm and checkpoints, whatever they are called."""
    known = {about["name"]: folders.checkpoint(about["name"], about) for about in checkpoints}
    return folders.Subject(
        data or folders.OWN_DATA,
        {file.name: file.digest for file in files},
        frozenset(one["name"] for one in skipped),
        tuple(
            (f"{known[name][0]} under {one.arm}", f"{known[name][1]} {one.arm}")
            for one in compared
            for name in one.checkpoints
        ),
        {
            "seeds by condition": [len(one.checkpoints) for one in compared],
            "--reset-every": setting.chunk,
            "--weighting": setting.weighting,
        },
        frames={file.name: file.frames if isinstance(file, File) else file.frames.shape[1] for file in files},
    )


def _stream(
    compared: Sequence[Condition],
    models: dict[str, Checkpoint],
    files: Sequence[EvalFile],
    setting: Setting,
    batch: int | None,
) -> tuple[dict[tuple[str, str], np.ndarray], np.ndarray, dict[str, str]]:
    """All files through every checkpoint, one checkpoint in memory at a time.

    Returns:
      Nats per token by checkpoint and arm, [F, K]; the tokens' weight [F, K]; reasons by file whose predictions were no finite numbers.
    """
    from tqdm import tqdm

    from eval.inputs import checkpoints as models_
    from eval.streaming import command
    from eval.streaming.runner import batches, stream

    lengths = [file.frames.shape[1] for file in files]
    pieces = setting.pieces(max(lengths))
    found: dict[tuple[str, str], np.ndarray] = {}
    weight, failed = np.full((len(files), len(pieces)), np.nan), {}
    several = list(models.values())
    for path, model in models.items():
        arms = [arm for arm in ARMS if any(model.name in one.checkpoints and one.arm == arm for one in compared)]
        params = models_.load(path).params if model.params is None else model.params
        for arm in arms:
            found[model.name, arm] = np.full(weight.shape, np.nan)
        with tqdm(total=sum(lengths), desc=model.name, unit="frame", unit_scale=True, leave=False) as bar:
            for some in batches(lengths, batch or command.rows(model)):
                scored = stream(
                    params,
                    [files[i].frames for i in some],
                    model.cfg,
                    arms,
                    chunk=command.calls(several),
                    period=setting.chunk,
                    on_frames=bar.update,
                )
                for i, one in zip(some, scored, strict=True):
                    if reason := command.diverged(model, files[i], one):
                        if files[i].name not in failed:
                            tqdm.write(f"skipped: {reason}", file=sys.stderr)
                        failed.setdefault(files[i].name, reason)
                        continue
                    of_arm, own = by_piece(one, setting.weighting, pieces)
                    if np.isnan(weight[i]).all():
                        weight[i] = own
                    elif not np.array_equal(weight[i], own):
                        raise InputError(
                            f"{model.name} predicts other tokens of {files[i].name} than {several[0].name}: compare checkpoints of the same"
                            " codebooks and delays."
                        )
                    for arm, loss in of_arm.items():
                        found[model.name, arm][i] = loss
        del params
    return found, weight, failed


def by_piece(scores: FileScores, weighting: str, pieces: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Frames of a file to pieces, which `pieces` [K] gives the first frames of.

    Returns:
      By arm: nats per token of the own codebooks, weighted, [K], NaN where nothing is scored; and the scored tokens' weight [K].
    """
    there = scores.tokens[1:] >= 0
    each = weights(weighting, len(there))[:, None] * there
    weight = _sums(each, pieces)

    def loss(nats: np.ndarray) -> np.ndarray:
        sums = _sums(each * np.where(there, nats[1:].astype(np.float64), 0), pieces)
        return np.where(weight > 0, np.round(sums / np.where(weight > 0, weight, 1), DIGITS), np.nan)

    return {arm: loss(own.nats) for arm, own in scores.arms.items()}, weight


def _sums(values: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Sums over rows and over the frames of each piece, [Q, T] -> [K]; pieces beyond the last frame have 0."""
    frames = np.searchsorted(pieces, np.arange(values.shape[1]), side="right") - 1
    return np.bincount(frames, values.sum(0), minlength=len(pieces))


def task_bounds(
    data: str | None, files: Sequence[EvalFile], frames: int
) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """What could be reached at best on a controlled task; None where `data` is no such task.

    Returns:
      For every file, float [T]: nats of each frame's token of the first own codebook that the best possible model pays with memory of
      everything before, and with memory of `frames` frames; NaN where nothing is scored.
    """
    if data is None or not (local(data) / "task.json").is_file():
        return None
    from eval.benchmarks import tasks

    return tasks.bounds_for(local(data), files, frames)


def _bounds(found: tuple[list[np.ndarray], list[np.ndarray]], setting: Setting, count: int, kept: list[int]) -> Bounds:
    """Bounds by frame to bounds by piece, [F, K]."""
    longest = max(len(row) for row in found[0])
    pieces = setting.pieces(longest)[:count]
    rows = [[np.asarray(side[i], np.float64)[None] for i in kept] for side in found]
    weight = np.stack([_sums(np.isfinite(row), pieces) for row in rows[0]])
    ideal, memoryless = (np.stack([_sums(np.where(np.isfinite(row), row, 0), pieces) for row in side]) for side in rows)
    mean = lambda sums: np.where(weight > 0, np.round(sums / np.maximum(weight, 1), DIGITS), np.nan)  # noqa: E731
    return Bounds(mean(ideal), mean(memoryless), weight)


def _about(model: Checkpoint) -> dict:
    """What results.json says of a checkpoint."""
    own = {"name": model.name, "attention": list(model.cfg.contexts), "ttt_layers": list(model.cfg.ttt_layers)}
    return own | ({"seed": model.seed} if model.corpus else {}) | model.about
