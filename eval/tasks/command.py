"""`python -m eval tasks`: data sets of code streams for which the best possible loss is known. Imports no jax.

    FOLDER/task.json                  the settings and the best possible losses
    FOLDER/codes/NUMBER.safetensors   a stream (`ttt_jax.data.codes`)
    FOLDER/manifest.jsonl             for training and evaluation

As in Moshi, a stream holds two speakers: the user in codebooks 1 and 2 of the user's stream, and Moshi, who answers in
codebook 1 of its own. Only answers are targets; the text is padding. Moshi delays all codebooks but the first by a
frame: column c of the delayed grid holds frame c of codebook 1 and frame c - 1 of codebook 2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from tyro.conf import Positional, arg

from eval.results import schema
from ttt_jax.config import FRAME_RATE
from ttt_jax.data.codes import Codes, write_codes
from ttt_jax.data.frames import ABSENT
from ttt_jax.data.manifest import MANIFEST
from ttt_jax.data.text import PAD
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically
from ttt_jax.utils.paths import local

if TYPE_CHECKING:
    from eval.inputs.dataset import EvalFile

SETTINGS = "task.json"
CODEC = hashlib.sha256(b"ttt_jax.tasks/1").hexdigest()
"""Digest of the codec in the code files; all tasks share it, so that a model can train on several."""
CARDINALITY = 64
TEXT, MOSHI, USER = 0, 1, 9
"""Rows of a stream: the text, codebook 1 of Moshi, codebook 1 of the user."""
CODEBOOKS = 8

SYMBOLS = 16
"""Number of keys and of values: ids from 0 in the user's codebooks 1 and 2."""
QUESTION = 31
"""Id in codebook 2 beside a key: asks for the value of the key."""
FILLERS = (32, 64)
"""Range of the ids that fill the rest of the user's codebooks."""
FACTS = 32
"""Frames at the start that hold the facts."""
GAP = 48
"""Frames behind the facts without an answer, more than attention reaches in the models that these tasks are for."""
AVERAGED = 256
"""First files whose best possible losses are averaged for task.json."""
VOCABULARY = 8
"""Number of tokens that a speaker uses, of `CARDINALITY`."""
LEAST_EVERY = 3
"""Frames for a question, its answer and one more."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a data set; the same settings give the same files."""

    task: Positional[Literal["recall", "speaker", "control"]]
    """recall: early facts are asked for later; speaker: few tokens are learned once; control: nothing to remember."""
    files: int = 64
    """Streams."""
    frames: int = 512
    """Frames of each stream."""
    every: int = 16
    """Behind the start, frames for each question (recall, control) or each token (speaker)."""
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


@dataclasses.dataclass(frozen=True)
class Options:
    """Make a data set for which the best possible loss is known.

    Train on the folder with --data.train FOLDER --data.codec files --data.from-start --loss.text 0: the facts stand at
    the start of each file, and its text is padding. See docs/evaluation/tasks.md.
    """

    settings: Annotated[Settings, arg(name="")]
    """Settings of the data set."""
    out: str
    """Folder for the code files, manifest.jsonl and task.json; new or empty."""


