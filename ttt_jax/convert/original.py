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
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import record
from ttt_jax.config import MoshiConfig, TTTConfig, parse_layers
from ttt_jax.convert.source import MOSHI, Source
from ttt_jax.differences import differences, group
from ttt_jax.errors import InputError
from ttt_jax.tensorfile import DTYPES, Piece, Ring, TensorFile
from ttt_jax.weights import LORA

SETTINGS = "training_config.json"
WHOLE = "consolidated.safetensors"
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

    file: TensorFile
    keys: dict[int, dict[str, str]]
    """By layer: keys in the file by the name within `seq_modeling_block`."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor `key` of the file."""
        return self.file.tensors[key].shape


class View:
    """Some tensors of a file under other names, to be read like a `TensorFile`.

    A tensor that stands there more than once is compared as it is read: `InputError` if its copies differ.
    """

    def __init__(self, file: TensorFile, keys: Mapping[str, list[str]]):
        """Raises `InputError` if copies differ in type or shape. `keys`: those in the file by the name here."""
        self.path, self._file, self._keys = file.path, file, keys
        self.tensors = {name: file.tensors[copies[0]] for name, copies in keys.items()}
        for copies in keys.values():
            if len({(file.tensors[key].dtype, file.tensors[key].shape) for key in copies}) > 1:
                raise self._differ(copies)

    def array(self, name: str) -> np.ndarray:
        """The tensor `name`."""
        first, *copies = map(self._file.array, self._keys[name])
        if any(first.tobytes() != copy.tobytes() for copy in copies):
            raise self._differ(self._keys[name])
        return first

    def piece(self, name: str, part: int = 0, parts: int = 1) -> Piece:
        """One of `parts` equal consecutive shares of the bytes of the tensor `name`."""
        first, *copies = (self._file.piece(key, part, parts) for key in self._keys[name])

        def blocks(ring: Ring, unit: int) -> Iterator[memoryview]:
            others = [copy.blocks(Ring(), unit) for copy in copies]
            for views in zip(first.blocks(ring, unit), *others, strict=True):
                if any(view != views[0] for view in views):
                    raise self._differ(self._keys[name])
                yield views[0]

        return Piece(first.nbytes, blocks)

    def _differ(self, copies: list[str]) -> InputError:
        return InputError(
            f"{self.path} holds one tensor as {' and '.join(copies)}, which differ: give the file as the original saved it."
        )


def split(file: TensorFile, base: Collection[str] = ()) -> tuple[TensorFile | View, Layers | None]:
    """What of `file` is Kyutai's, under Kyutai's names, and the original's TTT layers if there are any.

    Args:
      base: keys of the base that `file` belongs to; attention maps take the names that they have there.
    """
    layers: dict[int, dict[str, str]] = {}
    kept: dict[str, list[str]] = {}
    for key in file.tensors:
        if match := OWN.fullmatch(key):
            layers.setdefault(int(match[1]), {})[match[2]] = key
            continue
        name = KYUTAI.sub(r"\1", key).replace(".frozen_W.", ".")
        stem, dot, attention = name.partition("self_attn.")
        fused = stem + dot + FUSED.get(attention, attention)
        kept.setdefault(fused if fused in base else name, []).append(key)
    return (View(file, kept), Layers(file, dict(sorted(layers.items())))) if layers else (file, None)


def located(found: Source) -> Source:
    """`found` with the weights where the original saves them.

    Raises `InputError` if it holds what the original saves of a run that trained a part of the weights: that lacks the others.
    """
    file = found.file
    if file is None and found.folder is not None and found.fetch(SETTINGS):
        here = [path.name for path in found.folder.glob("*.safetensors")]
        if not found.fetch(found.raw.get("moshi_name") or MOSHI):
            file = found.fetch(WHOLE)
        if here == [LORA]:
            file = found.folder / LORA
    if file is not None and file.name == LORA and (file.parent / SETTINGS).is_file():
        raise InputError(
            f"{file} holds what the original trained and not the weights it started from: give those (such as"
            f" kyutai/moshiko-pytorch-bf16) as SOURCE, and --lora {file}."
        )
    return found._replace(file=file)


def merged(found: Source, notes: list[str]) -> Source:
    """`found` with adapters that config.json tells of and that lie nowhere counted as merged: the original saves all weights so."""
    if found.fetch(LORA) or not found.raw.get("lora"):
        return found
    notes.append(f"the adapters that {found.where} tells of are in the weights already, as the original saves them")
    return found._replace(config={**found.raw, "lora": False})


def trained_part(found: Source) -> Path | None:
    """The file beside the weights in which the original saves what it trained; its config.json only tells of adapters in it."""
    return found.fetch(LORA) if found.folder is not None and found.fetch(SETTINGS) else None


