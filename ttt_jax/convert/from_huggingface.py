"""Renames Moshi as Hugging Face's `transformers` stores it (`MoshiForConditionalGeneration`, as kmhf/hf-moshiko) to
Kyutai's names.

The map inverts transformers' conversion script (`models/moshi/convert_moshi_transformers.py`): q and k have the rows of
each head in another order, since transformers rotates halves of a head where Kyutai rotates neighbours; q, k and v are
separate; the depth transformer's matrices are stacked by codebook. No number changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.checkpoints.safetensors_reader import SIZES, Piece, as_bytes
from ttt_jax.config import DepthConfig, LoRAConfig, MoshiConfig, TTTConfig
from ttt_jax.convert import kyutai_config, unsupported
from ttt_jax.convert.state_dict import StateDict, StoredTensor, misfits, refuse_misfits
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

CLASS = "MoshiForConditionalGeneration"
COMMON = {
    "vocab_size": 32000,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "head_dim": None,
    "rms_norm_eps": 1e-8,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
}
DEFAULTS: dict[str, Any] = COMMON | {
    **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "sliding_window": 3000},
    **{"ffn_dim": 22528, "num_codebooks": 8, "rope_theta": 10000.0, "audio_vocab_size": None, "rope_parameters": None},
    **dict.fromkeys(("rope_scaling", "quantization_config", "audio_encoder_config", "depth_decoder_config")),
}
DEPTH_DEFAULTS: dict[str, Any] = COMMON | {
    **{"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "sliding_window": 8, "ffn_dim": 5632}
}
"""Defaults of transformers' `MoshiConfig` and `MoshiDepthConfig`."""
CODES = 2048  # entries of a codebook of transformers' `MimiConfig`
CODEBOOKS = 32
MIMI = "hf://kyutai/moshiko-pytorch-bf16/tokenizer-e351c8d8-checkpoint125.safetensors"
"""Kyutai's file of the codec, which transformers stores among the weights."""
CODEC = "audio_encoder."
BUFFER = ".rotary_emb.inv_freq"


class Share(NamedTuple):
    """A tensor of theirs, or the share of it that belongs to one codebook."""

    name: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1
    heads: int = 0
    """Number of heads whose rows are reordered; 0: rows stay."""


def is_config(raw: Mapping[str, Any]) -> bool:
    """Returns whether `raw` is a config.json of transformers' Moshi. Kyutai's may have the model_type "moshi", too."""
    classes = raw.get("architectures")
    named = raw.get("model_type") == "moshi" or (isinstance(classes, list) and CLASS in classes)
    return named and "dim" not in raw and "hidden_size" in raw


def is_layout(names: Iterable[str]) -> bool:
    """Returns whether these are names of transformers' Moshi."""
    return any(name.startswith(("decoder.model.", "depth_decoder.")) for name in names)


def architecture(raw: Mapping[str, Any], where: str) -> MoshiConfig:
    """Returns the model that transformers' config.json describes, without its codec.

    Raises `InputError` with the file `where` and the key if a value is impossible or not supported.
    """

    values = {**DEFAULTS, **raw}
    get = _getter(values, where, "")
    given = get("depth_decoder_config", dict | None) or {}
    deep = _getter({**DEPTH_DEFAULTS, **given}, where, "depth_decoder_config.")
    codec = {"codebook_size": CODES, **(get("audio_encoder_config", dict | None) or {})}
    card = get("audio_vocab_size", int | None)
    rope = get("rope_parameters", dict | None) or {}
    codebooks = get("num_codebooks")
    codes = config_json.conform(int, codec["codebook_size"] if card is None else card, where, "codebook_size")
    problems = [*_unsupported(get, where, ""), *_unsupported(deep, where, "depth_decoder_config.")]
    for key, name, wanted in (
        ("num_codebooks", "num_codebooks", codebooks),
        ("vocab_size", "vocab_size", get("vocab_size")),
        ("audio_vocab_size", "audio_vocab_size" if card is not None else "audio_encoder_config.codebook_size", codes),
        ("input_size", "hidden_size", get("hidden_size")),
    ):
        if given.get(key) is not None and deep(key) != wanted:
            there = f"depth_decoder_config.{key} is {deep(key)}, but {name} is {wanted}"
            raise InputError(f"{where} contradicts itself: {there}; correct it there.")
    if (kind := rope.get("rope_type", "default")) != "default" or values["rope_scaling"] is not None:
        problems.append(f"scaled positions ({values['rope_scaling'] or kind!r})")
    share = config_json.conform(float, rope.get("partial_rotary_factor", 1.0), where, "partial_rotary_factor")
    if share != 1:
        problems.append(f"positions on a part of each head (rope_parameters.partial_rotary_factor={share})")
    if values["quantization_config"] is not None:
        problems.append("quantised weights (quantization_config)")
    if codebooks > CODEBOOKS:
        problems.append(f"more codebooks than Mimi's {CODEBOOKS} (num_codebooks={codebooks})")
    if (window := deep("sliding_window")) < codebooks:
        problems.append(f"a window in the depth transformer (depth_decoder_config.sliding_window={window})")
    unsupported.refuse(where, problems)
    with kyutai_config.describing(where):
        return MoshiConfig(
            dim=get("hidden_size"),
            num_layers=get("num_hidden_layers"),
            num_heads=get("num_attention_heads"),
            hidden=get("ffn_dim") // 2,
            context=get("sliding_window"),
            max_period=config_json.conform(float, rope.get("rope_theta", values["rope_theta"]), where, "rope_theta"),
            n_q=2 * codebooks,
            dep_q=codebooks,
            card=codes,
            text_card=get("vocab_size"),
            delays=(0, *(0, *(1,) * (codebooks - 1)) * 2),  # fixed in transformers: `build_delay_pattern_mask`
            depth=DepthConfig(
                dim=deep("hidden_size"),
                num_layers=deep("num_hidden_layers"),
                num_heads=deep("num_attention_heads"),
                hidden=deep("ffn_dim") // 2,
                schedule=(),
                low_rank=None,
            ),
            lora=LoRAConfig(),
            ttt=TTTConfig(layers="none"),
        )


