"""A small Mimi of PyTorch `moshi` with random weights, in Kyutai's layout and as transformers stores it, apart from
`ttt_jax.convert`."""

from __future__ import annotations

import copy
import functools
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.helpers.places import FIXTURES

NAME = "tokenizer-e351c8d8-checkpoint125.safetensors"
"""Kyutai's name of the file."""
CONFIG = json.loads((FIXTURES / "mimi.config.json").read_text())
"""The mimi_config.json of the fixture."""
CODEBOOKS = ["quantizer.rvq_first.vq.layers.0.", *(f"quantizer.rvq_rest.vq.layers.{i}." for i in range(7))]
"""Beginning of the names of each codebook's tensors."""


@functools.cache
def _fixture() -> dict[str, np.ndarray]:
    return load_file(FIXTURES / "mimi.weights.safetensors")


def weights() -> dict[str, np.ndarray]:
    """The fixture's tensors, as Kyutai names them."""
    return {name: array.copy() for name, array in _fixture().items()}


def config(**changes: object) -> dict:
    """The fixture's mimi_config.json with changes, "section.key" within a section; `...` removes a key."""
    c = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *section, key = path.split(".")
        place = c[section[0]] if section else c
        if value is ...:
            del place[key]
        else:
            place[key] = value
    return c


def write(
    folder: pathlib.Path, tensors: dict[str, np.ndarray] | None = None, c: dict | None = CONFIG, name: str = NAME
) -> pathlib.Path:
    """A folder with the codec's file and, if there is a configuration, its config.json of Kyutai's kind."""
    folder.mkdir(exist_ok=True)
    save_file(weights() if tensors is None else tensors, folder / name)
    if c is not None:
        (folder / "codec.json").write_text(json.dumps(c))
        (folder / "config.json").write_text(json.dumps({"mimi_name": name, "mimi_config_name": "codec.json"}))
    return folder


def huggingface_config(**changes: object) -> dict:
    """The config.json of transformers' `MimiModel` of the fixture's sizes, with changes."""
    seanet, quantizer, transformer = (CONFIG[part] for part in ("seanet", "quantizer", "transformer"))
    return {
        "architectures": ["MimiModel"],
        "model_type": "mimi",
        "sampling_rate": CONFIG["sample_rate"],
        "frame_rate": 12.5,
        "hidden_size": seanet["dimension"],
        "num_filters": seanet["n_filters"],
        "upsampling_ratios": seanet["ratios"],
        "codebook_size": quantizer["bins"],
        "codebook_dim": quantizer["dimension"],
        "vector_quantization_hidden_dimension": quantizer["dimension"],
        "num_quantizers": quantizer["n_q"],
        "upsample_groups": seanet["dimension"],
        "num_hidden_layers": transformer["num_layers"],
        "intermediate_size": transformer["dim_feedforward"],
        "num_attention_heads": transformer["num_heads"],
        "num_key_value_heads": transformer["num_heads"],
        "head_dim": seanet["dimension"] // transformer["num_heads"],
        "sliding_window": transformer["context"],
        "rope_theta": 10000.0,
        "transformers_version": "4.45.0.dev0",
        **changes,
    }


def huggingface(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Kyutai's tensors as transformers' script stores them: q, k and v apart, q and k rotated by halves."""
    dim, heads = CONFIG["transformer"]["d_model"], CONFIG["transformer"]["num_heads"]
    half = dim // heads // 2
    order = [head * 2 * half + 2 * pair + side for head in range(heads) for side in (0, 1) for pair in range(half)]
    found = {}
    for name, array in w.items():
        words = name.split(".")
        if words[0] in ("downsample", "upsample"):
            found[f"{words[0]}.conv.weight"] = array
        elif words[0] in ("encoder", "decoder"):
            words[1] = "layers"
            found[".".join([*words[:-3], "conv", words[-1]])] = array
        elif words[0] == "quantizer":
            words[1] = {"rvq_first": "semantic", "rvq_rest": "acoustic"}[words[1]] + "_residual_vector_quantizer"
            names = {"_codebook": "codebook", "_initialized": "initialized", "embedding_sum": "embed_sum"}
            found[".".join(names.get(word, word) for word in words if word != "vq")] = array
        else:
            layer, last = f"{words[0]}.layers.{words[3]}", ".".join(words[4:])
            if last == "self_attn.in_proj_weight":
                q, k, v = np.split(array, 3)
                for letter, part in (("q", q[order]), ("k", k[order]), ("v", v)):
                    found[f"{layer}.self_attn.{letter}_proj.weight"] = part
                continue
            names = {
                "self_attn.out_proj.weight": "self_attn.o_proj.weight",
                "linear1.weight": "mlp.fc1.weight",
                "linear2.weight": "mlp.fc2.weight",
                "layer_scale_1.scale": "self_attn_layer_scale.scale",
                "layer_scale_2.scale": "mlp_layer_scale.scale",
            }
            norm = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}.get(words[4])
            found[f"{layer}.{norm}.{words[5]}" if norm else f"{layer}.{names[last]}"] = array
    return found


def write_huggingface(folder: pathlib.Path, **changes: object) -> pathlib.Path:
    """A folder with the fixture as transformers stores it."""
    folder.mkdir()
    save_file(huggingface(weights()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(huggingface_config(**changes)))
    return folder
