"""Small checkpoints, in memory and on disk, and recordings for them: tests of the evaluation commands use these."""

import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from tests.helpers import micro
from tests.helpers.drawing import random_params
from ttt_jax.checkpoints.loading import Checkpoint
from ttt_jax.checkpoints.run_checkpoints import Checkpoints
from ttt_jax.codec import load_codec
from ttt_jax.moshi import model
from ttt_jax.utils import config_json

DIGEST = load_codec().digest


@cache
def params(cfg=micro.MODEL, seed=0):
    """Random weights, gates open and TTT layers' outputs far from 0."""
    shapes = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    return random_params(shapes, np.random.default_rng(seed), cfg.dtype)


def write_run(folder: Path, cfg=micro.CONFIG, seed=0, codec=DIGEST) -> Path:
    """Writes a run with one checkpoint of random weights; returns its folder."""
    checkpoints = Checkpoints(folder, keep=1)
    meta = {"config": config_json.to_dict(cfg), "codec": {"name": "a codec", "digest": codec}}
    checkpoints.save(1, params(cfg.model, seed), {"none": np.zeros(1)}, {"none": 0}, json.loads(json.dumps(meta)))
    checkpoints.close()
    return folder


def checkpoint(cfg=micro.MODEL, name="run") -> Checkpoint:
    """A run's checkpoint without weights."""
    about = {"codec": {"name": "a codec", "digest": DIGEST}}
    return Checkpoint(name, cfg, {}, about, micro.CONFIG.data, micro.CONFIG.data.chunk)


def tokens(frames=60, seed=0) -> np.ndarray:
    """int32 [17, frames] as the embedded codec could give them."""
    return micro.files((frames,), seed)[0]


def write_codes(path: Path, codes: np.ndarray, codec=DIGEST) -> Path:
    """Writes codes of the embedded codec, or of another digest; returns the path."""
    save_file({"codes": codes}, path, metadata={"frame_rate": "12.5", "codec": codec})
    return path


def write_data(folder, codes, digest=DIGEST, **extra):
    """A manifest of code files: with a text row, except the last, which has none."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, array in enumerate(codes):
        path = folder / f"{i}.safetensors"
        save_file({"codes": array}, path, metadata={"frame_rate": "12.5", "codec": digest})
        lines.append(json.dumps({"path": path.name, "duration": array.shape[1] / 12.5, **extra}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder
