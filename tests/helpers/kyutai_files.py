"""Small random checkpoints in Kyutai's layouts, made from the rules of PyPI `moshi`'s `LMModel`, apart from
`ttt_jax.convert`."""

from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

SEVEN_B = {
    **{"dim": 4096, "num_layers": 32, "hidden_scale": 4.125, "n_q": 16, "dep_q": 8, "card": 2048, "text_card": 32000},
    **{"depformer_dim": 1024, "depformer_dim_feedforward": 4224, "depformer_num_layers": 6},
}
"""Sizes of Kyutai's 7B."""
CONFIG = {
    **{"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_scale": 4.125, "context": 8, "max_period": 10000},
    **{"n_q": 4, "dep_q": 2, "card": 6, "text_card": 9, "delays": [0, 0, 1, 0, 1], "existing_text_padding_id": 3},
    **{"causal": True, "layer_scale": None, "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope"},
    **{"depformer_dim": 8, "depformer_dim_feedforward": 33, "depformer_num_heads": 2, "depformer_num_layers": 2},
    **{"depformer_layer_scale": None, "depformer_gating": "silu", "depformer_pos_emb": "none", "depformer_context": 2},
    **{"depformer_multi_linear": True, "depformer_weights_per_step": True},
}
VARIANTS = {
    "plain": {},
    "every codebook predicted": {"dep_q": 4},
    "one codebook predicted": {"dep_q": 1},
    "schedule": {"dep_q": 4, "depformer_weights_per_step_schedule": [0, 1, 2, 2]},
    "low rank": {"dep_q": 3, "depformer_low_rank_embeddings": 5},
    "low rank, one codebook": {"dep_q": 1, "depformer_low_rank_embeddings": 5},
    "extra heads": {"extra_heads_num_heads": 3, "extra_heads_dim": 4},
    "all": {
        "dep_q": 4,
        "depformer_weights_per_step_schedule": [0, 1, 1, 1],
        "depformer_low_rank_embeddings": 5,
        "extra_heads_num_heads": 2,
    },
}
"""What configurations may have, each over `CONFIG`."""
TYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


def linears(c: dict) -> dict[str, tuple[int, int]]:
    """Modules that are linear maps, un-fused, with their shapes [out, in]."""
    d, e, q = c["dim"], c["depformer_dim"], c["dep_q"]
    sets = max(c.get("depformer_weights_per_step_schedule") or range(q)) + 1
    low = c.get("depformer_low_rank_embeddings")
    hidden, depth_hidden = 2 * int(c["hidden_scale"] * d) // 3, 2 * c["depformer_dim_feedforward"] // 3
    found = {"text_linear": (c["text_card"], d)}
    for i in range(c["num_layers"]):
        p = f"transformer.layers.{i}."
        found |= {p + "self_attn.in_projs.0": (3 * d, d), p + "self_attn.out_projs.0": (d, d)}
        found |= {p + "gating.linear_in": (2 * hidden, d), p + "gating.linear_out": (d, hidden)}
    for k in range(sets):
        found[f"depformer_in.{k}"] = (e, d)
        for i in range(c["depformer_num_layers"]):
            p = f"depformer.layers.{i}."
            found |= {p + f"self_attn.in_projs.{k}": (3 * e, e), p + f"self_attn.out_projs.{k}": (e, e)}
            found |= {
                p + f"gating.{k}.linear_in": (2 * depth_hidden, e),
                p + f"gating.{k}.linear_out": (e, depth_hidden),
            }
    found |= {f"linears.{k}": (c["card"], e) for k in range(q)}
    found |= {f"extra_heads.{k}": (c.get("extra_heads_dim", 6), d) for k in range(c.get("extra_heads_num_heads", 0))}
    if low:
        found |= {f"depformer_emb.{k}.low_rank": (e, low) for k in range(q - 1)}
        found["depformer_text_emb.low_rank"] = (e, low)
    return found


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Tensors of the model that `c` describes, in the layout of memory (un-fused)."""
    d, e, low = c["dim"], c["depformer_dim"], c.get("depformer_low_rank_embeddings")
    found = {"text_emb.weight": (c["text_card"] + 1, d), "out_norm.alpha": (1, 1, d)}
    found |= {f"emb.{k}.weight": (c["card"] + 1, d) for k in range(c["n_q"])}
    found |= {f"depformer_emb.{k}.weight": (c["card"] + 1, low or e) for k in range(c["dep_q"] - 1)}
    found["depformer_text_emb.weight"] = (c["text_card"] + 1, low or e)
    for name, width, layers in (("transformer", d, c["num_layers"]), ("depformer", e, c["depformer_num_layers"])):
        for i in range(layers):
            found |= {f"{name}.layers.{i}.norm{n}.alpha": (1, 1, width) for n in (1, 2)}
    return found | {f"{module}.weight": shape for module, shape in linears(c).items()}


def weights(c: dict, kind: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of the model that `c` describes, un-fused."""
    return random(shapes(c), kind, seed)


