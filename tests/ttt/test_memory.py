"""Memory that stays alive: at default settings fast weights neither inflate nor grow stiff over an hour of real
speech."""

import dataclasses

import jax
import pytest

from bench import memory
from ttt_jax.config import MoshiConfig, TTTConfig, model_preset
from ttt_jax.moshi import model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def speech():
    """What the TTT layer of `tiny` reads of the embedded speech before any training."""
    cfg = model_preset("tiny")
    return memory.activations(model.init_params(cfg, jax.random.key(0)), cfg, memory.speech())


@pytest.mark.parametrize(
    ("network", "mini_batch"),
    [(network, b) for network in memory.NETWORKS for b in (1, 16, 64)],
)
def test_fast_weights_stay_bounded_and_plastic_over_an_hour(speech, network, mini_batch):
    cfg = MoshiConfig(
        dim=speech.shape[-1],
        num_heads=4,
        num_layers=1,
        dtype="float32",
        ttt=TTTConfig(layers="0", hidden=memory.NETWORKS[network], mini_batch=mini_batch),
    )
    found = memory.study(speech, cfg)
    assert found["peak"] <= 2
    assert found["growth"] <= 1.5
    assert found["plasticity"] <= 1.25
    assert found["last"] < 0.2 * found["base"]  # and it learns: nothing would be bounded more easily than what does not


def test_without_decay_a_fast_linear_memory_inflates_and_grows_stiff_and_a_bound_holds_it(speech):
    ttt = TTTConfig(layers="0", hidden=(), mini_batch=1, horizon=None, base_lr=4.0)
    cfg = MoshiConfig(dim=speech.shape[-1], num_heads=8, num_layers=1, dtype="float32", ttt=ttt)
    loose = memory.study(speech, cfg)
    assert loose["peak"] > 4
    assert loose["growth"] > 1.5
    assert loose["plasticity"] > 1.2
    held = memory.study(speech, dataclasses.replace(cfg, ttt=dataclasses.replace(ttt, max_displacement=1.0)))
    assert max(held["displacement"]) <= 1 + 1e-5
    assert held["growth"] <= 1.01  # a head may reach the bound after 4,500 frames
    assert held["plasticity"] <= 1.05
