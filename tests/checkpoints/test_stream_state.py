"""The file of a state: every type comes back, and no copy of it is made, which would hold all threads."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from ttt_jax.checkpoints import stream_state

TYPES = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.int32, np.int64, np.uint32, np.uint8, np.bool_]


def test_every_type_and_shape_comes_back(tmp_path):
    path, rng = tmp_path / "a.safetensors", np.random.default_rng(0)
    tree = {f"x{i}": rng.integers(0, 2, (3, 2, 5)).astype(dtype) for i, dtype in enumerate(TYPES)}
    tree |= {"turned": np.arange(6.0).reshape(2, 3).T, "scalar": np.float32(3), "empty": np.zeros((0, 4), np.float32)}
    stream_state.write(path, tree, {"about": "é"})
    stored = stream_state.read(path, "a tree")
    assert stored.about == {"about": "é"}
    for found in (stored.like(tree), {name: leaf for name, leaf in load_file(path).items()}):
        for name, leaf in tree.items():
            assert found[name].dtype == leaf.dtype
            np.testing.assert_array_equal(found[name], leaf, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_state_is_written_without_a_copy(tmp_path, dtype):
    tree = {"k": np.ones((16, 1 << 20), dtype)}
    tracemalloc.start()
    try:
        stream_state.write(tmp_path / "a.safetensors", tree, {})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < tree["k"].nbytes / 4
