"""Converts TTT layers of the original, the PyTorch system that first put them into Moshi.

docs/checkpoints/original.md describes what carries over. The original replaces `transformer.layers.N` by a module that
holds a TTT layer, and Kyutai's layer under two names, so that files hold the tensors of that twice.
Names, shapes and equations: github.com/AlufRon/claude-web, folder
moshi_ttt_try/moshi-finetune (`moshi_ttt/`, `finetune/checkpointing.py`).
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

from ttt_jax.checkpoints.differences import differences, group, wrong_types
from ttt_jax.checkpoints.safetensors_reader import DTYPES, Piece
from ttt_jax.config import MoshiConfig, TTTConfig, parse_layers
from ttt_jax.convert import kyutai_config
from ttt_jax.convert.source import Source
from ttt_jax.convert.state_dict import StateDict, StoredTensor
from ttt_jax.convert.ttt_layers import Parameters
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

SETTINGS = "training_config.json"
TTT_KEY = re.compile(r"transformer\.layers\.(\d+)\.seq_modeling_block\.(?!original_layer\.)(.+)")
KYUTAI_KEY = re.compile(r"(transformer\.layers\.\d+\.)(?:seq_modeling_block\.)?original_layer\.")
FUSED = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}
"""Names of a temporal layer's attention maps in memory, and in the files that Kyutai releases."""

GATE, UNUSED_GATE = "forward_ssm_gating.gating_alpha", "backward_ssm_gating.gating_alpha"
GATE_LIMIT = 3.0
"""The original clamps the gate parameter when it reads it. Our layers do not, so it is stored clamped."""
TTT = "ttt_layer.ttt."
PLAIN = {f"{letter}_kernel": f"{TTT}w{letter}.weight" for letter in "qkv"}
PLAIN |= {f"{letter}_bias": f"{TTT}w{letter}.bias" for letter in "qkv"}
PLAIN |= {
    "rate_weight": TTT + "learnable_ttt_lr_weight",
    "rate_bias": TTT + "learnable_ttt_lr_bias",
    "ln_scale": TTT + "ttt_norm_weight",
    "ln_bias": TTT + "ttt_norm_bias",
    "gate": GATE,
}
"""Names of our parameters in the original, without the inner network. Shapes are the same but for axes of length 1."""
UNUSED = {UNUSED_GATE} | {f"{TTT}{module}.{part}" for module in ("post_norm", "wo") for part in ("weight", "bias")}
"""Tensors that the original saves and never uses."""


class Layers(NamedTuple):
    """The original's TTT layers in a file."""

    path: Path
    tensors: dict[int, dict[str, StoredTensor]]
    """By layer and by the name within `seq_modeling_block`."""

    def keys(self, names: Collection[str]) -> list[str]:
        """Returns the names in the file of the tensors `names` of all layers."""
        return [key(layer, name) for layer, tensors in self.tensors.items() for name in tensors if name in names]


def key(layer: int, name: str) -> str:
    """Returns the name in the file of the tensor `name` of a layer."""
    return f"transformer.layers.{layer}.seq_modeling_block.{name}"


def split(state_dict: StateDict, base: Collection[str] = ()) -> tuple[StateDict, Layers | None]:
    """Returns Kyutai's tensors in `state_dict`, under Kyutai's names, and the original's TTT layers if there are any.

    Attention maps get the names that they have in `base`, if `state_dict` belongs to one. Raises `InputError` if two
    copies of a tensor differ in type or shape, or, when they are read, in a value.
    """
    layers: dict[int, dict[str, StoredTensor]] = {}
    kept: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in state_dict.tensors.items():
        if match := TTT_KEY.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = stored
            continue
        plain = KYUTAI_KEY.sub(r"\1", name).replace(".frozen_W.", ".")
        stem, dot, attention = plain.partition("self_attn.")
        fused = stem + dot + FUSED.get(attention, attention)
        kept.setdefault(fused if fused in base else plain, {})[name] = stored
    if not layers:
        return state_dict, None
    kyutai = StateDict(state_dict.path, {name: _same(copies) for name, copies in kept.items()})
    return kyutai, Layers(state_dict.path, dict(sorted(layers.items())))


