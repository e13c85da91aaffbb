"""The fused inner loop on simulated devices: each mesh against one device, where results lie, communication."""

import json
import os
import subprocess
import sys

import jax
import pytest

from tests.helpers.places import ROOT

pytestmark = pytest.mark.integration
meshes = pytest.mark.parametrize(
    ("mesh", "shard"),
    [
        ("2,2,2", [1, 150, 1, 16]),
        ("2,2,2 in chunks", [1, 150, 1, 16]),
        ("rows do not divide", [3, 150, 1, 16]),
        ("heads do not divide", [2, 150, 2, 16]),
    ],
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("fused") / "out.json"
    env = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    }
    subprocess.run([sys.executable, "-m", "tests.helpers.fused_devices", str(out)], env=env, cwd=ROOT, check=True)
    return json.loads(out.read_text())


@meshes
def test_a_mesh_has_the_results_of_one_device(found, mesh, shard):
    assert found[mesh]["results"] < 1e-10
    assert found[mesh]["gradients"] < 1e-10
    assert found[mesh]["shard"] == shard


@meshes
def test_loops_have_no_communication(found, mesh, shard):
    inner = [loop for loop in found[mesh]["loops"] if loop["products"]]
    assert {loop["backward"] for loop in inner} == {False, True}
    assert [loop for loop in inner if loop["collectives"]] == []
