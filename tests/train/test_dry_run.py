"""The figures of a dry run: exact for arrays, near XLA's own figure for the rest."""

import dataclasses
import math
import time
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from bench.train import configuration
from tests.helpers.micro import MODEL, config
from train import dry_run
from train.batches import Batch
from train.config import PRESETS, LossConfig, MeshConfig, TrainableConfig
from train.partition import fit, shapes, split
from train.step import make_train_step, state_like
from ttt_jax.config import LoRAConfig, TTTConfig
from ttt_jax.distributed import sharding
from ttt_jax.errors import InputError

LORA = TrainableConfig(base=False)


def build(batch=4, chunk=128, mesh=MeshConfig(), **changes):  # noqa: B008 - frozen
    """The micro model with adapters, and layers enough for a stack."""
    ttt = TTTConfig(layers="4", mini_batch=4)
    net = dataclasses.replace(MODEL, dim=64, num_layers=5, lora=LoRAConfig(rank=4), ttt=ttt, context=64)
    cfg = config(model=net, mesh=mesh, **{"loss": LossConfig(block=64), **changes})
    return fit(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=batch, chunk=chunk)))


planned = cache(dry_run.plan)


def compiled(cfg):
    """XLA's own account of the step."""
    mesh = sharding.make_mesh(1, 1, 1)
    k, rows, streams, frames = cfg.bptt, cfg.data.batch, cfg.model.num_streams, cfg.data.chunk
    shape = jax.ShapeDtypeStruct
    batch = Batch(shape((k, rows, streams, frames), jnp.int32), shape((k, rows, frames), bool), shape((k, rows), bool))
    inputs = state_like(cfg, mesh), split(shapes(cfg.model), cfg)[1], batch, shape((rows,), bool)
    return make_train_step(cfg, mesh).lower(*inputs).compile().memory_analysis(), size(batch)


def size(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("ttt", ["none", "4"])
@pytest.mark.parametrize("remat", ["dots", "layers"])
def test_memory_is_what_xla_takes(ttt, remat):
    cfg = build(trainable=LORA, remat=remat)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, ttt=TTTConfig(layers=ttt, mini_batch=4)))
    found, (account, batch) = planned(cfg).memory, compiled(cfg)
    arrays = sum(found[part] for part in dry_run.ARRAYS)
    assert arrays + batch == pytest.approx(account.argument_size_in_bytes, rel=0.01)
    step = sum(found[part] for part in dry_run.STEP)
    assert 0.5 * account.temp_size_in_bytes < step < 1.5 * account.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "temporary", "peak"), [("layers", 8.8, 33.2), ("dots", 15.0, 39.4)])
def test_memory_of_the_7b_is_what_an_h100_took(remat, temporary, peak):
    """By `python -m bench.train --shape 7b --set remat=...`: one row of 1,250 frames; adapters and TTT layers train."""
    found = dry_run.plan(configuration("7b", "lora+ttt", [f"remat={remat}"])).memory
    assert sum(found[part] for part in dry_run.STEP) / 1e9 == pytest.approx(temporary, rel=0.1)
    assert sum(found.values()) / 1e9 == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
def test_less_is_taken_where_less_is_asked_for():
    def take(part, **changes):
        return planned(build(trainable=LORA, **changes)).memory[part]

    kept, working = dry_run.STEP[1:]
    none, dots, layers = (take(kept, remat=remat) for remat in ("none", "dots", "layers"))
    assert none > dots > layers > 0
    assert take(kept, accumulate=2) == pytest.approx(none / 2, rel=0.1)
    assert take("gradients", accumulate=2) == 2 * take("gradients")
    assert take(kept, bptt=2) > none
    assert take(working, loss=LossConfig(block=32)) < take(working) < take(working, loss=LossConfig(block=512))


