"""Architecture as frozen dataclasses, checked when they are built; presets. Imports no jax, so ``--help`` stays quick.

Sizes follow Moshi (Défossez et al. 2024, arXiv 2410.00037) and its ``config.json``; the TTT fields follow Sun et al.
2024 (arXiv 2407.04620).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, TypeVar, get_args, get_type_hints

from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

Preset = TypeVar("Preset")
Dtype = Literal["float32", "bfloat16", "float64"]
Part = Literal["attention", "ffn", "depth", "heads"]
Impl = Literal["auto", "xla", "pallas"]
FRAME_RATE = 12.5  # frames per second of Moshi and Mimi


def check(condition: bool, message: str) -> None:
    """Raise `InputError` with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


class Checked:
    """A configuration that checks types and values of its fields, and turns lists into tuples so that it has a hash."""

    prefix: ClassVar[str]
    """Of fields in messages."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """Fields that are 1 or more."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = config_json.conform(hints[field.name], value, "the configuration", f"{self.prefix}.{field.name}")
            object.__setattr__(self, field.name, value)
        for field in self.sizes:
            size = getattr(self, field)
            check(size >= 1, f"{self.prefix}.{field}={size} is not a size: give 1 or more.")
        for field, problem in self._rules():
            raise InputError(f"{self.prefix}.{field}={getattr(self, field)} {problem}")

    def _rules(self) -> Iterator[tuple[str, str]]:
        """Yields each field that does not fit, with the problem and what to do."""
        yield from ()


@dataclasses.dataclass(frozen=True)
class TTTConfig(Checked):
    """TTT layers: where they sit and how their inner network learns."""

    prefix: ClassVar[str] = "ttt"
    sizes: ClassVar[tuple[str, ...]] = ("mini_batch", "remat_group")

    layers: str = "middle"
    """Layers with a TTT layer after self-attention: "29,30,31", "25-30", "-1" (the last), "middle", "all" or "none"."""
    hidden: tuple[int, ...] = (4,)
    """Hidden widths of the inner network in multiples of the head width D; none: a linear network, 4: a 2-layer MLP."""
    mini_batch: int = 16
    """Inner mini-batch size b: frames that share one starting point of the inner gradient."""
    base_lr: float | None = None
    """Largest inner learning rate before the division by the head width D. Unset: min(1, D / 32, 8 / mini_batch), where
    every hidden layer beyond the first halves 8 / mini_batch."""
    horizon: float | None = 4000.0
    """Frames after which the displacement has decayed to 1/e (4,000 frames are 5 minutes). None: no decay."""
    max_displacement: float | None = None
    """Bound on the norm of fast weights minus base, per head, in norms of the base; unset: no bound."""
    rope: bool = False
    """Rotary embedding of inner queries and keys by their position in the mini-batch."""
    gate_init: float = 0.1
    """Initial gate alpha; the layer adds tanh(alpha) times its output. Models trained from scratch start at 0.5."""
    pre_norm: bool = True
    """RMSNorm in front of the layer's projections."""
    post_norm: bool = True
    """LayerNorm in front of its output projection."""
    remat_group: int = 16
    """Mini-batches whose activations the backward pass computes again together: memory for time, the same results."""
    impl: Impl = "auto"
    """What runs the inner loop: a scan (xla), fused kernels for NVIDIA GPUs of compute capability 9.0 (pallas), or the
    kernels where they can run and are quicker (auto). The same results to rounding."""

    def _rules(self) -> Iterator[tuple[str, str]]:
        b, lr, horizon, bound = self.mini_batch, self.base_lr, self.horizon, self.max_displacement
        if min(self.hidden, default=1) < 1:
            yield "hidden", "is no list of widths: give positive multiples of the head width, or none."
        if not math.isfinite(self.gate_init):
            yield "gate_init", "is not a number: give one, such as 0.1."
        if not (lr is None or 0 <= lr < math.inf):
            yield "base_lr", "is no rate: give 0 (no learning) or more."
        if not (horizon is None or 0 < horizon < math.inf):
            yield "horizon", "is no number of frames: give one above 0, or None."
        if not (horizon is None or b <= horizon):
            yield "horizon", f"is shorter than the mini-batch of {b}: give as many or more."
        if not (bound is None or 0 < bound < math.inf):
            yield "max_displacement", "is no bound: give a number above 0, or None."
        if self.rope and b == 1:
            yield "rope", "has no effect with ttt.mini_batch=1: give a larger mini-batch or leave it off."


