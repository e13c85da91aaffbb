"""Runs that are killed or stopped at any moment, also while they save, end with the losses of one that is not."""

import random
import signal
import time

import pytest

from tests.helpers import commands, small_tasks

STEPS = 24
integration, slow = {"marks": pytest.mark.integration}, {"marks": pytest.mark.slow}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The configuration, and the metrics of a run of it that nobody disturbed."""
    folder = tmp_path_factory.mktemp("killed")
    model = small_tasks.CONFIG.model
    config = commands.write_config(folder, model=model, steps=STEPS, checkpoint_every=2, eval_every=5, keep=2)
    output, code = commands.finish(commands.start("--from", config, "--run-dir", folder / "whole"))
    assert code == 0, output
    assert (folder / "whole" / "loss.png").is_file()
    return folder, config, commands.lines(folder / "whole")


def wait_for(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.005)


def saved(run):
    """Steps of the checkpoints that are whole."""
    return [path.name for path in (run / "checkpoints").glob("*") if path.name.isdecimal()]


def half_written(run):
    return list((run / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize("times", [pytest.param(2, **integration), pytest.param(6, **slow)])
def test_a_run_killed_at_random_ends_like_one_never_killed(whole, times):
    folder, config, expected = whole
    rng, run = random.Random(0), folder / f"victim of {times}"
    words, kills, saving = ["--from", config, "--run-dir", run], 0, 0
    for _ in range(12):
        process = commands.start(*words)
        if kills < times:
            steps = run / "metrics.jsonl"
            before = steps.stat().st_size if steps.exists() else 0
            # The file is first cut to the steps that a checkpoint holds; wait until new steps are done.
            wait_for(lambda steps=steps, before=before: steps.exists() and steps.stat().st_size != before, process)
            if kills % 2 == 0:  # while a checkpoint is being written
                wait_for(lambda run=run: half_written(run), process)
                saving += bool(half_written(run))
            else:
                time.sleep(rng.random() * 0.5)
            process.kill()
            commands.finish(process)
            kills += 1
        else:
            output, code = commands.finish(process)
            assert code == 0, output
            break
        if saved(run):
            words = ["--resume", run]
        else:  # killed before its first checkpoint: it starts anew, in a new folder
            run = folder / f"victim of {times}, {kills}"
            words = ["--from", config, "--run-dir", run]
    assert kills == times
    assert saving, "no kill met a save"
    assert commands.lines(run) == expected
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert all(name.isdecimal() for name in left), left
    assert len(left) <= 3


# test_resume.py presses Ctrl-C, too.
@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 143, **integration), pytest.param(signal.SIGINT, 130, **slow)]
)
def test_a_signal_saves_and_the_exit_code_says_so(whole, number, code):
    folder, config, expected = whole
    run = folder / f"stopped{code}"
    process = commands.start("--from", config, "--run-dir", run)
    wait_for((run / "metrics.jsonl").exists, process)
    wait_for(lambda: (run / "metrics.jsonl").read_text().count("\n") >= 3, process)
    process.send_signal(number)
    output, found = commands.finish(process)
    assert found == code, output
    assert f"--resume {run}" in output
    done = commands.lines(run)[-1]["step"]
    assert done < STEPS
    assert (run / "checkpoints" / str(done)).is_dir()  # nothing that was done is lost
    output, found = commands.finish(commands.start("--resume", run))
    assert found == 0, output
    assert commands.lines(run) == expected
