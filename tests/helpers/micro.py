"""The smallest model that has every part, tokens for it, and manifests of them: training tests build on these."""

import dataclasses
import json

import numpy as np
from safetensors.numpy import save_file

from train.config import DataConfig, LossConfig, OptimConfig, TrainConfig
from ttt_jax.config import DepthConfig, MoshiConfig, TTTConfig
from ttt_jax.data.corpus import Source
from ttt_jax.data.frames import Recording

MODEL = MoshiConfig(
    dim=32,
    num_layers=2,
    num_heads=2,
    hidden=64,
    context=8,
    card=64,
    text_card=512,
    n_q=16,
    dep_q=8,
    depth=DepthConfig(dim=16, num_layers=1, num_heads=2, hidden=32),
    ttt=TTTConfig(layers="1", mini_batch=4),
)

# One configuration for all tests: a program of another shape or schedule would compile for half a minute.
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(chunk=32, batch=4),
    optim=OptimConfig(lr=1e-2, ttt_lr=1e-2, warmup_steps=2),
    loss=LossConfig(text=3.0, text_padding=0.25, codebooks=(5.0, 1.0)),
    name="micro",
    steps=40,
    log_every=1,
    checkpoint_every=20,
)


def config(**changes):
    """`CONFIG` with fields replaced."""
    return dataclasses.replace(CONFIG, **changes)


def files(lengths=(100, 61, 90, 45, 80), seed=0):
    """Random tokens, int32 [17, T] per length, most of them small numbers."""
    rng = np.random.default_rng(seed)
    return [np.minimum(rng.geometric(0.2, (17, n)) - 1, 63).astype(np.int32) for n in lengths]


def source(arrays, weight=1.0, name="micro"):
    """Token arrays as a source of training data; file i is called NAME/i."""
    recordings = [
        Recording(f"{name}/{i}", None, array.shape, None, lambda array=array: array) for i, array in enumerate(arrays)
    ]
    return Source(name, weight, tuple(recordings))


def write_manifest(folder, name, arrays, digest):
    """Write token arrays as codes made elsewhere, with the manifest that names them; its path."""
    lines = []
    for i, array in enumerate(arrays):
        path = folder / f"{name}{i}.safetensors"
        save_file({"codes": array}, path, metadata={"frame_rate": "12.5", "codec": digest})
        lines.append(json.dumps({"path": path.name, "duration": array.shape[1] / 12.5}))
    manifest = folder / f"{name}.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest
