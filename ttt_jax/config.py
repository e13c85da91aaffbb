"""Architecture as frozen dataclasses, checked when they are built; presets. Imports no jax, so ``--help`` stays quick.

Sizes follow Moshi (Défossez et al. 2024, arXiv 2410.00037) and its ``config.json``; the TTT fields follow Sun et al. 2024
(arXiv 2407.04620).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Literal, TypeVar, get_args, get_type_hints

from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

Preset = TypeVar("Preset")

Dtype = Literal["float32", "bfloat16", "float64"]
Part = Literal["attention", "ffn", "depth", "heads"]
FRAME_RATE = 12.5  # frames per second of Moshi and Mimi


def check(condition: bool, message: str) -> None:
    """Raise `InputError` with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def _conform(config: object, prefix: str) -> None:
    """Refuse values of another type than their field's, and turn lists into tuples, so that a configuration can be hashed."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = config_json.conform(
            hints[field.name], getattr(config, field.name), "the configuration", prefix + field.name
        )
        object.__setattr__(config, field.name, value)


def _check_sizes(prefix: str, **sizes: int) -> None:
    for name, size in sizes.items():
        check(size >= 1, f"{prefix}.{name}={size} is not a size: give 1 or more.")


@dataclasses.dataclass(frozen=True)
class TTTConfig:
    """TTT layers: where they sit and how their inner network learns."""

    layers: str = "middle"
    """Layers that get a TTT layer after self-attention: "29,30,31", "25-30", "-1" (the last), "middle" (the middle one), "all", "none"."""
    hidden: tuple[int, ...] = (4,)
    """Hidden widths of the inner network in multiples of the head width D: none is the linear network, 4 the 2-layer MLP."""
    mini_batch: int = 16
    """Inner mini-batch size b: frames that share one starting point of the inner gradient."""
    base_lr: float | None = None
    """Largest inner learning rate before the division by the head width D; unset: min(1, D / 32, 8 / mini_batch), the last halved for
    every hidden layer beyond the first."""
    horizon: float | None = 4000.0
    """Frames after which what was learned has decayed to 1/e (4,000 are 5 minutes); None: no decay."""
    max_displacement: float | None = None
    """Bound on the norm of fast weights minus base, per head, in norms of the base; unset: no bound."""
    rope: bool = False
    """Rotary embedding of inner queries and keys by their position in the mini-batch."""
    gate_init: float = 0.1
    """Initial value of the gate parameter alpha; the layer adds tanh(alpha) times its output. Models trained from scratch start at 0.5."""
    pre_norm: bool = True
    """RMSNorm in front of the layer's projections."""
    post_norm: bool = True
    """LayerNorm in front of its output projection."""
    remat_group: int = 16
    """Mini-batches whose inner activations are recomputed together in the backward pass; memory against time, no effect on results."""

    def __post_init__(self) -> None:
        _conform(self, "ttt.")
        check(
            self.mini_batch >= 1,
            f"ttt.mini_batch={self.mini_batch} is not a size: give 1 or more frames per inner mini-batch.",
        )
        check(
            self.remat_group >= 1,
            f"ttt.remat_group={self.remat_group} is not a size: give 1 or more mini-batches per group.",
        )
        check(
            all(width >= 1 for width in self.hidden),
            f"ttt.hidden={self.hidden} is no list of widths: give positive multiples of the head width, or nothing for the linear network.",
        )
        check(
            math.isfinite(self.gate_init),
            f"ttt.gate_init={self.gate_init} is not a number: give one, 0.1 for layers added to a trained model.",
        )
        check(
            self.base_lr is None or 0 <= self.base_lr < math.inf,
            f"ttt.base_lr={self.base_lr} is no rate: give 0 (no learning) or a positive inner learning rate.",
        )
        check(
            self.horizon is None or 0 < self.horizon < math.inf,
            f"ttt.horizon={self.horizon} is no number of frames: give one above 0, or None for no decay.",
        )
        check(
            self.horizon is None or self.mini_batch <= self.horizon,
            f"ttt.horizon={self.horizon} is shorter than the mini-batch of {self.mini_batch} frames: give at least as many.",
        )
        check(
            self.max_displacement is None or 0 < self.max_displacement < math.inf,
            f"ttt.max_displacement={self.max_displacement} is no bound: give a number above 0, or None for none.",
        )
        check(
            not (self.rope and self.mini_batch == 1),
            "ttt.rope=True has no effect with ttt.mini_batch=1, where every frame has position 0: give a larger mini-batch or leave it off.",
        )


