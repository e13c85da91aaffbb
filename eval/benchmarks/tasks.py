"""`python -m eval tasks`: data sets of code streams in which what memory is worth is known. Loads no jax.

    FOLDER/task.json                  which task, its settings, and the best possible losses
    FOLDER/codes/NUMBER.safetensors   a stream (`ttt_jax.data.codes`)
    FOLDER/manifest.jsonl             for training and evaluation

A stream has two voices, as Moshi's have. The other voice speaks in its first two codebooks, the own voice answers in its first one, and
nothing but an answer is ever a target. The text is padding throughout. Moshi delays every codebook but the first by a frame, so what
shall meet in one column c of its delayed grid stands in frame c of codebook 1 and in frame c - 1 of codebook 2.
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
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from tyro.conf import Positional, arg

from ttt_jax.config import FRAME_RATE
from ttt_jax.data.codes import Codes, write_codes
from ttt_jax.data.frames import ABSENT
from ttt_jax.data.manifest import MANIFEST
from ttt_jax.data.text import PAD
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import write_atomically
from ttt_jax.utils.paths import local

if TYPE_CHECKING:
    from eval.inputs.dataset import EvalFile

SETTINGS = "task.json"
CODEC = hashlib.sha256(b"ttt_jax.tasks/1").hexdigest()
"""What the code files state as their codec: that of all tasks, so that a model can train on several."""
CARDINALITY = 64
TEXT, OWN, OTHER = 0, 1, 9
"""Rows of a stream: the text, the first codebooks of both voices."""
CODEBOOKS = 8

SYMBOLS = 16
"""Keys, and values: ids from 0 of the other voice's codebooks 1 and 2."""
QUESTION = 31
"""In codebook 2: what stands beside a key is asked for."""
FILLERS = (32, 64)
"""Ids, from and below, of what the other voice says besides."""
TOLD = 32
"""Frames at the start that hold what there is to know."""
GAP = 48
"""Frames behind them without an answer: longer than attention reaches in the models that these tasks are for."""
_BOUNDED = 256
"""Files, the first ones, whose best possible losses are averaged for task.json."""
VOICE = 8
"""Tokens that a speaker uses, of `CARDINALITY`."""
LEAST_EVERY = 3
"""Frames that a question, its answer and one beside them take."""


class Best(NamedTuple):
    """What is best said of a stream; nats of each frame's token in the own codebook 1, NaN where there is none."""

    with_memory: np.ndarray
    """By a predictor that knows the task and has seen all of the stream before, float64 [T]."""
    memoryless: np.ndarray
    """By one that has seen its last columns only, float64 [T]."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a data set; the same settings give the same files."""

    task: Positional[Literal["recall", "speaker", "control"]]
    """recall: facts given early are asked for later; speaker: a speaker's few tokens are learned once; control: nothing to remember."""
    files: int = 64
    """Streams."""
    frames: int = 512
    """Frames of each stream."""
    every: int = 16
    """Behind the start, frames for each question (recall, control) or each token (speaker)."""
    seed: int = 0
    """Seed of all random draws; give files to train on and files to test on different ones."""

    def __post_init__(self) -> None:
        least = {"files": 1, "every": LEAST_EVERY, "frames": TOLD + GAP + self.every}
        for name, low in least.items():
            value = getattr(self, name)
            if value < low:
                raise InputError(f"--{name} {value} is too few: give {low} or more.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed} is negative: give 0 or more.")


@dataclasses.dataclass(frozen=True)
class Options:
    """Make a data set for which the best possible loss is known.

    Train on the folder with --data.train FOLDER --data.codec files --data.from-start --loss.text 0: the facts stand at the start of
    each file, and its text is padding. See docs/evaluation.md.
    """

    settings: Annotated[Settings, arg(name="")]
    """Settings of the data set."""
    out: str
    """Folder for the code files, manifest.jsonl and task.json; new or empty."""


def _silent(rng: np.random.Generator, frames: int) -> np.ndarray:
    """A stream in which the other voice says nothing of interest and the own voice nothing at all, int32 [17, T]."""
    stream = np.full((1 + 2 * CODEBOOKS, frames), ABSENT, np.int32)
    stream[TEXT] = PAD
    stream[OTHER : OTHER + 2] = rng.integers(*FILLERS, (2, frames))
    return stream


