"""Tensors by name, from a file, shards or under prefixes, matched against the tensors that a model needs."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from ttt_jax.checkpoints.differences import differences, group
from ttt_jax.checkpoints.safetensors_reader import DTYPES, Piece, TensorFile, cast, watched
from ttt_jax.checkpoints.safetensors_writer import Spec
from ttt_jax.checkpoints.weights import Tensor
from ttt_jax.convert.kyutai_names import TOP, Key, Names
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

INDEX = ".index.json"
"""Ending of the index of shards, which maps tensors to shards, after the name that the whole file would have."""
SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Words that `torch.compile`, FSDP and activation checkpointing put into names, also in the middle."""
FIRST = {pattern.split(".")[0] for pattern in TOP.values()} | {"transformer", "depformer"}
"""First words of Kyutai's names, which are no prefix."""

Beside = Callable[[str], Path | None]
"""From a file's name to its path in the same folder; None if there is no such file."""


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    """Its name in the file."""
    dtype: str
    """As files name it."""
    shape: tuple[int, ...]
    piece: Callable[..., Piece]
    """Returns its bytes; called with (part, parts) one of `parts` equal consecutive shares."""

    def array(self) -> np.ndarray:
        """Returns all of it as float32."""
        content = b"".join(map(bytes, self.piece().blocks(1)))
        return np.frombuffer(content, DTYPES[self.dtype]).reshape(self.shape).astype(np.float32)

    def cast(self, dtype: str) -> StoredTensor:
        """Returns the tensor as type `dtype`. Reading it raises `InputError` if a number is beyond its range."""
        where, advice = f"{self.path}: {self.name}", "give weights of another type, such as float32"
        return self._replace(
            dtype=dtype, piece=lambda *share: cast(self.piece(*share), self.dtype, dtype, where, advice)
        )


class StateDict(NamedTuple):
    """The tensors of a model or of its adapters."""

    path: Path
    """The file, or the index of the shards; names them in messages."""
    tensors: dict[str, StoredTensor]

    def watched(self) -> StateDict:
        """Returns the same tensors. Reading one that holds NaN or infinity logs a warning once with file and name."""
        warned: set[str] = set()

        def watch(stored: StoredTensor) -> StoredTensor:
            if stored.dtype not in DTYPES:
                return stored
            where = f"{stored.path}: {stored.name}"
            return stored._replace(piece=lambda *share: watched(stored.piece(*share), stored.dtype, where, warned))

        return StateDict(self.path, {key: watch(stored) for key, stored in self.tensors.items()})


def open_state_dict(path: Path, beside: Beside, opened: contextlib.ExitStack, notes: list[str]) -> StateDict:
    """Returns the tensors of a safetensors file, of the shards of an index, or of all shards beside one.

    `beside` finds the shards of an index, `opened` keeps the files open, `notes` receives notes for the user. Raises
    `InputError` if a file is damaged or missing, or shards and index contradict one another.
    """
    if shard := SHARD.fullmatch(path.name):
        index = path.with_name(f"{shard[1]}.safetensors{INDEX}")
        if not index.is_file():
            alone = f"is one of {int(shard[2])} shards, and {index.name} is not beside it"
            raise InputError(f"{path} {alone}: put all shards and their index there.")
        notes.append(f"{path.name} is one of {int(shard[2])} shards, which are read together")
        path = index
    if path.name.endswith(INDEX):
        return _without_prefix(_of_shards(path, beside, opened), notes)
    return _without_prefix(StateDict(path, _tensors(opened.enter_context(TensorFile(path)))), notes)


def _tensors(file: TensorFile) -> dict[str, StoredTensor]:
    return {
        key: StoredTensor(file.path, key, info.dtype, info.shape, functools.partial(file.piece, key))
        for key, info in file.tensors.items()
    }


def _of_shards(index: Path, beside: Beside, opened: contextlib.ExitStack) -> StateDict:
    raw = config_json.read_json(index, "an index of shards")
    listed = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index} holds no weight_map from tensors to files: give the index of the shards.")
    names = sorted(set(listed.values()))
    if elsewhere := [name for name in names if Path(name).name != name or name in ("", ".", "..")]:
        raise InputError(f"{index} names {elsewhere[0]!r}, which is no file beside it: correct it there.")
    paths = {name: beside(name) for name in names}
    if missing := [name for name, path in paths.items() if path is None]:
        raise InputError(f"{index} names {', '.join(missing)}, which is not there: put all shards beside it.")
    shards = {name: _tensors(opened.enter_context(TensorFile(path))) for name, path in paths.items()}
    problems = []
    for name, tensors in shards.items():
        if absent := [key for key, where in listed.items() if where == name and key not in tensors]:
            problems.append(f"{name} lacks {group(absent)}, which the index lists for it")
        if unlisted := [key for key in tensors if key not in listed]:
            problems.append(f"{name} holds {group(unlisted)}, which the index does not name")
        if twice := [key for key in tensors if listed.get(key, name) != name]:
            others = ", ".join(sorted({listed[key] for key in twice}))
            problems.append(f"{name} holds {group(twice)}, which the index lists for {others}")
    if problems:
        raise InputError(f"{index} does not fit its shards, as {'; '.join(problems)}: copy all of them again.")
    return StateDict(index, {key: shards[name][key] for key, name in listed.items()})


