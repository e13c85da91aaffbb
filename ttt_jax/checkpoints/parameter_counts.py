"""Counts the parameters of a model by part, and finds adapters of the size of its TTT layers. Needs shapes only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.weights import Tensor
from ttt_jax.config import MoshiConfig
from ttt_jax.errors import InputError

EMBEDDINGS, ATTENTION, FFN = "embeddings", "temporal attention", "temporal feed-forward"
NORMS_AND_HEADS, DEPTH, TTT, ADAPTERS = "norms and heads", "depth transformer", "TTT layers", "adapters"


def parameter_counts(cfg: MoshiConfig) -> dict[str, int]:
    """Returns the parameters of `cfg` by part. The parts sum up to the whole model.

    "embeddings" and "norms and heads" are those of the temporal transformer; the depth transformer includes its own.
    """
    counts = dict.fromkeys((EMBEDDINGS, ATTENTION, FFN, NORMS_AND_HEADS, DEPTH), 0)
    for tensor in weights.base(cfg):
        counts[_part(tensor)] += math.prod(tensor.shape)
    adapters = (tensor for _, *pair in weights.adapters(cfg) for tensor in pair)
    return counts | {TTT: _total(weights.ttt(cfg)), ADAPTERS: _total(adapters)}


def lora_rank_like_ttt(cfg: MoshiConfig) -> int:
    """Returns the rank, at least 1, at which adapters on `cfg.lora.maps` come nearest to the TTT layers of `cfg` in
    size.

    Counts the true shapes. The original system reckoned with maps of width 1024 and gave TTT layers of 4.35 M
    parameters rank 11; on the 7B's attention and feed-forward that many are rank 2. Raises `InputError` if there are no
    TTT layers, or no maps.
    """
    rank_one = dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, rank=1))
    if not cfg.ttt_layers:
        raise InputError(f'ttt.layers="{cfg.ttt.layers}" gives no layers whose size adapters could have: name some.')
    counts = parameter_counts(rank_one)
    return max(1, round(counts[TTT] / counts[ADAPTERS]))  # adapters grow in proportion to their rank


def _part(tensor: Tensor) -> str:
    path = tensor.path
    if path[0] == "depth":
        return DEPTH
    if path[0] in ("text_emb", "audio_emb"):
        return EMBEDDINGS
    return {"attention": ATTENTION, "ffn": FFN}.get(path[2] if len(path) > 2 else "", NORMS_AND_HEADS)


def _total(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)
