"""Operations of a training step, from shapes alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from train.config import TrainConfig
from train.trained import paths, trains
from ttt_jax.moshi import model

TABLES = ("text_emb", "audio_emb")


class Flops(NamedTuple):
    """Operations for one frame, two per multiply-add."""

    forward: float
    backward: float
    """What gradients need: what is computed again to save memory is not counted."""


def flops_per_frame(cfg: TrainConfig) -> Flops:
    """Products with weights, attention over what a frame of a chunk sees, and the inner loop.

    The backward pass goes down to the lowest layer with anything that trains: through it as many operations as forward, and as many
    again for the weights that train.
    """
    cfg_m = cfg.model
    shapes = jax.eval_shape(lambda key: model.init_params(cfg_m, key), jax.random.key(0))
    sizes = dict(zip(paths(shapes), (leaf.shape for leaf in jax.tree.leaves(shapes)), strict=True))
    runs = {run.name: run for run in cfg_m.runs}
    lowest = min((_level(path, runs) for path in sizes if trains(path, cfg)), default=math.inf)
    forward = backward = 0.0
    for path, shape in sizes.items():
        name = path.split("/")[-1]
        if len(shape) < 2 or name in TABLES or "norm" in name or name.startswith(("inner_", "ln_")) or name.endswith("_bias"):
            continue
        operations = 2.0 * math.prod(shape)
        if path.startswith("depth/") and cfg_m.depth.schedule and not name.startswith(("heads", "audio_emb_up")):
            operations *= cfg_m.dep_q / (max(cfg_m.depth_sets) + 1)
        forward += operations
        run = runs.get(path.split("/")[1]) if path.startswith("layers/") else None
        through = operations if run is None else operations * sum(layer >= lowest for layer in range(run.start, run.stop)) / shape[0]
        backward += through + (operations if trains(path, cfg) else 0.0)
    widths = [cfg_m.head_dim, *(m * cfg_m.head_dim for m in cfg_m.ttt.hidden), cfg_m.head_dim]
    inner = 2.0 * cfg_m.num_heads * sum(i * o for i, o in zip(widths[:-1], widths[1:], strict=True))
    for layer, context in enumerate(cfg_m.contexts):
        # Scores and values; on average over a chunk that starts with an empty ring, or with a full one.
        seen = context if cfg.carry_attention else min(context, (cfg.data.chunk + 1) / 2)
        # The inner network runs for keys and queries, back for keys, and its steps are summed up.
        own = 4.0 * cfg_m.dim * seen + (4 * inner if layer in cfg_m.ttt_layers else 0.0)
        forward += own
        backward += 2 * own if layer >= lowest else 0.0
    return Flops(forward, backward)


def _level(path: str, runs: dict) -> float:
    """The layer that a parameter stands in; below all for tables, above all for what follows the layers."""
    if path.startswith("layers/"):
        return runs[path.split("/")[1]].start
    return -1 if path in TABLES else math.inf
