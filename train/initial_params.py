"""A run's parameters at its start: at random, or a folder of converted weights with what is new at random."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from train.config import TrainConfig
from train.partition import is_trainable, split
from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.differences import differences
from ttt_jax.config import MoshiConfig
from ttt_jax.distributed import sharding
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.utils import config_json
from ttt_jax.utils.trees import Tree, merge, named, pick
from ttt_jax.utils.xla import known_options

FREE = ("ttt", "lora", "apart", "dtype", "context", "layer_context")
"""Fields of the model that a run may set otherwise than the weights it starts from."""


class Parameters(NamedTuple):
    """All parameters of a model, on the mesh."""

    trainable: Tree
    """float32."""
    frozen: Tree
    """In the types of their files."""


def check_base(cfg: TrainConfig) -> None:
    """Raise `InputError` if frozen weights would come from nowhere."""
    if cfg.base is None and not cfg.trainable.base:
        raise InputError(
            "trainable.base is off and base is unset, so frozen weights would stay at random: give --base FOLDER (python -m"
            " ttt_jax.convert makes it), or --trainable.base."
        )


def stored(cfg: TrainConfig) -> list[str] | None:
    """Paths of the leaves that a checkpoint holds: all (None) but those of Moshi itself that lie in `cfg.base` and are frozen.

    The digest by which a checkpoint names its base leaves out TTT layers and adapters: a checkpoint has its own.
    """
    if cfg.base is None:
        return None
    with _open(cfg) as folder:
        here = {"/".join(tensor.path) for tensor in _found(folder, cfg)}
    own = lambda path: "/ttt/" in path or "_lora_" in path or is_trainable(path, cfg)  # noqa: E731
    return [path for path in named(_shapes(cfg.model)) if path not in here or own(path)]


def initial(cfg: TrainConfig, mesh: Mesh) -> Parameters:
    """The parameters before the first step. Raises `InputError`: no such weights, or they do not fit the model."""
    shapes = _shapes(cfg.model)
    if cfg.base is None:
        return Parameters(*split(_fresh(cfg, mesh, named(shapes).keys()), cfg))
    with _open(cfg) as folder:
        _found(folder, cfg)
        read = weights.read(folder, cfg.model, place=partial(_place, cfg, mesh))
    fresh = _fresh(cfg, mesh, named(shapes).keys() - named(read).keys())
    return Parameters(*split(merge(read, fresh), cfg))


def frozen_base(cfg: TrainConfig, mesh: Mesh) -> Tree:
    """The frozen leaves that no checkpoint holds, from `cfg.base`."""
    kept = stored(cfg)
    if kept is None:
        return {}
    with _open(cfg) as folder:
        return weights.read(folder, cfg.model, named(_shapes(cfg.model)).keys() - set(kept), partial(_place, cfg, mesh))


def stored_like(cfg: TrainConfig, mesh: Mesh) -> Tree:
    """Shapes, types and shardings of the leaves that a checkpoint holds."""
    kept, shapes = stored(cfg), _shapes(cfg.model)
    shapes = shapes if kept is None else pick(shapes, set(kept))
    shardings = sharding.params_shardings(mesh, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def base_of(cfg: TrainConfig) -> dict[str, str] | None:
    """The folder of `cfg.base` and the digest of what is in it, as a checkpoint names them; None without one."""
    if cfg.base is None:
        return None
    with _open(cfg) as folder:
        return {"path": cfg.base, "digest": folder.info["digest"]}


def _open(cfg: TrainConfig) -> weights.Folder:
    return weights.Folder(cfg.base)


def _found(folder: weights.Folder, cfg: TrainConfig) -> list[weights.Tensor]:
    """The tensors of `cfg.model` that the folder has. Raises `InputError` unless they are its base, and all that it has."""
    ours, theirs = (
        {key: value for key, value in config_json.to_dict(model).items() if key not in FREE}
        for model in (cfg.model, folder.cfg)
    )
    if ours != theirs:
        wrong = "; ".join(
            f"model.{key} is {ours[key]}, there {theirs[key]}" for key in ours if ours[key] != theirs[key]
        )
        raise InputError(
            f"the weights in {cfg.base} are of another architecture ({wrong}): set these fields as they are there."
        )
    wanted = {(t.file, t.name): t for t in weights.tensors(cfg.model)}
    for what, extra in (("adapters", weights.LORA), ("TTT layers", "ttt_")):
        here = {(t.file, t.name): t.shape for t in folder.tensors if t.file.startswith(extra)}
        asked = {key: t.shape for key, t in wanted.items() if key[0].startswith(extra)}
        if here and here != asked:
            raise InputError(
                f"the {what} in {cfg.base} are not those of the run ({'; '.join(list(differences(_by_name(asked), _by_name(here)))[:2])}): set"
                f" {'model.lora' if what == 'adapters' else 'model.ttt'} as there, or give weights without {what}."
            )
    here = {(t.file, t.name) for t in folder.tensors}
    return [tensor for key, tensor in wanted.items() if key in here]


def _by_name(shapes: dict[tuple[str, str], tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """By one name what has a file's and a tensor's."""
    return {f"{file.removesuffix('.safetensors')}/{name}": shape for (file, name), shape in shapes.items()}


def _shapes(cfg: MoshiConfig) -> Tree:
    return jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))


def _fresh(cfg: TrainConfig, mesh: Mesh, names: Collection[str]) -> Tree:
    """The leaves `names` as the model starts them; TTT layers that join a trained model say nothing at first."""

    def draw(key: jax.Array) -> Tree:
        drawn = pick(model.init_params(cfg.model, key), names)
        if cfg.base is None:
            return drawn
        silent = lambda path, leaf: 0 * leaf if path[-1].key in ("out_kernel", "out_bias") else leaf  # noqa: E731
        return jax.tree_util.tree_map_with_path(silent, drawn)

    key = jax.random.key(cfg.seed)
    shardings = sharding.params_shardings(mesh, jax.eval_shape(draw, key))
    # Random draws of many shapes take long to optimise and run once: on CPU this compiles in a fifth of the time.
    options = known_options({"xla_backend_optimization_level": 0})
    return jax.jit(draw, out_shardings=shardings, compiler_options=options)(key)


def _place(cfg: TrainConfig, mesh: Mesh, path: tuple[str, ...], array: np.ndarray) -> Any:
    """A leaf from disk on the mesh, as a float32 master if it trains."""
    array = array.astype(np.float32) if is_trainable("/".join(path), cfg) else array
    like = array
    for key in reversed(path):
        like = {key: like}
    (where,) = jax.tree.leaves(sharding.params_shardings(mesh, like))
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
