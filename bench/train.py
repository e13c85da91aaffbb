"""Times whole training steps, optimiser included: ``python -m bench.train``.

Random codes go through random weights. A cell names the trainable parts; a process times one cell, so that the peak of
memory is that of the cell. The rate of a large matrix product is printed for comparison. Compilation is timed apart.

    python -m bench.train                                           # tiny, on a CPU
    python -m bench.train --shape 7b --cell lora+ttt                # the 7B in bfloat16 on a GPU of 80 GB
    python -m bench.train --shape 7b --set remat=dots data.batch=2  # fields of the training configuration
    python -m bench.train --together 1 3 9    # runs side by side, as python -m train --seeds trains the preset tiny
    python -m bench.train --together 1 3 9 --shape task             # as experiments/memory trains them
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.figures import device, peak, product_rate, random_params
from experiments.memory import TASK
from train.batches import Batch
from train.config import PRESETS, TrainableConfig, TrainConfig
from train.flops import flops_per_frame
from train.partition import fit, split
from train.step import init_state, init_states, make_steps_together, make_train_step
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
    """Prints a line for the cell, or for each number of runs side by side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", "small", "7b", "task"], default="tiny")
    parser.add_argument("--cell", default="lora+ttt", choices=list(CELLS), help="what trains")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the training configuration")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--together", type=int, nargs="+", metavar="RUNS", help="times so many runs side by side")
    args = parser.parse_args()
    if args.together:
        print_together(TASK if args.shape == "task" else PRESETS[args.shape], args.together, args.steps)
    else:
        print_cell(args.cell, configuration(args.shape, args.cell, args.set), args.steps)


def configuration(shape: str, name: str, changes: list[str]) -> TrainConfig:
    """Returns the preset of `shape` with the trainable parts of the cell `name`; of the 7B one row of 1,250 frames."""
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
    """Returns `config` with the field at `path` read from `value`: JSON, or else the text itself."""
    if len(path) > 1:
        return dataclasses.replace(config, **{path[0]: changed(getattr(config, path[0]), path[1:], value)})
    try:
        return dataclasses.replace(config, **{path[0]: json.loads(value)})
    except ValueError:
        return dataclasses.replace(config, **{path[0]: value})


def random_batch(cfg: TrainConfig, *lead: int) -> Batch:
    """Returns the random codes of a step, all frames valid, with leading axes `lead`."""
    shape = (*lead, cfg.bptt, cfg.data.batch, cfg.model.num_streams, cfg.data.chunk)
    cards = min(cfg.model.card, cfg.model.text_card)
    tokens = np.random.default_rng(0).integers(0, cards, shape, np.int32)
    return Batch(tokens, np.ones((*shape[:-2], shape[-1]), bool), np.zeros(shape[:-2], bool))


def timed(lowered: Any, state: Any, *inputs: Any, steps: int) -> tuple[Callable, list[float], float, Any]:
    """Returns the compiled step, seconds of each of its `steps` after two, seconds of compiling, the last loss."""
    began = time.perf_counter()
    step = lowered.compile()
    compiled, times = time.perf_counter() - began, []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, *inputs)
        loss = jax.block_until_ready((state.step, metrics.loss))[1]
        times.append(time.perf_counter() - began)
    return step, times[2:], compiled, loss


def print_cell(name: str, cfg: TrainConfig, steps: int) -> None:
    """Times the steps of a configuration."""
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    trainable, frozen = split(random_params(cfg.model), cfg)
    trainable = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable)
    trainable, frozen = (jax.device_put(tree, sharding.params_shardings(mesh, tree)) for tree in (trainable, frozen))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trainable, frozen)]
    batch = Batch(*(jax.device_put(x, sharding.rows_sharding(mesh, 1)) for x in random_batch(cfg)))
    stop = jax.device_put(np.zeros(mesh.size, np.int32), sharding.devices_sharding(mesh))
    inputs = init_state(cfg, mesh, trainable), frozen, batch, stop
    step, times, compiled, loss = timed(make_train_step(cfg, mesh).lower(*inputs), *inputs, steps=steps)
    seconds, devices = float(np.median(times)), jax.devices()
    frames = cfg.bptt * cfg.data.batch * cfg.data.chunk
    flops = sum(flops_per_frame(cfg)) * frames
    rate = product_rate(cfg.model.dtype) * len(devices)
    nominal = NOMINAL.get(devices[0].device_kind, float("nan")) * len(devices)
    print(
        f"{name:9s} {device()} x {len(devices)}: {cfg.bptt} x"
        f" {cfg.data.batch} x {cfg.data.chunk} frames, b = {cfg.model.ttt.mini_batch}, remat {cfg.remat}:"
        f" {1e3 * seconds:.1f} ms ({1e3 * min(times):.1f}-{1e3 * max(times):.1f}),"
        f" {frames / seconds:,.0f} frames/s; {flops / 1e12:.1f} TFLOP a step,"
        f" MFU {flops / seconds / nominal:.1%} of nominal,"
        f" {flops / seconds / rate:.1%} of the {rate / 1e12:.0f} TFLOP/s that a large product reaches;"
        f" compiled in {compiled:.0f} s; peak {peak():.1f} GB"
        f" (temporary {step.memory_analysis().temp_size_in_bytes / 1e9:.1f});"
        f" {sizes[0] / 1e6:.1f} M parameters train, {sizes[1] / 1e6:.1f} M do not; loss {loss:.3f}"
    )


def print_together(cfg: TrainConfig, numbers: Sequence[int], steps: int) -> None:
    """Times steps of several small runs side by side, relative to the first of `numbers`."""
    first = None
    for runs in numbers:
        inputs = *init_states(cfg, range(runs)), jax.device_put(random_batch(cfg, runs)), jnp.zeros(1, jnp.int32)
        _, times, compiled, _ = timed(make_steps_together(cfg, runs).lower(*inputs), *inputs, steps=steps)
        seconds = float(np.median(times))
        first = first or seconds
        print(
            f"{runs:3d} runs on {device()}: {1e3 * seconds:.1f} ms a step"
            f" ({1e3 * min(times):.1f}-{1e3 * max(times):.1f}),"
            f" {runs * cfg.bptt * cfg.data.batch * cfg.data.chunk / seconds:,.0f} frames/s,"
            f" {seconds / first:.2f} x {numbers[0]}; compiled in {compiled:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
