"""What of Kyutai's models is not supported yet, told by name from `config.json` and from the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ttt_jax.convert.kyutai_config import BESIDE, DEFAULTS, LORA, NO_EFFECT, REQUIRED, Shapes
from ttt_jax.errors import InputError

REFUSED = {
    "quantize",
    "cross_attention",
    "conditioners",
    "fuser",
    "demux_second_stream",
    "demux_second_text_stream",
    "norm_emb",
    "bias_proj",
    "layer_scale",
    "depformer_layer_scale",
    "depformer_gating",
    "depformer_norm",
    "depformer_kv_repeat",
    "depformer_num_layers",
    "depformer_multi_linear",
    "depformer_weights_per_step",
    "text_card_out",
}
"""Further keys that are known: `unsupported` looks at their values."""
KNOWN = DEFAULTS.keys() | set(REQUIRED) | BESIDE | NO_EFFECT | LORA | REFUSED

IN_TENSORS = {
    r"weight_scb$": "8-bit weights",
    r"\.cross_attention\.|\.norm_cross\.": "cross-attention",
    r"^(condition_provider|fuser)\.": "conditioners",
    r"\.out[12]\.weight$": "a second text stream in the same tokens (demux)",
    r"^depformer_norms\.": "depformer_norm",
    r"layer_scale": "layer_scale",
    r"\.linear[12]\.weight$": "feed-forward layers without gating",
    r"norm[12]?\.(weight|bias)$": "another norm than rms_norm_f32",
    r"^(text_linear|linears\.\d+)\.bias$": "bias_proj",
    r"emb(\.\d+)?\.norm\.": "norm_emb",
    r"^depformer\.(slices\.|\d+\.)|^audio_embs\.": "the key layout of Kyutai's MLX and Rust files (the PyTorch files hold the same)",
}
"""What keys give away of a model, as patterns."""


SIZES = ("dim", "n_q", "card", *REQUIRED)
"""Keys of which a configuration of Kyutai's has most; those of other models have none or a common word among them."""


def check_is_moshi(raw: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` if `raw`, read from `where`, is the configuration of something else than Kyutai's language models."""
    missing = [key for key in SIZES if key not in raw]
    if 2 * len(missing) <= len(SIZES):
        return
    if {"format", "model", "files", "digest"} <= raw.keys():
        raise InputError(f"{where} is that of weights which were converted already: use their folder as it is.")
    kind = f" but of model_type {raw['model_type']!r}" if "model_type" in raw else ""
    raise InputError(
        f"{where} describes no language model of Kyutai's{kind} (it has no {', '.join(missing)}): if the weights are Kyutai's"
        " (docs/checkpoints.md tells of PersonaPlex's), give their configuration by --config FILE; else give another model."
    )


def unsupported(raw: Mapping[str, Any]) -> list[str]:
    """What the model described by `raw` has that we do not, each with its key and value."""
    values = {**DEFAULTS, **raw}
    gating, scale = values["gating"], values.get("layer_scale")
    feed_forward = values["depformer_dim_feedforward"]
    fuser = raw.get("fuser") or {}
    if isinstance(fuser, dict):  # one of nothing does nothing
        fuser = {key: kinds for key, kinds in fuser.items() if key in ("sum", "cross", "prepend") and kinds}
    found = {
        "8-bit weights": ("quantize", values.get("quantize"), bool),
        "cross-attention": ("cross_attention", values.get("cross_attention"), bool),
        "conditioners": ("conditioners", _names(raw.get("conditioners")), bool),
        "a fuser of conditions": ("fuser", fuser, bool),
        "no depth transformer": ("dep_q", values["dep_q"], lambda q: q == 0),
        "a second text stream in the same tokens": ("demux_second_stream", values.get("demux_second_stream"), bool),
        "a second text stream": ("demux_second_text_stream", values.get("demux_second_text_stream"), bool),
        "another norm than rms_norm_f32": ("norm", values["norm"], lambda name: name != "rms_norm_f32"),
        "other positions than rope": ("positional_embedding", values["positional_embedding"], lambda n: n != "rope"),
        "positions in the depth transformer": ("depformer_pos_emb", values["depformer_pos_emb"], lambda n: n != "none"),
        "another gating than silu": ("gating", gating, lambda name: name != "silu"),
        "another gating than silu in the depth transformer": (
            "depformer_gating",
            values.get("depformer_gating", gating),
            lambda name: name != "silu",
        ),
        "layer scales": ("layer_scale", scale, _is_given),
        "layer scales in the depth transformer": (
            "depformer_layer_scale",
            values.get("depformer_layer_scale", scale),
            _is_given,
        ),
        "norms of embeddings": ("norm_emb", values.get("norm_emb"), bool),
        "biases of the heads": ("bias_proj", values.get("bias_proj"), bool),
        "norms in front of the depth transformer's heads": ("depformer_norm", values.get("depformer_norm"), _is_given),
        "one depth input for all codebooks": (
            "depformer_multi_linear",
            values.get("depformer_multi_linear"),
            _is_false,
        ),
        "one set of depth weights for all codebooks": (
            "depformer_weights_per_step",
            values.get("depformer_weights_per_step"),
            _is_false,
        ),
        "another number of text tokens in the output": (
            "text_card_out",
            values.get("text_card_out"),
            lambda card: card not in (None, values["text_card"]),
        ),
        "shared keys and values": ("kv_repeat", values["kv_repeat"], lambda n: n != 1),
        "shared keys and values in the depth transformer": (
            "depformer_kv_repeat",
            values.get("depformer_kv_repeat", 1),
            lambda n: n != 1,
        ),
        "attention to what comes later": ("causal", values["causal"], _is_false),
        "attention without a window": ("context", values.get("context", 1), lambda frames: frames is None),
        "depth feed-forward layers of different widths": (
            "depformer_dim_feedforward",
            feed_forward,
            lambda widths: isinstance(widths, list) and (not widths or any(width != widths[0] for width in widths)),
        ),
    }
    told = [f"{what} ({key}={value!r})" for what, (key, value, is_bad) in found.items() if is_bad(value)]
    if unknown := sorted(raw.keys() - KNOWN):
        told.append("unknown keys (" + ", ".join(unknown) + ")")
    return told


def unsupported_keys(shapes: Shapes) -> list[str]:
    """What the tensors give away of a model that we do not have, each with one of its keys."""
    told = []
    for pattern, what in IN_TENSORS.items():
        if keys := [key for key in shapes if re.search(pattern, key)]:
            told.append(f"{what} ({keys[0]}" + (f" and {len(keys) - 1} more)" if len(keys) > 1 else ")"))
    if shapes and not any(key.startswith(("depformer", "linears.")) for key in shapes):
        told.append('no depth transformer (no key starts with "depformer")')
    return told


def _is_given(value: Any) -> bool:
    return value is not None


def _is_false(value: Any) -> bool:
    return not value


def _names(value: object) -> object:
    return sorted(value) if isinstance(value, dict) else value
