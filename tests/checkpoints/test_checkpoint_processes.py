"""Checkpoints after a kill at any moment, of sharded arrays and of several processes."""

import os
import random
import subprocess
import sys
import time

import pytest

from tests.helpers.comparing import same
from tests.helpers.places import ROOT
from ttt_jax.checkpoints.run_checkpoints import Checkpoints

KILLS = 6


def named_steps(run):
    return {path.name for path in (run / "checkpoints").iterdir()}


SAVING = """
import sys
import jax.numpy as jnp
from ttt_jax.checkpoints.run_checkpoints import Checkpoints

def content(step):
    return {"w": jnp.arange(500_000, dtype=jnp.float32) + step}, {"m": [jnp.full((300, 1000), step, jnp.bfloat16)] * 2}

if __name__ == "__main__":
    checkpoints, done = Checkpoints(sys.argv[1], keep=2), 0
    if checkpoints.steps():
        done = checkpoints.restore(lambda meta: content(0)).step
    for step in range(done + 1, done + 1 + int(sys.argv[2])):
        checkpoints.save(step, *content(step), {"at": step}, {}, validation=abs(step - 5))
        print(step - 1, flush=True)  # is on disk: a save waits for the one before
    checkpoints.close()
    print(step, flush=True)
"""


def child(tmp_path, *args, source=SAVING):
    (tmp_path / "saving.py").write_text(source)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "saving.py"), *map(str, args)], env=env, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.integration
def test_a_kill_at_any_moment_leaves_every_save_that_was_finished(tmp_path, monkeypatch):
    rng, in_a_save, last = random.Random(0), 0, 0
    for _ in range(KILLS):
        process = child(tmp_path, tmp_path / "run", 1000)
        process.stdout.readline()  # it has begun to save
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        reported = [int(line) for line in process.stdout.read().splitlines()]
        process.wait()
        last = max([last, *reported])
        names = named_steps(tmp_path / "run")
        in_a_save += any(not name.isdecimal() for name in names)
        if not any(name.isdecimal() for name in names):
            assert last == 0
            continue
        monkeypatch.syspath_prepend(str(tmp_path))
        from saving import content

        reader = Checkpoints(tmp_path / "run")
        steps = reader.steps()
        assert len(steps) <= 5  # two, the best, one that is new and one not yet removed
        saved = reader.restore(lambda meta: content(0))
        assert saved.step == steps[-1] >= last
        same((saved.params, saved.state), content(saved.step))
        assert saved.data == {"at": saved.step}
        if saved.step >= 5:
            assert 5 in steps
            assert reader.best() == 5
        last = saved.step
    assert in_a_save >= KILLS // 2
    assert not (tmp_path / "run" / "damaged").exists()
    process = child(tmp_path, tmp_path / "run", 1)
    assert int(process.communicate()[0].splitlines()[-1]) == last + 1
    best = min(last + 1, 5)  # a busy machine may not get as far as 5
    assert named_steps(tmp_path / "run") == {str(best), str(last), str(last + 1)}


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from ttt_jax.checkpoints import checksums
from ttt_jax.checkpoints.run_checkpoints import Checkpoints

mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
w = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
put = lambda *spec: {"w": jax.device_put(w, NamedSharding(mesh, P(*spec))), "step": jnp.int32(3)}
single = {"w": jax.device_put(w, jax.devices()[3]), "step": jnp.int32(3)}
places = [put("x", "y"), put(("x", "y")), put(None, "y"), put(), single]
totals = [{name: int(total) for name, total in checksums.sums(place).items()} for place in places]
assert all(total == totals[0] for total in totals), totals
checkpoints = Checkpoints(sys.argv[1], keep=9)
checkpoints.save(1, places[0], {"s": places[0]["w"]}, {}, {})
checkpoints.save(2, places[1], {"s": places[2]["w"]}, {}, {})
checkpoints.close()
for place in places:
    saved = Checkpoints(sys.argv[1]).restore(lambda meta: (place, {"s": place["w"]}))
    assert saved.step == 2
    for found in (saved.params["w"], saved.state["s"]):
        assert found.sharding == place["w"].sharding, found.sharding
        np.testing.assert_array_equal(found, w)
print("done")
"""


@pytest.mark.integration
def test_sharded_arrays_come_back_in_other_places_with_the_same_sums(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    process = child(tmp_path, tmp_path / "run", source=SHARDED)
    assert process.communicate()[0].splitlines()[-1] == "done"


PROCESSES = """
import logging, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pathlib import Path
from ttt_jax.checkpoints.run_checkpoints import Checkpoints

jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
run = Path(sys.argv[1])
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
w = np.random.default_rng(0).normal(size=(8, 5000)).astype(np.float32)

def put(step):
    return {"w": jax.make_array_from_callback(w.shape, NamedSharding(mesh, P("x")), lambda index: w[index] + step)}

checkpoints = Checkpoints(run, keep=2)
for step in (1, 2, 3, 4):
    checkpoints.save(step, put(step), put(-step), {"at": step}, {}, validation=step)
checkpoints.close()
assert checkpoints.steps() == [1, 3, 4], checkpoints.steps()
jax.experimental.multihost_utils.sync_global_devices("saved")
if sys.argv[3] == "1":  # what it alone reads
    folder = run / "checkpoints" / "4" / "params" / "ocdbt.process_1"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.write_bytes(b"")
jax.experimental.multihost_utils.sync_global_devices("damaged")
again = Checkpoints(run, keep=2)
saved = again.restore(lambda meta: (put(0), put(0)))
assert saved.step == 3 and saved.data == {"at": 3}
for found, sign in ((saved.params["w"], 1), (saved.state["w"], -1)):
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, w[shard.index] + np.float32(3 * sign))
assert (run / "damaged" / "4").is_dir() and not (run / "checkpoints" / "4").exists()
again.save(4, put(4), put(4), {"at": 4}, {})
again.close()
assert again.steps() == [1, 3, 4]
print("done")
"""


@pytest.mark.integration
def test_processes_that_train_together_go_back_together(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [child(tmp_path, tmp_path / "run", port, i, source=PROCESSES) for i in range(2)]
    try:
        for process in both:
            assert process.communicate(timeout=120)[0].splitlines()[-1:] == ["done"]
    finally:
        for process in both:
            process.kill()
