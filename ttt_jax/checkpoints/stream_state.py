"""Saves and loads the state of a running stream, so that a conversation can go on another day or be forked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ttt_jax.checkpoints.differences import differences
from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.errors import InputError
from ttt_jax.moshi.model import State, init_state
from ttt_jax.utils import config_json, trees
from ttt_jax.utils.files import write_atomically


def save_state(path: str | Path, state: State, cfg: MoshiConfig) -> None:
    """Writes `state` to `path`, at once or not at all: a tensor for each leaf, the model's configuration, a checksum.

    Raises `InputError` if it cannot be written; what was there before is left as it was.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in trees.named(state).items()}
    about = json.dumps(config_json.to_dict(_model(cfg)))
    content = save(leaves, {"model": about, "checksum": _checksum(leaves, about)})
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        failed = f"{path} could not be written ({error.strerror}), {len(content):,} bytes are needed"
        raise InputError(f"{failed}: mend that, or give another path.") from error


def load_state(path: str | Path, cfg: MoshiConfig) -> State:
    """Returns the state in `path`, bit for bit, so that a stream goes on as if it had never stopped.

    Raises `InputError` if the file is damaged or is not the state of a model with the configuration `cfg`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file: give the path of a state that save_state wrote.")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except SafetensorError as error:
        damaged = f"{path} is damaged or no safetensors file ({error})"
        raise InputError(f"{damaged}: give a state that save_state wrote.") from None
    wanted = config_json.to_dict(_model(cfg))
    try:
        model = dict(json.loads(metadata["model"]))
    except (KeyError, ValueError, TypeError):
        raise InputError(f"{path} does not name its model: give a state that save_state wrote.") from None
    if differing := [key for key in wanted if model.get(key) != wanted[key]]:
        key = differing[0]
        other = f"whose {key} is {model.get(key)!r} where this one's is {wanted[key]!r}"
        raise InputError(f"{path} is the state of another model, {other}: give the state of this model.")
    rows = leaves["position"].shape[0] if "position" in leaves else 1
    fresh = jax.eval_shape(lambda: init_state(cfg, rows))
    expected = {name: (*leaf.shape, str(leaf.dtype)) for name, leaf in trees.named(fresh).items()}
    if problems := list(differences(expected, {name: (*leaf.shape, str(leaf.dtype)) for name, leaf in leaves.items()})):
        raise InputError(f"{path} {'; '.join(problems)}: give a state that save_state wrote.")
    if metadata.get("checksum") != _checksum(leaves, metadata["model"]):
        raise InputError(f"{path} is damaged (its checksum does not match its content): bring back a sound copy.")
    return jax.tree.unflatten(jax.tree.structure(fresh), [jnp.asarray(leaves[name]) for name in expected])


def _checksum(leaves: dict[str, np.ndarray], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _model(cfg: MoshiConfig) -> MoshiConfig:
    """Returns `cfg` with layers as numbers and with defaults for fields without effect on a running stream."""
    layers = ",".join(map(str, cfg.ttt_layers)) or "none"
    plain = TTTConfig()
    return dataclasses.replace(
        cfg, ttt=dataclasses.replace(cfg.ttt, layers=layers, remat_group=plain.remat_group, gate_init=plain.gate_init)
    )
