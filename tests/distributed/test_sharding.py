"""Training on simulated devices: each mesh against one device, shardings of arrays, communication of devices."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers import small_step
from tests.helpers.many_devices import STEPS, computations, loops
from tests.helpers.places import ROOT
from tests.helpers.small_step import LORA
from train import optim, step
from train.config import PRESETS
from train.partition import shapes
from ttt_jax.config import LoRAConfig
from ttt_jax.distributed import sharding
from ttt_jax.errors import InputError
from ttt_jax.utils.trees import named

MESHES = ("2,2,2",)
MORE = ("2,1,2", "1,2,2", "4,1,1", "1,4,1", "2,1,2/2")
FAULTS = {"2,2,2-width": {False, True}, "1,2,2-rows": {True}}
"""By mesh and fault whether forward and backward (False, True) loops talk to other devices."""
either = pytest.mark.parametrize(
    "mesh",
    [
        *(pytest.param(mesh, marks=pytest.mark.integration) for mesh in MESHES),
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE),
    ],
)


def child(*words, devices):
    env = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen([sys.executable, *map(str, words)], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def run(folder, meshes, devices):
    process = child("-m", "tests.helpers.many_devices", folder / "out.json", *meshes, devices=devices)
    assert process.wait(timeout=900) == 0
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return run(tmp_path_factory.mktemp("few"), ["1,1,1", *MESHES], devices=8)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return run(tmp_path_factory.mktemp("more"), ["1,1,1", *MORE], devices=4)


@pytest.fixture
def found(request, mesh):
    """Results of one device and of the mesh."""
    results = request.getfixturevalue("more" if mesh in MORE else "few")
    return results["1,1,1"], results[mesh]


@either
def test_a_mesh_has_the_losses_and_norms_of_one_device(found):
    one, many = found
    assert len(one["metrics"]) == len(many["metrics"]) == STEPS
    for a, b in zip(one["metrics"], many["metrics"], strict=True):
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=1e-5, err_msg=name)
    assert np.ptp([step["loss"] for step in one["metrics"]]) > 1e-2


@either
def test_a_mesh_ends_in_the_state_of_one_device(found):
    one, many = found
    for part, tolerance in (("trainable", 1e-4), ("mu", 1e-6), ("stream", 5e-5)):
        assert one["state"][part].keys() == many["state"][part].keys()
        for name, leaf in one["state"][part].items():
            np.testing.assert_allclose(many["state"][part][name], leaf, atol=tolerance, err_msg=name)


def expected_shards(data, fsdp, tensor):
    """Shapes of every parameter on a device, written out for the model of `many_devices`."""
    d, e, h, k = 16, 8, 4, 4  # width, depth's width, heads, head width
    both = fsdp * tensor
    found = {
        "text_emb": (21, d // fsdp), "audio_emb": (3, 13, d // fsdp), "text_head": (20 // tensor, d // fsdp),
        "out_norm": (d,), "depth/text_emb": (21, e // fsdp), "depth/audio_emb": (1, 13, e // fsdp),
        "depth/norm1": (1, e), "depth/norm2": (1, e),
        "depth/input": (2, e // tensor, d // fsdp), "depth/heads": (2, 12 // tensor, e // fsdp),
        "depth/qkv": (2, 3, 2 // tensor, 4, e // fsdp), "depth/out": (2, e // fsdp, e // tensor),
        "depth/gate_up": (2, 2, 12 // tensor, e // fsdp), "depth/down": (2, e // fsdp, 12 // tensor),
    }  # fmt: skip
    for run in ("layers_00_00", "layers_01_01"):
        maps = {
            "attention/qkv": ((3, h // tensor, k), d // fsdp), "attention/out": ((d // fsdp,), d // tensor),
            "ffn/gate_up": ((2, 24 // tensor), d // fsdp), "ffn/down": ((d // fsdp,), 24 // tensor),
        }  # fmt: skip
        found |= {f"layers/{run}/{name}": (1, *out, inner) for name, (out, inner) in maps.items()}
        found |= {f"layers/{run}/{name}_lora_a": (1, 2, inner) for name, (_, inner) in maps.items()}
        found |= {f"layers/{run}/{name}_lora_b": (1, *out, 2) for name, (out, _) in maps.items()}
        # Their last axis is the rank, so an output axis takes what spreads the map's input axis.
        found |= {f"layers/{run}/attention/qkv_lora_b": (1, 3, h // both, k, 2)}
        found |= {f"layers/{run}/ffn/gate_up_lora_b": (1, 2, 24 // both, 2)}
        found |= {f"layers/{run}/norm1": (1, d), f"layers/{run}/norm2": (1, d)}
    ttt = {name: (d,) for name in ("norm", "post_norm_scale", "post_norm_bias", "gate", "out_bias")}
    ttt |= {f"{name}_kernel": (d // tensor, d // fsdp) for name in "qkv"} | {
        f"{name}_bias": (d // tensor,) for name in "qkv"
    }
    ttt |= {"out_kernel": (d // fsdp, d // tensor), "rate_bias": (h // tensor,), "rate_weight": (h // tensor, d)}
    ttt |= {"inner_w0": (h // tensor, k, 2 * k), "inner_w1": (h // tensor, 2 * k, k)}
    ttt |= {"inner_b0": (h // tensor, 2 * k), "inner_b1": (h // tensor, k)}
    ttt |= {"ln_scale": (h // tensor, k), "ln_bias": (h // tensor, k)}
    return found | {f"layers/layers_01_01/ttt/{name}": (1, *shape) for name, shape in ttt.items()}


@either
def test_arrays_lie_where_the_table_says_and_stay_there(found, mesh):
    _, many = found
    data, fsdp, tensor = map(int, mesh.split("/")[0].split(","))
    shards = {part: {name: tuple(shape) for name, shape in some.items()} for part, some in many["shards"].items()}
    expected = expected_shards(data, fsdp, tensor)
    assert shards["trainable"] == shards["mu"] == shards["nu"] == expected
    rows = small_step.ROWS // (data * fsdp)
    for name, shape in shards["stream"].items():
        if not name.startswith("layers/"):
            assert shape[0] == rows, name
        else:
            assert shape[1] == rows, name
            assert name.endswith("/count") or shape[2] == 4 // tensor, name
    assert many["moved"] == []


# Communication


def inner_loops(result):
    """The scans over mini-batches, forth and back: loops of TTT layers with products in them."""
    return [loop for loop in result["loops"] if loop["ttt"] and loop["products"]]


@either
def test_the_inner_loop_has_no_communication(found, mesh):
    _, many = found
    found_loops = inner_loops(many)
    assert {loop["backward"] for loop in found_loops} == {False, True}
    assert [loop for loop in found_loops if loop["collectives"]] == []
    assert "all-reduce" in many["collectives"]  # of gradients, outside


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_communication_in_the_inner_loop_is_noticed(tmp_path, fault):
    broken = run(tmp_path, [fault], devices=8 if fault.startswith("2,2,2") else 4)[fault]
    assert {loop["backward"] for loop in inner_loops(broken) if loop["collectives"]} >= FAULTS[fault]


def test_loops_are_followed_into_what_they_call():
    text = """