def _same(copies: dict[str, StoredTensor]) -> StoredTensor:
    """Returns a tensor that a file holds under several names. The copies are compared as they are read."""
    first, *others = copies.values()
    names = " and ".join(copies)
    differ = f"{first.path} holds one tensor as {names}, which differ: give the file as the original saved it."
    if any((other.dtype, other.shape) != (first.dtype, first.shape) for other in others):
        raise InputError(differ)

    def compared(*share: int) -> Piece:
        piece, *other_pieces = (stored.piece(*share) for stored in copies.values())

        def blocks(unit: int) -> Iterator[memoryview]:
            for view, *views in zip(*(p.blocks(unit) for p in (piece, *other_pieces)), strict=True):
                if any(view != other for other in views):
                    raise InputError(differ)
                yield view

        return Piece(piece.nbytes, blocks)

    return first._replace(piece=compared) if others else first


def check_base(state_dict: StateDict) -> None:
    """Raises `InputError` if `state_dict`, from `split`, holds only the part of the weights that a run trained."""
    if "text_emb.weight" not in state_dict.tensors:
        how = f"give those (such as kyutai/moshiko-pytorch-bf16) as SOURCE, and --lora {state_dict.path}"
        raise InputError(f"{state_dict.path} holds what the original trained but not its base weights: {how}.")


def is_checkpoint(source: Source) -> bool:
    """Returns whether the original's settings lie in the folder `source`. Its trained tensors then lie beside them."""
    return source.folder is not None and source.fetch(SETTINGS) is not None