def _silent(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Returns a stream in which the user says fillers and Moshi nothing, int32 [17, T]."""
    stream = np.full((1 + 2 * CODEBOOKS, frames), ABSENT, np.int32)
    stream[TEXT] = PAD
    stream[USER : USER + 2] = rng.integers(*FILLERS, (2, frames))
    return stream


def _spread(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """Returns a column of each of equal parts, of at least `every` frames, of the stream behind `FACTS` and `GAP`.

    The column is not the last of its part, so that an answer fits behind it.
    """
    edges = np.linspace(FACTS + GAP, frames, (frames - FACTS - GAP) // every + 1).astype(int)
    return rng.integers(edges[:-1], edges[1:] - 1)


def _ask(rng: np.random.Generator, stream: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes a value for each key, then questions for all keys in turn; returns questions, their keys, all values."""
    facts = rng.permutation(np.arange(1, FACTS))[:SYMBOLS]
    values = rng.integers(SYMBOLS, size=SYMBOLS)
    stream[USER, facts], stream[USER + 1, facts - 1] = np.arange(SYMBOLS), values
    questions = _spread(rng, stream.shape[1], every)
    keys = np.concatenate([rng.permutation(SYMBOLS) for _ in range(0, len(questions), SYMBOLS)])[: len(questions)]
    stream[USER, questions], stream[USER + 1, questions - 1] = keys, QUESTION
    return questions, keys, values


def recall(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """The user gives a value for each of 16 keys and asks for them later; Moshi answers."""
    stream = _silent(rng, frames)
    questions, keys, values = _ask(rng, stream, every)
    stream[MOSHI, questions + 1] = values[keys]
    return stream


def control(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """`recall` with nothing to remember: half of the answers, by chance, are the key, the others are drawn anew."""
    stream = _silent(rng, frames)
    questions, keys, _ = _ask(rng, stream, every)
    stream[MOSHI, questions + 1] = np.where(rng.random(len(keys)) < 0.5, keys, rng.integers(SYMBOLS, size=len(keys)))
    return stream


def speaker(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """Moshi uses 8 of 64 tokens, all equally likely: it speaks through the start, then now and then."""
    stream = _silent(rng, frames)
    spoken = np.concatenate([np.arange(FACTS), _spread(rng, frames, every)])
    stream[MOSHI, spoken] = rng.choice(rng.permutation(CARDINALITY)[:VOCABULARY], len(spoken))
    return stream


TASKS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    function.__name__: function for function in (recall, speaker, control)
}
"""By name: (generator, frames, every) -> tokens int32 [17, T]; the command prints the docstrings."""


def best(task: str, stream: np.ndarray, reach: int | None = None) -> np.ndarray:
    """Returns the best possible losses on a stream [17, T] of `task`, nats of each token in Moshi's codebook 1.

    The token of frame t is predicted from columns up to t - 1: from all of them, or from the last `reach` alone.

    Returns:
      float64 [T], NaN in frames without a token.
    """
    reach = stream.shape[1] if reach is None else reach
    nats = np.full(stream.shape[1], np.nan)
    answers = np.flatnonzero(stream[MOSHI] != ABSENT)
    if task == "control":
        wrong = 0.5 / SYMBOLS
        hit = stream[MOSHI, answers] == stream[USER, answers - 1]
        nats[answers] = -np.log(np.where(hit, 0.5 + wrong, wrong))
        return nats
    for t in answers:
        if task == "speaker":
            seen = stream[MOSHI, max(0, t - reach) : t]
            known = np.unique(seen[seen != ABSENT])
            # Candidates for each token of the speaker that was not heard yet.
            unheard = (CARDINALITY - len(known)) / max(1, VOCABULARY - len(known))
            nats[t] = math.log(VOCABULARY) + (0.0 if stream[MOSHI, t] in known else math.log(unheard))
        else:
            # The value stands in the column of the fact or question, or in the next one.
            known = np.flatnonzero(stream[USER, : t - 1] == stream[USER, t - 1])
            nats[t] = 0.0 if (known >= t - reach).any() else math.log(SYMBOLS)
    return nats


def bounds_for(data: Path, files: Sequence[EvalFile], reach: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns `best` of files of the data set in `data`: with all memory, and from `reach` columns, float64 [T] each.

    Raises `InputError` if the folder's task.json is not as `python -m eval tasks` wrote it.
    """
    task = schema.read(data, DataSet, SETTINGS).settings.task
    return [best(task, file.frames) for file in files], [best(task, file.frames, reach) for file in files]


def main(options: Options) -> int:
    """Makes a data set; returns the exit code. Raises `InputError`, and then leaves nothing behind."""
    settings = options.settings
    data = make(settings, local(options.out))
    print(f"{settings.task}: {' '.join(TASKS[settings.task].__doc__.split())}")
    print(f"{settings.files} files of {settings.frames} frames in {options.out}")
    print(
        f"best possible loss, nats per answer: {data.with_memory:.4f} with all memory,"
        f" {data.memoryless:.4f} from the last {GAP} frames alone"
    )
    return 0


def make(settings: Settings, folder: Path) -> DataSet:
    """Writes all of the data set to `folder` or nothing; returns the content of task.json.

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
        data = _write(settings, new)
        new.chmod(0o755)
        new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return data


def _write(settings: Settings, folder: Path) -> DataSet:
    lines, sums, answers = [], np.zeros(2), 0
    for i in range(settings.files):
        # A generator for each file, so that a larger data set begins with the files of a smaller one.
        rng = np.random.default_rng((settings.seed, i))
        stream = TASKS[settings.task](rng, settings.frames, settings.every)
        name = f"codes/{i:05d}.safetensors"
        codes = Codes(stream, FRAME_RATE, CODEC, codec_name=f"task {settings.task}", cardinality=CARDINALITY)
        write_codes(folder / name, codes)
        lines.append(json.dumps({"path": name, "duration": settings.frames / FRAME_RATE}))
        if i < AVERAGED:
            losses = best(settings.task, stream), best(settings.task, stream, GAP)
            sums += [np.nansum(nats) for nats in losses]
            answers += np.isfinite(losses[0]).sum()
    data = DataSet(settings, *(sums / answers).tolist())
    schema.write(folder, data, {}, SETTINGS)
    write_atomically(folder / MANIFEST, "".join(f"{line}\n" for line in lines).encode())
    return data
