"""TTT layers of the original, the PyTorch system that first put them into Moshi, as layers of ours (docs/checkpoints.md).

It replaces `transformer.layers.N` by a module that holds Kyutai's layer under two names, so that files hold its tensors twice,
and a TTT layer. Names, shapes and equations: github.com/AlufRon/claude-web, folder moshi_ttt_try/moshi-finetune (`moshi_ttt/`,
`finetune/checkpointing.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.checkpoints.differences import differences, group
from ttt_jax.checkpoints.safetensors_reader import DTYPES, Piece
from ttt_jax.config import MoshiConfig, TTTConfig, parse_layers
from ttt_jax.convert.source import Source
from ttt_jax.convert.tensor_view import Held, View
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

SETTINGS = "training_config.json"
OWN = re.compile(r"transformer\.layers\.(\d+)\.seq_modeling_block\.(?!original_layer\.)(.+)")
KYUTAI = re.compile(r"(transformer\.layers\.\d+\.)(?:seq_modeling_block\.)?original_layer\.")
FUSED = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}
"""Names of a temporal layer's attention maps in memory, and in the files that Kyutai releases."""

GATE, UNUSED_GATE = "forward_ssm_gating.gating_alpha", "backward_ssm_gating.gating_alpha"
GATE_LIMIT = 3.0
"""The original reads the gate parameter as clamped to this, which ours does not: it is stored clamped."""
TTT = "ttt_layer.ttt."
PLAIN = {
    "q_kernel": TTT + "wq.weight",
    "q_bias": TTT + "wq.bias",
    "k_kernel": TTT + "wk.weight",
    "k_bias": TTT + "wk.bias",
    "v_kernel": TTT + "wv.weight",
    "v_bias": TTT + "wv.bias",
    "rate_weight": TTT + "learnable_ttt_lr_weight",
    "rate_bias": TTT + "learnable_ttt_lr_bias",
    "ln_scale": TTT + "ttt_norm_weight",
    "ln_bias": TTT + "ttt_norm_bias",
    "gate": GATE,
}
"""Their names of our parameters, but for the inner network; axes of length 1 aside, the shapes are the same."""
UNUSED = {UNUSED_GATE} | {f"{TTT}{module}.{part}" for module in ("post_norm", "wo") for part in ("weight", "bias")}
"""What the original saves and never uses."""


class Layers(NamedTuple):
    """The original's TTT layers in a file."""

    path: Path
    tensors: dict[int, dict[str, Held]]
    """By layer, by the name within `seq_modeling_block`."""

    def keys(self, names: Collection[str]) -> list[str]:
        """What the tensors of these names are called in the file, of all layers."""
        return [key(layer, name) for layer, held in self.tensors.items() for name in held if name in names]


def key(layer: int, name: str) -> str:
    """What the tensor `name` of a layer is called in a file."""
    return f"transformer.layers.{layer}.seq_modeling_block.{name}"


def split(view: View, base: Collection[str] = ()) -> tuple[View, Layers | None]:
    """What of `view` is Kyutai's, under Kyutai's names, and the original's TTT layers if there are any.

    Args:
      base: names of the base that `view` belongs to; attention maps take those that they have there.

    Raises `InputError` if the two copies of a tensor differ in type or shape, or, when they are read, in a value.
    """
    layers: dict[int, dict[str, Held]] = {}
    kept: dict[str, dict[str, Held]] = {}
    for name, held in view.tensors.items():
        if match := OWN.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = held
            continue
        plain = KYUTAI.sub(r"\1", name).replace(".frozen_W.", ".")
        stem, dot, attention = plain.partition("self_attn.")
        fused = stem + dot + FUSED.get(attention, attention)
        kept.setdefault(fused if fused in base else plain, {})[name] = held
    if not layers:
        return view, None
    kyutai = View(view.path, {name: _one(copies) for name, copies in kept.items()})
    return kyutai, Layers(view.path, dict(sorted(layers.items())))


