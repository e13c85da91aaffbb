"""Lists by name the features of Kyutai's models that are not supported yet, from `config.json` and from the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_jax.convert.kyutai_config import BESIDE, DEFAULTS, LORA, NO_EFFECT, REQUIRED, Shapes
from ttt_jax.errors import InputError

OFF = (None, False, 0, "", [], {})
FEATURES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "quantize": ("8-bit weights", OFF),
    "cross_attention": ("cross-attention", OFF),
    "conditioners": ("conditioners", OFF),
    "fuser": ("a fuser of conditions", OFF),
    "demux_second_stream": ("a second text stream in the same tokens", OFF),
    "demux_second_text_stream": ("a second text stream", OFF),
    "norm": ("another norm than rms_norm_f32", ("rms_norm_f32",)),
    "positional_embedding": ("other positions than rope", ("rope",)),
    "depformer_pos_emb": ("positions in the depth transformer", ("none",)),
    "gating": ("another gating than silu", ("silu",)),
    "depformer_gating": ("another gating than silu in the depth transformer", ("silu",)),
    "layer_scale": ("layer scales", (None,)),
    "depformer_layer_scale": ("layer scales in the depth transformer", (None,)),
    "norm_emb": ("norms of embeddings", OFF),
    "bias_proj": ("biases of the heads", OFF),
    "depformer_norm": ("norms in front of the depth transformer's heads", (None,)),
    "depformer_multi_linear": ("one depth input for all codebooks", (True,)),
    "depformer_weights_per_step": ("one set of depth weights for all codebooks", (True,)),
    "kv_repeat": ("shared keys and values", (1,)),
    "depformer_kv_repeat": ("shared keys and values in the depth transformer", (1,)),
    "causal": ("attention to what comes later", (True,)),
}
"""By key the feature and the supported values."""
DEPENDING = {
    "dep_q": "no depth transformer",
    "text_card_out": "another number of text tokens in the output",
    "context": "attention without a window",
    "depformer_dim_feedforward": "depth feed-forward layers of different widths",
}
"""By key features whose supported values follow from other keys."""
KNOWN = (
    DEFAULTS.keys()
    | set(REQUIRED)
    | BESIDE
    | NO_EFFECT
    | LORA
    | FEATURES.keys()
    | DEPENDING.keys()
    | {"depformer_num_layers"}
)

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
    r"^depformer\.(slices\.|\d+\.)|^audio_embs\.": "keys of Kyutai's MLX and Rust files (PyTorch files hold the same)",
}
"""Features by patterns of the keys that have them."""
SIZES = ("dim", "n_q", "card", *REQUIRED)
"""Keys most of which stand in every configuration of Kyutai's, and few in those of other models."""


def check_config(raw: Mapping[str, Any], where: str) -> None:
    """Raises `InputError` unless `raw`, read from `where`, configures a supported language model of Kyutai's."""
    missing = [key for key in SIZES if key not in raw]
    if 2 * len(missing) <= len(SIZES):
        return refuse(where, _unsupported(raw))
    if {"format", "model", "files", "digest"} <= raw.keys():
        raise InputError(f"{where} is that of weights which were converted already: use their folder as it is.")
    kind = f" but of model_type {raw['model_type']!r}" if "model_type" in raw else ""
    raise InputError(
        f"{where} describes no language model of Kyutai's{kind} (it has no {', '.join(missing)}): give the"
        " configuration of the weights by --config FILE (docs/checkpoints.md has PersonaPlex's), or another model."
    )


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
    """Describes the unsupported features of the model `raw`, each with its key and value."""
    values = {**DEFAULTS, **raw}
    values.setdefault("depformer_gating", values["gating"])
    values.setdefault("depformer_kv_repeat", 1)
    values.setdefault("depformer_layer_scale", values.get("layer_scale"))
    conditioners, fuser = raw.get("conditioners"), raw.get("fuser") or {}
    values["conditioners"] = sorted(conditioners) if isinstance(conditioners, dict) else conditioners
    if isinstance(fuser, dict):  # without conditions it has no effect
        fuser = {key: kinds for key, kinds in fuser.items() if key in ("sum", "cross", "prepend") and kinds}
    values["fuser"] = fuser
    widths = values["depformer_dim_feedforward"]
    supported = {key: values.get(key) in allowed for key, (_, allowed) in FEATURES.items()} | {
        "dep_q": values["dep_q"] != 0,
        "text_card_out": values.get("text_card_out") in (None, values["text_card"]),
        "context": raw.get("context", ...) is not None,
        "depformer_dim_feedforward": not isinstance(widths, list) or 0 < len(widths) == widths.count(widths[0]),
    }
    names = {key: feature for key, (feature, _) in FEATURES.items()} | DEPENDING
    problems = [f"{name} ({key}={values.get(key)!r})" for key, name in names.items() if not supported[key]]
    if unknown := sorted(raw.keys() - KNOWN):
        problems.append("unknown keys (" + ", ".join(unknown) + ")")
    return problems


def check_keys(shapes: Shapes, path: Path) -> None:
    """Raises `InputError` if the tensors in `path` show unsupported features; names each with one of its keys."""
    problems = []
    for pattern, feature in IN_TENSORS.items():
        if keys := [key for key in shapes if re.search(pattern, key)]:
            problems.append(f"{feature} ({keys[0]}" + (f" and {len(keys) - 1} more)" if len(keys) > 1 else ")"))
    if shapes and not any(key.startswith(("depformer", "linears.")) for key in shapes):
        problems.append('no depth transformer (no key starts with "depformer")')
    refuse(str(path), problems)


def refuse(where: str, problems: list[str]) -> None:
    """Raises `InputError` if there are `problems`: features of the model in `where` that are not supported."""
    if problems:
        raise InputError(f"{where} describes what is not supported yet: {'; '.join(problems)}; give another model.")
