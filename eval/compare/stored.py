"""Evaluations whose stored scores can be compared: those of `python -m eval stream` and of `compare`. Imports no
jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.compare import results as compare_results
from eval.compare.conditions import ARMS, Given, parse
from eval.compare.conditions import conditions as conditions_of
from eval.compare.experiment import Condition
from eval.results import schema
from eval.results.schema import CheckpointInfo, FileInfo, Skipped
from eval.streaming import results as stream_results
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A result folder's scores."""

    checkpoints: dict[str, CheckpointInfo]
    """By name."""
    arms: dict[str, list[str]]
    """By checkpoint: the arms that can be compared."""
    files: list[FileInfo]
    skipped: list[Skipped]
    reset_every: int
    about: dict[str, Any]
    """Data and codec."""
    measured_with: dict[str, Any]
    """Versions, device and cost."""


def read(folder: Path) -> Evaluation:
    """Returns what results.json in `folder` states. Raises `InputError` if it is not of `python -m eval stream` or
    `compare`."""
    header = schema.command_of(
        config_json.read_json(folder / schema.RESULTS, "results.json in a folder of python -m eval stream")
    )
    kind = (
        compare_results.Results if header and header[0] == compare_results.Results.COMMAND else stream_results.Results
    )
    content = schema.content_of(folder, kind.COMMAND, kind.FORMAT)
    results = schema.typed(kind, content)
    setting = results.setting
    if kind is stream_results.Results:
        infos, reset_every = [checkpoint.info for checkpoint in results.checkpoints], setting.reset_every
        arms = {checkpoint.info.name: checkpoint.arms for checkpoint in results.checkpoints}
    else:
        infos, reset_every = results.checkpoints, setting.chunk
        arms = {
            info.name: [condition.arm for condition in results.conditions if info.name in condition.checkpoints]
            for info in infos
        }
    return Evaluation(
        {info.name: _brief(info) for info in infos},
        {name: [arm for arm in ARMS if arm in names] for name, names in arms.items()},
        results.files,
        results.skipped,
        reset_every,
        {name: setting.about.get(name) for name in ("data", "codec")},
        {name: content[name] for name in ("evaluated_with", "cost") if name in content},
    )


def _brief(info: CheckpointInfo) -> CheckpointInfo:
    about = {name: info.about[name] for name in ("path", "step", "weights") if name in info.about}
    return dataclasses.replace(info, about=about)


def conditions(evaluation: Evaluation, texts: Sequence[str], folder: Path) -> list[Condition]:
    """Returns the conditions that `texts` name; by default the arms of a single checkpoint, or all checkpoints.

    Raises `InputError` if one is not stored or they cannot be compared.
    """
    known = evaluation.checkpoints
    given = [parse(text, known) for text in texts]
    if not given and len(known) == 1:
        ((name, arms),) = evaluation.arms.items()
        given = [Given(None, (name,), arm) for arm in arms]
    given = given or [Given(None, (name,), None) for name in known]
    for name in (name for condition in given for name in condition.paths):
        if name not in known:
            raise InputError(f"{folder} has no scores of the checkpoint {name}: give some of {', '.join(known)}.")
    if len(given) == 1 and known[given[0].paths[0]].ttt_layers and given[0].arm is None:
        given = [
            given[0]._replace(arm=arm, name=given[0].name and f"{given[0].name} {arm}")
            for arm in ARMS
            if all(arm in evaluation.arms[name] for name in given[0].paths)
        ]
    compared = conditions_of(given, known)
    for condition in compared:
        for name in condition.checkpoints:
            if condition.arm not in evaluation.arms[name]:
                raise InputError(
                    f"{folder} has no scores of {name} under {condition.arm}, only under"
                    f" {', '.join(evaluation.arms[name])}: run python -m eval stream with that arm."
                )
    return compared