def _one(copies: dict[str, Held]) -> Held:
    """A tensor that stands in files under several names; they are compared as they are read."""
    first, *others = copies.values()
    differ = f"{first.path} holds one tensor as {' and '.join(copies)}, which differ: give the file as the original saved it."
    if any((held.dtype, held.shape) != (first.dtype, first.shape) for held in others):
        raise InputError(differ)

    def piece(*share: int) -> Piece:
        whole, *again = (held.piece(*share) for held in copies.values())

        def blocks(unit: int) -> Iterator[memoryview]:
            for view, *same in zip(whole.blocks(unit), *(one.blocks(unit) for one in again), strict=True):
                if any(view != one for one in same):
                    raise InputError(differ)
                yield view

        return Piece(whole.nbytes, blocks)

    return first._replace(piece=piece) if others else first


def check_base(view: View) -> None:
    """Raise `InputError` if `view`, what `split` left, are no whole weights, as of a run that trained and saved a part of them."""
    if "text_emb.weight" not in view.tensors:
        raise InputError(
            f"{view.path} holds what the original trained and not the weights it started from: give those (such as"
            f" kyutai/moshiko-pytorch-bf16) as SOURCE, and --lora {view.path}."
        )


def is_checkpoint(found: Source) -> bool:
    """Whether the original's settings lie in the folder `found`: what it trained is then beside them, adapters or not."""
    return found.folder is not None and found.fetch(SETTINGS) is not None


