"""The partition of a model's parameters into a trainable and a frozen tree.

Optimiser state, gradients and float32 masters exist for the trainable tree alone. A stack of layers trains as a whole
or not at all, so `fit` stacks layers apart if only their attention trains.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import jax

from train.config import TrainConfig
from ttt_jax.config import MoshiConfig, parse_layers
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.utils.trees import Tree, named, pick


def fit(cfg: TrainConfig) -> TrainConfig:
    """Returns `cfg` with layers stacked as `cfg.trainable` needs. Raises `InputError` if no parameter would train."""
    trainable, model = cfg.trainable, cfg.model
    named_layers = _attention(cfg)
    layers = () if trainable.base else named_layers
    if not (trainable.base or layers or (trainable.ttt and model.ttt_layers) or (trainable.lora and model.lora.rank)):
        raise InputError(
            f"nothing trains: trainable={trainable}, but model.ttt.layers={model.ttt.layers!r} and model.lora.rank="
            f"{model.lora.rank}: give TTT layers, adapters, --trainable.attention or --trainable.base."
        )
    return dataclasses.replace(cfg, model=dataclasses.replace(model, apart=layers))


def is_trainable(path: str, cfg: TrainConfig) -> bool:
    """Whether the parameter at `path` ("layers/layers_29_31/ttt/gate") trains under a configuration from `fit`."""
    if "/ttt/" in path:
        return cfg.trainable.ttt
    if "_lora_" in path:
        return cfg.trainable.lora
    if cfg.trainable.base:
        return True
    return "/attention/" in path and path.split("/")[1] in {
        run.name for run in cfg.model.runs if run.start in cfg.model.apart
    }


@cache
def shapes(cfg: MoshiConfig) -> Tree:
    """Returns shapes and types of all parameters of a model; no caller may change the tree."""
    return jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))


def split(params: Tree, cfg: TrainConfig) -> tuple[Tree, Tree]:
    """Returns (trainable, frozen) parts of `params`; `ttt_jax.utils.trees.merge` joins them again."""
    trainable = {path for path in named(params) if is_trainable(path, cfg)}
    return pick(params, trainable), pick(params, named(params).keys() - trainable)


def _attention(cfg: TrainConfig) -> tuple[int, ...]:
    try:
        return parse_layers(cfg.trainable.attention, cfg.model.num_layers)
    except InputError as error:
        raise InputError(str(error).replace("ttt.layers", "trainable.attention")) from None
