"""From the scores of all files and checkpoints to estimates. Imports no jax: `python -m eval draw` works where no model
could run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.schema import CheckpointInfo, FileInfo, Skipped, units
from eval.stats import paired
from eval.stats.estimates import Estimate, band, group_means, unit_means
from eval.stats.verdict import MARGIN, THRESHOLD, Rule, advise, verdict
from eval.streaming.measure import load_scores, main_arm, measure
from eval.streaming.results import LATER, CheckpointResults, Results, Setting

Nested = dict[str, Any]
"""By name; leaves of one file are float64 arrays, [] or [windows]; leaves of all files are `Estimate`s or lists of
them."""


def summarise(
    setting: Setting,
    checkpoints: Sequence[CheckpointInfo],
    files: Sequence[FileInfo],
    skipped: Sequence[Skipped],
    folder: Path,
) -> Results:
    """Returns estimates from the scores in `folder`.

    The unit is the file. Where several files share a group (a speaker) they are averaged within it first, and the unit
    is the group: `Estimate.n` counts groups then. Only one file's arrays are in memory at a time.

    Args:
      setting: of the evaluation; checkpoints: at least one; files: those that every checkpoint was run on, at least
        one;
        skipped: files that were not; folder: the result folder.

    Raises:
      InputError: scores of a file are missing or damaged.
    """
    groups = [file.group for file in files]
    summaries, of_main = [], []
    for checkpoint in checkpoints:
        by_file = [measure(load_scores(folder, checkpoint, file, setting), setting, checkpoint) for file in files]
        summaries.append(_checkpoint(setting, checkpoint, by_file, files))
        of_main.append([_main_losses(file, summaries[-1].main) for file in by_file])
    between = {
        summary.info.name: _combine([_minus(*pair) for pair in zip(losses, of_main[0], strict=True)], groups)
        for summary, losses in zip(summaries[1:], of_main[1:], strict=True)
    }
    return Results(setting, summaries, between, list(files), list(skipped))


def _checkpoint(
    setting: Setting, info: CheckpointInfo, by_file: list[Nested], files: Sequence[FileInfo]
) -> CheckpointResults:
    combined = _combine(by_file, [file.group for file in files])
    arms = [arm for arm in setting.arms if arm in combined["losses"]]
    losses = {
        file.name: {arm: {row: float(value) for row, value in rows.items()} for arm, rows in measured["losses"].items()}
        for file, measured in zip(files, by_file, strict=True)
    }
    sentence = _verdict(setting, info, by_file, files)
    return CheckpointResults(info, arms, main_arm(arms), **combined, by_file=losses, verdict=sentence)


def _main_losses(measured: Nested, arm: str) -> Nested:
    """Returns what checkpoints are compared by: losses of `arm` by row and by position."""
    return {**measured["losses"][arm], "by_position": measured["by_position"]["losses"][arm]}


def _minus(losses: Nested, first: Nested) -> Nested:
    return {name: losses[name] - first[name] for name in losses}


def _combine(trees: Sequence[Nested | None], groups: Sequence[str]) -> Nested:
    """Returns estimates over files; a file whose tree lacks an entry was not measured there."""
    names = dict.fromkeys(name for tree in trees for name in tree or {})
    entries = {name: [(tree or {}).get(name) for tree in trees] for name in names}
    return {
        name: _combine(entry, groups) if any(isinstance(item, dict) for item in entry) else _estimates(entry, groups)
        for name, entry in entries.items()
    }


def _estimates(leaves: list[np.ndarray | None], groups: Sequence[str]) -> Estimate | list[Estimate]:
    """Returns one estimate of numbers; of arrays one for each entry, the shorter ones padded with NaN."""
    arrays = [np.asarray(np.nan if leaf is None else leaf, np.float64) for leaf in leaves]
    stacked = np.full((len(arrays), max(array.size for array in arrays)), np.nan)
    for row, array in zip(stacked, arrays, strict=True):
        row[: array.size] = array
    columns = band(group_means(stacked, groups))
    estimates = [Estimate(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]
    return estimates if any(array.ndim for array in arrays) else estimates[0]


def _verdict(setting: Setting, info: CheckpointInfo, by_file: list[Nested], files: Sequence[FileInfo]) -> str:
    """Returns the verdict on persist against reset after the first reset, by the rule and margin of `python -m eval
    compare`."""
    if not info.ttt_layers:
        return f"{info.name} has no TTT layers: there is no memory to compare."
    if "reset" not in by_file[0]["against_persist"]:
        return "The arms persist and reset were not both run: there is no verdict on whether keeping the memory helps."
    groups = [file.group for file in files]
    d = unit_means(np.array([file["against_persist"]["reset"][LATER][setting.weighting] for file in by_file]), groups)
    losses = unit_means(np.array([file["losses_later"]["reset"][setting.weighting] for file in by_file]), groups)
    reference = float(losses.mean()) if len(losses) else np.nan
    differences = paired.compare(d, reference, MARGIN)
    rule = Rule(MARGIN, THRESHOLD, units(files)[1])
    result = verdict(differences, differences.p, differences.equivalence.p, rule, ("persist", "reset"))
    return advise(result, rule.unit).text
