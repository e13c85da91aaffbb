"""What runs here also lowers for TPU: forward, the training step and a step of generation, without a TPU at hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.micro import CONFIG, MODEL
from train import step
from train.batches import Batch
from ttt_jax.distributed.sharding import make_mesh
from ttt_jax.moshi import generate, model

ROWS, FRAMES = 2, 24

dtypes = pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])


def params_and_state(cfg):
    """Their shapes, for `ROWS` rows; nothing is computed."""
    return model.init_params.eval_shape(cfg, jax.random.key(0)), jax.eval_shape(lambda: model.init_state(cfg, ROWS))


def tokens(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def flags(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def lowered(function, *args):
    """The StableHLO of `function` for TPU."""
    exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*args)
    assert exported.platforms == ("tpu",)
    return exported.mlir_module()


@dtypes
@pytest.mark.parametrize(
    "measured", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="measured")]
)
def test_forward_over_a_chunk(dtype, measured):
    cfg = dataclasses.replace(MODEL, dtype=dtype)
    params, state = params_and_state(cfg)

    def forward(params, frames, mask, state):
        return model.forward(params, frames, mask, state, cfg, measured)

    text = lowered(forward, params, tokens(ROWS, cfg.num_streams, FRAMES), flags(ROWS, FRAMES), state)
    assert "stablehlo.dot_general" in text
    assert "stablehlo.while" in text  # over the mini-batches
    assert ("bf16" in text) == (dtype == "bfloat16")


@pytest.mark.slow
@dtypes
def test_training_step(dtype):
    cfg = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dtype=dtype))
    mesh, rows, frames = make_mesh(1, 1, 1), cfg.data.batch, cfg.data.chunk
    batch = Batch(tokens(1, rows, MODEL.num_streams, frames), flags(1, rows, frames), flags(1, rows))
    text = lowered(step.make_train_step(cfg, mesh), step.state_like(cfg, mesh), {}, batch, flags(rows))
    assert "stablehlo.dot_general" in text
    assert "stablehlo.while" in text  # over the mini-batches, forth and back
    assert ("bf16" in text) == (dtype == "bfloat16")


@dtypes
def test_generating_step(dtype):
    cfg = dataclasses.replace(MODEL, dtype=dtype)
    params, state = params_and_state(cfg)

    def stream_step(params, user, mask, state):
        return generate.stream_step(params, user, mask, state, cfg)

    text = lowered(stream_step, params, tokens(ROWS, cfg.n_q - cfg.dep_q), flags(ROWS), state)
    assert "stablehlo.dot_general" in text
    assert ("bf16" in text) == (dtype == "bfloat16")
