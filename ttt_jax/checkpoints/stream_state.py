"""Saves and loads the state of a running stream, so that a conversation can go on another day or be forked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ttt_jax.checkpoints import safetensors_writer
from ttt_jax.checkpoints.differences import differences
from ttt_jax.checkpoints.safetensors_reader import as_bytes, of_array
from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.errors import InputError
from ttt_jax.moshi.model import State, init_state
from ttt_jax.utils import config_json, trees
from ttt_jax.utils.files import write_atomically

FORMAT = "ttt_jax.state/2"


def save_state(path: str | Path, state: State, cfg: MoshiConfig) -> None:
    """Writes `state` to `path`, at once or not at all: a tensor for each leaf, the model's configuration, a checksum.

    Raises `InputError` if it cannot be written; what was there before is left as it was.
    """
    write(path, state, {"format": FORMAT, "model": describe(cfg)})


def load_state(path: str | Path, cfg: MoshiConfig) -> State:
    """Returns the state in `path`, bit for bit, so that a stream goes on as if it had never stopped.

    Raises `InputError` if the file is damaged or is not the state of a model with the configuration `cfg`, or if
    another version of this package wrote it.
    """
    stored = read(path, "a state that save_state wrote")
    check_model(stored, cfg)
    check_format(stored, FORMAT)
    rows = stored.leaves["position"].shape[0] if "position" in stored.leaves else 1
    return jax.tree.map(jnp.asarray, stored.like(jax.eval_shape(lambda: init_state(cfg, rows))))


class Stored(NamedTuple):
    """The content of a file that `write` wrote."""

    path: Path
    leaves: dict[str, np.ndarray]
    about: dict[str, str]
    checksum: str | None
    wanted: str
    """What the file should be, in words."""

    def like(self, tree: Any) -> Any:
        """Returns the leaves as NumPy arrays in the form of `tree`, arrays or their shapes.

        Raises `InputError` if they have another form, or are not as they were written.
        """
        expected = {name: (*leaf.shape, str(leaf.dtype)) for name, leaf in trees.named(tree).items()}
        found = {name: (*leaf.shape, str(leaf.dtype)) for name, leaf in self.leaves.items()}
        if problems := list(differences(expected, found)):
            raise InputError(f"{self.path} {'; '.join(problems)}: give {self.wanted}.")
        if self.checksum != _checksum(self.leaves, self.about):
            raise InputError(
                f"{self.path} is damaged (its checksum does not match its content): bring back a sound copy."
            )
        return jax.tree.unflatten(jax.tree.structure(tree), [self.leaves[name] for name in expected])


def write(path: str | Path, tree: Any, about: dict[str, str]) -> None:
    """Writes the leaves of `tree` and `about` to `path`, with a checksum over both.

    Raises `InputError` if it cannot be written; what was there before is left as it was.
    """
    leaves = {name: np.asarray(leaf, order="C") for name, leaf in trees.named(tree).items()}
    # In blocks: safetensors' own functions copy a state whole, and no other thread of a live server runs meanwhile.
    specs = [
        safetensors_writer.Spec(
            name, _type(leaf.dtype), leaf.shape, (of_array(leaf.nbytes, partial(np.asarray, leaf)),)
        )
        for name, leaf in leaves.items()
    ]
    try:
        write_atomically(Path(path), safetensors_writer.blocks(specs, {**about, "checksum": _checksum(leaves, about)}))
    except OSError as error:
        needed = sum(spec.nbytes for spec in specs)
        failed = f"{path} could not be written ({error.strerror}), {needed:,} bytes are needed"
        raise InputError(f"{failed}: mend that, or give another path.") from error


def read(path: str | Path, wanted: str) -> Stored:
    """Returns what `write` wrote; `wanted` says in words what it should be.

    Raises `InputError` if the file cannot be read. Whether it is as it was written `Stored.like` finds out.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file: give the path of {wanted}.")
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            leaves = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}): give {wanted}.") from None
    return Stored(path, leaves, about, about.pop("checksum", None), wanted)


def check_format(stored: Stored, expected: str) -> None:
    """Raises `InputError` unless a file has the format `expected`; the first formats held `open_sum`."""
    if (found := stored.about.get("format")) != expected:
        raise InputError(
            f"{stored.path} has the format {found!r}, not {expected!r}, in which TTT states hold the steps of the open"
            f" mini-batch, not their sum: give {stored.wanted} by this version, or go on with the one that wrote it."
        )


def check_model(stored: Stored, cfg: MoshiConfig) -> None:
    """Raises `InputError` unless the state in a file is of a model with the configuration `cfg`."""
    wanted = json.loads(describe(cfg))
    try:
        # States that were saved before there were sinks have none.
        model = {"attention_sink": 0, **json.loads(stored.about["model"])}
    except (KeyError, ValueError, TypeError):
        raise InputError(f"{stored.path} does not name its model: give {stored.wanted}.") from None
    if differing := [key for key in wanted if model.get(key) != wanted[key]]:
        key = differing[0]
        other = f"whose {key} is {model.get(key)!r} where this one's is {wanted[key]!r}"
        raise InputError(f"{stored.path} is the state of another model, {other}: give the state of this model.")


def describe(cfg: MoshiConfig) -> str:
    """Returns what a state depends on of its model's configuration, JSON."""
    model = config_json.to_dict(_model(cfg))
    del model["ttt"]["impl"]  # how a stream is computed; older states do not name it
    return json.dumps(model)


def _type(dtype: np.dtype) -> str:
    """Returns the name of a type in a safetensors file."""
    return {"bool": "BOOL", "bfloat16": "BF16"}.get(dtype.name, f"{dtype.kind.upper()}{8 * dtype.itemsize}")


def _tensor(file: Any, name: str) -> np.ndarray:
    """Returns a tensor, read in parts: no other thread runs while one is copied."""
    part = file.get_slice(name)
    count = next(iter(part.get_shape()), 0)
    return np.concatenate([part[i : i + 1] for i in range(count)]) if count else file.get_tensor(name)


def _checksum(leaves: dict[str, np.ndarray], about: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(as_bytes(np.ascontiguousarray(leaf)))
    return digest.hexdigest()


def _model(cfg: MoshiConfig) -> MoshiConfig:
    """Returns `cfg` with layers as numbers and with defaults for fields without effect on a running stream."""
    layers = ",".join(map(str, cfg.ttt_layers)) or "none"
    plain = TTTConfig()
    return dataclasses.replace(
        cfg, ttt=dataclasses.replace(cfg.ttt, layers=layers, remat_group=plain.remat_group, gate_init=plain.gate_init)
    )
