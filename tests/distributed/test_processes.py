"""Two processes of two devices each train like one device, stop together, and are resumed by any number of them."""

import signal
import socket
import time

import pytest

from tests.helpers import commands
from train.config import MeshConfig

STEPS = 6


def pair(*words, devices=2):
    """The command in two processes that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ("--launch", "manual", "--coordinator", f"localhost:{port}", "--processes", 2, "--process")
    return [commands.start(*words, *launch, i, devices=devices) for i in range(2)]


def close(found, expected):
    """Whether numbers agree to rounding, in lines of metrics."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected, strict=True):
        for x, y in ((a, b), (a.get("validation"), b.get("validation"))):
            if x and "loss" in x:
                assert x["loss"] == pytest.approx(y["loss"], rel=2e-5)
                assert x["streams"] == pytest.approx(y["streams"], rel=2e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    config = commands.write_config(folder, steps=STEPS, checkpoint_every=3, eval_every=3, mesh=MeshConfig(-1, 2, 1))
    words = ("--from", config, "--run-dir", folder / "alone", "--mesh.fsdp", 1)
    output, code = commands.finish(commands.start(*words))
    assert code == 0, output
    return folder, config, commands.lines(folder / "alone")


@pytest.fixture(scope="module")
def together(alone):
    folder, config, _ = alone
    done = [commands.finish(process) for process in pair("--from", config, "--run-dir", folder / "pair")]
    assert [code for _, code in done] == [0, 0], "\n".join(output for output, _ in done)
    return folder / "pair"


@pytest.mark.integration
def test_two_processes_have_the_losses_of_one(alone, together):
    close(commands.lines(together), alone[2])


@pytest.mark.slow
def test_what_two_processes_saved_one_goes_on_with(alone, together):
    folder, _, expected = alone
    last = together / "checkpoints" / str(STEPS)
    last.rename(together / "last")
    output, code = commands.finish(commands.start("--resume", together, "--mesh.data", 1, "--mesh.fsdp", 1))
    assert code == 0, output
    close(commands.lines(together), expected)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(alone):
    """Also where both work on the same rows, although each knows of other signals."""
    folder, config, _ = alone
    run = folder / "stopped"
    words = ("--steps", 4000, "--checkpoint-every", 4000, "--eval-every", 0)
    mesh = ("--mesh.data", 1, "--mesh.fsdp", 1, "--mesh.tensor", 2)
    processes = pair("--from", config, "--run-dir", run, *words, *mesh, devices=1)
    log = run / "metrics.jsonl"
    while all(process.poll() is None for process in processes) and not (
        log.exists() and log.read_text().count("\n") > 3
    ):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    done = [commands.finish(process) for process in processes]
    assert [code for _, code in done] == [143, 143], "\n".join(output for output, _ in done)
    steps = [path.name for path in (run / "checkpoints").iterdir()]
    assert steps == [str(commands.lines(run)[-1]["step"])]
