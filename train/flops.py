"""Operations of a training step, from shapes alone."""

from __future__ import annotations

import math
from typing import NamedTuple

from train.config import TrainConfig
from train.partition import is_trainable, shapes
from ttt_jax.config import MoshiConfig
from ttt_jax.ttt import network
from ttt_jax.utils.trees import named

BY_SET = ("input", "qkv", "out", "gate_up", "down")
"""Maps of the depth transformer that codebooks can share."""
MAPS = (
    *BY_SET,
    "text_head",
    "heads",
    "text_emb_up",
    "audio_emb_up",
    "rate_weight",
    *(f"{name}_kernel" for name in ("q", "k", "v", "out")),
)
"""Parameters that a product of every frame reads, adapters apart. `extra_heads` has no targets in training."""


class Flops(NamedTuple):
    """Operations for one frame, two per multiply-add."""

    forward: float
    backward: float
    """Operations of gradients, without those that are repeated to save memory."""


def flops_per_frame(cfg: TrainConfig) -> Flops:
    """Counts products with weights, attention over the visible frames, and the inner loop; not entrywise operations.

    Each product costs as much again for the gradient of its input, down to the lowest stack of layers with a trainable
    parameter, and as much again for the gradient of its weights if they train.
    """
    parameters = named(shapes(cfg.model))
    starts = {run.name: run.start for run in cfg.model.runs}
    trainable = {path for path in parameters if is_trainable(path, cfg)}
    lowest = min((_level(path, starts) for path in trainable), default=math.inf)
    depth_trains = any(path.startswith("depth/") for path in trainable)
    forward = backward = 0.0
    for path, leaf in parameters.items():
        name = path.split("/")[-1].partition("_lora_")[0]
        if name not in MAPS:
            continue
        operations, in_depth = 2.0 * math.prod(leaf.shape), path.startswith("depth/")
        if in_depth and name in BY_SET:
            operations *= cfg.model.dep_q / (max(cfg.model.depth_sets) + 1)
        level = _level(path, starts)
        if level < math.inf:
            below = level >= lowest
        else:
            below = lowest < math.inf or (in_depth and depth_trains) or path.endswith("_lora_b")
        forward += operations
        backward += operations * (below + (path in trainable))
    for run in cfg.model.runs:
        whole, recent = _seen(cfg, run.context)
        inner = _inner(cfg.model, cfg.data.chunk) if run.has_ttt else 0.0
        layers = run.stop - run.start
        forward += layers * (4.0 * cfg.model.dim * whole + inner)
        backward += layers * (4.0 * cfg.model.dim * (whole + recent) + 2 * inner) if run.start >= lowest else 0.0
    return Flops(forward, backward)


def _level(path: str, starts: dict[str, int]) -> float:
    """First layer of a parameter's stack; -1 for embeddings, infinity for parameters after the layers."""
    if path.startswith("layers/"):
        return starts[path.split("/")[1]]
    return -1 if path in ("text_emb", "audio_emb") else math.inf


def _seen(cfg: TrainConfig, context: int) -> tuple[float, float]:
    """Mean number of frames that attention sees, behind a full KV cache or none, and of those in the step."""
    span = cfg.data.chunk * (cfg.bptt if cfg.carry_attention else 1)
    growing = min(context, span)
    recent = context + growing * (growing + 1 - 2 * context) / (2 * span)
    return (context if cfg.carry_attention else recent), recent


def _inner(cfg: MoshiConfig, chunk: int) -> float:
    """Operations of a layer's inner loop in dual form, by frame.

    They are the network forward for keys and queries, backward for keys, the sum of its steps, and the products by
    which frames of a mini-batch read each other's steps.
    """
    widths = network.widths(cfg.head_dim, cfg.ttt.hidden)
    frames = min(cfg.ttt.mini_batch, chunk)
    products = 4 * sum(i * o for i, o in widths) - math.prod(widths[0])  # nothing lies below the first map
    return 2.0 * cfg.num_heads * (products + frames * sum(i + o for i, o in widths))
