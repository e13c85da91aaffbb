"""Kyutai's on-disk weights as our parameters: the test helper behind the parity fixtures."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from ttt_jax.config import DepthConfig, MoshiConfig, TTTConfig

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def load_fixture() -> tuple[MoshiConfig, dict, dict[str, np.ndarray]]:
    """Configuration, parameters and traces of the small random model that PyTorch `moshi` ran."""
    raw = json.loads((FIXTURES / "moshi.config.json").read_text())
    weights = load_file(FIXTURES / "moshi.weights.safetensors")
    cfg = config_from(raw, weights)
    return cfg, params_from(weights, cfg), load_file(FIXTURES / "moshi.trace.safetensors")


def config_from(raw: dict, weights: dict[str, np.ndarray]) -> MoshiConfig:
    """Architecture of a Kyutai config.json; hidden widths from the tensors, whose rule differs between ports."""
    return MoshiConfig(
        dim=raw["dim"],
        num_layers=raw["num_layers"],
        num_heads=raw["num_heads"],
        hidden=weights["transformer.layers.0.gating.linear_out.weight"].shape[1],
        context=raw["context"],
        max_period=raw["max_period"],
        n_q=raw["n_q"],
        dep_q=raw["dep_q"],
        card=raw["card"],
        text_card=raw["text_card"],
        delays=tuple(raw["delays"]),
        depth=DepthConfig(
            dim=raw["depformer_dim"],
            num_layers=raw["depformer_num_layers"],
            num_heads=raw["depformer_num_heads"],
            hidden=weights["depformer.layers.0.gating.0.linear_out.weight"].shape[1],
        ),
        ttt=TTTConfig(layers="none"),
    )


def params_from(w: dict[str, np.ndarray], cfg: MoshiConfig) -> dict:
    """Maps matrices fused over q, k, v and codebooks to our stacked kernels."""
    dim, heads, width, q = cfg.dim, cfg.num_heads, cfg.head_dim, cfg.dep_q
    depth, depth_width = cfg.depth, cfg.depth.dim // cfg.depth.num_heads

    def gate_up(name: str) -> np.ndarray:
        return w[name].reshape(2, -1, w[name].shape[1])

    def layer(i: int) -> dict:
        p = f"transformer.layers.{i}."
        return {
            "attention": {
                "qkv": w[p + "self_attn.in_proj_weight"].reshape(3, heads, width, dim),
                "out": w[p + "self_attn.out_proj.weight"],
            },
            "ffn": {"gate_up": gate_up(p + "gating.linear_in.weight"), "down": w[p + "gating.linear_out.weight"]},
            "norm1": w[p + "norm1.alpha"].reshape(-1),
            "norm2": w[p + "norm2.alpha"].reshape(-1),
        }

    def depth_layer(i: int) -> dict:
        p = f"depformer.layers.{i}."
        qkv = w[p + "self_attn.in_proj_weight"].reshape(q, 3, depth.num_heads, depth_width, depth.dim)
        out = w[p + "self_attn.out_proj.weight"].reshape(q, depth.dim, depth.dim)
        return {
            "qkv": qkv,
            "out": out,
            "gate_up": np.stack([gate_up(p + f"gating.{k}.linear_in.weight") for k in range(q)]),
            "down": np.stack([w[p + f"gating.{k}.linear_out.weight"] for k in range(q)]),
            "norm1": w[p + "norm1.alpha"].reshape(-1),
            "norm2": w[p + "norm2.alpha"].reshape(-1),
        }

    def stack(trees: list[dict]) -> dict:
        first = trees[0]
        return {
            key: stack([t[key] for t in trees]) if isinstance(first[key], dict) else jnp.stack([t[key] for t in trees])
            for key in first
        }

    def merged(layers: dict) -> dict:
        return {k: leaf if k.startswith("norm") else leaf.reshape(-1, *leaf.shape[2:]) for k, leaf in layers.items()}

    def each(pattern: str, n: int) -> list[np.ndarray]:
        return [w[pattern.format(k)] for k in range(n)]

    return {
        "text_emb": jnp.asarray(w["text_emb.weight"]),
        "audio_emb": jnp.stack(each("emb.{}.weight", cfg.n_q)),
        "layers": {run.name: stack([layer(i) for i in range(run.start, run.stop)]) for run in cfg.runs},
        "out_norm": jnp.asarray(w["out_norm.alpha"].reshape(-1)),
        "text_head": jnp.asarray(w["text_linear.weight"]),
        "depth": {
            "input": jnp.stack(each("depformer_in.{}.weight", q)),
            "text_emb": jnp.asarray(w["depformer_text_emb.weight"]),
            "audio_emb": jnp.stack(each("depformer_emb.{}.weight", q - 1)),
            "heads": jnp.stack(each("linears.{}.weight", q)),
            **merged(stack([depth_layer(i) for i in range(depth.num_layers)])),
        },
    }
