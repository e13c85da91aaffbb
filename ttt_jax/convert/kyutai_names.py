"""Kyutai's names of our tensors. Both store a matrix as [out, in], so a tensor of ours is some of theirs end to end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ttt_jax.checkpoints.weights import Tensor

TOP = {
    "text_emb": "text_emb",
    "audio_emb": "emb.{}",
    "out_norm": "out_norm",
    "text_head": "text_linear",
    "extra_heads": "extra_heads.{}",
    "depth/input": "depformer_in.{}",
    "depth/text_emb": "depformer_text_emb",
    "depth/audio_emb": "depformer_emb.{}",
    "depth/text_emb_up": "depformer_text_emb.low_rank",
    "depth/audio_emb_up": "depformer_emb.{}.low_rank",
    "depth/heads": "linears.{}",
}
LAYER = {
    "qkv": "self_attn.in_projs.{}",
    "out": "self_attn.out_projs.{}",
    "gate_up": "gating.{}.linear_in",
    "down": "gating.{}.linear_out",
    "norm1": "norm1",
    "norm2": "norm2",
}
"""Their modules. A number counts the maps or tables that a tensor of ours stacks. Of the temporal transformer's single
maps attention numbers its own 0, the feed-forward layer has no number."""

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


class Key(NamedTuple):
    """A tensor of theirs."""

    name: str
    shape: tuple[int, ...]


class Names(NamedTuple):
    """Kyutai's names of a tensor of ours."""

    parts: tuple[Key, ...]
    """One name for each map, as PyTorch holds them in memory."""
    fused: tuple[Key, ...]
    """Names that a file may use for all parts end to end instead, the released one first; may be empty."""


def modules(tensor: Tensor) -> tuple[str, ...]:
    """Returns Kyutai's modules that make up `tensor`, in order."""
    count = tensor.shape[0] if tensor.lead else 1
    if tensor.index is None:
        pattern = TOP[tensor.name]
    else:
        stem, number = tensor.file.removesuffix(".safetensors").rsplit("_", 1)
        pattern = LAYER[tensor.name.rpartition("/")[2]]
        if stem == "layer":
            pattern = f"transformer.layers.{int(number)}.{pattern.replace('gating.{}', 'gating')}"
        else:
            pattern = f"depformer.layers.{int(number)}.{pattern}"
    return tuple(pattern.format(i) for i in range(count))


def weight(tensor: Tensor) -> Names:
    """Returns the names of a tensor of the base."""
    if len(tensor.part) == 1:
        return Names((Key(f"{modules(tensor)[0]}.alpha", (1, 1, *tensor.part)),), ())
    rows = math.prod(tensor.rows) if tensor.inputs else tensor.part[0]
    shape = (rows, math.prod(tensor.part) // rows)
    return _names(tensor, ".weight", shape, ("_weight", ".weight") if tensor.path[-1] == "qkv" else (".weight",))


def adapter(tensor: Tensor, rank: int) -> tuple[Names, Names]:
    """Returns the names of the adapters A and B of a linear map."""
    rows = math.prod(tensor.rows)
    columns = math.prod(tensor.part) // rows
    a, b = (rank, columns), (rows, rank)
    return _names(tensor, LORA_A, a, (LORA_A,)), _names(tensor, LORA_B, b, (LORA_B,))


def _names(tensor: Tensor, suffix: str, shape: tuple[int, int], fused: tuple[str, ...]) -> Names:
    names = modules(tensor)
    parts = tuple(Key(name + suffix, shape) for name in names)
    if not names or "_projs." not in names[0]:
        return Names(parts, ())
    stem = names[0].removesuffix("s.0")
    return Names(parts, tuple(Key(stem + ending, (len(names) * shape[0], shape[1])) for ending in fused))


def released(names: Names) -> tuple[Key, ...]:
    """Returns the tensors of the layout that Kyutai releases."""
    return names.fused[:1] or names.parts


def lora_rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Returns the rank of most adapters among `shapes`; 0 if there are none."""
    ranks = [shape[1] for key, shape in shapes.items() if key.endswith(LORA_B) and len(shape) == 2]
    return max(set(ranks), key=ranks.count) if ranks else 0
