"""Translates Kyutai's configuration of a Mimi (mimi_config.json) and Hugging Face's (config.json) to ours.

Keys and defaults are those of PyPI `moshi` 0.2.13 (`get_mimi` and the classes that it makes) and of transformers 5.24.0
(`MimiConfig`). Of Kyutai's keys unknown ones are refused, as the loader does; Hugging Face's have many without effect.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_jax.codec.mimi.config import MimiConfig
from ttt_jax.convert import unsupported
from ttt_jax.convert.kyutai_config import describing
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

NAME = "mimi_config.json"
"""Name of a new file with Kyutai's configuration."""

LARGEST = 2**31 - 1  # size
REQUIRED = object()
DEFAULTS: dict[str, dict[str, Any]] = {
    "seanet": {
        **{"channels": 1, "dimension": 128, "n_filters": 32, "n_residual_layers": 3, "ratios": [8, 5, 4, 2]},
        **{"activation": "ELU", "activation_params": {"alpha": 1.0}, "norm": "none", "norm_params": {}},
        **{"kernel_size": 7, "last_kernel_size": 7, "residual_kernel_size": 3, "dilation_base": 2, "causal": False},
        **{"pad_mode": "reflect", "true_skip": True, "compress": 2, "disable_norm_outer_blocks": 0},
    },
    "quantizer": {
        **{"dimension": 128, "input_dimension": None, "output_dimension": None, "n_q": 8, "n_q_semantic": 1},
        **{"bins": 1024, "q_dropout": False, "no_quantization_rate": 0.0, "decay": 0.99},
        **{"threshold_usage_ratio": 0.1, "replaced_usage_ratio": 1.0},
    },
    "transformer": {
        **dict.fromkeys(("d_model", "num_heads", "num_layers", "input_dimension", "output_dimensions"), REQUIRED),
        **{"dim_feedforward": 2048, "causal": False, "context": None, "positional_embedding": "sin"},
        **{"max_period": 10000, "positional_scale": 1.0, "betas": None, "quantize": False, "checkpointing": False},
        **{"norm": "layer_norm", "layer_scale": None, "gating": "none", "kv_repeat": 1, "weights_per_step": 0},
        **{"weights_per_step_schedule": None, "skip_self_attn": False, "cross_attention": False},
        **{"conv_layout": False},
    },
}
"""Defaults of the classes of PyPI `moshi`, by section."""
TOP = ("sample_rate", "channels", "frame_rate", *DEFAULTS)
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "channels": (1,),
    "seanet.channels": (1,),
    "seanet.n_residual_layers": (1,),
    "seanet.activation": ("ELU",),
    "seanet.activation_params": ({"alpha": 1.0},),
    "seanet.norm": ("none", "weight_norm"),
    "seanet.causal": (True,),
    "seanet.pad_mode": ("constant",),
    "seanet.true_skip": (True,),
    "quantizer.n_q_semantic": (1,),
    "transformer.causal": (True,),
    "transformer.positional_embedding": ("rope",),
    "transformer.quantize": (False,),
    "transformer.norm": ("layer_norm",),
    "transformer.gating": ("none",),
    "transformer.kv_repeat": (1,),
    "transformer.weights_per_step": (0, None),
    "transformer.weights_per_step_schedule": (None,),
    "transformer.skip_self_attn": (False,),
    "transformer.cross_attention": (False,),
    "transformer.conv_layout": (True,),
}
"""Values that the architecture has, of keys with others."""

