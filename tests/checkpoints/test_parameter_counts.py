"""Counted parameters are those that the model has, and the nearest rank is the nearest."""

import dataclasses
import math

import jax
import pytest

from tests.helpers.converting import nightly
from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.parameter_counts import lora_rank_like_ttt, parameter_counts
from ttt_jax.config import DepthConfig, LoRAConfig, MoshiConfig, TTTConfig, model_preset
from ttt_jax.errors import InputError
from ttt_jax.moshi import model

MODELS = {
    "tiny": model_preset("tiny"),
    "extra heads, shared and low-rank depth": MoshiConfig(
        **{"dim": 32, "num_layers": 2, "num_heads": 2, "hidden": 48, "context": 8, "n_q": 4, "dep_q": 4},
        **{"card": 16, "text_card": 20, "delays": (0, 0, 1, 1, 1), "extra_heads": 2, "extra_heads_dim": 3},
        ttt=TTTConfig(layers="1", mini_batch=4),
        depth=DepthConfig(dim=16, num_layers=2, num_heads=2, hidden=24, schedule=(0, 1, 1, 0), low_rank=6),
        lora=LoRAConfig(rank=3),
    ),
    "moshi-7b": dataclasses.replace(model_preset("moshi-7b"), lora=LoRAConfig(rank=128, maps=("attention", "ffn"))),
}


def leaves(cfg):
    """Paths and sizes of all parameters, in numbers."""
    shapes = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    found = jax.tree_util.tree_leaves_with_path(shapes)
    return {"/".join(key.key for key in path): math.prod(leaf.shape) for path, leaf in found}


@pytest.mark.parametrize("name", nightly("extra heads, shared and low-rank depth", "tiny", "moshi-7b"))
def test_parts_sum_up_to_the_model(name):
    cfg = MODELS[name]
    counts, sizes = parameter_counts(cfg), leaves(cfg)
    assert sum(counts.values()) == sum(sizes.values())

    def total(*words, without="lora"):
        return sum(n for path, n in sizes.items() if any(word in path for word in words) and without not in path)

    assert counts["temporal attention"] == total("/attention/")
    assert counts["temporal feed-forward"] == total("/ffn/")
    assert counts["depth transformer"] == total("depth/")
    assert counts["TTT layers"] == total("/ttt/")
    assert counts["adapters"] == total("_lora_", without="nothing")
    assert counts["embeddings"] == sizes["text_emb"] + sizes["audio_emb"]


SOME, ALL = ("attention", "ffn"), ("attention", "ffn", "depth", "heads")


@pytest.mark.parametrize(
    ("name", "maps"), nightly(("tiny", SOME), ("tiny", ALL), ("moshi-7b", ALL), ("moshi-7b", SOME))
)
def test_the_rank_is_the_nearest(name, maps):
    cfg = dataclasses.replace(MODELS[name], lora=LoRAConfig(maps=maps))
    ttt, linears = parameter_counts(cfg)["TTT layers"], [t for t in weights.base(cfg) if t.inputs]

    def size(rank):
        pairs = [weights.adapter(t, rank) for t in linears if weights.owner(t) in maps]
        return sum(math.prod(t.shape) for pair in pairs for t in pair)

    ranks = range(1, 2 * (ttt // size(1) + 1))
    assert lora_rank_like_ttt(cfg) == min(ranks, key=lambda rank: abs(size(rank) - ttt))


def test_the_rank_counts_the_shapes_of_the_model():
    """4.35 M parameters, for which the original system computed rank 11 with maps of width 1024."""
    cfg = dataclasses.replace(model_preset("moshi-7b"), lora=LoRAConfig(rank=1, maps=("attention", "ffn")))
    assert parameter_counts(cfg)["adapters"] == 32 * (4 * 4096 + 2 * 4096 + (4096 + 2 * 11264) + (11264 + 4096))
    assert round(4.35e6 / parameter_counts(cfg)["adapters"]) == 2


def test_the_rank_is_at_least_one_and_needs_ttt_layers_and_maps():
    tiny = model_preset("tiny")
    wide = dataclasses.replace(tiny, text_card=1_000_000, lora=LoRAConfig(maps=("heads",)))
    assert lora_rank_like_ttt(wide) == 1
    with pytest.raises(InputError, match='ttt.layers="none"'):
        lora_rank_like_ttt(dataclasses.replace(tiny, ttt=TTTConfig(layers="none")))
    with pytest.raises(InputError, match="leaves no map"):
        lora_rank_like_ttt(dataclasses.replace(tiny, lora=LoRAConfig(maps=())))
