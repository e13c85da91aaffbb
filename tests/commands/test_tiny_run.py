"""The shared run holds what its description says."""

import jax
import numpy as np
import pytest

from eval.results.schema import scores_path
from eval.streaming import results as stream_results
from eval.streaming import scores
from ttt_jax.checkpoints import loading

pytestmark = pytest.mark.integration


def test_the_shared_run_is_whole(tiny_run):
    steps = {path.name for path in (tiny_run.run / "checkpoints").iterdir() if path.name.isdecimal()}
    assert steps == {"2", "4"}
    assert len((tiny_run.run / "metrics.jsonl").read_text().splitlines()) == 4
    trained, converted = (loading.load(path) for path in (tiny_run.run, tiny_run.weights))
    jax.tree.map(np.testing.assert_array_equal, converted.params, trained.params)
    results = stream_results.read(tiny_run.eval)
    assert results.checkpoints[0].info.about["weights"] == trained.about["weights"]
    assert results.checkpoints[0].arms == ["persist", "reset", "frozen", "off"]
    assert not results.skipped
    for file in results.files:
        stored = scores.load(scores_path(tiny_run.eval, results.checkpoints[0].info.name, file))
        assert all(arm.inner is not None for arm in stored.arms.values())
    assert "minus persist" in tiny_run.output.read_text()


def test_a_copy_can_be_changed(tiny_run, tmp_path):
    copy = tiny_run.copy(tmp_path)
    (copy / "config.json").unlink()
    assert (tiny_run.run / "config.json").is_file()
