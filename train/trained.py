"""What trains and what is frozen: two trees that together are the model's parameters.

The optimiser, gradients and masters exist for the first alone. A stack of layers trains as a whole or not at all, so
`fit` has layers whose attention alone trains stacked apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax

from train.config import TrainConfig
from ttt_jax.config import parse_layers
from ttt_jax.errors import InputError

Tree = dict[str, Any]


def fit(cfg: TrainConfig) -> TrainConfig:
    """`cfg` with layers stacked apart as `cfg.trains` needs. Raises `InputError` if it names nothing that there is."""
    trains, model = cfg.trains, cfg.model
    layers = () if trains.base else _attention(cfg)
    if not (trains.base or layers or (trains.ttt and model.ttt_layers) or (trains.lora and model.lora.rank)):
        raise InputError(
            f"nothing trains: trains={trains}, but model.ttt.layers={model.ttt.layers!r} and model.lora.rank={model.lora.rank}: give TTT"
            " layers, adapters, --trains.attention or --trains.base."
        )
    return dataclasses.replace(cfg, model=dataclasses.replace(model, apart=layers))


def trains(path: str, cfg: TrainConfig) -> bool:
    """Whether the parameter at `path` ("layers/layers_29_31/ttt/gate") trains under a configuration that `fit` gave."""
    if "/ttt/" in path:
        return cfg.trains.ttt
    if "_lora_" in path:
        return cfg.trains.lora
    if cfg.trains.base:
        return True
    return "/attention/" in path and path.split("/")[1] in {
        run.name for run in cfg.model.runs if run.start in cfg.model.apart
    }


def split(params: Tree, cfg: TrainConfig) -> tuple[Tree, Tree]:
    """(what trains, what is frozen) of `params`: nested as they are, without the leaves of the other."""
    return pick(params, wanted := {path for path in paths(params) if trains(path, cfg)}), pick(
        params, set(paths(params)) - wanted
    )


def merge(*parts: Tree) -> Tree:
    """The tree that has the leaves of all `parts`, which share none."""
    keys = dict.fromkeys(key for part in parts for key in part)

    def one(key: str) -> Any:
        found = [part[key] for part in parts if key in part]
        return found[0] if len(found) == 1 else merge(*found)

    return {key: one(key) for key in keys}


def paths(params: Tree) -> list[str]:
    """The path of every leaf, as "layers/layers_29_31/ttt/gate"."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]


def pick(params: Tree, wanted: Collection[str], _prefix: str = "") -> Tree:
    """The leaves of `params` whose paths are `wanted`, nested as they are, without empty branches."""
    found = {}
    for key, value in params.items():
        path = _prefix + key
        if isinstance(value, dict):
            if inner := pick(value, wanted, path + "/"):
                found[key] = inner
        elif path in wanted:
            found[key] = value
    return found


def _attention(cfg: TrainConfig) -> tuple[int, ...]:
    try:
        return parse_layers(cfg.trains.attention, cfg.model.num_layers)
    except InputError as error:
        raise InputError(str(error).replace("ttt.layers", "trains.attention")) from None