def lora(c: dict, rank: int, kind: str = "F32", seed: int = 1) -> dict[str, np.ndarray]:
    """Random adapters of every linear map of the model, named as moshi-finetune names them."""
    shapes = {}
    for module, (rows, columns) in linears(c).items():
        shapes |= {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (rows, rank)}
    return random(shapes, kind, seed)


def random(shapes: dict, kind: str, seed: int) -> dict[str, np.ndarray]:
    """Normal numbers in these shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(TYPES[kind]) for name, shape in shapes.items()}


def fuse(unfused: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The layout that Kyutai releases: attention's maps end to end in one tensor."""
    fused, found = {}, dict(unfused)
    for name in unfused:
        if name.endswith("_projs.0.weight"):
            stem = name.removesuffix("s.0.weight")
            parts = [found.pop(f"{stem}s.{k}.weight") for k in range(sum(n.startswith(f"{stem}s.") for n in unfused))]
            fused[stem + ("_weight" if stem.endswith("in_proj") else ".weight")] = np.concatenate(parts)
    return found | fused


def config(**changes: object) -> dict:
    """A config.json: `CONFIG` with changes; delays of 0 where they do not fit."""
    c = {**CONFIG, **changes}
    return c if len(c["delays"]) == c["n_q"] + 1 else {**c, "delays": [0] * (c["n_q"] + 1)}


def write(folder: pathlib.Path, c: dict | None, tensors: dict[str, np.ndarray], **others: dict) -> pathlib.Path:
    """A folder with config.json and model.safetensors, and NAME.safetensors for each of `others`."""
    folder.mkdir(exist_ok=True)
    if c is not None:
        (folder / "config.json").write_text(json.dumps(c))
    for name, some in {"model": tensors, **others}.items():
        save_file(some, folder / f"{name}.safetensors")
    return folder