def _without_prefix(state_dict: StateDict, notes: list[str]) -> StateDict:
    """Returns `state_dict` with names that have neither a prefix common to all nor words of wrappers."""
    words = os.path.commonprefix([key.split(".")[:-1] for key in state_dict.tensors])
    known = next((i for i, word in enumerate(words) if word in FIRST), len(words))
    if known:
        notes.append(f"all names in {state_dict.path.name} start with {'.'.join(words[:known])}., which is left out")
    renamed: dict[str, StoredTensor] = {}
    for key, stored in state_dict.tensors.items():
        name = ".".join(word for word in key.split(".")[known:] if word not in WRAPPERS)
        if name in renamed:
            twice = sorted((renamed[name].name, stored.name), key=lambda key: not WRAPPERS & {*key.split(".")})
            raise InputError(f"{state_dict.path} holds {name} twice, once as {twice[0]}: keep one of them.")
        renamed[name] = stored
    if wrapped := sorted(WRAPPERS & {word for key in state_dict.tensors for word in key.split(".")[known:]}):
        notes.append(f"{', '.join(wrapped)} in names in {state_dict.path.name} is left out")
    return StateDict(state_dict.path, renamed)


# Matching

Problems = dict[Path, list[str]]
"""By file, in which ways it does not fit."""


class Match(NamedTuple):
    """A tensor of ours and its bytes in Kyutai's files."""

    tensor: Tensor
    names: Names
    parts: tuple[Piece, ...]
    """The bytes of each of its maps or tables."""

    def spec(self, dtype: str) -> Spec:
        """Returns the tensor, of type `dtype`, to be written into our files."""
        return Spec(self.tensor.name, dtype, self.tensor.shape, self.parts)


class Matched(NamedTuple):
    """All tensors of ours, matched, or the problems that prevent it."""

    matches: list[Match]
    dtype: str
    """The type that most of the tensors have."""
    problems: Problems


def match(wanted: Sequence[tuple[Tensor, Names]], tensors: Mapping[str, StoredTensor], path: Path) -> Matched:
    """Matches the tensors `wanted` with all of `tensors`. A missing one counts as missing in `path`."""
    unfused = any("in_projs." in key or "out_projs." in key for key in tensors)
    chosen: list[tuple[Key, ...]] = []
    for _, names in wanted:
        there = tuple(key for key in names.fused if key.name in tensors)[:1]
        chosen.append(there or (names.fused[:1] if names.fused and not unfused else names.parts))
    problems = misfits({key.name: key.shape for keys in chosen for key in keys}, tensors, path)
    if problems:
        return Matched([], common_type(tensors), problems)
    matches = []
    for (tensor, names), keys in zip(wanted, chosen, strict=True):
        if keys == names.parts:
            parts = [tensors[key.name].piece() for key in keys]
        else:
            (key,) = keys
            parts = [tensors[key.name].piece(i, len(names.parts)) for i in range(len(names.parts))]
        matches.append(Match(tensor, names, tuple(parts)))
    return Matched(matches, common_type(tensors), {})


def common_type(tensors: Mapping[str, StoredTensor]) -> str:
    """Returns the type that most tensors have; "" if there are none."""
    types = Counter(stored.dtype for stored in tensors.values()).most_common(1)
    return types[0][0] if types else ""


def misfits(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor], path: Path) -> Problems:
    """Describes by file how `tensors` differ from `expected`. A missing one counts as missing in `path`."""
    files: dict[Path, dict[str, StoredTensor]] = {path: {}}
    for key, stored in tensors.items():
        files.setdefault(stored.path, {})[key] = stored
    missing = {key: shape for key, shape in expected.items() if key not in tensors}
    dtype, problems = common_type(tensors), {}
    for file, held in files.items():
        here = {key: shape for key, shape in expected.items() if key in held} | (missing if file == path else {})
        texts = list(differences(here, {key: stored.shape for key, stored in held.items()}))
        for other in sorted({stored.dtype for stored in held.values()} - {dtype}):
            keys = group(key for key, stored in held.items() if stored.dtype == other)
            texts.append(f"has {keys} as {other} where the others are {dtype}")
        if dtype and dtype not in DTYPES and any(stored.dtype == dtype for stored in held.values()):
            texts.append(f"has weights of type {dtype} instead of {', '.join(DTYPES)}")
        if texts:
            problems[file] = texts
    return problems


def refuse_misfits(problems: Problems, target: str, advice: str = "") -> NoReturn:
    """Raises `InputError` with the `problems` of files that do not fit `target`, and the advice."""
    text = "; ".join(f"{path} does not fit {target}, as it {'; '.join(texts)}" for path, texts in problems.items())
    raise InputError(f"{text}: {advice or 'give weights and a config.json that belong together'}.")
