"""Training on controlled tasks, so small that it takes seconds: one configuration, so that its program compiles
once."""

import dataclasses
from pathlib import Path

from eval.tasks.dataset import Settings, make
from tests.helpers import micro
from train.config import DataConfig, LossConfig, OptimConfig, TrainConfig
from ttt_jax.config import DepthConfig, TTTConfig

CONFIG = TrainConfig(
    model=dataclasses.replace(
        micro.MODEL,
        dim=16,
        num_layers=1,
        hidden=24,
        context=6,
        depth=DepthConfig(dim=8, num_layers=1, num_heads=2, hidden=12),
        ttt=TTTConfig(layers="0", mini_batch=8, hidden=()),
    ),
    data=DataConfig(chunk=64, batch=2, codec="files", from_start=True),
    optim=OptimConfig(lr=1e-2, ttt_lr=1e-2, warmup_steps=2),
    loss=LossConfig(text=0.1),  # there are chunks without an answer
    steps=6,
    checkpoint_every=2,
)
SHORT = Settings("", files=4, frames=128, every=3, seed=1)
LONG = Settings("", files=3, frames=200, every=7, seed=2)


def write_data(folder: Path, task: str) -> str:
    """Files of two lengths in `folder`; the data.train that names them."""
    for name, settings in (("short", SHORT), ("long", LONG)):
        make(dataclasses.replace(settings, task=task), folder / name)
    return f"{folder / 'short'}:2,{folder / 'long'}:1"