def configure(layers: Layers, found: Source, cfg: MoshiConfig, notes: list[str]) -> MoshiConfig:
    """`cfg` with the TTT layers and the attention windows that the original trained with; what differs is told in `notes`.

    Raises `InputError` if settings or tensors are missing, left over, of a wrong shape or type, or have no counterpart here.
    """
    path = layers.path.parent / SETTINGS
    path = path if path.is_file() else found.fetch(SETTINGS)
    if path is None:
        raise InputError(
            f"{layers.path} holds TTT layers of the original but there is no {SETTINGS} beside it, which tells their base_lr and"
            " mini_batch_size: put it there."
        )
    get = _settings(path)
    base_lr, b = get("base_lr", float), get("mini_batch_size", int)
    if b < 1 or not 0 <= base_lr < math.inf:
        raise InputError(
            f"{path}: ttt.base_lr={base_lr}, ttt.mini_batch_size={b} are not a rate and a number of frames: correct them there."
        )
    if get("use_rope", bool, False) and b > 1:
        raise InputError(
            f"{path}: ttt.use_rope=true turns inner queries and keys by rescaled frequencies, which our layers do not have: set it to"
            " false there to convert without, which is how the original's own inference runs it."
        )
    _check_numbers(layers, cfg, path, get("layers", str, _list(layers.tensors)))
    inner = _inner_widths(layers)
    _check_tensors(layers, cfg, inner)
    inside, outside = (
        _window(path, key, get(key, int | None, None), cfg) for key in ("ttt_layer_context", "non_ttt_layer_context")
    )
    windows = ((layer, inside if layer in layers.tensors else outside) for layer in range(cfg.num_layers))
    try:
        made = dataclasses.replace(
            cfg,
            layer_context=tuple((layer, window) for layer, window in windows if window != cfg.context),
            ttt=TTTConfig(
                layers=_list(layers.tensors),
                hidden=tuple(-(-width // cfg.head_dim) for width in inner),
                mini_batch=b,
                base_lr=base_lr / b,
                horizon=None,
                pre_norm=False,
                post_norm=False,
            ),
        )
    except InputError as error:
        raise InputError(f"{path} describes no model that can be: {error}") from None
    notes.extend(_differences(layers, made, inner, base_lr))
    return made


def parameters(layers: Layers, cfg: MoshiConfig) -> Callable[[int], dict[str, np.ndarray]]:
    """Parameters of our TTT layers by the layer's number, float32; those of the last layer asked for are kept.

    Args:
      cfg: from `configure`.
    """
    heads, width = cfg.num_heads, cfg.head_dim
    sizes = [width, *(multiple * width for multiple in cfg.ttt.hidden), width]

    @functools.lru_cache(maxsize=1)
    def make(layer: int) -> dict[str, np.ndarray]:
        here = layers.tensors[layer]
        theirs = {name: _numbers(held, key(layer, name)) for name, held in here.items() if name not in UNUSED}
        made = {ours: theirs[name] for ours, name in PLAIN.items()}
        made["gate"] = made["gate"].clip(-GATE_LIMIT, GATE_LIMIT)
        made |= {name: made[name][:, 0] for name in ("rate_weight", "rate_bias")}
        # What it never applied: ttt.post_norm is off, and the projection changes nothing.
        made |= {"out_kernel": np.eye(cfg.dim, dtype=np.float32), "out_bias": np.zeros(cfg.dim, np.float32)}
        for n, ((w, b), (i, o)) in enumerate(zip(_inner_names(layers), itertools.pairwise(sizes), strict=True)):
            made[f"inner_w{n}"] = _filled(theirs[w], (heads, i, o))
            made[f"inner_b{n}"] = _filled(theirs[b][:, 0], (heads, o))
        return made

    return make


def _filled(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`values` with zeros up to `shape`: units of hidden widths that are no multiples of the head's put out 0 and get no gradient."""
    return np.pad(values, [(0, new - old) for old, new in zip(values.shape, shape, strict=True)])


def _settings(path: Path) -> Callable[..., Any]:
    """A function from key, type and (if it may be missing) default to the setting of the TTT layers in `path`."""
    raw = config_json.read_json(path, "the original's settings")
    ttt = raw.get("ttt") if isinstance(raw, dict) else None
    if not isinstance(ttt, dict):
        raise InputError(f'{path} has no settings "ttt": give the {SETTINGS} that the original wrote.')

    def get(key: str, kind: Any, *default: Any) -> Any:
        if key not in ttt and not default:
            raise InputError(f"{path} has no ttt.{key}: give the {SETTINGS} that the original wrote.")
        return config_json.conform(kind, ttt.get(key, *default), str(path), f"ttt.{key}")

    return get


def _window(path: Path, key: str, frames: int | None, cfg: MoshiConfig) -> int:
    """The attention window that the settings in `path` give by `key`: that of `cfg` if they give none or 0."""
    if frames is not None and frames < 0:
        raise InputError(f"{path}: ttt.{key} is {frames}, but must be a window of 1 frame or more; correct it there.")
    return frames or cfg.context


def _list(numbers: Collection[int]) -> str:
    return ",".join(map(str, numbers)) or "none"


def _inner_names(layers: Layers) -> list[tuple[str, str]]:
    """Their names of weight and bias of each affine map of the inner network, told from all layers' keys together."""
    names = {name.removeprefix(TTT) for held in layers.tensors.values() for name in held}
    many = [int(m[1]) for name in names if (m := re.fullmatch(r"(?:weights|biases)\.(\d{1,4})", name))]
    if many:
        return [(f"{TTT}weights.{n}", f"{TTT}biases.{n}") for n in range(max(many) + 1)]
    return [(f"{TTT}W{n}", f"{TTT}b{n}") for n in ((1, 2) if names & {"W2", "b2"} else (1,))]


def _inner_widths(layers: Layers) -> list[int]:
    """Hidden widths of the inner network of the first layer; 0 where its tensor is missing or no stack of matrices."""
    held = next(iter(layers.tensors.values()))
    shapes = [held[w].shape if w in held else () for w, _ in _inner_names(layers)[:-1]]
    return [shape[-1] if len(shape) == 3 else 0 for shape in shapes]


def _check_numbers(layers: Layers, cfg: MoshiConfig, path: Path, text: str) -> None:
    """Raise `InputError` unless the layers that the settings in `path` name by `text` are those of the file, and the model has them."""
    if max(layers.tensors) >= cfg.num_layers:
        raise InputError(
            f"{layers.path} holds TTT layers {_list(layers.tensors)}, but the model has layers 0 to {cfg.num_layers - 1}: give files"
            " that belong together."
        )
    try:
        middle_half = range(cfg.num_layers // 4, 3 * cfg.num_layers // 4)  # as the original reads it
        named = tuple(middle_half) if text == "middle" else parse_layers(text, cfg.num_layers)
    except InputError as error:
        raise InputError(f"{path} cannot be followed: {error}") from None
    if named != tuple(layers.tensors):
        raise InputError(
            f"{path}: ttt.layers names the layers {_list(named)}, but {layers.path} holds {_list(layers.tensors)}: give files that"
            " belong together."
        )


def _check_tensors(layers: Layers, cfg: MoshiConfig, inner: list[int]) -> None:
    """Raise `InputError` unless the tensors are those of TTT layers of the model `cfg` with these hidden widths."""
    d, heads, width = cfg.dim, cfg.num_heads, cfg.head_dim
    shapes = dict.fromkeys(PLAIN.values(), (d,)) | dict.fromkeys((PLAIN[f"{one}_kernel"] for one in "qkv"), (d, d))
    shapes |= {PLAIN["rate_weight"]: (heads, 1, d), PLAIN["rate_bias"]: (heads, 1)}
    shapes |= {PLAIN["ln_scale"]: (heads, width), PLAIN["ln_bias"]: (heads, width)}
    sizes = [width, *(max(1, size) for size in inner), width]
    for (w, b), (i, o) in zip(_inner_names(layers), itertools.pairwise(sizes), strict=True):
        shapes |= {w: (heads, i, o), b: (heads, 1, o)}
    expected = {key(layer, name): shape for layer in layers.tensors for name, shape in shapes.items()}
    found = {
        key(layer, name): one
        for layer, held in layers.tensors.items()
        for name, one in held.items()
        if name not in UNUSED
    }
    problems = list(differences(expected, {name: one.shape for name, one in found.items()}))
    problems += [
        f"has {name} as {one.dtype} instead of {', '.join(DTYPES)}"
        for name, one in found.items()
        if one.dtype not in DTYPES
    ]
    if problems:
        raise InputError(
            f"{layers.path} does not hold whole TTT layers of the original for this model, as it {'; '.join(problems)}: give a"
            " checkpoint that it saved."
        )


def _numbers(held: Held, name: str) -> np.ndarray:
    """A tensor in float32. Raises `InputError` if it holds what is no number."""
    data = b"".join(bytes(view) for view in held.piece().blocks(1))
    values = np.frombuffer(data, DTYPES[held.dtype]).reshape(held.shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(
            f"{held.path} holds NaN or infinite values in {name}: give a checkpoint of before its training broke."
        )
    return values


def _differences(layers: Layers, cfg: MoshiConfig, inner: list[int], base_lr: float) -> Iterator[str]:
    """What does not carry over, and where the converted layers do otherwise than the original."""
    ttt, maps = cfg.ttt, len(inner) + 1
    if unused := layers.keys(UNUSED):
        yield (
            f"not carried over, as the original saves but never applies them: {group(unused)}; instead there is no post-norm and the"
            " output projection is the identity"
        )
    yield (
        f"base_lr {base_lr:g} at {ttt.mini_batch} frames a mini-batch is {ttt.base_lr:g} here, where rates are not divided by their"
        " number"
    )
    if ttt.mini_batch > 1:
        yield "a frame no longer reads the steps of later frames of its mini-batch" + (
            ", so outputs are the original's at the last frame of each and differ before" if maps < 3 else ""
        )
    if maps == 1:
        yield "the original cannot run its linear inner network, so these weights are as they were initialised or from elsewhere"
    if maps > 2:
        yield f"outputs count an update once, where the original counts it twice in networks of {maps} maps"
        fast = layers.keys({name for pair in _inner_names(layers) for name in pair})
        yield (
            f"{group(fast)} may be a stream's weights instead of the learned start, as the original's evaluation writes those over it;"
            " they are taken as they stand"
        )
    yield (
        "fast weights stay with a stream from call to call and do not decay (ttt.horizon none), where the original starts anew at each"
        " call" + (" in training and keeps the first row's in evaluation" if maps > 2 else "")
    )
    yield "a mini-batch that a call leaves open waits for its next frames, where the original fills it up and learns from the filling"
    if any(width % cfg.head_dim for width in inner):
        yield f"inner widths {_list(inner)} are filled up to multiples of the head width {cfg.head_dim} by units that stay 0"
    if cfg.layer_context:
        yield f"attention windows other than {cfg.context}, as trained: " + ", ".join(
            f"{window} in layer {layer}" for layer, window in cfg.layer_context
        )
