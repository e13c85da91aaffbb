"""The one schema of results: what every results.json stores of checkpoints and files, how it is written and read.

Commands write a dataclass of their own whose class attributes `COMMAND` and `FORMAT` name the command and the version.
Imports no jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NewType, Protocol, TypeVar

import numpy as np

from eval.stats.estimates import Estimate
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import write_atomically
from ttt_jax.utils.paths import file_name

RESULTS = "results.json"
FRAMES = "frames"
"""Folder of the scores by frame in a result folder."""

Tree = NewType("Tree", dict)
"""Nested by name; leaves are `Estimate`s, numbers (null was not measured), texts, or lists of them."""

UNIT = "speaker"
"""What files of one group share."""


class Skipped(NamedTuple):
    """A file that was not evaluated."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that was evaluated."""

    name: str
    """Also of its folder under frames/, as `file_name` writes it; unique."""
    contexts: tuple[int, ...]
    """Attention window of each layer, frames."""
    ttt_layers: tuple[int, ...]
    """Indices of the layers that carry a TTT layer, in the order of `eval.streaming.scores.Inner`."""
    max_delay: int = 0
    """Longest delay of a codebook, frames."""
    dtype: str = "float32"
    seed: int | None = None
    """Of its training; None of converted weights."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Path, step, digest of the weights, and what else a command records."""
    attention_sink: int = 0
    """First frames of a stream that every later frame sees."""

    @property
    def context(self) -> int:
        """Longest attention window, frames."""
        return max(self.contexts)

    @property
    def reach(self) -> float:
        """Frames that attention of all layers together looks back at most; infinity with an attention sink.

        Each layer passes on what its window shows, and codebooks come with their delay.
        """
        if self.attention_sink:
            return math.inf
        return sum(context - 1 for context in self.contexts) + 1 + self.max_delay


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """A file that was streamed."""

    name: str
    """Unique."""
    group: str
    """Speaker; its own name if it shares none with another file."""
    frames: int
    npz: str
    """Name of its scores in the folder of each checkpoint."""
    boundaries: tuple[int, ...] = ()
    """Frames at which the next joined recording begins."""
    digest: str = ""
    """SHA-256 of the tokens that were streamed."""


def scores_path(folder: Path, checkpoint: str, file: FileInfo) -> Path:
    """Returns where a result folder holds the scores of a file under the checkpoint of this name."""
    return folder / FRAMES / file_name(checkpoint) / file.npz


def units(files: Sequence[FileInfo]) -> tuple[int, str]:
    """Returns the number of independent units, and what they are: files, or groups where several share one."""
    count = len({file.group for file in files})
    return count, "files" if count == len(files) else f"{UNIT}s"


class Stored(Protocol):
    """A dataclass that is stored as results.json."""

    COMMAND: ClassVar[str]
    FORMAT: ClassVar[int]


Kind = TypeVar("Kind", bound=Stored)


def write(folder: Path, results: Stored, about: dict[str, Any], name: str = RESULTS) -> Path:
    """Writes results.json to `folder`, at once or not at all; returns its path.

    Args:
      about: further entries at the top (versions, cost, notes); name: of the file, if another.
    """
    content = plain({**about, "command": results.COMMAND, "format": results.FORMAT, **plain(results)})
    path = folder / name
    write_atomically(path, as_json(content | {"checksum": _checksum(content)}))
    return path


def read(folder: Path, kind: type[Kind], name: str = RESULTS) -> Kind:
    """Returns what `write` wrote to `folder`, without its `about`.

    Raises `InputError` if there is no such file, it is of another command or version, or not as it was written.
    """
    return typed(kind, content_of(folder, kind.COMMAND, kind.FORMAT, name))


def typed(kind: type[Kind], content: dict[str, Any]) -> Kind:
    """Returns the fields of `kind` from the content of a results.json."""
    return restore(kind, {field.name: content[field.name] for field in dataclasses.fields(kind)})


def content_of(folder: Path, command: str, version: int, name: str = RESULTS) -> dict[str, Any]:
    """Returns the content of results.json in `folder`. Raises `InputError` as `read`."""
    path = folder / name
    stored = config_json.read_json(path, f"{name} in a folder that {command} wrote")
    header = command_of(stored)
    if header != (command, version):
        what = "is of format {1} of {0}".format(*header) if header else "does not name its command and format"
        raise InputError(f"{path} {what}, but format {version} of {command} is read: run {command} again.")
    if stored.pop("checksum", None) != _checksum(stored):
        raise InputError(
            f"{path} is not as it was written (its checksum does not match its content): run {command} again."
        )
    return stored


def command_of(stored: Any) -> tuple[str, int] | None:
    """Returns the command and version that the content of a results.json names; None if it names none."""
    header = (stored.get("command"), stored.get("format")) if isinstance(stored, dict) else (None, None)
    return header if isinstance(header[0], str) and isinstance(header[1], int) else None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


LEVELS, WIDTH = 4, 400
"""Levels of nesting whose entries stand on lines of their own (of lists one level less), and characters that fit on one
line anyway."""


def as_json(content: Any) -> bytes:
    """Returns JSON that people can read: lists of numbers, short entries and deep ones are on one line."""
    return (_lines(plain(content), 0) + "\n").encode("utf-8", "backslashreplace")


def _lines(value: Any, level: int) -> str:
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    is_list = isinstance(value, list)
    numbers = is_list and not any(isinstance(item, dict | list | str) for item in value)
    deep = level >= LEVELS - is_list
    if not isinstance(value, dict | list) or numbers or level and (deep or len(flat) <= WIDTH):
        return flat
    names = [""] * len(value) if is_list else [f"{json.dumps(name, ensure_ascii=False)}: " for name in value]
    items = [
        name + _lines(item, level + 1) for name, item in zip(names, value if is_list else value.values(), strict=True)
    ]
    (start, end), indent = "[]" if is_list else "{}", " " * level
    return f"{start}\n{indent} " + f",\n{indent} ".join(items) + f"\n{indent}{end}"


def plain(value: Any) -> Any:
    """Returns `value` as JSON: dataclasses and named tuples as objects, arrays as lists, not finite numbers as null."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if dataclasses.is_dataclass(value):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def restore(kind: Any, value: Any) -> Any:
    """Returns `value`, read from JSON, as type `kind`: the inverse of `plain`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Tree:
        return _tree(value)
    if kind is float:
        return float("nan") if value is None else float(value)
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        hints = typing.get_type_hints(kind)
        return kind(**{name: restore(hints[name], item) for name, item in value.items()})
    if origin is dict:
        return {name: restore(args[1], item) for name, item in value.items()}
    if origin in (list, tuple):
        return origin(restore(args[0], item) for item in value)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else restore(args[0], value)
    return value


def _tree(value: Any) -> Any:
    if value is None:
        return float("nan")
    if isinstance(value, dict):
        items = {name: _tree(item) for name, item in value.items()}
        return Estimate(**items) if set(items) == set(Estimate._fields) else items
    return [_tree(item) for item in value] if isinstance(value, list) else value