def configure(layers: Layers, found: Source, cfg: MoshiConfig, notes: list[str]) -> MoshiConfig:
    """`cfg` with the TTT layers and the attention windows that the original trained with; what differs is told in `notes`.

    Raises `InputError` if settings or tensors are missing, left over, of a wrong shape or type, or have no counterpart here.
    """
    path = layers.file.path.parent / SETTINGS
    path = path if path.is_file() else found.fetch(SETTINGS)
    if path is None:
        raise InputError(
            f"{layers.file.path} holds TTT layers of the original but there is no {SETTINGS} beside it, which tells their base_lr and"
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
    _check_numbers(layers, cfg, path, get("layers", str, _list(layers.keys)))
    inner = _inner_widths(layers)
    _check_tensors(layers, cfg, inner)
    inside, outside = (
        get(key, int | None, None) or cfg.context for key in ("ttt_layer_context", "non_ttt_layer_context")
    )
    windows = ((layer, inside if layer in layers.keys else outside) for layer in range(cfg.num_layers))
    try:
        made = dataclasses.replace(
            cfg,
            layer_context=tuple((layer, window) for layer, window in windows if window != cfg.context),
            ttt=TTTConfig(
                layers=_list(layers.keys),
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
        theirs = {name: _numbers(layers, key) for name, key in layers.keys[layer].items() if name not in UNUSED}
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
    raw = record.read_json(path, "the original's settings")
    ttt = raw.get("ttt") if isinstance(raw, dict) else None
    if not isinstance(ttt, dict):
        raise InputError(f'{path} has no settings "ttt": give the {SETTINGS} that the original wrote.')

    def get(key: str, kind: Any, *default: Any) -> Any:
        if key not in ttt and not default:
            raise InputError(f"{path} has no ttt.{key}: give the {SETTINGS} that the original wrote.")
        return record.conform(kind, ttt.get(key, *default), str(path), f"ttt.{key}")

    return get


def _list(numbers: Collection[int]) -> str:
    return ",".join(map(str, numbers)) or "none"


def _inner_names(layers: Layers) -> list[tuple[str, str]]:
    """Their names of weight and bias of each affine map of the inner network, told from all layers' keys together."""
    names = {name.removeprefix(TTT) for keys in layers.keys.values() for name in keys}
    many = [int(m[1]) for name in names if (m := re.fullmatch(r"(?:weights|biases)\.(\d{1,4})", name))]
    if many:
        return [(f"{TTT}weights.{n}", f"{TTT}biases.{n}") for n in range(max(many) + 1)]
    return [(f"{TTT}W{n}", f"{TTT}b{n}") for n in ((1, 2) if names & {"W2", "b2"} else (1,))]


def _inner_widths(layers: Layers) -> list[int]:
    """Hidden widths of the inner network of the first layer; 0 where its tensor is missing or no stack of matrices."""
    keys = next(iter(layers.keys.values()))
    found = [layers.shape(keys[w]) if w in keys else () for w, _ in _inner_names(layers)[:-1]]
    return [shape[-1] if len(shape) == 3 else 0 for shape in found]


def _check_numbers(layers: Layers, cfg: MoshiConfig, path: Path, text: str) -> None:
    """Raise `InputError` unless the layers that the settings in `path` name by `text` are those of the file, and the model has them."""
    if max(layers.keys) >= cfg.num_layers:
        raise InputError(
            f"{layers.file.path} holds TTT layers {_list(layers.keys)}, but the model has layers 0 to {cfg.num_layers - 1}: give files"
            " that belong together."
        )
    try:
        middle_half = range(cfg.num_layers // 4, 3 * cfg.num_layers // 4)  # as the original reads it
        named = tuple(middle_half) if text == "middle" else parse_layers(text, cfg.num_layers)
    except InputError as error:
        raise InputError(f"{path} cannot be followed: {error}") from None
    if named != tuple(layers.keys):
        raise InputError(
            f"{path}: ttt.layers names the layers {_list(named)}, but {layers.file.path} holds {_list(layers.keys)}: give files that"
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
    expected, found = {}, {}
    for number, keys in layers.keys.items():
        expected |= {f"transformer.layers.{number}.seq_modeling_block.{name}": shape for name, shape in shapes.items()}
        found |= {key: layers.shape(key) for name, key in keys.items() if name not in UNUSED}
    problems = list(differences(expected, found))
    problems += [
        f"has {key} as {info.dtype} instead of {', '.join(DTYPES)}"
        for key in found
        if (info := layers.file.tensors[key]).dtype not in DTYPES
    ]
    if problems:
        raise InputError(
            f"{layers.file.path} does not hold whole TTT layers of the original for this model, as it {'; '.join(problems)}: give a"
            " checkpoint that it saved."
        )


def _numbers(layers: Layers, key: str) -> np.ndarray:
    """A tensor in float32. Raises `InputError` if it holds what is no number."""
    values = layers.file.array(key).astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(
            f"{layers.file.path} holds NaN or infinite values in {key}: give a checkpoint of before its training broke."
        )
    return values


def _differences(layers: Layers, cfg: MoshiConfig, inner: list[int], base_lr: float) -> Iterator[str]:
    """What does not carry over, and where the converted layers do otherwise than the original."""
    ttt, maps = cfg.ttt, len(inner) + 1
    if unused := [key for keys in layers.keys.values() for name, key in keys.items() if name in UNUSED]:
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
        fast = [keys[name] for keys in layers.keys.values() for pair in _inner_names(layers) for name in pair]
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