def _spread(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """Columns spread over the stream behind `TOLD` and `GAP`: one in each of equal parts of at least `every` frames, with room for an
    answer behind it."""
    edges = np.linspace(TOLD + GAP, frames, (frames - TOLD - GAP) // every + 1).astype(int)
    return rng.integers(edges[:-1], edges[1:] - 1)


def _ask(rng: np.random.Generator, stream: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tells a value for every key, then asks for all keys in turn, again and again: columns of the questions, their keys, the values."""
    told = rng.permutation(np.arange(1, TOLD))[:SYMBOLS]
    values = rng.integers(SYMBOLS, size=SYMBOLS)
    stream[OTHER, told], stream[OTHER + 1, told - 1] = np.arange(SYMBOLS), values
    asked = _spread(rng, stream.shape[1], every)
    keys = np.concatenate([rng.permutation(SYMBOLS) for _ in range(0, len(asked), SYMBOLS)])[: len(asked)]
    stream[OTHER, asked], stream[OTHER + 1, asked - 1] = keys, QUESTION
    return asked, keys, values


def recall(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """The other voice tells a value for each of 16 keys and asks for them later on; the own voice answers."""
    stream = _silent(rng, frames)
    asked, keys, values = _ask(rng, stream, every)
    stream[OWN, asked + 1] = values[keys]
    return stream


def control(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """`recall` without anything to remember: every second answer, by chance, is the key itself, the others are drawn anew."""
    stream = _silent(rng, frames)
    asked, keys, _ = _ask(rng, stream, every)
    stream[OWN, asked + 1] = np.where(rng.random(len(keys)) < 0.5, keys, rng.integers(SYMBOLS, size=len(keys)))
    return stream


def speaker(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """The own voice has 8 of 64 tokens, all alike likely: it speaks through the start, then now and then."""
    stream = _silent(rng, frames)
    heard = np.concatenate([np.arange(TOLD), _spread(rng, frames, every)])
    stream[OWN, heard] = rng.choice(rng.permutation(CARDINALITY)[:VOICE], len(heard))
    return stream


TASKS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "recall": recall,
    "speaker": speaker,
    "control": control,
}
"""By name: (generator, frames, every) -> tokens int32 [17, T]; their docstrings are shown to users."""


def best(task: str, stream: np.ndarray, reach: int) -> Best:
    """The best possible losses on a stream [17, T] of `task`, for all memory and for the last `reach` columns alone.

    The token of frame t is predicted from column t - 1 and those before it.
    """
    return Best(_best(task, stream, stream.shape[1]), _best(task, stream, reach))


def _best(task: str, stream: np.ndarray, reach: int) -> np.ndarray:
    nats = np.full(stream.shape[1], np.nan)
    answers = np.flatnonzero(stream[OWN] != ABSENT)
    if task == "speaker":
        for t in answers:
            seen = stream[OWN, max(0, t - reach) : t]
            known = np.unique(seen[seen != ABSENT])
            # Tokens for each of the voice that is still to be heard.
            unheard = (CARDINALITY - len(known)) / max(1, VOICE - len(known))
            nats[t] = math.log(VOICE) + (0.0 if stream[OWN, t] in known else math.log(unheard))
        return nats
    if task == "control":
        wrong = 0.5 / SYMBOLS
        hit = stream[OWN, answers] == stream[OTHER, answers - 1]
        nats[answers] = -np.log(np.where(hit, 0.5 + wrong, wrong))
        return nats
    for t in answers:
        key = stream[OTHER, t - 1]
        # Told, or asked for before: the value stands in that column, or in the next.
        known = np.flatnonzero(stream[OTHER, : t - 1] == key)
        nats[t] = 0.0 if (known >= t - reach).any() else math.log(SYMBOLS)
    return nats


def bounds_for(data: Path, files: Sequence[EvalFile], reach: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`best` of files of the data set in the folder `data`: with all memory, and with `reach` frames of it, float64 [T] each.

    Raises `InputError`: the folder's task.json is not what `python -m eval tasks` writes.
    """
    path = data / SETTINGS
    stated = config_json.read_json(path, "the task.json of python -m eval tasks")
    task = stated.get("task") if isinstance(stated, dict) else None
    if task not in list(TASKS):  # which may be anything
        raise InputError(
            f"{path} names the task {task!r}, expected one of {', '.join(TASKS)}: make the data set again."
        )
    found = [best(task, file.frames, reach) for file in files]
    return [one.with_memory for one in found], [one.memoryless for one in found]


def main(options: Options) -> int:
    """Makes a data set; returns the exit code. Raises `InputError`, and then leaves nothing behind."""
    settings = options.settings
    best = make(settings, local(options.out))["best"]
    print(f"{settings.task}: {' '.join(TASKS[settings.task].__doc__.split())}")
    print(f"{settings.files} files of {settings.frames} frames in {options.out}")
    print(
        f"best possible loss, nats per answer: {best['with_memory']:.4f} with all memory,"
        f" {best['memoryless']:.4f} from the last {GAP} frames alone"
    )
    return 0


def make(settings: Settings, folder: Path) -> dict[str, Any]:
    """Write the data set into `folder`, which must be new or empty: all of it or nothing; what its task.json says. Raises `InputError`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder} is taken: give a folder that is new or empty.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made ({error.strerror}): give another folder.") from None
    try:
        stated = _write(settings, new)
        new.chmod(0o755)
        new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return stated


def _write(settings: Settings, folder: Path) -> dict[str, Any]:
    lines, sums, answers = [], np.zeros(2), 0
    for i in range(settings.files):
        # Of a generator of its own each, so that a larger data set begins with the files of a smaller one.
        rng = np.random.default_rng((settings.seed, i))
        stream = TASKS[settings.task](rng, settings.frames, settings.every)
        name = f"codes/{i:05d}.safetensors"
        codes = Codes(stream, FRAME_RATE, CODEC, codec_name=f"task {settings.task}", cardinality=CARDINALITY)
        write_codes(folder / name, codes)
        lines.append(json.dumps({"path": name, "duration": settings.frames / FRAME_RATE}))
        if i < _BOUNDED:
            found = best(settings.task, stream, GAP)
            sums += [np.nansum(nats) for nats in found]
            answers += np.isfinite(found.with_memory).sum()
    with_memory, memoryless = (sums / answers).tolist()
    stated = {
        **dataclasses.asdict(settings),
        "best": {
            "with_memory": with_memory,
            "memoryless": memoryless,
            "reach": GAP,
            "files": min(settings.files, _BOUNDED),
        },
    }
    config_json.write_json(folder / SETTINGS, stated)
    write_atomically(folder / MANIFEST, "".join(f"{line}\n" for line in lines).encode())
    return stated
