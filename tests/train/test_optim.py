"""Groups, decay and schedules of the optimiser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.micro import MODEL, config
from train import optim
from train.config import OptimConfig
from train.partition import shapes
from ttt_jax.config import LoRAConfig
from ttt_jax.utils.trees import named

GATE, W0 = "layers/layers_01_01/ttt/gate", "layers/layers_01_01/ttt/inner_w0"


def some_params():
    """A parameter of every kind, of one shape, since every shape compiles anew."""
    ttt = {"gate": 2.0, "inner_w0": 3.0, "q_kernel": 4.0, "q_bias": 5.0}
    tree = {"text_head": 1.0, "text_head_lora_b": 7.0, "out_norm": 6.0, "layers": {"layers_01_01": {"ttt": ttt}}}
    return jax.tree.map(lambda value: jnp.full((3, 4), value), tree)


def first_update(optim_config, grad):
    params = some_params()
    optimizer = optim.make_optimizer(config(optim=optim_config))
    updates, state = optimizer.update(
        jax.tree.map(lambda p: jnp.full(p.shape, grad), params), optimizer.init(params), params
    )
    return named(updates), named(params), state


DEPTH = dataclasses.replace(MODEL.depth, low_rank=8, schedule=(0,) + (1,) * (MODEL.dep_q - 1))
ALL = dataclasses.replace(MODEL, lora=LoRAConfig(rank=2), depth=DEPTH, extra_heads=2)
"""With adapters, further heads, a low-rank depth transformer and shared weight sets."""


def test_every_parameter_has_a_group():  # distributed/test_sharding.py looks at the presets
    groups = named(optim.groups(shapes(ALL)))
    assert set(groups.values()) == set(optim.GROUPS)
    for path, group in groups.items():
        ttt = "gate" if path.endswith("/ttt/gate") else "ttt"
        assert group == (ttt if "/ttt/" in path else "lora" if "_lora_" in path else "base"), path


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="surprise"):
        optim.groups({"surprise": jnp.zeros(3)})


def test_only_matrices_and_embeddings_decay():
    decayed = named(optim.decayed(shapes(ALL)))
    kept = {name for name, flag in decayed.items() if not flag}
    vectors = ("bias", "scale", "norm", "norm1", "norm2", "gate", "rate_weight")
    assert kept == {name for name in decayed if name.endswith(vectors) or "/inner_" in name}
    matrices = {"text_emb", "depth/heads", "depth/text_emb_up", "extra_heads", "layers/layers_01_01/ttt/q_kernel"}
    assert matrices | {"layers/layers_00_00/attention/qkv_lora_a", "depth/out_lora_b"} <= set(decayed) - kept


def test_schedule_warms_up_to_each_peak_and_ends_at_the_fraction():
    cfg = config(steps=100, optim=OptimConfig(lr=1.0, ttt_lr=2.0, gate_lr=4.0, warmup_steps=10, final_fraction=0.1))
    for group, peak in (("base", 1.0), ("lora", 1.0), ("ttt", 2.0), ("gate", 4.0)):
        rates = np.asarray(optim.schedules(cfg)[group](np.arange(101)))
        np.testing.assert_allclose(rates[[0, 10, 100]], [peak / 11, peak, peak / 10], rtol=1e-5)
        assert np.argmax(rates) == 10
        assert min(rates) > 0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_runs_have_a_schedule(steps):
    cfg = config(steps=steps, optim=OptimConfig(warmup_steps=50))
    rates = np.asarray(optim.schedules(cfg)["base"](np.arange(steps)))
    assert (rates > 0).all()
    assert (rates < 1.001 * cfg.optim.lr).all()


def test_each_group_steps_at_its_own_rate():
    updates, *_ = first_update(OptimConfig(lr=1.0, ttt_lr=2.0, gate_lr=4.0, warmup_steps=0, weight_decay=0.0), 1.0)
    for name, rate in (("text_head", 1.0), ("text_head_lora_b", 1.0), (W0, 2.0), (GATE, 4.0)):
        np.testing.assert_allclose(updates[name], -rate, rtol=1e-3)


def test_without_gradient_only_decay_moves_anything():
    updates, params, _ = first_update(
        OptimConfig(lr=0.5, ttt_lr=0.5, gate_lr=0.5, warmup_steps=0, weight_decay=0.1), 0.0
    )
    np.testing.assert_allclose(updates["text_head"], -0.05 * params["text_head"], rtol=1e-5)
    np.testing.assert_allclose(updates["text_head_lora_b"], -0.05 * params["text_head_lora_b"], rtol=1e-5)
    for name in ("out_norm", GATE, W0, "layers/layers_01_01/ttt/q_bias"):
        assert not updates[name].any(), name


def test_the_gradient_is_clipped_by_its_global_norm():
    *_, state = first_update(OptimConfig(clip_norm=1.0, beta1=0.9, warmup_steps=0), 7.0)
    mean = next(part.mu for part in state if hasattr(part, "mu"))
    np.testing.assert_allclose(optax.tree.norm(mean), 0.1, rtol=1e-4)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.5), (0.25, 0.75)])
def test_the_betas_are_those_of_the_configuration(beta1, beta2):
    *_, state = first_update(OptimConfig(beta1=beta1, beta2=beta2, clip_norm=1e9, warmup_steps=0), 2.0)
    adam = next(part for part in state if hasattr(part, "mu"))
    np.testing.assert_allclose(adam.mu["text_head"], (1 - beta1) * 2.0, rtol=1e-5)
    np.testing.assert_allclose(adam.nu["text_head"], (1 - beta2) * 4.0, rtol=1e-5)
