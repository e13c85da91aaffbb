"""Names and layouts of a Mimi's tensors: Kyutai's and Hugging Face's, to ours and back.

Numbers are only moved, but for the codebooks, which are kept as sums and counts of what belongs to each entry, and for
convolutions with weight norm. Hugging Face's script renames Kyutai's tensors, splits q, k and v, and permutes the rows
of q and k, since transformers rotates halves of a head where Kyutai rotates neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ttt_jax.codec.mimi.config import MimiConfig, shapes
from ttt_jax.convert.state_dict import StateDict, StoredTensor, misfits, refuse_misfits
from ttt_jax.errors import InputError

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]

MANY = 10  # tensors of another shape, whose list would help nobody
SUM, USAGE, FLAG = "embedding_sum", "cluster_usage", "_initialized"
EPSILON = np.float32(1e-5)
"""Smallest usage that moshi divides by."""
OLD = {"inited": FLAG, "cluster_size": USAGE, "embed_avg": SUM, "embed_sum": SUM}
"""Old names of a codebook's tensors, which moshi reads, too."""
TRAINING = "wavlm_"
"""First letters of tensors that only training needs."""
NORM, DIRECTION = "_g", "_v"
"""Endings of the two tensors of a weight with weight norm."""

LAYER = {
    "norm1/scale": "norm1.weight",
    "norm1/bias": "norm1.bias",
    "qkv": "self_attn.in_proj_weight",
    "out": "self_attn.out_proj.weight",
    "scale1": "layer_scale_1.scale",
    "norm2/scale": "norm2.weight",
    "norm2/bias": "norm2.bias",
    "up": "linear1.weight",
    "down": "linear2.weight",
    "scale2": "layer_scale_2.scale",
}
"""Kyutai's names of a transformer layer's tensors by ours."""
IN_MEMORY = {".self_attn.in_projs.0.weight": ".self_attn.in_proj_weight"}
IN_MEMORY |= {".self_attn.out_projs.0.weight": ".self_attn.out_proj.weight"}
"""Names in a model's `state_dict()` by those in Kyutai's files."""
HUGGINGFACE = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(conv\.conv|convtr\.convtr)\.(weight|bias)$", r".conv.\2"),
    (r"^(downsample|upsample)\..*", r"\1.conv.weight"),
    (r"_transformer\.transformer\.", "_transformer."),
    (r"\.norm1\.", ".input_layernorm."),
    (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_1\.", ".self_attn_layer_scale."),
    (r"\.layer_scale_2\.", ".mlp_layer_scale."),
    (r"\.rvq_first\.(vq\.)?", ".semantic_residual_vector_quantizer."),
    (r"\.rvq_rest\.(vq\.)?", ".acoustic_residual_vector_quantizer."),
    (r"\._codebook\.", ".codebook."),
    (r"\.embedding_sum$", ".embed_sum"),
    (r"\._initialized$", ".initialized"),
)
"""What makes Hugging Face's names of Kyutai's, in this order."""


class Layout(NamedTuple):
    """How Kyutai stores a parameter of ours."""

    shape: Callable[[Shape], Shape]
    """From our shape to theirs."""
    read: Callable[[np.ndarray], np.ndarray]
    """From theirs to ours."""
    write: Callable[[np.ndarray], np.ndarray]
    """From ours to theirs."""


