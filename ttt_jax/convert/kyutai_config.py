"""Translates Kyutai's `config.json` to our configuration and back.

Keys and defaults are those of PyPI `moshi` 0.2.13. Unknown keys are refused, also those that its `LMModel` would
accept.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ttt_jax.config import DepthConfig, LoRAConfig, MoshiConfig, TTTConfig
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

Shapes = Mapping[str, tuple[int, ...]]

DEFAULTS: dict[str, Any] = {
    "dim": 128,
    "n_q": 8,
    "dep_q": 8,
    "card": 1024,
    "text_card": 32000,
    "max_period": 10000,
    "extra_heads_num_heads": 0,
    "extra_heads_dim": 6,
    "hidden_scale": 4,
    "depformer_dim": 256,
    "depformer_dim_feedforward": None,
    "depformer_weights_per_step_schedule": None,
    "depformer_low_rank_embeddings": None,
    "norm": "layer_norm",
    "gating": "none",
    "positional_embedding": "sin",
    "depformer_pos_emb": "sin",
    "causal": True,
    "kv_repeat": 1,
}
"""Defaults of `LMModel` that are not None or false."""

REQUIRED = ("num_layers", "num_heads", "context", "depformer_num_heads", "delays")
FILES = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name")
BESIDE = {*FILES, "model_type", "lm_gen_config", "tts_config", "stt_config", "model_id"}
"""Keys about more than the language model; they travel along."""
NO_EFFECT = {"existing_text_padding_id", "existing_text_end_padding_id", "gradient_checkpointing"}
NO_EFFECT |= {"depformer_context", "depformer_causal", "depformer_max_period"}
"""Keys without effect on weights and scores; they travel along."""
LORA = {"lora", "lora_rank", "lora_scaling"}


def architecture(raw: Mapping[str, Any], shapes: Shapes, dtype: str, where: str) -> MoshiConfig:
    """Returns the model that `raw` describes, without adapters and TTT layers.

    The tensors' shapes give the hidden widths, as Kyutai's PyTorch, MLX and Rust have different rules for them. `dtype`
    is that of the tensors: "BF16", "F16" or "F32"; `where` names the file in messages.

    Raises `InputError` with the key if one is missing or its value is impossible.
    """
    if missing := [key for key in REQUIRED if key not in raw]:
        raise InputError(f"{where} has no {', '.join(missing)}: give the config.json that belongs to these weights.")
    values = {**DEFAULTS, **raw}

    def get(key: str, kind: Any = int) -> Any:
        return config_json.conform(kind, values[key], where, key)

    values.setdefault("depformer_num_layers", values["num_layers"])
    schedule = get("depformer_weights_per_step_schedule", tuple[int, ...] | None) or ()
    several = isinstance(values["depformer_dim_feedforward"], list)
    wide = get("depformer_dim_feedforward", tuple[int, ...] if several else int | None)
    scale = get("hidden_scale", float)
    for key, number in (("hidden_scale", scale), ("depformer_dim_feedforward", wide[0] if several else wide)):
        if number is not None and not 0 < number < math.inf:
            raise InputError(f"{where}: {key} is {values[key]!r}, but must be a number above 0; correct it there.")
    for key in ("causal", "depformer_multi_linear", "depformer_weights_per_step"):
        get(key, bool)
    names = ("dim", "num_layers", "num_heads", "context", "n_q", "dep_q", "card", "text_card")
    sizes, depth_dim = {key: get(key) for key in names}, get("depformer_dim")
    hidden, depth_hidden = _hidden_widths(values)
    with describing(where):
        return MoshiConfig(
            **sizes,
            hidden=_width(shapes, r"transformer\.layers\.\d+\.gating\.linear_out\.weight") or hidden,
            max_period=get("max_period", float),
            delays=get("delays", tuple[int, ...]),
            dtype="bfloat16" if dtype == "BF16" else "float32",
            extra_heads=get("extra_heads_num_heads"),
            extra_heads_dim=get("extra_heads_dim"),
            depth=DepthConfig(
                dim=depth_dim,
                num_layers=get("depformer_num_layers"),
                num_heads=get("depformer_num_heads"),
                hidden=_width(shapes, r"depformer\.layers\.\d+\.gating\.\d+\.linear_out\.weight") or depth_hidden,
                schedule=schedule,
                low_rank=get("depformer_low_rank_embeddings", int | None),
            ),
            lora=LoRAConfig(),
            ttt=TTTConfig(layers="none"),
        )


@contextlib.contextmanager
def describing(where: str) -> Iterator[None]:
    """Raises an `InputError` of a model's configuration with the file `where` that describes it."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(where):
            raise
        raise InputError(f"{where} describes no model that can be: {error}") from None


def check_counts(cfg: MoshiConfig, tensors: int, path: object, where: str) -> None:
    """Raises `InputError` if `cfg`, from `where`, has more layers or heads than `path` has tensors."""
    counts = {"layers": cfg.num_layers, "extra heads": cfg.extra_heads}
    counts["layers in the depth transformer"] = cfg.depth.num_layers
    for name, count in counts.items():
        if count > tensors:
            few = f"which has {count} {name}, as it holds only {tensors} tensors in all"
            raise InputError(f"{path} does not fit {where}, {few}: give weights and a config.json that fit.")


