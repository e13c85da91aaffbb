"""Tensors by their names, wherever they lie: in one file, in shards, or under names with a prefix."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ttt_jax.checkpoints.differences import group
from ttt_jax.checkpoints.safetensors_reader import DTYPES, Piece, TensorFile, watched
from ttt_jax.convert.kyutai_names import TOP
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

INDEX = ".index.json"
"""Ending of the file beside shards that tells which tensor is in which, after the name that the whole would have."""
SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What `torch.compile`, FSDP and activation checkpointing put into names, also in their middle."""
FIRST = {pattern.split(".")[0] for pattern in TOP.values()} | {"transformer", "depformer"}
"""First words of Kyutai's names, which are no prefix."""

Beside = Callable[[str], Path | None]
"""Path of another file of the same folder by its name; None if there is none."""


class Held(NamedTuple):
    """A tensor, and the file that it lies in."""

    path: Path
    name: str
    """What it is called there."""
    dtype: str
    """As files name it."""
    shape: tuple[int, ...]
    piece: Callable[..., Piece]
    """Its bytes; of what lies in one piece, with two numbers (part, parts) one of so many equal consecutive shares."""


class View(NamedTuple):
    """The tensors of a model or of its adapters."""

    path: Path
    """The file, or the index of the shards; names them in messages."""
    tensors: dict[str, Held]

    def watched(self) -> View:
        """The same; reading a tensor that holds NaN or infinity warns once, with its file and its name there."""
        told: set[str] = set()

        def watch(held: Held) -> Held:
            where = f"{held.path}: {held.name}"
            return held._replace(piece=lambda *share: watched(held.piece(*share), held.dtype, where, told))

        return View(
            self.path, {key: watch(held) if held.dtype in DTYPES else held for key, held in self.tensors.items()}
        )


def open_view(path: Path, beside: Beside, opened: contextlib.ExitStack, notes: list[str]) -> View:
    """The tensors of a safetensors file, of the shards of an index, or of those that a shard belongs to.

    Args:
      path: the file; beside: finds the shards of an index.
      opened: keeps the files open.
      notes: takes what the user should know: that a shard is not read alone, that names had a prefix.

    Raises `InputError` if a file is damaged or missing, or shards and index contradict one another.
    """
    if shard := SHARD.fullmatch(path.name):
        index = path.with_name(f"{shard[1]}.safetensors{INDEX}")
        if not index.is_file():
            raise InputError(
                f"{path} is one of {int(shard[2])} shards, and {index.name} is not beside it: put all shards and their index there."
            )
        notes.append(f"{path.name} is one of {int(shard[2])} shards, which are read together")
        path = index
    if path.name.endswith(INDEX):
        return _bare(_of_shards(path, beside, opened), notes)
    return _bare(View(path, _held(opened.enter_context(TensorFile(path)))), notes)


def _held(file: TensorFile) -> dict[str, Held]:
    return {
        key: Held(file.path, key, info.dtype, info.shape, functools.partial(file.piece, key))
        for key, info in file.tensors.items()
    }


def _of_shards(index: Path, beside: Beside, opened: contextlib.ExitStack) -> View:
    raw = config_json.read_json(index, "an index of shards")
    listed = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(
            f"{index} holds no weight_map from tensors to files: give the index that belongs to the shards."
        )
    names = sorted(set(listed.values()))
    if elsewhere := [name for name in names if Path(name).name != name or name in ("", ".", "..")]:
        raise InputError(f"{index} names {elsewhere[0]!r}, which is no file beside it: correct it there.")
    paths = {name: beside(name) for name in names}
    if missing := [name for name, path in paths.items() if path is None]:
        raise InputError(f"{index} names {', '.join(missing)}, which is not there: put all shards beside it.")
    shards = {name: _held(opened.enter_context(TensorFile(path))) for name, path in paths.items()}
    problems = []
    for name, held in shards.items():
        if absent := [key for key, where in listed.items() if where == name and key not in held]:
            problems.append(f"{name} lacks {group(absent)}, which the index says it holds")
        if unlisted := [key for key in held if key not in listed]:
            problems.append(f"{name} holds {group(unlisted)}, which the index does not name")
        if twice := [key for key in held if listed.get(key, name) != name]:
            others = ", ".join(sorted({listed[key] for key in twice}))
            problems.append(f"{name} holds {group(twice)}, which the index says {others} holds")
    if problems:
        raise InputError(
            f"{index} does not fit its shards, as {'; '.join(problems)}: copy or download all of them again."
        )
    return View(index, {key: shards[name][key] for key, name in listed.items()})


def _bare(view: View, notes: list[str]) -> View:
    """`view` with names that have neither a prefix common to all nor words that wrappers of modules put in."""
    words = os.path.commonprefix([key.split(".")[:-1] for key in view.tensors])
    known = next((i for i, word in enumerate(words) if word in FIRST), len(words))
    if known:
        notes.append(f"all names in {view.path.name} start with {'.'.join(words[:known])}., which is left out")
    bare: dict[str, Held] = {}
    for key, held in view.tensors.items():
        rest = key.split(".")[known:]
        name = ".".join(word for word in rest if word not in WRAPPERS)
        if name in bare:
            twice = sorted((bare[name].name, held.name), key=lambda one: not WRAPPERS & {*one.split(".")})
            raise InputError(
                f"{view.path} holds {name} twice, once as {twice[0]}, with a wrapper's word in its name: keep one of them."
            )
        bare[name] = held
    if wrapped := sorted(WRAPPERS & {word for key in view.tensors for word in key.split(".")[known:]}):
        notes.append(f"{', '.join(wrapped)} in names in {view.path.name} is left out")
    return View(view.path, bare)
