"""Training on simulated devices, for `distributed/test_sharding.py`: it runs as a process and writes results as JSON.

    JAX_NUM_CPU_DEVICES=8 python -m tests.helpers.many_devices OUT [MESH ...]

with meshes such as "2,2,2" (data, fsdp, tensor), or "2,1,2/2" for a batch in two parts. A mesh with a word behind it
plants a fault in the library and looks at the program alone: "2,2,2-width" spreads the width of heads instead of heads,
"1,2,2-rows" sums the gradients of rows in each step of the inner loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from unittest import mock

import jax
import numpy as np

from tests.helpers import small_step
from tests.helpers.drawing import OPTIONS
from tests.helpers.small_step import LORA, batch
from train import initial_params, step
from train.partition import split
from ttt_jax.distributed import sharding
from ttt_jax.ttt import inner, layer
from ttt_jax.utils.trees import named

STEPS = 3
FRAMES = 20
COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(-start)?\("
)


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation of an HLO module, by its name."""
    found, current = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            current = found.setdefault(head[1], [])
        elif current is not None and line.startswith(" "):
            current.append(line.strip())
    return found


def called(line: str) -> list[str]:
    """The computations that an instruction names."""
    names = re.findall(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line)
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    return names


def loops(text: str) -> list[dict]:
    """For every loop its op_name, whether it belongs to a TTT layer, and the products and collectives inside."""
    all_ = computations(text)

    def reached(name: str, seen: set[str]) -> set[str]:
        if name not in seen and name in all_:
            seen.add(name)
            for line in all_[name]:
                for other in called(line):
                    reached(other, seen)
        return seen

    found = []
    for lines in all_.values():
        for line in lines:
            if not re.search(r"\bwhile\(", line):
                continue
            inside = [inner for name in set().union(*(reached(n, set()) for n in called(line))) for inner in all_[name]]
            name = re.search(r'op_name="([^"]*)"', line)
            names = [m[1] for inner in [line, *inside] if (m := re.search(r'op_name="([^"]*)"', inner))]
            found.append(
                {
                    "name": name[1] if name else "",
                    "ttt": name is not None and "/ttt/" in name[1],
                    "backward": any("transpose(" in n for n in names),
                    "products": sum(bool(re.search(r"\bdot\(|custom-call.*(dot|matmul)", inner)) for inner in inside),
                    "collectives": sorted({m[1] for inner in inside if (m := COLLECTIVES.search(inner))}),
                }
            )
    return found


FAULTS = {
    "": contextlib.nullcontext(),
    "width": mock.patch.object(
        layer, "by_rows", lambda y, *_: sharding.by_rows(y, *[None, None, "tensor"][: y.ndim - 1])
    ),
    "rows": mock.patch.object(inner, "per_row", lambda tree, rows: tree, create=True),
}


def put(tree, places):
    return jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s), tree, places)


def run(mesh: jax.sharding.Mesh, accumulate: int, steps: int = STEPS) -> dict:
    """Some steps on `mesh`: their metrics, the last state, its shardings, and the loops of the program."""
    ttt = dataclasses.replace(small_step.MODEL.ttt, remat_group=2)  # a scan in a scan, and a rest
    cfg = small_step.config(lora=LORA, accumulate=accumulate, ttt=ttt, num_heads=4)
    like = step.state_like(cfg, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    trainable = put(small_step.some_params(cfg)[0], places.trainable)
    state = step.init_state(cfg, mesh, trainable)
    rows, stop = (
        sharding.rows_sharding(mesh, 1),
        jax.device_put(np.zeros(mesh.size, np.int32), sharding.devices_sharding(mesh)),
    )
    batches = [batch(seed=i, frames=FRAMES, reset=[(0, 1)] if i == 1 else ()) for i in range(max(steps, 1))]
    batches = [type(one)(*(jax.device_put(x, rows) for x in one)) for one in batches]
    program = step.make_train_step(cfg, mesh).lower(state, {}, batches[0], stop).compile(compiler_options=OPTIONS)
    metrics_of, moved = [], []
    for one in batches[:steps]:
        state, metrics = program(state, {}, one, stop)
        numbers = {name: getattr(metrics, name) for name in ("loss", "streams", "rows", "grad_norm")}
        numbers |= metrics.grad_norms | {"displacement": metrics.ttt[1]["displacement_norm"]}
        metrics_of.append({name: np.asarray(value).tolist() for name, value in numbers.items()})
        leaves = zip(named(state).items(), jax.tree.leaves(like), strict=True)
        moved += [name for (name, leaf), want in leaves if leaf.sharding != want.sharding]
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    trees = {"trainable": state.trainable, "mu": adam.mu, "nu": adam.nu, "stream": state.stream}

    def shards(tree):
        return {name: list(leaf.sharding.shard_shape(leaf.shape)) for name, leaf in named(tree).items()}

    text = program.as_text()
    return {
        "metrics": metrics_of,
        "moved": moved,
        "shards": {name: shards(tree) for name, tree in trees.items()},
        "loops": loops(text),
        "collectives": sorted({m[1] for m in COLLECTIVES.finditer(text)}),
        "state": {
            part: {name: np.asarray(leaf).tolist() for name, leaf in named(trees[part]).items()}
            for part in ("trainable", "mu", "stream")
        },
    }  # fmt: skip


def start(mesh: jax.sharding.Mesh, one: jax.sharding.Mesh) -> dict:
    """Random parameters that differ from those of one device, or have another sharding than the step expects."""
    cfg = small_step.config(lora=LORA, num_heads=4)
    found, expected = (named(split(initial_params.initial(cfg, m).trainable, cfg)[0]) for m in (mesh, one))
    table = named(step.state_like(cfg, mesh).trainable)
    return {
        "differ": [name for name in found if not np.allclose(found[name], expected[name], atol=1e-6)],
        "elsewhere": [name for name in found if found[name].sharding != table[name].sharding],
        "names": len(found),
    }


def main(out: str, wanted: list[str]) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    results = {}
    for name in wanted:
        sizes = [int(size) for size in re.match(r"[\d,]+", name)[0].split(",")]
        mesh = one if sizes == [1, 1, 1] else sharding.make_mesh(*sizes)
        _, _, fault = name.partition("-")
        with FAULTS[fault]:
            results[name] = run(mesh, 2 if name.endswith("/2") else 1, 0 if fault else STEPS)
    results["start"] = start(sharding.make_mesh(2, 2, 2), one) if "2,2,2" in wanted else None
    with open(out, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