HUGGINGFACE: dict[str, Any] = {
    **{"sampling_rate": 24000, "audio_channels": 1, "hidden_size": 512, "num_filters": 64, "num_residual_layers": 1},
    **{"upsampling_ratios": None, "kernel_size": 7, "last_kernel_size": 3, "residual_kernel_size": 3, "compress": 2},
    **{"use_causal_conv": True, "pad_mode": "constant", "trim_right_ratio": 1.0, "use_conv_shortcut": False},
    **{"codebook_size": 2048, "codebook_dim": 256, "num_quantizers": 32, "num_semantic_quantizers": 1},
    **{"vector_quantization_hidden_dimension": 256, "upsample_groups": 512, "num_hidden_layers": 8},
    **{"intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": None},
    **{"hidden_act": "gelu", "norm_eps": 1e-5, "sliding_window": 250, "attention_bias": False, "frame_rate": None},
    **{"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None, "quantization_config": None},
    "encoder_config": {},
    "decoder_config": {},
}
"""Defaults of transformers' `MimiConfig`, of this and former versions."""


def is_huggingface(raw: Mapping[str, Any]) -> bool:
    """Returns whether `raw` is a config.json of transformers' Mimi."""
    return raw.get("model_type") == "mimi" and "seanet" not in raw


def read(path: Path) -> dict[str, Any]:
    """Returns the configuration in a file of either layout. Raises `InputError` if it holds no object."""
    raw = config_json.read_json(path, "the configuration of a Mimi")
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no object: give the configuration that belongs to the Mimi.")
    return raw


def from_kyutai(raw: Mapping[str, Any], where: str) -> MimiConfig:
    """Returns the Mimi that Kyutai's configuration `raw`, from the file `where`, describes.

    Raises `InputError` with the key if one is missing, unknown, impossible or not supported.
    """
    values: dict[str, Any] = {key: raw[key] for key in TOP if key in raw and key not in DEFAULTS}
    unknown = [key for key in raw if key not in TOP]
    for section, defaults in DEFAULTS.items():
        given = config_json.conform(dict, raw.get(section, {}), where, section)
        values |= {f"{section}.{key}": value for key, value in {**defaults, **given}.items()}
        unknown += [f"{section}.{key}" for key in given if key not in defaults]
    missing = [key for key in TOP if key not in raw] or [key for key, value in values.items() if value is REQUIRED]
    if missing:
        raise InputError(f"{where} has no {', '.join(missing)}: give the {NAME} that belongs to these weights.")

    def get(key: str, kind: Any = int) -> Any:
        return config_json.conform(kind, values[key], where, key)

    dim, heads = get("seanet.dimension"), get("transformer.num_heads")
    problems = [
        f"{key}={values[key]!r} instead of {' or '.join(map(repr, allowed))}"
        for key, allowed in SUPPORTED.items()
        if values[key] not in allowed
    ]
    if get("transformer.layer_scale", float | None) is None:
        problems.append("transformer.layer_scale=None instead of a number")
    for key, wanted in (
        ("quantizer.input_dimension", dim),
        ("quantizer.output_dimension", dim),
        ("transformer.d_model", dim),
        ("transformer.input_dimension", dim),
        ("transformer.output_dimensions", [dim]),
    ):
        if values[key] != wanted:
            problems.append(f"{key}={values[key]!r} instead of {wanted!r}, which is seanet.dimension")
    if unknown:
        problems.append(f"unknown keys ({', '.join(unknown)})")
    unsupported.refuse(where, problems)
    with describing(where):
        return _config(
            where,
            get("frame_rate", float),
            sample_rate=get("sample_rate"),
            filters=get("seanet.n_filters"),
            ratios=get("seanet.ratios", tuple[int, ...])[::-1],
            kernel=get("seanet.kernel_size"),
            residual_kernel=get("seanet.residual_kernel_size"),
            last_kernel=get("seanet.last_kernel_size"),
            compress=get("seanet.compress"),
            dim=dim,
            num_layers=get("transformer.num_layers"),
            num_heads=heads,
            hidden=get("transformer.dim_feedforward"),
            context=get("transformer.context"),
            max_period=get("transformer.max_period", float),
            quantizer_dim=get("quantizer.dimension"),
            codebooks=get("quantizer.n_q"),
            cardinality=get("quantizer.bins"),
        )


def to_kyutai(cfg: MimiConfig) -> dict[str, Any]:
    """Returns Kyutai's configuration of a Mimi."""
    period = int(cfg.max_period) if cfg.max_period == int(cfg.max_period) else cfg.max_period
    return {
        "sample_rate": cfg.sample_rate,
        "channels": 1,
        "frame_rate": cfg.frame_rate,
        "seanet": {
            "channels": 1,
            "dimension": cfg.dim,
            "causal": True,
            "n_filters": cfg.filters,
            "n_residual_layers": 1,
            "activation": "ELU",
            "compress": cfg.compress,
            "kernel_size": cfg.kernel,
            "residual_kernel_size": cfg.residual_kernel,
            "last_kernel_size": cfg.last_kernel,
            "norm": "none",
            "pad_mode": "constant",
            "ratios": list(cfg.ratios[::-1]),
            "true_skip": True,
        },
        "quantizer": {
            "dimension": cfg.quantizer_dim,
            "n_q": cfg.codebooks,
            "bins": cfg.cardinality,
            "input_dimension": cfg.dim,
            "output_dimension": cfg.dim,
        },
        "transformer": {
            "d_model": cfg.dim,
            "num_heads": cfg.num_heads,
            "num_layers": cfg.num_layers,
            "causal": True,
            "layer_scale": 0.01,
            "context": cfg.context,
            "conv_layout": True,
            "max_period": period,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "dim_feedforward": cfg.hidden,
            "input_dimension": cfg.dim,
            "output_dimensions": [cfg.dim],
        },
    }


def from_huggingface(raw: Mapping[str, Any], where: str) -> MimiConfig:
    """Returns the Mimi that transformers' config.json `raw`, from the file `where`, describes. Raises `InputError` as
    `from_kyutai`, but for unknown keys."""
    values = {**HUGGINGFACE, **raw}

    def get(key: str, kind: Any = int) -> Any:
        return config_json.conform(kind, values[key], where, key)

    dim, heads, inner = get("hidden_size"), get("num_attention_heads"), get("vector_quantization_hidden_dimension")
    if heads < 1 or dim < 1:
        raise InputError(f"{where}: hidden_size={dim} and num_attention_heads={heads} must be 1 or more; correct them.")
    rope = get("rope_parameters", dict | None) or {}
    fixed = {
        **{"audio_channels": 1, "num_residual_layers": 1, "use_causal_conv": True, "pad_mode": "constant"},
        **{"trim_right_ratio": 1.0, "use_conv_shortcut": False, "num_semantic_quantizers": 1, "hidden_act": "gelu"},
        **{"norm_eps": 1e-5, "attention_bias": False, "num_key_value_heads": heads, "upsample_groups": dim},
        **{"rope_scaling": None, "quantization_config": None},
    }
    free = {"codebook_dim": inner, "head_dim": dim // heads}  # None: the default, which for codebook_dim is the width
    problems = [f"{key}={values[key]!r} instead of {one!r}" for key, one in fixed.items() if values[key] != one]
    for key, one in free.items():
        if values[key] != one and (values[key] is not None or key == "codebook_dim"):
            problems.append(f"{key}={values[key]!r} instead of {one!r}")
    if inner == dim:
        problems.append(f"no projections of the quantizer (vector_quantization_hidden_dimension={dim} is hidden_size)")
    problems += [f"no half of it ({key}=null)" for key in ("encoder_config", "decoder_config") if values[key] is None]
    if (kind := rope.get("rope_type", "default")) != "default":
        problems.append(f"scaled positions (rope_parameters.rope_type={kind!r})")
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append(f"positions on a part of each head (rope_parameters.partial_rotary_factor={share!r})")
    unsupported.refuse(where, problems)
    ratios = get("upsampling_ratios", tuple[int, ...] | None) or (8, 6, 5, 4)
    rate = config_json.conform(float | None, values.get("_frame_rate") or values["frame_rate"], where, "frame_rate")
    with describing(where):
        return _config(
            where,
            rate,
            sample_rate=get("sampling_rate"),
            filters=get("num_filters"),
            ratios=ratios[::-1],
            kernel=get("kernel_size"),
            residual_kernel=get("residual_kernel_size"),
            last_kernel=get("last_kernel_size"),
            compress=get("compress"),
            dim=dim,
            num_layers=get("num_hidden_layers"),
            num_heads=heads,
            hidden=get("intermediate_size"),
            context=get("sliding_window"),
            max_period=config_json.conform(float, rope.get("rope_theta", values["rope_theta"]), where, "rope_theta"),
            quantizer_dim=inner,
            codebooks=get("num_quantizers"),
            cardinality=get("codebook_size"),
        )


def _config(where: str, frame_rate: float | None, **sizes: Any) -> MimiConfig:
    """Returns a Mimi of these sizes and frame rate; None: half that of the latents. Raises `InputError` if latents are
    no whole number a frame, 2 or more."""
    if large := [key for key, value in sizes.items() if isinstance(value, int) and value > LARGEST]:
        raise InputError(f"{where}: {', '.join(large)} must be {LARGEST} or less; correct it there.")
    rate = (cfg := MimiConfig(**sizes)).sample_rate / cfg.hop
    if frame_rate is None:
        return dataclasses.replace(cfg, stride=2)
    stride = round(rate / frame_rate) if 0.01 < frame_rate < math.inf else 0
    if stride < 2 or rate != stride * frame_rate:
        raise InputError(
            f"{where}: frame_rate is {frame_rate:g}, but must divide the {rate:g} latents a second that sample rate and"
            " ratios give by 2 or more; correct it there."
        )
    return dataclasses.replace(cfg, stride=stride)