def default_base_lr(mini_batch: int, head_dim: int, hidden_layers: int = 1) -> float:
    """Inner learning rate for a mini-batch of `mini_batch` frames, heads of width `head_dim` and an MLP of so many
    hidden layers.

    A mini-batch sums its frames' gradients, all taken at the same weights, so the step is bounded by mini_batch *
    base_lr: a rate of 1 is stable up to 8 frames, and longer mini-batches keep the sum of 8 frames. Deeper networks
    start with smaller outputs, which the inner LayerNorm turns into larger gradients: each further hidden layer halves
    the sum. Division by the head width gives all widths the same relative step. Narrow heads still drift further from
    their base and learn as well at a lower rate.
    """
    return min(1.0, head_dim / 32, 8.0 / mini_batch * 0.5 ** max(0, hidden_layers - 1))


@dataclasses.dataclass(frozen=True)
class DepthConfig(Checked):
    """The depth transformer ("depformer"): one pass over the codebooks of Moshi's stream inside each frame."""

    prefix: ClassVar[str] = "depth"
    sizes: ClassVar[tuple[str, ...]] = ("dim", "num_layers", "num_heads", "hidden")

    dim: int = 1024
    """Width."""
    num_layers: int = 6
    """Layers."""
    num_heads: int = 16
    """Attention heads."""
    hidden: int = 2816
    """SwiGLU hidden width."""
    schedule: tuple[int, ...] = ()
    """Weight set of each predicted codebook; codebooks may share a set. Empty: one set for each codebook."""
    low_rank: int | None = None
    """Width of the embedding tables; a matrix then widens embeddings to `dim`. Unset: the tables have width `dim`."""

    def _rules(self) -> Iterator[tuple[str, str]]:
        sets = set(self.schedule)
        if not (self.low_rank is None or self.low_rank >= 1):
            yield "low_rank", "is not a width: give 1 or more, or None."
        if sets != set(range(len(sets))):
            yield "schedule", "leaves out a weight set: number sets from 0 on."
        if self.dim % self.num_heads:
            yield "dim", f"is no multiple of depth.num_heads={self.num_heads}: choose one."


@dataclasses.dataclass(frozen=True)
class LoRAConfig(Checked):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on linear maps of the base: W x + scaling * B (A x)."""

    prefix: ClassVar[str] = "lora"

    rank: int = 0
    """Rank; 0: none."""
    scaling: float = 2.0
    """Factor of the adapters' output."""
    maps: tuple[Part, ...] = get_args(Part)
    """Parts with adapters: attention and feed-forward (ffn) of temporal layers, depth transformer, temporal heads."""

    def _rules(self) -> Iterator[tuple[str, str]]:
        if self.rank < 0:
            yield "rank", "is no rank: give 0 for none, or a positive one."
        if not math.isfinite(self.scaling):
            yield "scaling", "is not a number: give one, such as 2."
        if len(set(self.maps)) < len(self.maps):
            yield "maps", "names a part of the model twice: name each once."
        if self.rank and not self.maps:
            yield "maps", f"leaves no map for adapters of rank {self.rank}: name some, or set lora.rank=0."

    def of(self, part: Part) -> LoRAConfig:
        """The adapters of the maps of `part`: these, or none."""
        return self if part in self.maps else dataclasses.replace(self, rank=0)

    @property
    def is_everywhere(self) -> bool:
        """Whether every linear map of the base has adapters."""
        return self.rank > 0 and set(self.maps) == set(get_args(Part))


