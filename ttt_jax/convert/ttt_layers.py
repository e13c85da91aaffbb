"""TTT layers in files of their own: new ones, and those that travel beside a model in Kyutai's layout.

`ttt.safetensors` holds float32 tensors "layer_29/NAME"; `ttt_config.json` the settings, {"format": 1, "ttt": {...}}.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.differences import differences, wrong_types
from ttt_jax.checkpoints.safetensors_reader import TensorFile, of_array, watched
from ttt_jax.checkpoints.safetensors_writer import Spec
from ttt_jax.checkpoints.weights import Tensor
from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

TTT = "ttt.safetensors"
TTT_CONFIG = "ttt_config.json"
FORMAT = 1

Parameters = Callable[[int], dict[str, Any]]
"""From a layer's number to the parameters of its TTT layer."""


def exported_name(tensor: Tensor) -> str:
    """Returns the name in `ttt.safetensors` of a tensor in the file ttt_29.safetensors: "layer_29/NAME"."""
    return f"layer_{Path(tensor.file).stem.removeprefix('ttt_')}/{tensor.name}"


def write_ttt_config(path: Path, cfg: MoshiConfig) -> None:
    """Writes the settings of the TTT layers of `cfg`."""
    layers = ",".join(map(str, cfg.ttt_layers))
    config_json.write_json(path, {"format": FORMAT, "ttt": {**config_json.to_dict(cfg.ttt), "layers": layers}})


def read_ttt_config(path: Path) -> TTTConfig:
    """Reads the file of `write_ttt_config`. Raises `InputError` if `path` holds anything else."""
    raw = config_json.read_json(path, "the settings of TTT layers")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}: export the model again, or take the file away.")
    return config_json.from_dict(TTTConfig, raw.get("ttt"), f"{path}: ttt")


def check_ttt(cfg: MoshiConfig, file: TensorFile) -> None:
    """Raises `InputError` unless `file` holds the TTT layers of `cfg` and nothing else, in float32."""
    expected = {exported_name(tensor): tensor.shape for tensor in weights.ttt(cfg)}
    problems = list(differences(expected, {key: info.shape for key, info in file.tensors.items()}))
    problems += wrong_types({key: info.dtype for key, info in file.tensors.items()}, "F32")
    if problems:
        raise InputError(f"{file.path} does not fit {TTT_CONFIG}, as it {'; '.join(problems)}: export the model again.")


def ttt_spec(tensor: Tensor, source: Parameters | TensorFile) -> Spec:
    """Returns a tensor of a TTT layer for our folder, from an exported file or from `Parameters`."""
    if isinstance(source, TensorFile):
        name = exported_name(tensor)
        piece = watched(source.piece(name), "F32", f"{source.path}: {name}", set())
    else:
        layer = int(Path(tensor.file).stem.removeprefix("ttt_"))
        piece = of_array(4 * math.prod(tensor.shape), lambda: np.asarray(source(layer)[tensor.name]))
    return Spec(tensor.name, "F32", tensor.shape, (piece,))


def fresh(cfg: MoshiConfig, seed: int) -> Parameters:
    """Returns the parameters of new TTT layers, drawn on the CPU from a key a layer. Keeps those of the last layer."""

    @functools.lru_cache(maxsize=1)
    def make(layer: int) -> dict[str, Any]:
        import jax

        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return _init_program(cfg)(jax.random.fold_in(jax.random.key(seed), layer))

    return make


@functools.lru_cache(maxsize=1)
def _init_program(cfg: MoshiConfig) -> Callable[[Any], dict[str, Any]]:
    import jax

    return jax.jit(functools.partial(weights.init_ttt, cfg))
