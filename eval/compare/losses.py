"""From stored frames to losses by piece, and losses.npz, which `python -m eval compare --again` starts from. Imports no
jax."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.compare.experiment import Bounds, Condition, Experiment, Setting
from eval.results.schema import CheckpointInfo, FileInfo, Skipped, scores_path
from eval.streaming.scores import FileScores, load, load_arrays
from eval.streaming.weighting import weights
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

LOSSES = "losses.npz"

DIGITS = 9
"""Decimals of losses. Rounding halves the size of losses.npz and changes nothing that is reported."""


def collect(
    folder: Path,
    setting: Setting,
    conditions: Sequence[Condition],
    checkpoints: Sequence[CheckpointInfo],
    files: Sequence[FileInfo],
    skipped: Sequence[Skipped],
    bounds: tuple[list[np.ndarray], list[np.ndarray]] | None = None,
) -> Experiment:
    """Returns the experiment of the scores that `folder` holds of `files` under all `conditions`.

    Args:
      bounds: of `eval.benchmarks.tasks.bounds_for`, by file; None where the data are no controlled task.

    Raises:
      InputError: scores are missing or damaged, or checkpoints predict different tokens.
    """
    pieces = setting.pieces(max(file.frames for file in files))
    weight = np.full((len(files), len(pieces)), np.nan)
    losses: dict[tuple[str, str], np.ndarray] = {}
    for checkpoint in checkpoints:
        name = checkpoint.name
        arms = {condition.arm for condition in conditions if name in condition.checkpoints}
        losses |= {(name, arm): np.full(weight.shape, np.nan) for arm in arms}
        for i, file in enumerate(files):
            path = scores_path(folder, name, file)
            by_arm, file_weight = by_piece(load(path), setting.weighting, pieces)
            if lacking := sorted(arms - by_arm.keys()):
                raise InputError(f"{path} has no scores under {lacking[0]}: run python -m eval stream with that arm.")
            if np.isnan(weight[i]).all():
                weight[i] = file_weight
            elif not np.array_equal(weight[i], file_weight):
                raise InputError(
                    f"{name} predicts other tokens of {file.name} than {checkpoints[0].name}: compare checkpoints of"
                    " the same codebooks and delays."
                )
            for arm in arms:
                losses[name, arm][i] = by_arm[arm]
    return Experiment(
        setting,
        list(conditions),
        list(files),
        weight,
        {
            condition.name: np.stack([losses[name, condition.arm] for name in condition.checkpoints])
            for condition in conditions
        },
        None if bounds is None else _bounds(bounds, pieces),
        list(checkpoints),
        list(skipped),
    )


def by_piece(scores: FileScores, weighting: str, pieces: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Averages the frames of a file over pieces, whose first frames are `pieces` [K].

    Returns:
      By arm: nats per token of Moshi's codebooks, weighted, [K], NaN where nothing is scored; and the scored tokens'
      weight [K].
    """
    scored = scores.tokens[1:] >= 0
    token_weights = weights(weighting, len(scored))[:, None] * scored
    weight = _sums(token_weights, pieces)

    def loss(nats: np.ndarray) -> np.ndarray:
        sums = _sums(token_weights * np.where(scored, nats[1:].astype(np.float64), 0), pieces)
        return np.where(weight > 0, np.round(sums / np.where(weight > 0, weight, 1), DIGITS), np.nan)

    return {arm: loss(values.nats) for arm, values in scores.arms.items()}, weight


def _sums(values: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Returns sums over rows and over the frames of each piece, [Q, T] -> [K]; 0 for pieces beyond the last frame."""
    frames = np.searchsorted(pieces, np.arange(values.shape[1]), side="right") - 1
    return np.bincount(frames, values.sum(0), minlength=len(pieces))


def _bounds(by_frame: tuple[list[np.ndarray], list[np.ndarray]], pieces: np.ndarray) -> Bounds:
    """Averages best possible losses by frame over pieces, [F, K]."""

    def sums(side: list[np.ndarray]) -> np.ndarray:
        return np.stack([_sums(np.where(np.isfinite(row), row, 0)[None], pieces) for row in side])

    weight = np.stack([_sums(np.isfinite(row)[None], pieces) for row in by_frame[0]])

    def mean(side: list[np.ndarray]) -> np.ndarray:
        return np.where(weight > 0, np.round(sums(side) / np.maximum(weight, 1), DIGITS), np.nan)

    return Bounds(mean(by_frame[0]), mean(by_frame[1]), weight)


def as_npz(experiment: Experiment) -> bytes:
    """Returns losses.npz: `losses` [conditions, S, F, K], `weight` [F, K], and of a controlled task `bounds` [3, F,
    K]."""
    arrays = {"weight": experiment.weight, "losses": np.stack(list(experiment.losses.values()))}
    if experiment.bounds:
        arrays["bounds"] = np.stack([getattr(experiment.bounds, field.name) for field in dataclasses.fields(Bounds)])
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def write(folder: Path, experiment: Experiment) -> Path:
    """Writes losses.npz to `folder`, at once or not at all; returns its path."""
    write_atomically(folder / LOSSES, as_npz(experiment))
    return folder / LOSSES


def read(folder: Path, conditions: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray], Bounds | None]:
    """Returns `weight`, `losses` by name of the `conditions`, and `bounds` of an `Experiment` from losses.npz in
    `folder`.

    Raises `InputError` if the file is missing or damaged.
    """
    arrays = load_arrays(folder / LOSSES, "python -m eval compare")
    losses = dict(zip(conditions, arrays["losses"], strict=True))
    return arrays["weight"], losses, Bounds(*arrays["bounds"]) if "bounds" in arrays else None
