"""metrics.jsonl: JSON whatever the numbers are, and no line lost when a run is taken up again."""

import json
import os

import numpy as np
import pytest

from train.metrics import MetricsLog, read
from train.step import Metrics
from ttt_jax.errors import InputError

STREAMS = ["text", "codebook 1"]


def metrics(**changes):
    values = Metrics(
        loss=np.float32(3.5),
        streams=np.array([1.5, 2.5], np.float32),
        half_variance=np.array([0.25, 0.5], np.float32),
        grad_norm=np.float32(0.5),
        rates={"base": np.float32(0.125)},
        ttt={1: {"gate": np.float32(0.25)}},
    )
    return values._replace(**changes)


def write(path, steps, done=0, **changes):
    log = MetricsLog(path, STREAMS, 1, 100, done)
    for step in steps:
        log.add(step, metrics(**changes), 10)
    log.close()


def strictly(path):
    """The lines, refusing the NaN and Infinity that Python's reader takes and JSON lacks."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_stream_without_targets_is_null_in_losses_and_variances(tmp_path):
    path = tmp_path / "metrics.jsonl"
    nan = np.array([np.nan, 0.5], np.float32)
    write(path, [1], streams=nan, half_variance=nan)
    (line,) = strictly(path)
    assert line["streams"] == line["half_variance"] == {"text": None, "codebook 1": 0.5}
    assert line["ttt"] == {"1": {"gate": 0.25}}


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_or_gradient_that_is_no_number_is_refused_and_not_written(tmp_path, name, value):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match=f"step 1: {name} is {value}"):
        write(path, [1], **{name: np.float32(value)})
    assert not path.read_text()


def test_a_resumed_log_keeps_the_lines_up_to_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    kept = path.read_text().splitlines()[:3]
    path.write_text(path.read_text() + '{"step": 6, "lo')  # cut off by the kill
    write(path, [4], done=3)
    assert path.read_text().splitlines()[:3] == kept
    assert [line["step"] for line in strictly(path)] == [1, 2, 3, 4]
    seconds = [line["seconds"] for line in strictly(path)]
    assert seconds == sorted(seconds)


def test_a_kill_while_a_log_is_taken_up_loses_no_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    before = path.read_text()

    def fail(*_):
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        MetricsLog(path, STREAMS, 1, 100, 3)
    assert path.read_text() == before
    assert len(read(path)) == 5
