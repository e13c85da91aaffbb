"""A training step so small that it compiles in seconds: one layer of every kind, and random batches for it."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import jax
import numpy as np

from tests.helpers.drawing import OPTIONS, random_params
from train import step
from train.batches import Batch
from train.config import DataConfig, LossConfig, OptimConfig, TrainableConfig, TrainConfig
from train.partition import fit, shapes, split
from ttt_jax.config import DepthConfig, LoRAConfig, MoshiConfig, TTTConfig
from ttt_jax.distributed import sharding

MODEL = MoshiConfig(
    dim=16,
    num_layers=2,
    num_heads=2,
    hidden=24,
    context=6,
    card=12,
    text_card=20,
    n_q=3,
    dep_q=2,
    delays=(0, 0, 1, 1),
    depth=DepthConfig(dim=8, num_layers=1, num_heads=2, hidden=12),
    ttt=TTTConfig(layers="1", mini_batch=4, hidden=(2,), gate_init=0.5),
)
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(chunk=12, batch=4),
    optim=OptimConfig(lr=1e-2, ttt_lr=1e-2, warmup_steps=2),
    loss=LossConfig(text=3.0, text_padding=0.25, codebooks=(5.0, 1.0)),
    name="small",
    steps=40,
)
ROWS, FRAMES = CONFIG.data.batch, CONFIG.data.chunk
LORA = LoRAConfig(rank=2, maps=("attention", "ffn"))
ALL = TrainableConfig(base=True, ttt=True, lora=True)
NO_STOP = np.zeros(1, np.int32)


def config(**changes) -> TrainConfig:
    """`CONFIG` with fields replaced, its layers stacked as what trains needs; `ttt` and `lora` are the model's."""
    of_model = {
        name: changes.pop(name) for name in ("ttt", "lora", "num_layers", "num_heads", "dtype") if name in changes
    }
    return fit(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, **of_model), **changes))


def float64(cfg: TrainConfig) -> TrainConfig:
    """`cfg` with a model in float64, which a run is refused."""
    cfg = copy.copy(cfg)
    object.__setattr__(cfg, "model", dataclasses.replace(cfg.model, dtype="float64"))
    return cfg


def batch(chunks: int = 1, seed: int = 0, reset=(), absent: float = 0.1, frames: int = FRAMES) -> Batch:
    """Random tokens with padding of text and absent ones; rows end at different frames; `reset` are (chunk, row)."""
    rng = np.random.default_rng(seed)
    cards = np.array([MODEL.text_card] + MODEL.n_q * [MODEL.card])[:, None]
    tokens = rng.integers(0, cards, (chunks, ROWS, MODEL.num_streams, frames))
    padding = rng.random(tokens[:, :, 0].shape) < 0.4
    tokens[:, :, 0] = np.where(padding, rng.choice([0, 3], padding.shape), tokens[:, :, 0])
    tokens = np.where(rng.random(tokens.shape) < absent, -1, tokens).astype(np.int32)
    mask = np.ones((chunks, ROWS, frames), bool)
    for row in range(1, ROWS):
        mask[:, row, frames - 2 * row :] = False
    flags = np.zeros((chunks, ROWS), bool)
    for at in reset:
        flags[at] = True
    return Batch(np.where(mask[:, :, None], tokens, -1).astype(np.int32), mask, flags)


@cache
def some_params(cfg: TrainConfig, seed: int = 0, dtype=np.float32):
    """(trainable, frozen) parameters, none of them 0 or 1; no test may write to them."""
    return split(random_params(shapes(cfg.model), np.random.default_rng(seed), dtype), cfg)


def one_device() -> jax.sharding.Mesh:
    """The mesh of the one device of a test."""
    return sharding.make_mesh(1, 1, 1)


def compiled(cfg: TrainConfig, mesh: jax.sharding.Mesh, frozen, one: Batch, options=OPTIONS):
    """The step for batches like `one`, compiled quickly."""
    lowered = step.make_train_step(cfg, mesh).lower(step.state_like(cfg, mesh), frozen, one, NO_STOP)
    return lowered.compile(compiler_options=options)


def start(cfg: TrainConfig, trainable=None) -> step.TrainState:
    """The state before the first step on one device, in buffers that nothing else uses."""
    trainable = some_params(cfg)[0] if trainable is None else trainable
    return copied(_fresh(cfg)._replace(trainable=trainable))


@cache
def _fresh(cfg: TrainConfig) -> step.TrainState:
    return step.init_state(cfg, one_device(), some_params(cfg)[0])._replace(trainable=None)


def copied(tree):
    """A copy of `tree` in other buffers, since a step donates its arguments."""
    return jax.tree.map(lambda leaf: jax.numpy.array(leaf, copy=True), tree)
