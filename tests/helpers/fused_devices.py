"""The fused inner loop on simulated devices, for `distributed/test_fused_sharding.py`: it runs as a process and writes
results as JSON.

    JAX_NUM_CPU_DEVICES=8 python -m tests.helpers.fused_devices OUT
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from tests.helpers.drawing import OPTIONS
from tests.helpers.many_devices import loops
from tests.helpers.small_fused import config, drawn, loss_weights, value_and_grads
from ttt_jax.distributed import sharding
from ttt_jax.ttt.fused import scan as module
from ttt_jax.ttt.fused.scan import fused_scan

MESHES = {"2,2,2": (4, (2, 2, 2)), "rows do not divide": (3, (2, 2, 2)), "heads do not divide": (4, (1, 2, 4))}
FRAMES, MINI_BATCH = 150, 4


def worst(got: object, expected: object) -> float:
    """Largest error of a leaf, relative to the larger of 1 and its greatest magnitude."""

    def error(a: jax.Array, b: jax.Array) -> float:
        a, b = np.asarray(a), np.asarray(b)
        return float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) if b.size else 0.0

    return max(jax.tree.leaves(jax.tree.map(error, got, expected)))


def run(rows: int, sizes: tuple[int, int, int]) -> dict:
    """Errors of results and gradients against one device, where z lies, and the loops of the program."""
    cfg, args = config(MINI_BATCH), drawn(0, FRAMES, MINI_BATCH, rows=rows)
    weights = loss_weights(args)

    def both(*args):
        return fused_scan(*args[:6], cfg, True), value_and_grads(fused_scan, *args[:6], cfg, args[6])

    expected = jax.jit(both, compiler_options=OPTIONS)(*args, weights)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        program = jax.jit(both).lower(*args, weights).compile(compiler_options=OPTIONS)
        got = program(*args, weights)
    return {
        "results": worst(got[0], expected[0]),
        "gradients": worst(got[1], expected[1]),
        "shard": got[0][1].sharding.shard_shape(got[0][1].shape),
        "loops": loops(program.as_text()),
    }


def main(out: str) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_enable_x64", True)
    results = {name: run(*mesh) for name, mesh in MESHES.items()}
    module.CHUNK_BYTES = 10 * module._held(drawn(0, 1, MINI_BATCH)[0], config(MINI_BATCH), 1)
    results["2,2,2 in chunks"] = run(*MESHES["2,2,2"])
    with open(out, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