def default_base_lr(mini_batch: int, head_dim: int, hidden_layers: int = 1) -> float:
    """Inner learning rate for a mini-batch of `mini_batch` frames, heads of width `head_dim` and an MLP of so many hidden layers.

    A mini-batch sums its frames' gradients, all taken at one stale point, so what one update may move bounds
    mini_batch * base_lr: up to 8 frames a rate of 1 is stable, beyond the sum is held at that of 8 frames. Deeper networks start
    with smaller outputs, which the inner LayerNorm turns into larger gradients: each further hidden layer halves the sum. The
    division by the head width makes a step's relative size the same for all widths; narrow heads drift further from their base
    all the same and learn as well at a lower rate.
    """
    return min(1.0, head_dim / 32, 8.0 / mini_batch * 0.5 ** max(0, hidden_layers - 1))


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """The depth transformer ("depformer"): one pass over the own voice's codebooks inside each frame."""

    dim: int = 1024
    """Width."""
    num_layers: int = 6
    """Layers."""
    num_heads: int = 16
    """Attention heads."""
    hidden: int = 2816
    """SwiGLU hidden width."""
    schedule: tuple[int, ...] = ()
    """Weight set of each predicted codebook, so that codebooks can share one; empty: each has its own."""
    low_rank: int | None = None
    """Width of the embedding tables, which a matrix of their own widens to `dim`; unset: the tables have width `dim`."""

    def __post_init__(self) -> None:
        _conform(self, "depth.")
        _check_sizes("depth", dim=self.dim, num_layers=self.num_layers, num_heads=self.num_heads, hidden=self.hidden)
        check(
            self.low_rank is None or self.low_rank >= 1,
            f"depth.low_rank={self.low_rank} is not a width: give 1 or more, or None for full tables.",
        )
        check(
            set(self.schedule) == set(range(len(set(self.schedule)))),
            f"depth.schedule={self.schedule} leaves out a weight set: number those in use from 0 without a gap.",
        )
        check(
            self.dim % self.num_heads == 0,
            f"depth.dim={self.dim} does not divide into depth.num_heads={self.num_heads}: choose a multiple.",
        )


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on linear maps of the base: W x + scaling * B (A x)."""

    rank: int = 0
    """Rank; 0: none."""
    scaling: float = 2.0
    """Factor of the adapters' output."""
    maps: tuple[Part, ...] = get_args(Part)
    """Linear maps that have them: the temporal layers' attention, their feed-forward (ffn), the depth transformer with its input,
    heads and embeddings' matrices, and the heads on the temporal transformer."""

    def __post_init__(self) -> None:
        _conform(self, "lora.")
        check(self.rank >= 0, f"lora.rank={self.rank} is no rank: give 0 for none, or a positive one.")
        check(math.isfinite(self.scaling), f"lora.scaling={self.scaling} is not a number: give one, such as 2.")
        check(
            len(set(self.maps)) == len(self.maps),
            f"lora.maps={self.maps} names a part of the model twice: name each once.",
        )
        check(
            bool(self.maps) or not self.rank,
            f"lora.maps={self.maps} leaves no map for adapters of rank {self.rank}: name some of {', '.join(get_args(Part))}, or set"
            " lora.rank=0.",
        )

    def of(self, part: Part) -> LoRAConfig:
        """The adapters of the maps of `part`: these, or none."""
        return self if part in self.maps else dataclasses.replace(self, rank=0)

    @property
    def is_everywhere(self) -> bool:
        """Whether every linear map of the base has adapters."""
        return self.rank > 0 and set(self.maps) == set(get_args(Part))