def _getter(values: Mapping[str, Any], where: str, prefix: str) -> Callable[..., Any]:
    """Returns a function from a key and its type to the value. It raises `InputError` if the type is another."""
    return lambda key, kind=int: config_json.conform(kind, values[key], where, prefix + key)


def _unsupported(get: Callable[..., Any], where: str, prefix: str) -> Iterator[str]:
    """Describes unsupported settings of one of the two transformers. Raises `InputError` for impossible ones."""
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim"):
        if get(key) < 1 or (key == "ffn_dim" and get(key) % 2):
            rule = "even, as gate and values share it" if get(key) > 0 else "1 or more"
            raise InputError(f"{where}: {prefix}{key} is {get(key)}, but must be {rule}; correct it there.")
    heads = get("num_attention_heads")
    expected = COMMON | {"num_key_value_heads": heads, "head_dim": get("hidden_size") // heads}
    del expected["vocab_size"]
    for key, wanted in expected.items():
        value = get(key, type(wanted) | None)
        if value is not None and value != wanted:
            yield f"{prefix}{key}={value!r} instead of {wanted!r}"


def to_kyutai_names(state_dict: StateDict, cfg: MoshiConfig, where: str, notes: list[str]) -> StateDict:
    """Returns the tensors of `state_dict`, which must be those of the model `cfg`, under Kyutai's names.

    Leaves out the codec and buffers that transformers computes, and adds a note. Raises `InputError` with the file and
    transformers' names of tensors that are missing, left over or of another shape or type than `where` gives.
    """
    codec = [key for key in state_dict.tensors if key.startswith(CODEC)]
    buffers = [key for key in state_dict.tensors if key.endswith(BUFFER) and key not in codec]
    if codec:
        how = f"`python -m ttt_jax.convert mimi {MIMI} OUT` converts Kyutai's file of it"
        notes.append(f"{CODEC}* ({len(codec)} tensors) is Mimi, the codec, and left out: {how}")
    if buffers:
        notes.append(f"*{BUFFER} ({len(buffers)} tensors) follows from the configuration and is left out")
    used = {key: stored for key, stored in state_dict.tensors.items() if key not in {*codec, *buffers}}
    kyutai_config.check_counts(cfg, len(used), state_dict.path, where)
    sources = dict(_sources(cfg))
    expected = {share.name: share.shape for shares in sources.values() for share in shares}
    if problems := misfits(expected, used, state_dict.path):
        refuse_misfits(problems, where)
    return StateDict(state_dict.path, {name: _joined(shares, used) for name, shares in sources.items()})


def _sources(cfg: MoshiConfig) -> Iterator[tuple[str, tuple[Share, ...]]]:
    """Yields each of Kyutai's names with the tensors, end to end, that make it up."""
    d, e, q, depth = cfg.dim, cfg.depth.dim, cfg.dep_q, cfg.depth

    def whole(name: str, *shape: int, heads: int = 0) -> Share:
        return Share(name + ".weight", shape, heads=heads)

    def stacked(name: str, *shape: int) -> list[Share]:
        return [Share(name + ".weight", (q, *shape), k, q) for k in range(q)]

    yield "text_emb.weight", (whole("decoder.model.embed_tokens", cfg.text_card + 1, d),)
    for n in range(cfg.n_q):
        yield f"emb.{n}.weight", (whole(f"embed_tokens.{n}", cfg.card + 1, d),)
    for i in range(cfg.num_layers):
        ours, theirs = f"transformer.layers.{i}", f"decoder.model.layers.{i}"
        attention = f"{theirs}.self_attn"
        yield (
            f"{ours}.self_attn.in_projs.0.weight",
            (
                whole(f"{attention}.q_proj.linear", d, d, heads=cfg.num_heads),
                whole(f"{attention}.k_proj.linear", d, d, heads=cfg.num_heads),
                whole(f"{attention}.v_proj.linear", d, d),
            ),
        )
        yield f"{ours}.self_attn.out_projs.0.weight", (whole(f"{attention}.o_proj.linear", d, d),)
        yield f"{ours}.gating.linear_in.weight", (whole(f"{theirs}.mlp.fc1", 2 * cfg.hidden, d),)
        yield f"{ours}.gating.linear_out.weight", (whole(f"{theirs}.mlp.fc2", d, cfg.hidden),)
        yield f"{ours}.norm1.alpha", (whole(f"{theirs}.input_layernorm", d),)
        yield f"{ours}.norm2.alpha", (whole(f"{theirs}.post_attention_layernorm", d),)
    yield "out_norm.alpha", (whole("decoder.model.norm", d),)
    yield "text_linear.weight", (whole("decoder.lm_head", cfg.text_card, d),)

    yield "depformer_text_emb.weight", (whole("depth_decoder.text_embed_tokens", cfg.text_card + 1, e),)
    for k in range(q - 1):
        yield f"depformer_emb.{k}.weight", (whole(f"depth_decoder.embed_tokens.{k}", cfg.card + 1, e),)
    for k in range(q):
        yield f"depformer_in.{k}.weight", (stacked("depth_decoder.input_projections", e, d)[k],)
        yield f"linears.{k}.weight", (stacked("depth_decoder.lm_heads", cfg.card, e)[k],)
    for i in range(depth.num_layers):
        ours, theirs = f"depformer.layers.{i}", f"depth_decoder.layers.{i}"
        maps = {letter: stacked(f"{theirs}.self_attn.{letter}_proj.linear", e, e) for letter in "qkvo"}
        wide, narrow = stacked(f"{theirs}.mlp.fc1", 2 * depth.hidden, e), stacked(f"{theirs}.mlp.fc2", e, depth.hidden)
        for k in range(q):
            yield f"{ours}.self_attn.in_projs.{k}.weight", tuple(maps[letter][k] for letter in "qkv")
            yield f"{ours}.self_attn.out_projs.{k}.weight", (maps["o"][k],)
            yield f"{ours}.gating.{k}.linear_in.weight", (wide[k],)
            yield f"{ours}.gating.{k}.linear_out.weight", (narrow[k],)
        yield f"{ours}.norm1.alpha", (whole(f"{theirs}.input_layernorm", e),)
        yield f"{ours}.norm2.alpha", (whole(f"{theirs}.post_attention_layernorm", e),)


def _joined(parts: tuple[Share, ...], used: Mapping[str, StoredTensor]) -> StoredTensor:
    """Returns the tensor that `parts` make up, in Kyutai's shape."""
    first = used[parts[0].name]
    if len(first.shape) == 1:
        return StoredTensor(first.path, first.name, first.dtype, (1, 1, *first.shape), first.piece)
    rows, columns = parts[0].shape[-2:]
    size = SIZES[first.dtype]

    def piece() -> Piece:
        pieces = [
            _interleaved(piece, share.heads, columns * size) if share.heads else piece
            for share in parts
            for piece in [used[share.name].piece(share.part, share.parts)]
        ]

        def blocks(unit: int) -> Iterator[memoryview]:
            for piece in pieces:
                yield from piece.blocks(unit)

        return Piece(sum(piece.nbytes for piece in pieces), blocks)

    return StoredTensor(first.path, first.name, first.dtype, (len(parts) * rows, columns), piece)


def _interleaved(piece: Piece, heads: int, row: int) -> Piece:
    """Reorders the rows (of `row` bytes) of each head from halves of the rotating pairs to pair by pair."""
    head = piece.nbytes // heads

    def blocks(unit: int) -> Iterator[memoryview]:
        for view in piece.blocks(math.lcm(unit, head)):
            halves = np.frombuffer(view, np.uint8).reshape(-1, 2, head // row // 2, row)
            yield as_bytes(np.ascontiguousarray(halves.swapaxes(1, 2)))

    return Piece(piece.nbytes, blocks)
