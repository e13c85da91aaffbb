"""From stored frames to losses by piece, and losses.npz, which `python -m eval compare --again` starts from. Imports no
jax."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np

from eval.compare.experiment import Bounds, Experiment
from eval.results.schema import scores_path
from eval.streaming.scores import FileScores, load, load_arrays
from eval.streaming.weighting import weights
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

LOSSES = "losses.npz"

DIGITS = 9
"""Decimals of losses. Rounding halves the size of losses.npz and changes nothing that is reported."""


def collect(
    folder: Path, experiment: Experiment, bounds: tuple[list[np.ndarray], list[np.ndarray]] | None
) -> Experiment:
    """Returns the experiment with the losses of the scores that `folder` holds.

    Args:
      bounds: of `eval.tasks.dataset.bounds_for`, by file; None where the data are no controlled task.

    Raises `InputError` if scores are missing or damaged, or checkpoints predict different tokens.
    """
    pieces, names = experiment.pieces, [checkpoint.name for checkpoint in experiment.checkpoints]
    losses: dict[tuple[str, str], list[np.ndarray]] = {}
    weight: list[np.ndarray] = []
    for name in names:
        arms = {condition.arm for condition in experiment.conditions if name in condition.checkpoints}
        for i, file in enumerate(experiment.files):
            path = scores_path(folder, name, file)
            by_arm, file_weight = by_piece(load(path), experiment.setting.weighting, pieces)
            if lacking := sorted(arms - by_arm.keys()):
                raise InputError(f"{path} has no scores under {lacking[0]}: run python -m eval stream with that arm.")
            if name == names[0]:
                weight.append(file_weight)
            elif not np.array_equal(weight[i], file_weight):
                raise InputError(
                    f"{name} predicts other tokens of {file.name} than {names[0]}: compare checkpoints of the same"
                    " codebooks and delays."
                )
            for arm in arms:
                losses.setdefault((name, arm), []).append(by_arm[arm])
    by_condition = {
        condition.name: np.stack([losses[name, condition.arm] for name in condition.checkpoints])
        for condition in experiment.conditions
    }
    best = None if bounds is None else _bounds(*bounds, pieces)
    return dataclasses.replace(experiment, weight=np.stack(weight), losses=by_condition, bounds=best)


def by_piece(scores: FileScores, weighting: str, pieces: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Averages the frames of a file over pieces, whose first frames are `pieces` [K].

    Returns:
      By arm: nats per token of Moshi's codebooks, weighted, [K], NaN where nothing is scored; and the scored tokens'
      weight [K].
    """
    scored = scores.tokens[1:] >= 0
    token_weights = weights(weighting, len(scored))[:, None] * scored
    losses = {
        arm: _mean(np.where(scored, values.nats[1:].astype(np.float64), 0), token_weights, pieces)
        for arm, values in scores.arms.items()
    }
    return losses, _sums(token_weights, pieces)


def _sums(values: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Returns sums over rows and over the frames of each piece, [Q, T] -> [K]; 0 for pieces beyond the last frame."""
    frames = np.searchsorted(pieces, np.arange(values.shape[1]), side="right") - 1
    return np.bincount(frames, values.sum(0), minlength=len(pieces))


def _mean(values: np.ndarray, weight: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Returns weighted means over rows and over the frames of each piece, [Q, T] -> [K]; NaN where nothing has
    weight."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.round(_sums(weight * values, pieces) / _sums(weight, pieces), DIGITS)


def _bounds(ideal: list[np.ndarray], memoryless: list[np.ndarray], pieces: np.ndarray) -> Bounds:
    """Averages best possible losses by frame over pieces, [F, K]."""
    scored = [np.isfinite(frames)[None] for frames in ideal]

    def means(by_file: list[np.ndarray]) -> np.ndarray:
        rows = zip(by_file, scored, strict=True)
        return np.stack([_mean(np.where(used, frames, 0), used.astype(float), pieces) for frames, used in rows])

    return Bounds(means(ideal), means(memoryless), np.stack([_sums(used, pieces) for used in scored]))


def write(folder: Path, experiment: Experiment) -> Path:
    """Writes losses.npz to `folder`, at once or not at all; returns its path.

    It holds `losses` [conditions, S, F, K], `weight` [F, K], and of a controlled task `bounds` [3, F, K].
    """
    arrays = {"weight": experiment.weight, "losses": np.stack(list(experiment.losses.values()))}
    if experiment.bounds:
        arrays["bounds"] = np.stack(experiment.bounds)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(folder / LOSSES, content.getvalue())
    return folder / LOSSES


def read(folder: Path, experiment: Experiment) -> Experiment:
    """Returns the experiment with the losses that losses.npz in `folder` holds. Raises `InputError` if the file is
    missing or damaged."""
    arrays = load_arrays(folder / LOSSES, "python -m eval compare")
    names = [condition.name for condition in experiment.conditions]
    losses = dict(zip(names, arrays["losses"], strict=True))
    bounds = Bounds(*arrays["bounds"]) if "bounds" in arrays else None
    return dataclasses.replace(experiment, weight=arrays["weight"], losses=losses, bounds=bounds)