%add (a: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %a)
}

%deep (p: f32[2]) -> f32[2] {
  ROOT %r = f32[2] all-reduce(%p), to_apply=%add
}

%body.1 (p: (f32[2])) -> (f32[2]) {
  %d = f32[2] dot(%p, %p), metadata={op_name="jit(f)/ttt/while/body/dot"}
  ROOT %c = f32[2] fusion(%d), kind=kLoop, calls=%deep
}

%cond.1 (p: (f32[2])) -> pred[] {
  ROOT %t = pred[] constant(true)
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %w = (f32[2]) while(%p), condition=%cond.1, body=%body.1, metadata={op_name="jit(f)/transpose(jvp())/ttt/while"}
  ROOT %g = f32[2] all-gather(%w), dimensions={0}
}
"""
    assert computations(text).keys() == {"add", "deep", "body.1", "cond.1", "main"}
    (loop,) = loops(text)
    assert loop["collectives"] == ["all-reduce"]
    assert (loop["ttt"], loop["backward"], loop["products"]) == (True, True, 1)


@pytest.mark.integration
def test_random_weights_are_those_of_one_device_and_lie_where_the_step_wants_them(few):
    assert few["start"]["differ"] == few["start"]["elsewhere"] == []
    assert few["start"]["names"] > 50


# The table


def with_all(cfg):
    """`cfg` with adapters, further heads, a low-rank depth transformer and shared weight sets."""
    depth = dataclasses.replace(cfg.depth, low_rank=8, schedule=(0, 1) + (2,) * (cfg.dep_q - 2))
    return dataclasses.replace(cfg, lora=LoRAConfig(rank=4), depth=depth, extra_heads=2)


@pytest.mark.parametrize("name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS)])
@pytest.mark.parametrize("whole", [with_all, pytest.param(lambda cfg: cfg, marks=pytest.mark.slow)])
def test_every_parameter_has_a_place_and_a_group(name, whole):
    cfg = whole(PRESETS[name].model)
    for path, shape in named(shapes(cfg)).items():
        found = sharding.spec(path, shape.ndim)
        assert len(found) in (0, shape.ndim), path
        assert {axis for axis in found if axis} <= {"fsdp", "tensor", ("tensor", "fsdp")}
        # Whatever is large is spread, and by heads or hidden units where there are any.
        large = shape.size >= cfg.dim * cfg.depth.dim and "_lora_" not in path
        assert not large or any(found) or "inner_" in path, path
    groups = named(optim.groups(shapes(cfg)))
    assert set(groups.values()) == {"base", "ttt", "gate"} | ({"lora"} if cfg.lora.rank else set())


def test_a_parameter_that_no_rule_covers_is_an_error():
    with pytest.raises(ValueError, match="surprise"):
        sharding.spec("layers/layers_00_00/surprise", 2)


# Sizes that do not fit


def imagined(*sizes):
    """A mesh of any sizes, without devices."""
    return jax.sharding.AbstractMesh(sizes, sharding.AXES)


def refused(call, *parts):
    with pytest.raises(InputError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((1, 1, 4), ("mesh.tensor=4", "qkv", "does not divide the 2")),
        ((1, 3, 1), ("mesh.fsdp=3", "does not divide the")),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_one_sentence(sizes, parts):
    cfg = small_step.config(lora=LORA)
    refused(lambda: step.state_like(cfg, imagined(*sizes)), *parts)


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1), (1, 4, 1)])
def test_a_batch_that_does_not_divide_is_one_sentence(sizes):
    mesh, named_axes = imagined(*sizes), f"mesh.data={sizes[0]} x mesh.fsdp={sizes[1]}"
    refused(lambda: sharding.check_rows(mesh, 6, 1), "data.batch=6", named_axes, "multiple of 4")
    refused(lambda: sharding.check_rows(mesh, 4, 2), "data.batch=4", "accumulate=2", named_axes, "multiple of 8")
    sharding.check_rows(mesh, 8, 2)
    sharding.check_rows(imagined(1, 1, 4), 3, 3)  # tensor spreads no rows


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 2, 1), (1, 1, 2), (-1, 1, 3)])
def test_sizes_that_are_not_the_devices_are_one_sentence(sizes):
    refused(lambda: sharding.make_mesh(*sizes), f"mesh.data={sizes[0]}", "the 1 devices")


def test_one_size_follows_from_the_others():
    for sizes in ((-1, 1, 1), (1, 1, -1)):
        assert dict(sharding.make_mesh(*sizes).shape) == dict.fromkeys(sharding.AXES, 1)
    assert sharding.local_rows(sharding.make_mesh(1, 1, 1), 5) == range(5)


ROWS_OF_PROCESSES = """
import sys
import jax
from ttt_jax.distributed import sharding
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
meshes = (4, 1, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4)
print([list(sharding.local_rows(sharding.make_mesh(*sizes), 8)) for sizes in meshes])
"""


@pytest.mark.integration
def test_a_process_reads_the_rows_of_its_devices():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [child("-c", ROWS_OF_PROCESSES, port, i, devices=2) for i in range(2)]
    try:
        rows = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both]
    finally:
        for process in both:
            process.kill()
    halves = [list(range(4)), list(range(4, 8))]
    for i in range(2):
        assert rows[i] == 4 * [halves[i]] + [list(range(8))]
