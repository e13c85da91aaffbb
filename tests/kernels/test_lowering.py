"""The fused inner loop on its kernels lowers for CUDA, which needs no GPU: this finds layouts that do not fit and too
much shared memory."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.hopper import Setting, value_and_grads
from tests.helpers.micro import CONFIG, MODEL
from train import step
from train.batches import Batch
from ttt_jax.distributed.sharding import make_mesh
from ttt_jax.kernels import choice
from ttt_jax.moshi import model

# ruff: noqa: E402  the kernels are imported where jax has what they need
pytest.importorskip("jax", minversion="0.11.2", reason="the kernels need jax 0.11.2")

from ttt_jax.kernels import hopper, hopper_linear
from ttt_jax.ttt.fused.scan import fused_scan


@pytest.mark.parametrize("mini_batch", [1, 16, 64])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("hidden", "chain"), [((4,), hopper), ((), hopper_linear)], ids=["mlp", "linear"])
def test_the_fused_inner_loop_lowers_for_cuda(hidden, chain, width, mini_batch):
    setting = Setting(width, mini_batch, max(32, 4 * mini_batch), hidden)

    def forward(*args):
        return fused_scan(*args, setting.cfg, chain=chain)

    def gradients(args, weights):
        return value_and_grads(lambda *args: fused_scan(*args, chain=chain), setting.cfg, args, weights)

    args, weights = setting.drawn(0)
    for function, inputs, kernels in ((forward, args, 1), (gradients, (args, weights), 2)):
        lowered = jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == kernels


def kernels_of(function, *args):
    """Calls of kernels in the program for CUDA."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2")


@pytest.mark.parametrize("remat", ["none", pytest.param("layers", marks=pytest.mark.slow)])
def test_a_model_and_its_training_step_take_them_on_a_hopper_gpu(remat, monkeypatch):
    hopper_gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    monkeypatch.setattr(choice, "_device", lambda: hopper_gpu)
    ttt = dataclasses.replace(MODEL.ttt, mini_batch=16)
    cfg = dataclasses.replace(MODEL, dtype="bfloat16", dim=256, num_heads=2, ttt=ttt)
    data = dataclasses.replace(CONFIG.data, chunk=48)
    run = dataclasses.replace(CONFIG, model=cfg, data=data, remat=remat)
    rows, mesh = data.batch, make_mesh(1, 1, 1)
    tokens = jax.ShapeDtypeStruct((rows, cfg.num_streams, 48), jnp.int32)
    flags = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bool_)  # noqa: E731

    params = model.init_params.eval_shape(cfg, jax.random.key(0))
    state = jax.eval_shape(lambda: model.init_state(cfg, rows))
    assert kernels_of(lambda *args: model.forward(*args, cfg), params, tokens, flags(rows, 48), state) == 1
    lead = lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype)  # noqa: E731  parts of a batch
    batch = Batch(lead(tokens), flags(1, rows, 48), flags(1, rows))
    assert kernels_of(step.make_train_step(run, mesh), step.state_like(run, mesh), {}, batch, flags(rows)) == 2
