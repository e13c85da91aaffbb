"""A small Mimi with random weights as a codec: 8 codebooks of 64 entries, which lie among its latents, so that codes
are various. Kyutai's files of it, ours, and converted weights that it came with."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.helpers import kyutai_files, mimi_files
from tests.helpers.places import FIXTURES
from ttt_jax.config import TTTConfig
from ttt_jax.convert import kyutai, mimi


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    """In Kyutai's layout."""
    weights, near = mimi_files.weights(), load_file(FIXTURES / "mimi.codes.safetensors")
    return weights | {name: array for name, array in near.items() if name in weights}


def write(folder: Path) -> Path:
    """Our file of it, made from a folder in Kyutai's layout; its path."""
    mimi(mimi_files.write(folder / "kyutai", tensors()), folder / "mimi.safetensors")
    return folder / "mimi.safetensors"


def write_model(folder: Path, with_mimi: bool = True) -> Path:
    """Converted weights of a small model of Kyutai's with a TTT layer, and with this Mimi beside it or not; their
    folder."""
    c = kyutai_files.config(
        **{"n_q": 16, "dep_q": 8, "card": 64, "text_card": 512, "delays": [0, 0, *[1] * 7, 0, *[1] * 7]},
        **{"mimi_name": mimi_files.NAME, "mimi_config_name": "codec.json"},
    )
    # Weights of size 1 would give losses so large that their rounding is seen.
    quiet = {name: array if "norm" in name else array / 8 for name, array in kyutai_files.weights(c).items()}
    source = kyutai_files.write(folder / "model", c, quiet)
    if with_mimi:
        save_file(tensors(), source / mimi_files.NAME)
    (source / "codec.json").write_text(json.dumps(mimi_files.CONFIG))
    kyutai(source, folder / "weights", ttt=TTTConfig(layers="1", mini_batch=4))
    return folder / "weights"