def _read_transposed(w: np.ndarray) -> np.ndarray:
    """[in, out, 2 ratio] -> [ratio, out, 2, in]. The first half of their kernel is what the present input adds."""
    inputs, out, kernel = w.shape
    return w.reshape(inputs, out, 2, kernel // 2)[:, :, ::-1].transpose(3, 1, 2, 0)


def _write_transposed(w: np.ndarray) -> np.ndarray:
    ratio, out, _, inputs = w.shape
    return w.transpose(3, 1, 2, 0)[:, :, ::-1].reshape(inputs, out, 2 * ratio)


SAME = Layout(lambda shape: shape, lambda w: w, lambda w: w)
CONV = Layout(lambda s: (s[0], s[2], s[1]), lambda w: w.transpose(0, 2, 1), lambda w: w.transpose(0, 2, 1))
TRANSPOSED = Layout(lambda s: (s[3], s[1], 2 * s[0]), _read_transposed, _write_transposed)
DEPTHWISE = Layout(  # a transposed convolution of each channel by itself: theirs has one output for each input
    lambda s: (s[2], 1, 2 * s[0]),
    lambda w: _read_transposed(w)[:, 0],
    lambda w: _write_transposed(w[:, None]),
)
PROJECTION = Layout(lambda s: (*s, 1), lambda w: w[:, :, 0], lambda w: w[:, :, None])


class Place(NamedTuple):
    """Where Kyutai keeps a parameter of ours."""

    name: str
    """Their name; for codebooks the beginning of their names."""
    shape: Shape
    """Ours."""
    layout: Layout | None
    """None: codebooks."""

    @property
    def books(self) -> list[tuple[str, Shape]]:
        """Beginning of the names of each codebook's tensors, and the shape of its entries; [] for other parameters."""
        if self.layout is not None:
            return []
        count, *entries = self.shape
        return [(f"{self.name}.{i}._codebook.", tuple(entries)) for i in range(count)]


def places(cfg: MimiConfig) -> dict[str, Place]:
    """Returns by our name where Kyutai keeps each parameter."""
    return {name: _place(name, shape, len(cfg.ratios)) for name, shape in shapes(cfg).items()}


def _place(name: str, shape: Shape, blocks: int) -> Place:
    part, *rest = name.split("/")
    if part.endswith("_transformer"):
        return Place(f"{part}.transformer.layers.{rest[0]}.{LAYER['/'.join(rest[1:])]}", shape, SAME)
    if part == "quantizer":
        stem = f"quantizer.rvq_{'first' if rest[0] == 'semantic' else 'rest'}"
        if rest[1] == "codebooks":
            return Place(f"{stem}.vq.layers", shape, None)
        return Place(f"{stem}.{rest[1]}_proj.weight", shape, PROJECTION)
    if part == "downsample":
        return Place("downsample.conv.conv.conv.weight", shape, CONV)
    if part == "upsample":
        return Place("upsample.convtr.convtr.convtr.weight", shape, DEPTHWISE)
    *where, last = rest
    transposed = where[-1] == "up"
    if where[0] in ("first", "last"):
        module = str(0 if where[0] == "first" else 3 * blocks + 2)
    else:  # three modules a block: activation, resampling convolution, residual block; the encoder's begins with it
        offset = {"encoder": {"residual": 1, "down": 3}, "decoder": {"up": 2, "residual": 3}}[part][where[1]]
        module = str(3 * int(where[0]) + offset)
    if where[-1] in ("narrow", "wide"):
        module += f".block.{1 if where[-1] == 'narrow' else 3}"
    kind = "convtr" if transposed else "conv"
    layout = SAME if last == "b" else TRANSPOSED if transposed else CONV
    return Place(f"{part}.model.{module}.{kind}.{kind}.{'bias' if last == 'b' else 'weight'}", shape, layout)


def kyutai_shapes(cfg: MimiConfig) -> dict[str, Shape]:
    """Returns names and shapes of Kyutai's tensors, in the order of ours."""
    found: dict[str, Shape] = {}
    for place in places(cfg).values():
        if place.layout is not None:
            found[place.name] = place.layout.shape(place.shape)
        for stem, entries in place.books:
            found |= {stem + FLAG: (1,), stem + USAGE: entries[:1], stem + SUM: entries}
    return found


def to_kyutai(params: Arrays, cfg: MimiConfig) -> Arrays:
    """Returns Kyutai's tensors of our parameters. Each entry of a codebook counts as used once."""
    found: Arrays = {}
    for name, place in places(cfg).items():
        if place.layout is not None:
            found[place.name] = place.layout.write(params[name])
            continue
        for (stem, entries), book in zip(place.books, params[name], strict=True):
            found |= {stem + FLAG: np.ones(1), stem + USAGE: np.ones(entries[0]), stem + SUM: book}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def from_kyutai(state_dict: StateDict, cfg: MimiConfig, where: str, advice: str, notes: list[str]) -> Arrays:
    """Returns our parameters from Kyutai's tensors.

    `where` names the configuration, `advice` says what to do if it does not fit ("": give others). Raises `InputError`
    with all tensors that are missing, left over, or of another shape or type, and for codebooks that were never set.
    """
    tensors = _renamed(state_dict, notes)
    expected: dict[str, Shape] = {}
    for key, shape in kyutai_shapes(cfg).items():
        if key not in tensors and key + DIRECTION in tensors:
            expected |= {key + NORM: (shape[0], 1, 1), key + DIRECTION: shape}
        else:
            expected[key] = shape
    _compare(expected, tensors, state_dict.path, where, advice)
    if normed := sum(key.endswith(DIRECTION) for key in expected):
        notes.append(f"weight norm of {normed} convolutions is folded into their weights")
    return _ours(cfg, lambda key: _weight(tensors, key), state_dict.path)


def from_huggingface(state_dict: StateDict, cfg: MimiConfig, where: str, advice: str) -> Arrays:
    """Returns our parameters from transformers' tensors. Arguments and errors as for `from_kyutai`."""
    tensors = state_dict.tensors
    expected: dict[str, Shape] = {}
    for key, (rows, *columns) in kyutai_shapes(cfg).items():
        names = huggingface_names(key)
        expected |= {name: (rows // len(names), *columns) for name in names}
    _compare(expected, tensors, state_dict.path, where, advice)

    def weight(key: str) -> np.ndarray:
        names = huggingface_names(key)
        parts = [_array(tensors[name]) for name in names]
        if len(names) == 1:
            return parts[0]
        heads = cfg.num_heads
        query, keys = (
            part.reshape(heads, 2, -1, part.shape[1]).swapaxes(1, 2).reshape(part.shape) for part in parts[:2]
        )
        return np.concatenate([query, keys, parts[2]])

    return _ours(cfg, weight, state_dict.path)


def is_huggingface(names: Mapping[str, object]) -> bool:
    """Returns whether these are names of transformers' Mimi."""
    return any("residual_vector_quantizer." in name or name.startswith("encoder.layers.") for name in names)


def is_mimi(names: Mapping[str, object]) -> bool:
    """Returns whether these are names of a Mimi alone, in any layout."""
    return any(name.startswith("quantizer.") for name in names)


def huggingface_names(key: str) -> list[str]:
    """Returns transformers' names of what one tensor of Kyutai's holds, end to end."""
    for pattern, replacement in HUGGINGFACE:
        key = re.sub(pattern, replacement, key)
    if key.endswith(".in_proj_weight"):
        return [key.replace("in_proj_weight", f"{letter}_proj.weight") for letter in "qkv"]
    return [key]


def _renamed(state_dict: StateDict, notes: list[str]) -> dict[str, StoredTensor]:
    """Returns the tensors under the names of Kyutai's files, without those of training."""
    found: dict[str, StoredTensor] = {}
    dropped = 0
    for key, stored in state_dict.tensors.items():
        if key.startswith(TRAINING):
            dropped += 1
            continue
        stem, _, last = key.rpartition(".")
        name = f"{stem}.{OLD[last]}" if stem.endswith("._codebook") and last in OLD else key
        for in_memory, in_file in IN_MEMORY.items():
            name = name.replace(in_memory, in_file)
        if name in found:
            older = key if name != key else found[name].name
            raise InputError(f"{state_dict.path} holds {name} twice, once as {older}: keep one of them.")
        found[name] = stored
    if dropped:
        notes.append(f"{TRAINING}* ({dropped} tensors) serves training only and is left out")
    return found


def _compare(
    expected: Mapping[str, Shape], tensors: Mapping[str, StoredTensor], path: Path, where: str, advice: str
) -> None:
    """Raises `InputError` unless `tensors` have the names and shapes expected, and one type."""
    if not expected.keys() & tensors.keys():  # naming every tensor would bury what happened
        raise InputError(
            f"{path} is no Mimi, as none of its {len(tensors)} tensors has a name of one's: give Kyutai's file"
            " (tokenizer-*-checkpoint*.safetensors) or Hugging Face's MimiModel."
        )
    if problems := misfits(expected, tensors, path):
        sized = [key in tensors and len(shape) > 1 and tensors[key].shape != shape for key, shape in expected.items()]
        if advice and sum(sized) > MANY:
            problems = {path: ["has other sizes"]}
        refuse_misfits(problems, where, advice)


def _ours(cfg: MimiConfig, weight: Callable[[str], np.ndarray], path: Path) -> Arrays:
    """Returns our parameters, from a function from Kyutai's names to tensors. Raises `InputError` with the file `path`
    for a codebook that was never set."""
    params: Arrays = {}
    for name, place in places(cfg).items():
        if place.layout is not None:
            array = place.layout.read(weight(place.name))
        else:
            array = np.empty(place.shape, np.float32)
            for book, (stem, _) in zip(array, place.books, strict=True):
                flag = weight(stem + FLAG)[0]
                if flag != 1:
                    untrained = f"has {stem}{FLAG}={flag:g} instead of 1, which is a codebook that was never trained"
                    raise InputError(f"{path} {untrained}: give a trained Mimi.")
                with np.errstate(over="ignore"):  # infinity is found as any number that is not finite
                    book[:] = weight(stem + SUM) / np.maximum(weight(stem + USAGE), EPSILON)[:, None]  # as moshi rounds
        params[name] = np.ascontiguousarray(array)
    return params


def _weight(tensors: Mapping[str, StoredTensor], key: str) -> np.ndarray:
    """Returns a tensor of Kyutai's, weight norm folded in: g v / |v|, the norm over all axes but the first."""
    if key in tensors:
        return _array(tensors[key])
    v, g = (_array(tensors[key + end]).astype(np.float64) for end in (DIRECTION, NORM))
    norm = np.sqrt(np.square(v).sum(tuple(range(1, v.ndim)), keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is found as any number that is not finite
        return (v * (g / norm)).astype(np.float32)


def _array(stored: StoredTensor) -> np.ndarray:
    """Reads a tensor as float32. Raises `InputError` if a number is NaN or infinite."""
    array = stored.array()
    if not np.isfinite(array).all():
        where = f"{stored.path}: {stored.name} holds NaN or infinite numbers"
        raise InputError(f"{where}, of which no codec can be made: give sound weights.")
    return array
