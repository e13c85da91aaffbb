"""A Mimi so small that its programs compile in a second: random weights, a window of three frames."""

from __future__ import annotations

from functools import cache

import numpy as np

from ttt_jax.codec.mimi import file, model
from ttt_jax.codec.mimi.codec import MimiCodec
from ttt_jax.codec.mimi.config import MimiConfig, Use

CFG = MimiConfig(
    sample_rate=1600,
    filters=4,
    ratios=(8, 8),
    dim=16,
    num_layers=1,
    num_heads=2,
    hidden=24,
    context=6,
    quantizer_dim=8,
    codebooks=4,
    cardinality=32,
)
USE = Use(num_codebooks=4)


def params(seed: int = 0, cfg: MimiConfig = CFG) -> dict[str, np.ndarray]:
    """Random weights; layer scales are such that attention counts, codebooks such that codes are various."""
    found = model.init_params(cfg, seed)
    sizes = {"scale1": 0.5, "scale2": 0.5, "codebooks": 0.6}
    for name, array in found.items():
        if size := sizes.get(name.rsplit("/")[-1]):
            found[name] = array * np.float32(size / np.sqrt(np.square(array).mean()))
    return found


@cache
def codec(use: Use = USE) -> MimiCodec:
    """One codec for all tests, so that its programs compile once."""
    mimi = file.make(params(), CFG, use, licence="unknown", source="random")
    return MimiCodec(mimi.params, mimi.cfg, mimi.use, mimi.name, mimi.digest)


def audio(frames: int, rows: int | None = None, seed: int = 0) -> np.ndarray:
    """Noise of changing level: float32 [frames * S], or [rows, frames * S]."""
    rng, count = np.random.default_rng(seed), (rows or 1) * frames
    level = 10 ** rng.uniform(-1, 1, (count, CFG.frame_size // 16, 1))
    noise = (level * rng.standard_normal((count, CFG.frame_size // 16, 16))).astype(np.float32)
    return noise.reshape(-1) if rows is None else noise.reshape(rows, -1)