@pytest.mark.slow
def test_a_mesh_shares_what_it_says():
    def take(data, fsdp, tensor):
        return planned(build(trainable=LORA, mesh=MeshConfig(data, fsdp, tensor))).memory

    one, data, fsdp, tensor = take(1, 1, 1), take(2, 1, 1), take(1, 2, 1), take(1, 1, 2)
    assert data["frozen weights"] == one["frozen weights"]
    assert data["streams"] == fsdp["streams"] == one["streams"] / 2
    assert fsdp["frozen weights"] == pytest.approx(one["frozen weights"] / 2, rel=0.05)
    assert one["frozen weights"] / 2 < tensor["frozen weights"] < one["frozen weights"]  # tables are not shared over it
    assert max(fsdp["optimiser"], tensor["optimiser"]) < one["optimiser"]
    kept = dry_run.STEP[1]
    assert data[kept] == fsdp[kept] == pytest.approx(one[kept] / 2, rel=0.1)
    assert one[kept] / 2 < tensor[kept] < one[kept]


def test_devices_that_are_not_here_can_be_planned_for():
    assert dict(dry_run._mesh(build(mesh=MeshConfig(2, 2, 1)), None).shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert dry_run._mesh(build(batch=64, mesh=MeshConfig(-1, 2, 1)), 64).shape["data"] == 32


@pytest.mark.parametrize(
    ("mesh", "devices", "sentence"),
    [
        (MeshConfig(3, 1, 1), 4, "do not make up the 4 devices"),
        (MeshConfig(3, 1, 1), None, r"data.batch=4 does not divide among mesh.data=3"),
        (MeshConfig(1, 1, 3), None, r"mesh.tensor=3 does not divide the \d+ of"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, devices, sentence):
    with pytest.raises(InputError, match=sentence):
        dry_run.plan(build(mesh=mesh), devices)


@pytest.mark.parametrize(
    "name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("small", "moshi-7b"))]
)
def test_the_text_is_short_and_adds_up(name):
    cfg, began = fit(PRESETS[name]), time.perf_counter()
    found = dry_run.plan(cfg, devices=1)
    text = dry_run.lines(found)
    assert time.perf_counter() - began < 60
    assert len(text) <= 25
    assert max(map(len, text)) <= 130
    parameters = sum(found.parameters.values())
    assert f"{parameters / 1e6:,.2f} M, of which {found.trainable / 1e6:,.2f} M train" in text[0]
    assert sum("estimate" in line for line in text) == 2
    assert "rank" in next(line for line in text if "TTT layers" in line)
    like = state_like(cfg, sharding.make_mesh(1, 1, 1))
    assert [found.memory[part] for part in dry_run.ARRAYS[1:]] == list(map(size, like[2:]))


@pytest.mark.slow
def test_frozen_weights_have_the_types_of_their_files():
    cfg = build(trainable=TrainableConfig(base=False, ttt=False))
    half = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype="bfloat16"))
    found = planned(cfg)
    ttt = found.parameters["TTT layers"]
    base = sum(found.parameters.values()) - found.trainable - ttt
    assert planned(half).memory["frozen weights"] == 2 * base + 4 * ttt


MESSAGES = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7406166528 bytes.\nBufferAssignment OOM Debugging.",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.",
    "RESOURCE_EXHAUSTED: The program requires more memory than the available 79.1GiB",
    "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_too_little_memory_is_one_sentence_with_the_sizes_of_xla(message):
    sentence = str(dry_run.too_large(jax.errors.JaxRuntimeError(message), build(trainable=LORA)))
    assert message.splitlines()[0].rstrip(".") in sentence
    assert "\n" not in sentence


def test_what_to_lower_is_what_can_be_lowered():
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")

    def sentence(**changes):
        return str(dry_run.too_large(error, build(**changes)))

    flags = "--remat dots", "--accumulate", "--loss.block", "--data.batch", "--data.chunk", "remat-group", "--mesh.fsdp"
    places = [sentence().index(flag) for flag in flags]
    assert places == sorted(places)
    assert "--remat" not in sentence(remat="layers")
    assert "--accumulate" not in sentence(accumulate=4)
    assert "--data.batch" not in sentence(batch=1)
    assert isinstance(dry_run.too_large(MemoryError(), build()), InputError)


@pytest.mark.parametrize(
    "error", [RuntimeError("INTERNAL: cuDNN failed"), ValueError("shapes do not fit"), KeyError("out")]
)
def test_other_errors_are_not_explained_away(error):
    assert dry_run.too_large(error, build()) is None
