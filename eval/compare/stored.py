"""Evaluations whose stored scores can be compared: those of `python -m eval stream` and of `compare`. Imports no
jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from eval.compare import results as compare_results
from eval.compare.conditions import ARMS
from eval.results import schema
from eval.results.schema import CheckpointInfo, FileInfo, Skipped
from eval.streaming import results as stream_results
from ttt_jax.utils import config_json


class Evaluation(NamedTuple):
    """A result folder's scores: checkpoints and their arms by name, data and codec, versions and cost."""

    checkpoints: dict[str, CheckpointInfo]
    arms: dict[str, list[str]]
    files: list[FileInfo]
    skipped: list[Skipped]
    reset_every: int
    about: dict[str, Any]
    measured_with: dict[str, Any]


def read(folder: Path) -> Evaluation:
    """Returns the scores of results.json in `folder`. Raises `InputError` if it is not of `python -m eval stream` or
    `compare`."""
    path = folder / schema.RESULTS
    header = schema.command_of(config_json.read_json(path, "results.json in a folder of python -m eval stream"))
    comparison = header is not None and header[0] == compare_results.Results.COMMAND
    kind = compare_results.Results if comparison else stream_results.Results
    content = schema.content_of(folder, kind.COMMAND, kind.FORMAT)
    results = schema.typed(kind, content)
    if comparison:
        infos, reset_every = results.checkpoints, results.setting.chunk
        pairs = {(name, condition.arm) for condition in results.conditions for name in condition.checkpoints}
    else:
        infos, reset_every = [checkpoint.info for checkpoint in results.checkpoints], results.setting.reset_every
        pairs = {(checkpoint.info.name, arm) for checkpoint in results.checkpoints for arm in checkpoint.arms}
    brief = {
        info.name: {name: info.about[name] for name in ("path", "step", "weights") if name in info.about}
        for info in infos
    }
    return Evaluation(
        {info.name: dataclasses.replace(info, about=brief[info.name]) for info in infos},
        {info.name: [arm for arm in ARMS if (info.name, arm) in pairs] for info in infos},
        results.files,
        results.skipped,
        reset_every,
        {name: results.setting.about.get(name) for name in ("data", "codec")},
        {name: content[name] for name in ("evaluated_with", "cost") if name in content},
    )
