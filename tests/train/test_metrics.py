"""metrics.jsonl: JSON whatever the numbers are, and no line lost when a run is taken up again."""

import json
import os
import time

import numpy as np
import pytest

from train.metrics import MetricsLog, read
from train.step import Metrics
from ttt_jax.errors import InputError

STREAMS = ["text", "codebook 1"]


METRICS = Metrics(
    loss=3.5,
    streams=np.array([1.5, 2.5]),
    half_variance=np.array([0.25, 0.5]),
    rows=np.array([[3.5, 3.5]]),
    grad_norm=0.5,
    grad_norms={"base": 0.4, "ttt": 0.3},
    rates={"base": 0.125},
    ttt={1: {"gate": 0.25}},
    skipped=0,
    finite=True,
    stop=0,
)
FILES = {(0, 0): "first", (0, 1): "second"}


def write(path, steps, done=0, skips=0, **changes):
    log = MetricsLog(path, STREAMS, 1, 100, done, skips)
    for step in steps:
        log.add(step, METRICS._replace(**changes), 10, FILES)
    log.close()


def strictly(path):
    """The lines, refusing the NaN and Infinity that Python's reader takes and JSON lacks."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_stream_without_targets_is_null_in_losses_and_variances(tmp_path):
    path = tmp_path / "metrics.jsonl"
    nan = np.array([np.nan, 0.5])
    write(path, [1], streams=nan, half_variance=nan)
    (line,) = strictly(path)
    assert line["streams"] == line["half_variance"] == {"text": None, "codebook 1": 0.5}
    assert line["ttt"] == {"1": {"gate": 0.25}}


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_or_gradient_that_is_no_number_is_refused_and_not_written(tmp_path, name, value):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match=f"step 1: {name} is {value}"):
        write(path, [1], finite=False, **{name: value})
    assert not path.read_text()


def test_group_and_file_of_what_is_not_finite_are_named(tmp_path):
    changes = {"rows": np.array([[3.5, np.nan]]), "grad_norms": {"base": 1.0, "ttt": np.nan}}
    with pytest.raises(InputError, match="the gradient of ttt, in second, so the run stops"):
        write(tmp_path / "m", [1], finite=False, loss=np.nan, **changes)
    with pytest.raises(InputError, match=r"state that the step leaves is not finite.*first, second\)"):
        write(tmp_path / "m", [1], finite=False)


def test_steps_are_skipped_as_often_as_is_allowed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = {"finite": False, "loss": np.nan}
    write(path, [1], skips=2, skipped=2, **bad)
    (line,) = strictly(path)
    assert (line["loss"], line["skipped"]) == (None, 2)
    assert "step 1: loss is nan" in line["skipped_for"]
    with pytest.raises(InputError, match="optim.skips=2 such steps were skipped before"):
        write(path, [1], skips=2, skipped=3, **bad)


def test_a_validation_is_a_line_of_its_own_and_pauses_do_not_count_for_the_rate(tmp_path):
    log = MetricsLog(tmp_path / "m", STREAMS, 1, 100, 0)
    with log.paused():
        time.sleep(0.3)
    log.add(1, METRICS, 1000, FILES)
    log.add_validation(1, {"loss": 2.0})
    log.close()
    assert log.rate > 1000 / 0.25
    assert strictly(tmp_path / "m")[1]["validation"] == {"loss": 2.0}


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


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\u2029"])
def test_a_line_ends_at_its_line_feed_only(tmp_path, character):
    lines = [{"step": n, "validation": {}, "seconds": 0.5, "skipped_for": f"a{character}b"} for n in (1, 2)]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(f'{text}\n{{"step": 3, "cut', encoding="utf-8")
    assert read(tmp_path / "metrics.jsonl") == lines


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 2, "val',
        b"\xff{}",
        b"[]",
        b'{"step": "2", "validation": {}, "seconds": 1}',
        b'{"step": 2, "validation": {"streams": 3}, "seconds": 1}',
        b'{"step": 2, "validation": {"streams": {"text": {}}}, "seconds": 1}',
        b'{"step": 2, "validation": {"ttt": {"1": 3.0}}, "seconds": 1}',
        b'{"step": 2, "validation": {}, "seconds": {}}',
        b'{"step": 2, "validation": {}, "seconds": NaN}',
        b'{"step": 2, "validation": {}}',
        b'{"step": 2, "loss": 3.0, "seconds": 1}',
        b'{"step": 2, "validation": {}, "seconds": null}',
        b'{"step": 2, "validation": {"loss": "3.0"}, "seconds": 1}',
        b'{"step": 2, "validation": {"loss": true}, "seconds": 1}',
        b'{"step": 2, "validation": {"loss": ' + b"9" * 400 + b'}, "seconds": 1}',
        b'{"step": 0, "validation": {}, "seconds": 1}',
    ],
)
def test_a_damaged_line_before_the_last_is_told(tmp_path, damaged):
    whole = b'{"step": 1, "validation": {"loss": 3.0, "ttt": {"1": {"loss": null}}}, "seconds": 1}'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole + b"\n" + damaged + b"\n" + whole.replace(b'"step": 1', b'"step": 9') + b"\n")
    with pytest.raises(InputError, match="metrics.jsonl (line 2 )?is damaged"):
        read(path)
    path.write_bytes(whole + b"\n" + whole + b"\n" + damaged.replace(b"\xff", b""))
    assert len(read(path)) == 2
