"""Data sets of controlled tasks on disk. Imports no jax.

FOLDER/task.json                  the settings and the best possible losses
FOLDER/codes/NUMBER.safetensors   a stream (`ttt_jax.data.codes`)
FOLDER/manifest.jsonl             for training and evaluation
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from tyro.conf import Positional

from eval.results import schema
from eval.tasks import facts, replay
from eval.tasks.facts import FACTS, GAP, LEAST_EVERY
from eval.tasks.streams import CARDINALITY
from ttt_jax.config import FRAME_RATE
from ttt_jax.data.codes import Codes, write_codes
from ttt_jax.data.manifest import MANIFEST
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

if TYPE_CHECKING:
    from eval.inputs.dataset import EvalFile

SETTINGS = "task.json"
CODEC = hashlib.sha256(b"ttt_jax.tasks/1").hexdigest()
"""Digest of the codec in the code files; all tasks share it, so that a model can train on several."""
AVERAGED = 256
"""First files whose best possible losses are averaged for task.json."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a data set; the same settings give the same files."""

    task: Positional[Literal["recall", "speaker", "control", "replay"]]
    """recall: early facts are asked for later; speaker: few tokens are learned once; control: nothing to remember;
    replay: excerpts come again."""
    files: int = 64
    """Streams."""
    frames: int = 512
    """Frames of each stream."""
    every: int = 16
    """Behind the start, frames for each question (recall, control) or each token (speaker); of replay, those of an
    excerpt."""
    seed: int = 0
    """Seed of all random draws; give files to train on and files to test on different ones."""

    def __post_init__(self) -> None:
        least = {"files": 1, "every": LEAST_EVERY, "frames": FACTS + GAP + self.every}
        for name, low in least.items():
            value = getattr(self, name)
            if value < low:
                raise InputError(f"--{name} {value} is too few: give {low} or more.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed} is negative: give 0 or more.")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """The content of task.json."""

    COMMAND: ClassVar[str] = "python -m eval tasks"
    FORMAT: ClassVar[int] = 1

    settings: Settings
    with_memory: float
    """Best possible loss, nats per answer: mean over the answers of the first `AVERAGED` files."""
    memoryless: float
    """From the last `reach` columns alone."""
    reach: int = GAP


TASKS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    function.__name__: function for function in (facts.recall, facts.speaker, facts.control, replay.replay)
}
"""By name: (generator, frames, every) -> tokens int32 [17, T]; the command prints the docstrings."""


def best(settings: Settings, stream: np.ndarray, reach: int | None = None) -> np.ndarray:
    """Returns the best possible losses on a stream [17, T], nats of each token in Moshi's codebook 1.

    The token of frame t is predicted from columns up to t - 1: from all of them, or from the last `reach` alone.

    Returns:
      float64 [T], NaN in frames without a token.
    """
    reach = stream.shape[1] if reach is None else reach
    if settings.task == "replay":
        return replay.best(stream, settings.every, reach)
    return facts.best(settings.task, stream, reach)


def bounds_for(data: Path, files: Sequence[EvalFile], reach: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns `best` of files of the data set in `data`: with all memory, and from `reach` columns, float64 [T] each.

    Raises `InputError` if the folder's task.json is not as `python -m eval tasks` wrote it.
    """
    settings = schema.read(data, DataSet, SETTINGS).settings
    return [best(settings, file.frames) for file in files], [best(settings, file.frames, reach) for file in files]


def make(settings: Settings, folder: Path, codec: str = CODEC) -> DataSet:
    """Writes all of the data set to `folder` or nothing; returns the content of task.json.

    `codec` is the digest that the code files state.

    Raises `InputError` if the folder is not new or empty, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder} is taken: give a folder that is new or empty.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made ({error.strerror}): give another folder.") from None
    try:
        data = _write(settings, new, codec)
        new.chmod(0o755)
        new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return data


def _write(settings: Settings, folder: Path, codec: str) -> DataSet:
    lines, sums, answers = [], np.zeros(2), 0
    for i in range(settings.files):
        # A generator for each file, so that a larger data set begins with the files of a smaller one.
        rng = np.random.default_rng((settings.seed, i))
        stream = TASKS[settings.task](rng, settings.frames, settings.every)
        name = f"codes/{i:05d}.safetensors"
        codes = Codes(stream, FRAME_RATE, codec, codec_name=f"task {settings.task}", cardinality=CARDINALITY)
        write_codes(folder / name, codes)
        lines.append(json.dumps({"path": name, "duration": settings.frames / FRAME_RATE}))
        if i < AVERAGED:
            losses = best(settings, stream), best(settings, stream, GAP)
            sums += [np.nansum(nats) for nats in losses]
            answers += np.isfinite(losses[0]).sum()
    data = DataSet(settings, *(sums / answers).tolist())
    schema.write(folder, data, {}, SETTINGS)
    write_atomically(folder / MANIFEST, "".join(f"{line}\n" for line in lines).encode())
    return data
