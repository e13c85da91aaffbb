"""The results of `python -m eval compare`: results.json, and losses.npz beside it. Imports no jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from eval.compare import losses
from eval.compare.analysis import Analysis
from eval.compare.experiment import Condition, Experiment, Setting
from eval.results import schema
from eval.results.schema import CheckpointInfo, FileInfo, Skipped, Tree
from ttt_jax.errors import InputError
from ttt_jax.utils.files import file_digest


@dataclasses.dataclass(frozen=True)
class Results:
    """The content of results.json."""

    COMMAND: ClassVar[str] = "python -m eval compare"
    FORMAT: ClassVar[int] = 3

    broken: str | None
    """Why no result counts, if one does not."""
    setting: Setting
    counts: dict[str, Any]
    conditions: list[Condition]
    checkpoints: list[CheckpointInfo]
    files: list[FileInfo]
    skipped: list[Skipped]
    pieces: list[int]
    losses: str
    """SHA-256 of losses.npz."""
    analysis: Tree
    """An `eval.compare.analysis.Analysis`."""


def write(folder: Path, experiment: Experiment, analysis: Analysis, about: dict[str, Any]) -> Path:
    """Writes results.json to `folder`, which holds losses.npz, at once or not at all; returns its path.

    Args:
      about: further entries at the top (versions, cost).
    """
    results = Results(
        analysis.first_chunk.broken,
        experiment.setting,
        {"files": len(experiment.files), "units": analysis.units, "unit": experiment.unit},
        experiment.conditions,
        experiment.checkpoints,
        experiment.files,
        experiment.skipped,
        experiment.pieces.tolist(),
        file_digest(folder / losses.LOSSES),
        analysis,
    )
    return schema.write(folder, results, about)


def read(folder: Path) -> tuple[Experiment, dict[str, Any]]:
    """Returns the experiment that `write` and `eval.compare.losses.write` wrote to `folder`, and its `about`.

    Raises `InputError` as `eval.results.schema.read`, or if losses.npz does not belong to results.json.
    """
    content = schema.content_of(folder, Results.COMMAND, Results.FORMAT)
    results = schema.typed(Results, content)
    if file_digest(folder / losses.LOSSES) != results.losses:
        raise InputError(
            f"{folder / losses.LOSSES} is not as it was written (its SHA-256 is not that in results.json): run"
            f" {Results.COMMAND} again."
        )
    experiment = Experiment(results.setting, results.conditions, results.checkpoints, results.files, results.skipped)
    about = {name: content[name] for name in ("evaluated_with", "cost") if name in content}
    return losses.read(folder, experiment), about
