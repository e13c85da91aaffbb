"""What trains and what is frozen: two trees that together are the model's parameters.

The optimiser, gradients and masters exist for the first alone. A stack of layers trains as a whole or not at all, so
`fit` has layers whose attention alone trains stacked apart.
"""

from __future__ import annotations

import dataclasses

from train.config import TrainConfig
from ttt_jax.config import parse_layers
from ttt_jax.errors import InputError
from ttt_jax.trees import Tree, named, pick


def fit(cfg: TrainConfig) -> TrainConfig:
    """`cfg` with layers stacked apart as `cfg.trains` needs. Raises `InputError` if it names nothing that there is."""
    trains, model = cfg.trains, cfg.model
    named_layers = _attention(cfg)
    layers = () if trains.base else named_layers
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
    """(what trains, what is frozen) of `params`; `ttt_jax.trees.merge` puts them together again."""
    wanted = {path for path in named(params) if trains(path, cfg)}
    return pick(params, wanted), pick(params, named(params).keys() - wanted)


def _attention(cfg: TrainConfig) -> tuple[int, ...]:
    try:
        return parse_layers(cfg.trains.attention, cfg.model.num_layers)
    except InputError as error:
        raise InputError(str(error).replace("ttt.layers", "trains.attention")) from None