def configure(layers: Layers, source: Source, cfg: MoshiConfig, notes: list[str]) -> MoshiConfig:
    """Returns `cfg` with the original's TTT layers and attention windows. Adds the differences to `notes`.

    Raises `InputError` if settings or tensors are missing, left over, of a wrong shape or type, or have no counterpart.
    """
    path = layers.path.parent / SETTINGS
    path = path if path.is_file() else source.fetch(SETTINGS)
    if path is None:
        settings = f"there is no {SETTINGS} beside it, which holds their base_lr and mini_batch_size"
        raise InputError(f"{layers.path} holds TTT layers of the original but {settings}: put it there.")
    get = _settings(path)
    base_lr, b = get("base_lr", float), get("mini_batch_size", int)
    if b < 1 or not 0 <= base_lr < math.inf:
        values = f"ttt.base_lr={base_lr}, ttt.mini_batch_size={b}"
        raise InputError(f"{path}: {values} are not a rate and a number of frames: correct them there.")
    if get("use_rope", bool, False) and b > 1:
        raise InputError(
            f"{path}: ttt.use_rope=true turns inner queries and keys by rescaled frequencies, which our layers do not"
            " have: set it to false there, as the original's own inference does."
        )
    _check_numbers(layers, cfg, path, get("layers", str, _list(layers.tensors)))
    inner = _inner_widths(layers)
    _check_tensors(layers, cfg, inner)
    inside, outside = (
        _window(path, key, get(key, int | None, None), cfg) for key in ("ttt_layer_context", "non_ttt_layer_context")
    )
    windows = ((layer, inside if layer in layers.tensors else outside) for layer in range(cfg.num_layers))
    with kyutai_config.describing(str(path)):
        configured = dataclasses.replace(
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
    notes.extend(_differences(layers, configured, inner, base_lr))
    return configured


def parameters(layers: Layers, cfg: MoshiConfig) -> Parameters:
    """Returns the parameters of our TTT layers by the layer's number, float32. `cfg` comes from `configure`."""
    heads, width = cfg.num_heads, cfg.head_dim
    sizes = [width, *(multiple * width for multiple in cfg.ttt.hidden), width]

    @functools.lru_cache(maxsize=1)
    def make(layer: int) -> dict[str, np.ndarray]:
        stored = layers.tensors[layer]
        theirs = {name: _numbers(tensor, key(layer, name)) for name, tensor in stored.items() if name not in UNUSED}
        made = {ours: theirs[name] for ours, name in PLAIN.items()}
        made["gate"] = made["gate"].clip(-GATE_LIMIT, GATE_LIMIT)
        made |= {name: made[name][:, 0] for name in ("rate_weight", "rate_bias")}
        # The original never applies these: ttt.post_norm is off, and the projection is the identity.
        made |= {"out_kernel": np.eye(cfg.dim, dtype=np.float32), "out_bias": np.zeros(cfg.dim, np.float32)}
        for n, ((w, b), (i, o)) in enumerate(zip(_inner_names(layers), itertools.pairwise(sizes), strict=True)):
            made[f"inner_w{n}"] = _padded(theirs[w], (heads, i, o))
            made[f"inner_b{n}"] = _padded(theirs[b][:, 0], (heads, o))
        return made

    return make


def _padded(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns `values` with zeros up to `shape`. The added hidden units put out 0 and get no gradient."""
    return np.pad(values, [(0, new - old) for old, new in zip(values.shape, shape, strict=True)])


def _settings(path: Path) -> Callable[..., Any]:
    """Returns a function from key, type and, unless it is required, default to a setting of TTT layers in `path`."""
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
    """Returns the attention window of the settings in `path` under `key`; that of `cfg` if it is missing or 0."""
    if frames is not None and frames < 0:
        raise InputError(f"{path}: ttt.{key} is {frames}, but must be a window of 1 frame or more; correct it there.")
    return frames or cfg.context


def _list(numbers: Collection[int]) -> str:
    return ",".join(map(str, numbers)) or "none"


def _inner_names(layers: Layers) -> list[tuple[str, str]]:
    """Returns the names of weight and bias of each affine map of the inner network, from the keys of all layers."""
    names = {name.removeprefix(TTT) for tensors in layers.tensors.values() for name in tensors}
    many = [int(m[1]) for name in names if (m := re.fullmatch(r"(?:weights|biases)\.(\d{1,4})", name))]
    if many:
        return [(f"{TTT}weights.{n}", f"{TTT}biases.{n}") for n in range(max(many) + 1)]
    return [(f"{TTT}W{n}", f"{TTT}b{n}") for n in ((1, 2) if names & {"W2", "b2"} else (1,))]


def _inner_widths(layers: Layers) -> list[int]:
    """Returns the hidden widths of the first layer's inner network; 0 where there is no stack of matrices."""
    tensors = next(iter(layers.tensors.values()))
    shapes = [tensors[w].shape if w in tensors else () for w, _ in _inner_names(layers)[:-1]]
    return [shape[-1] if len(shape) == 3 else 0 for shape in shapes]


def _check_numbers(layers: Layers, cfg: MoshiConfig, path: Path, text: str) -> None:
    """Raises `InputError` unless `text`, from `path`, names the layers of the file, and the model has them."""
    if max(layers.tensors) >= cfg.num_layers:
        has = f"holds TTT layers {_list(layers.tensors)}, but the model has layers 0 to {cfg.num_layers - 1}"
        raise InputError(f"{layers.path} {has}: give files that belong together.")
    try:
        middle_half = range(cfg.num_layers // 4, 3 * cfg.num_layers // 4)  # as the original reads it
        named = tuple(middle_half) if text == "middle" else parse_layers(text, cfg.num_layers)
    except InputError as error:
        raise InputError(f"{path} cannot be followed: {error}") from None
    if named != tuple(layers.tensors):
        held = f"{layers.path} holds {_list(layers.tensors)}"
        raise InputError(f"{path}: ttt.layers names the layers {_list(named)}, but {held}: give files that fit.")


def _check_tensors(layers: Layers, cfg: MoshiConfig, inner: list[int]) -> None:
    """Raises `InputError` unless the tensors are those of TTT layers of the model `cfg` with these hidden widths."""
    d, heads, width = cfg.dim, cfg.num_heads, cfg.head_dim
    shapes = dict.fromkeys(PLAIN.values(), (d,)) | dict.fromkeys(
        (PLAIN[f"{letter}_kernel"] for letter in "qkv"), (d, d)
    )
    shapes |= {PLAIN["rate_weight"]: (heads, 1, d), PLAIN["rate_bias"]: (heads, 1)}
    shapes |= {PLAIN["ln_scale"]: (heads, width), PLAIN["ln_bias"]: (heads, width)}
    sizes = [width, *(max(1, size) for size in inner), width]
    for (w, b), (i, o) in zip(_inner_names(layers), itertools.pairwise(sizes), strict=True):
        shapes |= {w: (heads, i, o), b: (heads, 1, o)}
    expected = {key(layer, name): shape for layer in layers.tensors for name, shape in shapes.items()}
    stored = {
        key(layer, name): tensor
        for layer, tensors in layers.tensors.items()
        for name, tensor in tensors.items()
        if name not in UNUSED
    }
    problems = list(differences(expected, {name: tensor.shape for name, tensor in stored.items()}))
    problems += wrong_types({name: tensor.dtype for name, tensor in stored.items()}, *DTYPES)
    if problems:
        whole = "does not hold whole TTT layers of the original for this model"
        raise InputError(f"{layers.path} {whole}, as it {'; '.join(problems)}: give a checkpoint that it saved.")


def _numbers(stored: StoredTensor, name: str) -> np.ndarray:
    """Returns a tensor in float32. Raises `InputError` if a number is NaN or infinite."""
    data = b"".join(bytes(view) for view in stored.piece().blocks(1))
    values = np.frombuffer(data, DTYPES[stored.dtype]).reshape(stored.shape).astype(np.float32)
    if not np.isfinite(values).all():
        how = "give a checkpoint of before its training broke"
        raise InputError(f"{stored.path} holds NaN or infinite values in {name}: {how}.")
    return values


def _differences(layers: Layers, cfg: MoshiConfig, inner: list[int], base_lr: float) -> Iterator[str]:
    """Describes what does not carry over, and where the converted layers differ from the original."""
    ttt, maps = cfg.ttt, len(inner) + 1
    if unused := layers.keys(UNUSED):
        yield f"not carried over, as the original saves but never applies them: {group(unused)}"
    there = f"base_lr {base_lr:g} at {ttt.mini_batch} frames a mini-batch"
    yield f"{there} is {ttt.base_lr:g} here, where rates are not divided by their number"
    if ttt.mini_batch > 1:
        before = ", so outputs are the original's at the last frame of each and differ before" if maps < 3 else ""
        yield f"a frame no longer reads the steps of later frames of its mini-batch{before}"
    if maps == 1:
        yield "the original cannot run its linear inner network, so these weights are initial values or from elsewhere"
    if maps > 2:
        yield f"outputs count an update once, where the original counts it twice in networks of {maps} maps"
        fast = layers.keys({name for pair in _inner_names(layers) for name in pair})
        start = "instead of the learned start, as the original's evaluation writes those over it"
        yield f"{group(fast)} may be a stream's weights {start}; they are taken as they stand"
    anew = "starts anew at each call" + (" in training and keeps the first row's in evaluation" if maps > 2 else "")
    yield f"fast weights stay with a stream and do not decay (ttt.horizon none), where the original {anew}"
    yield "a mini-batch that a call leaves open waits for its next frames, where the original pads it and learns that"
    if any(width % cfg.head_dim for width in inner):
        yield f"inner widths {_list(inner)} are padded with units of 0 to multiples of the head width {cfg.head_dim}"
    if cfg.layer_context:
        windows = ", ".join(f"{window} in layer {layer}" for layer, window in cfg.layer_context)
        yield f"attention windows other than {cfg.context}, as trained: {windows}"
