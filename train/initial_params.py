"""A run's parameters before its first step: at random, or converted weights with new parts at random."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from train.config import TrainConfig
from train.partition import is_trainable, shapes, split
from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.differences import differences
from ttt_jax.distributed import sharding
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.utils import config_json
from ttt_jax.utils.trees import Tree, merge, named, pick
from ttt_jax.utils.xla import known_options

FREE = ("ttt", "lora", "apart", "dtype", "context", "layer_context", "attention_sink")
"""Fields of the model in which a run may differ from the weights that it starts from."""


class Parameters(NamedTuple):
    """All parameters of a model, on the mesh."""

    trainable: Tree
    """Trainable parameters, float32."""
    frozen: Tree
    """Frozen parameters, in the types of their files."""


def check_base(cfg: TrainConfig) -> None:
    """Raises `InputError` if frozen weights would be random, or `cfg.base` is of another architecture.

    It reads no numbers, so it can come before audio is encoded, which may take hours.
    """
    if cfg.base is None and not cfg.trainable.base:
        raise InputError(
            "trainable.base is off and base is unset, so frozen weights would stay at random: give --base FOLDER"
            " (python -m ttt_jax.convert makes it), or --trainable.base."
        )
    if cfg.base is not None:
        with _open(cfg) as folder:
            _tensors(folder, cfg)


def stored(cfg: TrainConfig) -> list[str] | None:
    """Returns the paths of leaves that checkpoints store: all (None) without a base, else all but its frozen leaves.

    TTT layers and adapters are always stored, since the digest of the base does not cover them.
    """
    if cfg.base is None:
        return None
    with _open(cfg) as folder:
        here = {"/".join(tensor.path) for tensor in _tensors(folder, cfg)}
    always = lambda path: "/ttt/" in path or "_lora_" in path or is_trainable(path, cfg)  # noqa: E731
    return [path for path in named(shapes(cfg.model)) if path not in here or always(path)]


def initial(cfg: TrainConfig, mesh: Mesh) -> Parameters:
    """Returns the parameters before the first step. Raises `InputError` if weights are missing or do not fit."""
    names = named(shapes(cfg.model)).keys()
    if cfg.base is None:
        return Parameters(*split(_fresh(cfg, mesh, names), cfg))
    with _open(cfg) as folder:
        _tensors(folder, cfg)
        read = weights.read(folder, cfg.model, place=partial(_place, cfg, mesh))
    fresh = _fresh(cfg, mesh, names - named(read).keys())
    return Parameters(*split(merge(read, fresh), cfg))


def frozen_base(cfg: TrainConfig, mesh: Mesh) -> Tree:
    """Returns the frozen leaves that checkpoints do not store, from `cfg.base`."""
    kept = stored(cfg)
    if kept is None:
        return {}
    with _open(cfg) as folder:
        return weights.read(folder, cfg.model, named(shapes(cfg.model)).keys() - set(kept), partial(_place, cfg, mesh))


def stored_like(cfg: TrainConfig, mesh: Mesh) -> Tree:
    """Returns shapes, types and shardings of the leaves that a checkpoint stores."""
    kept, like = stored(cfg), shapes(cfg.model)
    like = like if kept is None else pick(like, set(kept))
    shardings = sharding.params_shardings(mesh, like)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)


def base_of(cfg: TrainConfig) -> dict[str, str] | None:
    """Returns the path of `cfg.base` and the digest of its content, as checkpoints store them; None without a base."""
    if cfg.base is None:
        return None
    with _open(cfg) as folder:
        return {"path": cfg.base, "digest": folder.info["digest"]}


def _open(cfg: TrainConfig) -> weights.Folder:
    return weights.Folder(cfg.base)


def _tensors(folder: weights.Folder, cfg: TrainConfig) -> list[weights.Tensor]:
    """Returns the tensors of `cfg.model` in the folder. Raises `InputError` if it lacks the base or has others."""
    ours, theirs = (
        {key: value for key, value in config_json.to_dict(model).items() if key not in FREE}
        for model in (cfg.model, folder.cfg)
    )
    if ours != theirs:
        differing = [key for key in ours if ours[key] != theirs[key]]
        wrong = "; ".join(f"model.{key} is {ours[key]}, there {theirs[key]}" for key in differing)
        raise InputError(
            f"the weights in {cfg.base} are of another architecture ({wrong}): set these fields as they are there."
        )
    wanted = {(t.file, t.name): t for t in weights.tensors(cfg.model)}
    for what, extra in (("adapters", weights.LORA), ("TTT layers", "ttt_")):
        here = {(t.file, t.name): t.shape for t in folder.tensors if t.file.startswith(extra)}
        needed = {key: t.shape for key, t in wanted.items() if key[0].startswith(extra)}
        if here and here != needed:
            examples = "; ".join(list(differences(_by_name(needed), _by_name(here)))[:2])
            raise InputError(
                f"the {what} in {cfg.base} are not those of the run ({examples}): set"
                f" {'model.lora' if what == 'adapters' else 'model.ttt'} as there, or give weights without {what}."
            )
    here = {(t.file, t.name) for t in folder.tensors}
    return [tensor for key, tensor in wanted.items() if key in here]


def _by_name(shapes: dict[tuple[str, str], tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Joins the names of file and tensor."""
    return {f"{file.removesuffix('.safetensors')}/{name}": shape for (file, name), shape in shapes.items()}


def _fresh(cfg: TrainConfig, mesh: Mesh, names: Collection[str]) -> Tree:
    """Draws the leaves `names`; TTT layers that join a base start with an output of 0."""
    if not names:
        return {}

    def draw(key: jax.Array) -> Tree:
        drawn = pick(model.init_params(cfg.model, key), names)
        if cfg.base is None:
            return drawn
        silent = lambda path, leaf: 0 * leaf if path[-1].key in ("out_kernel", "out_bias") else leaf  # noqa: E731
        return jax.tree_util.tree_map_with_path(silent, drawn)

    key = jax.random.key(cfg.seed)
    shardings = sharding.params_shardings(mesh, jax.eval_shape(draw, key))
    # Random draws of many shapes take long to optimise and run once; on a CPU this compiles in a fifth of the time.
    options = known_options({"xla_backend_optimization_level": 0})
    return jax.jit(draw, out_shardings=shardings, compiler_options=options)(key)


def _place(cfg: TrainConfig, mesh: Mesh, path: tuple[str, ...], array: np.ndarray) -> Any:
    """Places a leaf from disk on the mesh, in float32 if it trains."""
    array = array.astype(np.float32) if is_trainable("/".join(path), cfg) else array
    like = array
    for key in reversed(path):
        like = {key: like}
    (where,) = jax.tree.leaves(sharding.params_shardings(mesh, like))
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
