"""Whether results of `python -m eval generate` may replace those in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.generating.inputs import Input
from eval.generating.outputs import ENDINGS
from eval.generating.results import Results
from eval.results import folder as folders
from eval.results import schema
from eval.results.schema import CheckpointInfo, Skipped
from ttt_jax.errors import InputError


def subject(
    data: str, files: dict[str, str], skipped: Sequence[Skipped], info: CheckpointInfo, setting: dict[str, Any]
) -> folders.Subject:
    """Returns the subject of talks with `files`, digests by name."""
    checkpoints = (folders.checkpoint(info.name, info.about),)
    return folders.Subject(data, files, frozenset(file.name for file in skipped), checkpoints, setting)


def replaced(folder: Path, asked: folders.Subject, inputs: Sequence[Input]) -> list[str]:
    """Returns names of the earlier results in `folder` that the new ones replace.

    Raises `InputError` if they are not to be replaced, or a file of another origin has the name of an output.
    """
    names = [f"{source.name}{ending}" for source in inputs for ending in ENDINGS]
    earlier = folders.stored(folder, lambda folder: schema.read(folder, Results), names)
    if earlier is None:
        return []
    files = {file.name: file.digest for file in earlier.files}
    folders.check(folder, subject(earlier.data, files, earlier.skipped, earlier.checkpoint, earlier.setting), asked)
    ours = [name for file in earlier.files for name in file.outputs]
    foreign = next((name for name in names if name not in ours and os.path.lexists(folder / name)), None)
    if foreign is not None:
        raise InputError(f"{folder} holds {foreign}, which is no result of this command: give another --out.")
    return ours
