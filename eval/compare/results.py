"""The results of `python -m eval compare`: results.json, and losses.npz beside it. Imports no jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from eval.compare import losses
from eval.compare.analysis import Analysis
from eval.compare.experiment import BEYOND, LATER, REGIONS, WINDOW, Condition, Experiment, Setting
from eval.results import schema
from eval.results.schema import CheckpointInfo, FileInfo, Skipped, Tree
from eval.streaming.weighting import WEIGHTINGS
from ttt_jax.errors import InputError
from ttt_jax.utils.files import file_digest

NOTES = {
    "losses.npz": "losses by condition (in their order), checkpoint (seed), file and piece: nats per scored token of"
    " Moshi's codebooks, weighted; NaN: nothing is scored there. Files are cut into pieces where a chunk begins and"
    " where attention ends; `pieces` are their first frames. weight, by file and piece, is the weight of the scored"
    " tokens: the loss over several pieces is the mean weighted by it. bounds, of a controlled task: best loss with"
    " all memory, with attention's reach, number of tokens",
    "chunks": "means over units by chunk; a chunk that a file fills to less than half is left out for that file,"
    " here and in the trend (not from the parts of files, which are means over tokens)",
    "unit": "a file, or the mean over the files of one speaker where the manifest names speakers; frames are never"
    " units",
    "difference": "loss of the other condition minus loss of the first, which is under test, by the same file: above"
    " 0 the first is better. Of several checkpoints (seeds) the file's differences are averaged first: p-values"
    " speak of new files for these seeds; `seeds` has each seed alone, `over_seeds` the mean with the seed as unit",
    "regions": f"{LATER}: frames from the second chunk on; {WINDOW}: also beyond the longest attention window of a"
    f" layer; {BEYOND}: also beyond all that attention could hand on from layer to layer (the sum of context - 1 over"
    " layers, and the longest delay of a codebook), so that without memory nothing can know it",
    "paired": "n units, mean and sd of the differences in nats, 95 % BCa bootstrap interval (low, high), two-sided p"
    " of paired t, Wilcoxon's signed ranks and sign-flip permutation, share of units above 0, reference: mean loss"
    " of the other condition, relative = mean / reference, dz: Cohen's d_z with Hedges' exact correction",
    "equivalence": "two one-sided paired t tests against the margin (p: the larger), 90 % interval",
    "power": "units for 80 % power at 0.05 divided by the number of comparisons, two-sided: for_effect: to find this"
    " d_z; for_equivalence: to establish equivalence if there is truly no difference; of_threshold: power that n"
    " units had for an effect of the threshold. null: more than a million, or not known",
    "holm": "p of the paired t adjusted for the comparisons with the first condition in one region;"
    " holm_equivalence: the same for the equivalence tests; of a seed: adjusted for the seeds of its comparison",
    "trend": "slope of the difference over chunks after the first, nats per chunk: least squares by file, chunks"
    " weighted by their tokens, then a mean over units with a 95 % interval (Student's t) and its p; above 0 the"
    " benefit grows",
    "closed": "share of the gap between the best possible loss without and with memory from beyond attention that a"
    " condition closes, (memoryless - loss) / (memoryless - ideal), sums over units, 95 % BCa interval",
}
"""What the numbers in results.json are."""


@dataclasses.dataclass(frozen=True)
class Results:
    """The content of results.json."""

    COMMAND: ClassVar[str] = "python -m eval compare"
    FORMAT: ClassVar[int] = 2

    broken: str | None
    """Why no result counts, if one does not."""
    verdicts: dict[str, Any]
    """By condition and region."""
    setting: Setting
    regions: dict[str, int]
    """First frame of each part of a file."""
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
    verdicts = {
        comparison.name: {region: comparison.regions[region].verdict for region in REGIONS}
        for comparison in analysis.comparisons
    }
    results = Results(
        analysis.first_chunk.broken,
        verdicts,
        experiment.setting,
        experiment.setting.starts,
        {"files": len(experiment.files), "units": analysis.units, "unit": experiment.unit},
        experiment.conditions,
        experiment.checkpoints,
        experiment.files,
        experiment.skipped,
        experiment.pieces.tolist(),
        file_digest(folder / losses.LOSSES),
        analysis,
    )
    notes = NOTES | {"weighting": WEIGHTINGS[experiment.setting.weighting]}
    return schema.write(folder, results, {**about, "notes": notes})


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
    weight, by_condition, bounds = losses.read(folder, [condition.name for condition in results.conditions])
    experiment = Experiment(
        results.setting,
        results.conditions,
        results.files,
        weight,
        by_condition,
        bounds,
        results.checkpoints,
        results.skipped,
    )
    return experiment, {name: content[name] for name in ("evaluated_with", "cost") if name in content}