@dataclasses.dataclass(frozen=True)
class MoshiConfig(Checked):
    """Moshi's language model. Defaults are the 7B's (kyutai/moshiko)."""

    prefix: ClassVar[str] = "model"
    sizes: ClassVar[tuple[str, ...]] = (
        "dim",
        "num_layers",
        "num_heads",
        "hidden",
        "context",
        "n_q",
        "dep_q",
        "card",
        "text_card",
    )

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
    attention_sink: int = 0
    """First frames of a stream that every later frame sees, in place of as many of the oldest in each window (Xiao et
    al. 2023, arXiv 2309.17453); they seem no further away than the window is long. 0: none."""
    max_period: float = 10000.0
    """Longest period of the rotary position embedding."""
    n_q: int = 16
    """Audio codebooks read: those of Moshi's stream, then those of the user's."""
    dep_q: int = 8
    """Audio codebooks predicted: those of Moshi's stream."""
    card: int = 2048
    """Entries of an audio codebook; id `card` is the initial token. Training from scratch takes the codec's."""
    text_card: int = 32000
    """Text pieces; id `text_card` is the initial token. Training from scratch takes the tokenizer's."""
    delays: tuple[int, ...] = (0,) + 2 * ((0,) + 7 * (1,))
    """Delay in frames of text and of each codebook, Moshi's then the user's."""
    dtype: Dtype = "float32"
    """Type of activations (float64 for tests); norms, softmax, rotations, logits, TTT states are at least float32."""
    extra_heads: int = 0
    """Further linear heads on the temporal transformer's output (Kyutai's pause prediction)."""
    extra_heads_dim: int = 6
    """Outputs of each."""
    depth: DepthConfig = DepthConfig()
    """Depth transformer."""
    apart: tuple[int, ...] = ()
    """Layers that are not stacked with others of their kind; set by training, which trains a stack as a whole."""
    lora: LoRAConfig = LoRAConfig()
    """Adapters kept apart from the weights."""
    ttt: TTTConfig = TTTConfig(layers="29,30,31")
    """TTT layers."""

    def _rules(self) -> Iterator[tuple[str, str]]:
        schedule, last, named = self.depth.schedule, self.num_layers - 1, [layer for layer, _ in self.layer_context]
        lead = max(self.delays[:1], default=0)
        check(lead == 0, f"model.delays[0]={lead} delays the text stream: Moshi's text leads with delay 0.")
        fits = len(schedule) in (0, self.dep_q)
        check(
            fits, f"depth.schedule={schedule} has {len(schedule)} entries: give one for each of {self.dep_q} codebooks."
        )
        for layer, frames in self.layer_context:
            pair, fits = f"({layer}, {frames})", 0 <= layer <= last and frames >= 1
            check(fits, f"model.layer_context={pair} does not fit: name layers 0 to {last} and 1 frame or more.")
        if self.dim % self.num_heads:
            yield "dim", f"is no multiple of model.num_heads={self.num_heads}: choose one."
        if self.head_dim % 2:
            yield "dim", f"gives an odd head width {self.head_dim}: rotary pairs need an even one."
        if not (1 < self.max_period < math.inf):
            yield "max_period", "is not a period: give more than 1, such as 10000."
        if self.dep_q > self.n_q:
            yield "dep_q", f"exceeds model.n_q={self.n_q}: predict codebooks that are read."
        if len(self.delays) != self.n_q + 1 or min(self.delays) < 0:
            yield "delays", f"is no list of {self.n_q + 1} delays of 0 or more."
        if self.extra_heads < 0 or self.extra_heads_dim < 1:
            yield "extra_heads", f"of {self.extra_heads_dim} outputs cannot be: give heads of 1 output or more."
        if len(set(named)) < len(named):
            yield "layer_context", "gives a layer two windows: name each layer once."
        # Not min(self.contexts): a damaged file may name more layers than can be listed.
        others = [self.context] if len(named) < self.num_layers else []
        shortest = min([frames for _, frames in self.layer_context] + others)
        if not 0 <= self.attention_sink < shortest:
            yield "attention_sink", f"does not fit: give 0 or more, below the shortest attention window of {shortest}."
        if not all(0 <= layer <= last for layer in self.apart):
            yield "apart", f"names layers that are not there: name layers 0 to {last}."
        if self.ttt_layers and self.head_dim < 4:
            yield "num_heads", f"gives TTT layers heads of width {self.head_dim}: choose a width of 4 or more."

    @property
    def num_streams(self) -> int:
        """Token streams of a frame: text and n_q codebooks."""
        return self.n_q + 1

    @property
    def target_streams(self) -> dict[str, int]:
        """Number of tokens of each predicted stream, in order: text, then Moshi's codebooks from 1."""
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
    """Layer indices of a text such as "29,30,31", "25-30", "-1", "middle", "all" or "none", sorted, each once."""
    words = {"all": range(num_layers), "none": (), "middle": (num_layers // 2,)}
    if text.strip() in words:
        return tuple(words[text.strip()])
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        known = '"29,30,31", "25-30", "-1", "middle", "all" or "none"'
        check(match is not None, f'ttt.layers="{text}" cannot be read: write {known}.')
        first = int(match[1]) + (num_layers if match[1].startswith("-") else 0)
        last = int(match[2]) if match[2] else first
        for layer in (first, last):
            check(
                0 <= layer < num_layers,
                f'ttt.layers="{text}" names layer {layer}, but the model has layers 0 to {num_layers - 1}: name those.',
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
        # Early: from scratch, later layers did not learn to recall (docs/results/memory_layers.md).
        ttt=TTTConfig(layers="0,1,2", gate_init=0.5),
    ),
    "moshi-7b": MoshiConfig(dtype="bfloat16"),
}
"""Models: `tiny` trains on a laptop CPU in minutes, `small` (157 M parameters) on a GPU; `moshi-7b` is Kyutai's."""


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
