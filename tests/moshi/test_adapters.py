"""Adapters on chosen maps: where they are, and that they do what they add to the weights."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from tests.helpers.drawing import quick_jit
from ttt_jax.checkpoints import weights
from ttt_jax.config import DepthConfig, LoRAConfig, MoshiConfig, TTTConfig
from ttt_jax.moshi import model

CFG = MoshiConfig(
    dim=32, num_layers=2, num_heads=2, hidden=48, context=8, n_q=4, dep_q=3, card=16, text_card=20,
    delays=(0, 0, 1, 1, 1), extra_heads=2, extra_heads_dim=3, ttt=TTTConfig(layers="1", mini_batch=4),
    depth=DepthConfig(dim=16, num_layers=2, num_heads=2, hidden=24, schedule=(0, 1, 1), low_rank=6),
)  # fmt: skip
MAPS = {
    "attention": {"layers/*/attention/qkv", "layers/*/attention/out"},
    "ffn": {"layers/*/ffn/gate_up", "layers/*/ffn/down"},
    "depth": {
        f"depth/{name}" for name in ("input", "heads", "qkv", "out", "gate_up", "down", "text_emb_up", "audio_emb_up")
    },
    "heads": {"text_head", "extra_heads"},
}


def adapted(*maps):
    return dataclasses.replace(CFG, lora=LoRAConfig(rank=3, scaling=0.5, maps=maps))


def flat(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in found}


@pytest.mark.parametrize("maps", [("attention",), ("ffn",), ("depth",), ("heads",), ("heads", "attention")])
def test_adapters_are_on_the_named_maps_alone(maps):
    cfg = adapted(*maps)
    shapes = {
        p: x.shape for p, x in flat(jax.eval_shape(lambda k: model.init_params(cfg, k), jax.random.key(0))).items()
    }
    names = {"/".join(("layers", "*", *path[2:]) if path[0] == "layers" else path) for path in shapes}
    wanted = set().union(*(MAPS[part] for part in maps))
    assert {name for name in names if "_lora_" in name} == {f"{name}_lora_{half}" for name in wanted for half in "ab"}
    assert {t.path for t in weights.tensors(cfg)} == shapes.keys()
    assert {weights.owner(tensor) for tensor, *_ in weights.adapters(cfg)} == set(maps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "maps",
    [
        ("attention", "ffn", "depth", "heads"),
        *(pytest.param(maps, marks=pytest.mark.slow) for maps in (("attention", "depth"), ("ffn", "heads"))),
    ],
)
def test_adapters_are_what_they_add_to_the_weights(maps):
    cfg = adapted(*maps)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)

    def base(tree):
        return {
            name: base(leaf) if isinstance(leaf, dict) else leaf for name, leaf in tree.items() if "_lora_" not in name
        }

    def merge(tree):
        if not isinstance(tree, dict):
            return tree
        out = {name: merge(leaf) for name, leaf in tree.items() if "_lora_" not in name}
        for name in out:
            if f"{name}_lora_a" in tree:
                a, b = tree[f"{name}_lora_a"], tree[f"{name}_lora_b"]
                flat = b.reshape(*a.shape[:-2], -1, a.shape[-2])
                out[name] = out[name] + cfg.lora.scaling * (flat @ a).reshape(out[name].shape)
        return out

    frames = np.random.default_rng(0).integers(0, 16, (2, 5, 6), dtype=np.int32)
    mask = np.ones((2, 6), bool)

    @partial(quick_jit, static_argnames="cfg")
    def outputs(params, cfg):
        got, _ = model.forward(params, frames, mask, model.init_state(cfg, 2), cfg)
        return {
            "text": got.text_logits,
            "audio": got.audio_logits,
            "heads": model.extra_logits(params, got.hidden, cfg),
        }

    calls = (params, cfg), (merge(params), CFG), (base(params), CFG)
    apart, merged, without = (jax.tree.map(np.asarray, outputs(*call)) for call in calls)
    for name in apart:
        np.testing.assert_allclose(apart[name], merged[name], atol=2e-5)
        assert np.abs(apart[name] - without[name]).max() > 0.1
