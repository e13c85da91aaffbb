"""Initial values: the spread of every kind of parameter, and which parameters start alike."""

import itertools
import math

import jax
import numpy as np
import pytest

from tests.helpers.drawing import quick_jit
from ttt_jax.config import DepthConfig, LoRAConfig, MoshiConfig, TTTConfig
from ttt_jax.moshi import model

CFG = MoshiConfig(
    dim=64, num_layers=2, num_heads=4, hidden=96, context=8, n_q=4, dep_q=3, card=40, text_card=50,
    delays=(0, 0, 1, 1, 1), extra_heads=2, extra_heads_dim=16, ttt=TTTConfig(layers="all", mini_batch=4, gate_init=0.3),
    depth=DepthConfig(dim=32, num_layers=2, num_heads=2, hidden=48, schedule=(0, 1, 1), low_rank=24),
    lora=LoRAConfig(rank=8),
)  # fmt: skip
NORMAL = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
"""Standard deviation of a standard normal cut at three."""
UNIFORM = 1 / math.sqrt(3)
"""Of a uniform distribution over +-1."""
CONSTANT = {"norm1": 1, "norm2": 1, "norm": 1, "out_norm": 1, "ln_scale": 1, "post_norm_scale": 1, "gate": 0.3}
ZERO = ("ln_bias", "post_norm_bias", "out_bias", "rate_bias", "inner_b0", "inner_b1", "_lora_b")
"""All of these start at one value."""


@pytest.fixture(scope="module")
def drawn():
    init = quick_jit(model.init_params, static_argnums=0)
    return [jax.tree.map(np.asarray, init(CFG, jax.random.key(seed))) for seed in (0, 1)]


def expected_spread(path, shape) -> float:
    """Standard deviation by the parameter's place: Kyutai's rules, PyTorch's default where they use it, design.md for
    TTT."""
    name, fan_in = path[-1], shape[-1]
    if name == "rate_weight":
        return 0.02
    if name.startswith("inner_w"):
        return NORMAL / math.sqrt(shape[-2])
    if name in ("q_bias", "k_bias", "v_bias"):
        return UNIFORM / math.sqrt(fan_in)
    uniform = "_lora_a" in name or (path[0] == "depth" and name not in ("heads", "text_emb", "audio_emb"))
    return (UNIFORM if uniform else NORMAL) / math.sqrt(fan_in)


def test_every_parameter_starts_at_its_scale(drawn):
    leaves = [
        (tuple(key.key for key in path), np.stack([leaf, second]))
        for (path, leaf), second in zip(
            jax.tree_util.tree_leaves_with_path(drawn[0]), jax.tree.leaves(drawn[1]), strict=True
        )
    ]
    for path, values in leaves:
        if path[-1] in CONSTANT:
            np.testing.assert_allclose(values, CONSTANT[path[-1]], err_msg=str(path))
        elif path[-1].endswith(ZERO):
            assert not values.any(), path
        else:
            spread = expected_spread(path, values.shape)
            assert abs(values.mean()) < 5 * spread / math.sqrt(values.size), path
            # The error of a standard deviation of n values is at most 1 / sqrt(2 n) of it.
            assert abs(values.std() / spread - 1) < 5 / math.sqrt(2 * values.size), path
            assert np.abs(values).max() <= spread * (5 if path[-1] == "rate_weight" else 3 / NORMAL), path


def test_queries_start_as_keys_do_and_all_else_apart(drawn):
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], part["ttt"])
        for params in drawn
        for part in params["layers"].values()
        for i in range(len(part["ttt"]["q_kernel"]))
    ]
    assert len(layers) == 2 * CFG.num_layers
    for part in ("kernel", "bias"):
        for layer in layers:
            np.testing.assert_array_equal(layer[f"q_{part}"], layer[f"k_{part}"])
            assert (layer[f"q_{part}"] != layer[f"v_{part}"]).all()
        for one, other in itertools.combinations(layers, 2):  # of layers and of seeds
            assert all((one[f"{name}_{part}"] != other[f"{name}_{part}"]).all() for name in "kv")
