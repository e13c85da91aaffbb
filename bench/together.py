"""Times training steps of several small runs, side by side and by themselves: ``python -m bench.together``.

The limit is a run by itself, timed in the same process: N runs one after the other take N times as long. Random codes, which lie on the
device: reading files is not part of it. Compilation is timed apart.

    python -m bench.together                      # the preset tiny, as python -m train --seeds trains it
    python -m bench.together --task --runs 3 9    # as experiments/memory.py trains it
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.figures import spread
from experiments.memory import TASK
from train.batches import Batch
from train.config import PRESETS, TrainConfig
from train.step import make_steps_together
from train.together import fresh


def main() -> None:
    """Prints a line for each number of runs, and writes the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--task", action="store_true", help="the configuration of experiments/memory.py, not that of the preset tiny"
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[3, 9])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    cfg = TASK if args.task else PRESETS["tiny"]
    found = {runs: cell(cfg, runs, args.steps) for runs in (1, *args.runs)}
    for runs, one in found.items():
        frames = runs * cfg.bptt * cfg.data.batch * cfg.data.chunk
        middle, low, high = (1e3 * one["seconds"][i] for i in range(3))
        print(
            f"{runs:3d} runs on {jax.devices()[0].device_kind}, jax {jax.__version__}: {middle:.1f} ms a step ({low:.1f}-{high:.1f}),"
            f" {frames / one['seconds'][0]:,.0f} frames/s, {one['seconds'][0] / found[1]['seconds'][0]:.2f} x one run;"
            f" compiled in {one['compile_seconds']:.0f} s"
        )
    if args.out:
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        args.out.write_text(json.dumps({**about, "runs": found}, indent=1))


def cell(cfg: TrainConfig, runs: int, steps: int) -> dict[str, Any]:
    """Times steps of so many runs."""
    state, frozen = fresh(cfg, range(runs))
    rng, shape = np.random.default_rng(0), (runs, cfg.bptt, cfg.data.batch, cfg.model.num_streams, cfg.data.chunk)
    batch = Batch(
        jnp.asarray(rng.integers(0, cfg.model.card, shape, np.int32)),
        jnp.ones((*shape[:3], shape[-1]), bool),
        jnp.zeros(shape[:3], bool),
    )
    stop = jnp.zeros(1, jnp.int32)
    began = time.perf_counter()
    step = make_steps_together(cfg, runs).lower(state, frozen, batch, stop).compile()
    compiled, times = time.perf_counter() - began, []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, frozen, batch, stop)
        jax.block_until_ready((state.step, metrics.loss))
        times.append(time.perf_counter() - began)
    return {"seconds": spread(times[2:]), "compile_seconds": compiled}


if __name__ == "__main__":
    main()