@dataclasses.dataclass(frozen=True)
class MoshiConfig:
    """Moshi's language model. Defaults are the 7B's (kyutai/moshiko)."""

    dim: int = 4096
    """Width of the temporal transformer."""
    num_layers: int = 32
    """Layers of the temporal transformer."""
    num_heads: int = 32
    """Attention heads; TTT layers have as many."""
    hidden: int = 11264
    """SwiGLU hidden width."""
    context: int = 3000
    """Attention window in frames: a frame sees itself and the context - 1 before it."""
    layer_context: tuple[tuple[int, int], ...] = ()
    """Windows of single layers, as (layer, frames) pairs; the others have `context`."""
    max_period: float = 10000.0
    """Longest period of the rotary position embedding."""
    n_q: int = 16
    """Audio codebooks read: those of the own voice, then the other voice's."""
    dep_q: int = 8
    """Audio codebooks predicted: the own voice's."""
    card: int = 2048
    """Entries of an audio codebook; id `card` is the initial token. Training from scratch takes the codec's."""
    text_card: int = 32000
    """Text pieces; id `text_card` is the initial token. Training from scratch takes the tokenizer's."""
    delays: tuple[int, ...] = (0,) + 2 * ((0,) + 7 * (1,))
    """Delay of each stream in frames: text, own codebooks, other voice's codebooks."""
    dtype: Dtype = "float32"
    """Type of the activations (float64 for tests); norms, softmax, rotations, logits and the TTT state are at least float32."""
    extra_heads: int = 0
    """Further linear heads on the temporal transformer's output (Kyutai's pause prediction)."""
    extra_heads_dim: int = 6
    """Outputs of each."""
    depth: DepthConfig = DepthConfig()
    """Depth transformer."""
    apart: tuple[int, ...] = ()
    """Layers that are not stacked with others though equal to them in kind; training sets it, since a stack trains as a whole or not."""
    lora: LoRAConfig = LoRAConfig()
    """Adapters kept apart from the weights."""
    ttt: TTTConfig = TTTConfig(layers="29,30,31")
    """TTT layers."""

    def __post_init__(self) -> None:
        _conform(self, "model.")
        _check_sizes(
            "model",
            **{
                f: getattr(self, f)
                for f in ("dim", "num_layers", "num_heads", "hidden", "context", "n_q", "dep_q", "card", "text_card")
            },
        )
        check(
            self.dim % self.num_heads == 0,
            f"model.dim={self.dim} does not divide into model.num_heads={self.num_heads}: choose a multiple.",
        )
        check(
            self.head_dim % 2 == 0,
            f"model.dim={self.dim} over {self.num_heads} heads gives an odd head width {self.head_dim}: rotary pairs need an even one.",
        )
        check(
            1 < self.max_period < math.inf,
            f"model.max_period={self.max_period} is not a period: give a number above 1, such as 10000.",
        )
        check(
            self.dep_q <= self.n_q,
            f"model.dep_q={self.dep_q} exceeds model.n_q={self.n_q}: only codebooks that are read can be predicted.",
        )
        check(
            len(self.delays) == self.n_q + 1 and min(self.delays) >= 0,
            f"model.delays={self.delays} has {len(self.delays)} entries: give one delay of 0 or more for text and each of the {self.n_q} codebooks.",
        )
        check(
            self.delays[0] == 0,
            f"model.delays[0]={self.delays[0]} delays the text stream: Moshi's text leads with delay 0.",
        )
        check(
            not self.depth.schedule or len(self.depth.schedule) == self.dep_q,
            f"depth.schedule={self.depth.schedule} has {len(self.depth.schedule)} entries: give one for each of the {self.dep_q} predicted codebooks.",
        )
        check(
            self.extra_heads >= 0 and self.extra_heads_dim >= 1,
            f"model.extra_heads={self.extra_heads} of {self.extra_heads_dim} outputs cannot be: give 0 or more heads of 1 output or more.",
        )
        named = [layer for layer, _ in self.layer_context]
        check(
            len(set(named)) == len(named),
            f"model.layer_context={self.layer_context} gives a layer two windows: name each layer once.",
        )
        for layer, frames in self.layer_context:
            check(
                0 <= layer < self.num_layers and frames >= 1,
                f"model.layer_context=({layer}, {frames}) does not fit: name layers 0 to {self.num_layers - 1} and windows of 1 frame or more.",
            )
        check(
            all(0 <= layer < self.num_layers for layer in self.apart),
            f"model.apart={self.apart} names layers that are not there: name layers 0 to {self.num_layers - 1}.",
        )
        check(
            not self.ttt_layers or self.head_dim >= 4,  # refuses impossible layer names, too
            f"model.num_heads={self.num_heads} gives TTT layers heads of width {self.head_dim}: the inner LayerNorm needs 4 or more.",
        )

    @property
    def num_streams(self) -> int:
        """Token streams of a frame: text and n_q codebooks."""
        return self.n_q + 1

    @property
    def target_streams(self) -> dict[str, int]:
        """The streams that are predicted, in order, and the number of their tokens: text, then the own codebooks from 1."""
        return {"text": self.text_card} | {f"codebook {k}": self.card for k in range(1, self.dep_q + 1)}

    @property
    def head_dim(self) -> int:
        """Width of a head, the TTT layers' D too."""
        return self.dim // self.num_heads

    @property
    def inner_lr(self) -> float:
        """The base inner learning rate in force."""
        lr = self.ttt.base_lr
        return default_base_lr(self.ttt.mini_batch, self.head_dim, len(self.ttt.hidden)) if lr is None else lr

    @property
    def max_delay(self) -> int:
        """Longest delay in frames."""
        return max(self.delays)

    @property
    def depth_sets(self) -> tuple[int, ...]:
        """Weight set of the depth transformer that each predicted codebook uses."""
        return self.depth.schedule or tuple(range(self.dep_q))

    @property
    def ttt_layers(self) -> tuple[int, ...]:
        """Indices of the layers that carry a TTT layer."""
        return parse_layers(self.ttt.layers, self.num_layers)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Attention window of every layer."""
        special = dict(self.layer_context)
        return tuple(special.get(layer, self.context) for layer in range(self.num_layers))

    @property
    def runs(self) -> tuple[Run, ...]:
        """Longest runs of equal layers; parameters and states are stacked by run."""
        kinds = [
            (layer in self.ttt_layers, context, layer in self.apart) for layer, context in enumerate(self.contexts)
        ]
        starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        return tuple(
            Run(start, stop, *kinds[start][:2])
            for start, stop in zip(starts, [*starts[1:], self.num_layers], strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """Layers `start` to `stop` - 1: equal in kind, hence stacked."""

    start: int
    stop: int
    has_ttt: bool
    context: int

    @property
    def name(self) -> str:
        """Key in parameters and states."""
        return f"layers_{self.start:02d}_{self.stop - 1:02d}"


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Layer indices named by `text`: "29,30,31", "25-30", "-1", "middle", "all" or "none", sorted and without repeats."""
    words = {"all": range(num_layers), "none": (), "middle": (num_layers // 2,)}
    if text.strip() in words:
        return tuple(words[text.strip()])
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        check(
            match is not None,
            f'ttt.layers="{text}" cannot be read: write "29,30,31", "25-30", "-1", "middle", "all" or "none".',
        )
        first = int(match[1]) + (num_layers if match[1].startswith("-") else 0)
        last = int(match[2]) if match[2] else first
        for layer in (first, last):
            check(
                0 <= layer < num_layers,
                f'ttt.layers="{text}" names layer {layer}, but the model has layers 0 to {num_layers - 1}: name layers in that range.',
            )
        check(first <= last, f'ttt.layers="{text}" has the empty range {part.strip()}: write the lower layer first.')
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


MODEL_PRESETS: dict[str, MoshiConfig] = {
    "tiny": MoshiConfig(
        dim=128,
        num_layers=3,
        num_heads=4,
        hidden=352,
        context=64,
        card=64,
        text_card=512,
        depth=DepthConfig(dim=64, num_layers=2, num_heads=4, hidden=176),
        ttt=TTTConfig(layers="0", gate_init=0.5),
    ),
    "small": MoshiConfig(
        dim=768,
        num_layers=12,
        num_heads=12,
        hidden=2112,
        context=250,
        card=64,
        text_card=512,
        depth=DepthConfig(dim=384, num_layers=4, num_heads=6, hidden=1056),
        # Early: from scratch, later layers did not learn to recall (docs/results/memory.md).
        ttt=TTTConfig(layers="0,1,2", gate_init=0.5),
    ),
    "moshi-7b": MoshiConfig(dtype="bfloat16"),
}
"""Named models: `tiny` trains on a laptop CPU in minutes, `small` (about 150 M) on one GPU, `moshi-7b` has the shape of Kyutai's."""


def model_preset(name: str) -> MoshiConfig:
    """The model called `name`. Raises `InputError` with the nearest name if there is none."""
    return preset(name, MODEL_PRESETS)


def preset(name: str, presets: Mapping[str, Preset]) -> Preset:
    """The one of `presets` called `name`. Raises `InputError` with the nearest name if there is none."""
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f'perhaps you meant "{near[0]}"' if near else "choose one of them"
        raise InputError(f'unknown preset "{name}": there are {", ".join(presets)}; {hint}.')
    return presets[name]