def shard(folder: pathlib.Path, count: int = 3) -> pathlib.Path:
    """`folder` with its model.safetensors split into shards with an index, as transformers names them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        shard = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        some = names[i * len(names) // count : (i + 1) * len(names) // count]
        save_file({name: tensors[name] for name in some}, folder / shard)
        weight_map |= dict.fromkeys(some, shard)
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def huggingface_config(c: dict, **changes: object) -> dict:
    """The config.json of transformers' `MoshiForConditionalGeneration` of the model that `c` describes."""
    depth = {
        "model_type": "moshi_depth",
        "hidden_size": c["depformer_dim"],
        "num_hidden_layers": c["depformer_num_layers"],
        "num_attention_heads": c["depformer_num_heads"],
        "ffn_dim": 2 * (2 * c["depformer_dim_feedforward"] // 3),
        "sliding_window": c["dep_q"],
        "rms_norm_eps": 1e-8,
    }
    return {
        "architectures": ["MoshiForConditionalGeneration"],
        "model_type": "moshi",
        "audio_encoder_config": {"model_type": "mimi", "codebook_size": c["card"]},
        "audio_vocab_size": c["card"],
        "depth_decoder_config": depth,
        "ffn_dim": 2 * (2 * int(c["hidden_scale"] * c["dim"]) // 3),
        "head_dim": c["dim"] // c["num_heads"],
        "hidden_act": "silu",
        "hidden_size": c["dim"],
        "num_attention_heads": c["num_heads"],
        "num_codebooks": c["dep_q"],
        "num_hidden_layers": c["num_layers"],
        "num_key_value_heads": c["num_heads"],
        "rms_norm_eps": 1e-8,
        "rope_theta": float(c["max_period"]),
        "sliding_window": c["context"],
        "transformers_version": "4.46.0.dev0",
        "vocab_size": c["text_card"],
        **changes,
    }


def huggingface(w: dict[str, np.ndarray], c: dict) -> dict[str, np.ndarray]:
    """Un-fused tensors as transformers' script stores them: q and k rotated by halves, depth weights stacked by
    codebook."""
    d, heads, q = c["dim"], c["num_heads"], c["dep_q"]
    half = d // heads // 2
    order = [head * 2 * half + 2 * pair + side for head in range(heads) for side in (0, 1) for pair in range(half)]
    codebooks = range(q)
    found = {
        "decoder.model.embed_tokens.weight": w["text_emb.weight"],
        "decoder.model.norm.weight": w["out_norm.alpha"].ravel(),
        "decoder.lm_head.weight": w["text_linear.weight"],
        "depth_decoder.text_embed_tokens.weight": w["depformer_text_emb.weight"],
        "depth_decoder.input_projections.weight": np.stack([w[f"depformer_in.{k}.weight"] for k in codebooks]),
        "depth_decoder.lm_heads.weight": np.stack([w[f"linears.{k}.weight"] for k in codebooks]),
    }
    found |= {f"embed_tokens.{n}.weight": w[f"emb.{n}.weight"] for n in range(2 * q)}
    found |= {f"depth_decoder.embed_tokens.{k}.weight": w[f"depformer_emb.{k}.weight"] for k in range(q - 1)}
    for i in range(c["num_layers"]):
        old, new = f"transformer.layers.{i}.", f"decoder.model.layers.{i}."
        parts = np.split(w[old + "self_attn.in_projs.0.weight"], 3)
        for letter, part in zip("qkv", parts, strict=True):
            found[f"{new}self_attn.{letter}_proj.linear.weight"] = part if letter == "v" else part[order]
        found[new + "self_attn.o_proj.linear.weight"] = w[old + "self_attn.out_projs.0.weight"]
        found[new + "mlp.fc1.weight"] = w[old + "gating.linear_in.weight"]
        found[new + "mlp.fc2.weight"] = w[old + "gating.linear_out.weight"]
    for i in range(c["depformer_num_layers"]):
        old, new = f"depformer.layers.{i}.", f"depth_decoder.layers.{i}."
        thirds = [np.split(w[f"{old}self_attn.in_projs.{k}.weight"], 3) for k in codebooks]
        for n, letter in enumerate("qkv"):
            found[f"{new}self_attn.{letter}_proj.linear.weight"] = np.stack([third[n] for third in thirds])
        for module, stacked in (
            ("self_attn.out_projs.{}", "self_attn.o_proj.linear"),
            ("gating.{}.linear_in", "mlp.fc1"),
            ("gating.{}.linear_out", "mlp.fc2"),
        ):
            found[f"{new}{stacked}.weight"] = np.stack([w[f"{old}{module.format(k)}.weight"] for k in codebooks])
    for name, layers in (("transformer", c["num_layers"]), ("depformer", c["depformer_num_layers"])):
        new = {"transformer": "decoder.model", "depformer": "depth_decoder"}[name]
        for i in range(layers):
            found[f"{new}.layers.{i}.input_layernorm.weight"] = w[f"{name}.layers.{i}.norm1.alpha"].ravel()
            found[f"{new}.layers.{i}.post_attention_layernorm.weight"] = w[f"{name}.layers.{i}.norm2.alpha"].ravel()
    return {name: np.ascontiguousarray(array) for name, array in found.items()}
