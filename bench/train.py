"""Times whole training steps, optimiser included: ``python -m bench.train``.

Random codes through random weights; a cell is what trains, one to a process, so that the peak of memory is its own. Beside the figures stands the time that
the products alone would take at the rate that a large matrix product reaches here. Compilation is timed apart.

    python -m bench.train                                           # tiny, on a CPU
    python -m bench.train --shape 7b --cell lora+ttt      # the 7B in bfloat16 on a GPU of 80 GB
    python -m bench.train --shape 7b --set remat=dots data.batch=2  # fields of the training configuration
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.figures import peak, product_rate, random_params, spread
from train.batches import Batch
from train.config import PRESETS, TrainableConfig, TrainConfig
from train.flops import flops_per_frame
from train.partition import fit, split
from train.step import init_state, make_train_step
from ttt_jax.distributed import sharding

CELLS = {
    "lora+ttt": TrainableConfig(base=False),
    "lora": TrainableConfig(base=False, ttt=False),
    "ttt": TrainableConfig(base=False, lora=False),
    "all": TrainableConfig(),
}
NOMINAL = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12, "NVIDIA A100-SXM4-80GB": 311.9e12}
"""Dense bfloat16 operations a second, from the makers' data sheets."""


def main() -> None:
    """Prints a line, and writes the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", "small", "7b"], default="tiny")
    parser.add_argument("--cell", default="lora+ttt", choices=list(CELLS), help="what trains")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the training configuration")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trace", help="folder for a profile of three more steps")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    found = cell(args.cell, configuration(args.shape, args.cell, args.set), args.steps, args.trace)
    if args.out:
        about = {"device": jax.devices()[0].device_kind, "devices": len(jax.devices()), "jax": jax.__version__}
        args.out.write_text(json.dumps({**about, args.cell: found}, indent=1))


def configuration(shape: str, name: str, changes: list[str]) -> TrainConfig:
    """The preset of `shape` with what the cell `name` trains; of the 7B one row of 1,250 frames."""
    cfg = PRESETS["moshi-7b" if shape == "7b" else shape]
    rank = {"7b": 128, "small": 32, "tiny": 8}[shape] if "lora" in name else 0
    model = dataclasses.replace(cfg.model, lora=dataclasses.replace(cfg.model.lora, rank=rank))
    if name == "lora":
        model = dataclasses.replace(model, ttt=dataclasses.replace(model.ttt, layers="none"))
    cfg = dataclasses.replace(cfg, model=model, trainable=CELLS[name])
    if shape == "7b":
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=1), accumulate=1)
    for change in changes:
        path, _, value = change.partition("=")
        cfg = changed(cfg, path.split("."), value)
    return fit(cfg)


def changed(config: Any, path: list[str], value: str) -> Any:
    """`config` with the field at `path` read from `value`: JSON, or else the text itself."""
    if len(path) > 1:
        return dataclasses.replace(config, **{path[0]: changed(getattr(config, path[0]), path[1:], value)})
    try:
        return dataclasses.replace(config, **{path[0]: json.loads(value)})
    except ValueError:
        return dataclasses.replace(config, **{path[0]: value})


def cell(name: str, cfg: TrainConfig, steps: int, trace: str | None) -> dict[str, Any]:
    """Times the steps of one configuration."""
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    trainable, frozen = split(random_params(cfg.model), cfg)
    trainable = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable)
    trainable, frozen = (jax.device_put(tree, sharding.params_shardings(mesh, tree)) for tree in (trainable, frozen))
    state = init_state(cfg, mesh, trainable)
    rng, shape = np.random.default_rng(0), (cfg.bptt, cfg.data.batch, cfg.model.num_streams, cfg.data.chunk)
    batch = Batch(
        rng.integers(0, min(cfg.model.card, cfg.model.text_card), shape, np.int32),
        np.ones((*shape[:2], shape[-1]), bool),
        np.zeros(shape[:2], bool),
    )
    batch = Batch(*(jax.device_put(x, sharding.rows_sharding(mesh, 1)) for x in batch))
    stop = jax.device_put(np.zeros(mesh.size, np.int32), sharding.devices_sharding(mesh))
    began = time.perf_counter()
    step = make_train_step(cfg, mesh).lower(state, frozen, batch, stop).compile()
    compiled = time.perf_counter() - began
    memory = step.memory_analysis()
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, frozen, batch, stop)
        loss = float(jax.block_until_ready((state.step, metrics.loss))[1])
        times.append(time.perf_counter() - began)
    seconds = spread(times[2:])
    frames = cfg.bptt * cfg.data.batch * cfg.data.chunk
    forward, backward = flops_per_frame(cfg)
    whole = forward + backward
    rate = product_rate(cfg.model.dtype) * len(jax.devices())
    peak_rate = NOMINAL.get(jax.devices()[0].device_kind, float("nan")) * len(jax.devices())
    sizes = {
        what: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for what, tree in (("trained", trainable), ("frozen", frozen))
    }
    print(
        f"{name:9s} {jax.devices()[0].device_kind} x {len(jax.devices())}, jax {jax.__version__}: {cfg.bptt} x {cfg.data.batch} x"
        f" {cfg.data.chunk} frames, b = {cfg.model.ttt.mini_batch}, remat {cfg.remat}: {1e3 * seconds[0]:.1f} ms"
        f" ({1e3 * min(times[2:]):.1f}-{1e3 * max(times[2:]):.1f}), {frames / seconds[0]:,.0f} frames/s;"
        f" {whole * frames / 1e12:.1f} TFLOP a step, MFU {whole * frames / seconds[0] / peak_rate:.1%} of nominal, {whole * frames / seconds[0] / rate:.1%} of the {rate / 1e12:.0f}"
        f" TFLOP/s that a large product reaches;"
        f" compiled in {compiled:.0f} s; peak {peak():.1f} GB (temporary {memory.temp_size_in_bytes / 1e9:.1f});"
        f" {sizes['trained'] / 1e6:.1f} M parameters train, {sizes['frozen'] / 1e6:.1f} M do not; loss {loss:.3f}",
        flush=True,
    )
    if trace:
        with jax.profiler.trace(trace):
            for _ in range(3):
                state, metrics = step(state, frozen, batch, stop)
            jax.block_until_ready(state.step)
    return {
        "seconds": seconds,
        "frames_per_second": frames / seconds[0],
        "flops_per_frame": whole,
        "forward_flops_per_frame": forward,
        "rate": rate,
        "nominal_rate": peak_rate,
        "compile_seconds": compiled,
        "peak_gb": peak(),
        "loss": loss,
        **sizes,
    }


if __name__ == "__main__":
    main()
