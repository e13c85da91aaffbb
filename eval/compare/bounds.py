"""Best possible losses where the data are a controlled task of `python -m eval tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.compare.experiment import Experiment
from eval.results.schema import FileInfo
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import local


class Tokens(NamedTuple):
    """A file's tokens, int32 [17, T], as in `eval.inputs.dataset.EvalFile`."""

    name: str
    frames: np.ndarray


def is_task(data: str | None) -> bool:
    """Returns whether `data` is the folder of a controlled task."""
    return data is not None and (local(data) / "task.json").is_file()


def task_bounds(experiment: Experiment, files: Sequence[Tokens]) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """Returns the best possible losses by file and frame; None if the data are no controlled task.

    Returns:
      For every file, float64 [T]: nats of each frame's token of Moshi's first codebook under the best possible model
      with memory of all frames before, and with the frames that attention reaches; NaN where nothing is scored.
    """
    data = experiment.setting.about.get("data")
    if not is_task(data):
        return None
    from eval.tasks import dataset as tasks

    # The first codebook, which tasks are about, has no delay.
    frames = experiment.setting.reach - max(info.max_delay for info in experiment.checkpoints)
    return tasks.bounds_for(local(data), files, frames)


def stored_tokens(data: str | None, files: Sequence[FileInfo]) -> list[Tokens]:
    """Returns the tokens of files of a controlled task; none for other data. Raises `InputError` if they are not those
    that were streamed."""
    if not is_task(data):
        return []
    import hashlib

    from ttt_jax.data.codes import read_codes

    tokens = []
    for file in files:
        path = local(data) / "codes" / f"{file.name}.safetensors"
        codes = np.ascontiguousarray(read_codes(path).codes[:, : file.frames], np.int32)
        if hashlib.sha256(codes.tobytes()).hexdigest() != file.digest:
            raise InputError(f"{path} has other tokens than those that were scored: bring the old file back.")
        tokens.append(Tokens(file.name, codes))
    return tokens