def hidden_widths(raw: Mapping[str, Any], cfg: MoshiConfig) -> dict[str, tuple[int, int]]:
    """Returns by key the hidden width that PyPI `moshi` would take, and that of `cfg`."""
    temporal, depth = _hidden_widths({**DEFAULTS, **raw})
    return {"hidden_scale": (temporal, cfg.hidden), "depformer_dim_feedforward": (depth, cfg.depth.hidden)}


def export(cfg: MoshiConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Kyutai's configuration of `cfg`, with the other keys of `raw`, the configuration of its source or {}.
    Raises `InputError` for settings that theirs cannot express."""
    if cfg.layer_context:
        other = f"model.layer_context={cfg.layer_context} gives some layers other windows"
        raise InputError(f"{other}, which Kyutai's layout cannot express: export a model with one window.")
    if cfg.attention_sink:
        other = f"model.attention_sink={cfg.attention_sink} keeps the first frames in view"
        raise InputError(f"{other}, which Kyutai's layout cannot express: export a model without a sink.")
    kept = {key: value for key, value in raw.items() if key in BESIDE | NO_EFFECT}
    depth = cfg.depth
    scale, wide = raw.get("hidden_scale", 4.125), raw.get("depformer_dim_feedforward")
    if hidden_width(cfg.dim, int(scale * cfg.dim)) != cfg.hidden:
        temporal = _feed_forward(cfg.dim, cfg.hidden, "hidden")
        scale = temporal / cfg.dim
        if int(scale * cfg.dim) != temporal:  # rounded down below it
            scale = (temporal + 0.5) / cfg.dim
    if not isinstance(wide, int) or hidden_width(depth.dim, wide) != depth.hidden:
        wide = _feed_forward(depth.dim, depth.hidden, "depth.hidden")
    period = int(cfg.max_period) if cfg.max_period == int(cfg.max_period) else cfg.max_period
    config = {
        "dim": cfg.dim,
        "num_layers": cfg.num_layers,
        "num_heads": cfg.num_heads,
        "hidden_scale": scale,
        "context": cfg.context,
        "max_period": period,
        "n_q": cfg.n_q,
        "dep_q": cfg.dep_q,
        "card": cfg.card,
        "text_card": cfg.text_card,
        "delays": list(cfg.delays),
        "causal": True,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "layer_scale": None,
        "existing_text_padding_id": 3,
        "depformer_dim": depth.dim,
        "depformer_dim_feedforward": wide,
        "depformer_num_layers": depth.num_layers,
        "depformer_num_heads": depth.num_heads,
        "depformer_layer_scale": None,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_multi_linear": True,
        "depformer_weights_per_step": True,
        "depformer_context": cfg.dep_q,
        "depformer_max_period": 10000,
    }
    if depth.schedule:
        config["depformer_weights_per_step_schedule"] = list(depth.schedule)
    if depth.low_rank is not None:
        config["depformer_low_rank_embeddings"] = depth.low_rank
    if cfg.extra_heads:
        config |= {"extra_heads_num_heads": cfg.extra_heads, "extra_heads_dim": cfg.extra_heads_dim}
    if cfg.lora.rank:
        config |= {"lora": True, "lora_rank": cfg.lora.rank, "lora_scaling": cfg.lora.scaling}
    return config | kept


def hidden_width(dim: int, feed_forward: int) -> int:
    """Returns the hidden width that PyPI `moshi` gives a SwiGLU layer of nominal width `feed_forward`."""
    return 21 * dim // 8 if feed_forward == 4 * dim else 2 * feed_forward // 3


def _feed_forward(dim: int, hidden: int, name: str) -> int:
    """Returns a nominal width for which `hidden_width` gives `hidden`. Raises `InputError` if there is none."""
    for width in (4 * dim, (3 * hidden + 1) // 2, (3 * hidden + 1) // 2 + 1):
        if hidden_width(dim, width) == hidden:
            return width
    value = f"model.{name}={hidden} at width {dim}"
    raise InputError(f"{value} is no hidden width of Kyutai's layout: export a model of another hidden width.")


def _hidden_widths(values: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the hidden widths of both transformers by the rules of PyPI `moshi`."""
    scale, width, deep = values["hidden_scale"], values["dim"], values["depformer_dim"]
    nominal = values["depformer_dim_feedforward"]
    nominal = nominal[0] if isinstance(nominal, list) else int(scale * deep) if nominal is None else nominal
    return hidden_width(width, int(scale * width)), hidden_width(deep, nominal)


def _width(shapes: Shapes, pattern: str) -> int | None:
    """Returns the input width of most matrices that match `pattern`; None if there are none."""
    widths = Counter(shape[1] for key, shape in shapes.items() if re.fullmatch(pattern, key) and len(shape) == 2)
    return widths.most_common(1)[0][0] if widths else None
