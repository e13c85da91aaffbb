"""Checkpoints to evaluate are known by their weights, not by where they lie."""

import dataclasses

import pytest

from tests.helpers import micro
from ttt_jax.checkpoints import loading
from ttt_jax.errors import InputError

CFG = micro.CONFIG


def test_weights_are_known_by_what_they_are_and_not_by_where_they_lie(tmp_path):
    import shutil

    from tests.helpers.eval_models import write_run

    first, other = write_run(tmp_path / "first"), write_run(tmp_path / "other", seed=1)
    shutil.copytree(first, tmp_path / "copy.1")
    known = {path.name: loading.load(path).about["weights"] for path in (first, tmp_path / "copy.1", other)}
    assert known["first"] == known["copy.1"] != known["other"]
    assert loading.load(first / "checkpoints" / "1").about["weights"] == known["first"]
    (first / "checkpoints" / "1" / "integrity" / "metadata").write_text("{}")
    with pytest.raises(InputError, match="checkpoints/1 is damaged"):
        loading.load(first / "checkpoints" / "1")


def test_added_layers_make_other_weights_on_the_same_base():
    from ttt_jax.checkpoints import weights

    cfg = micro.MODEL
    files = {tensor.file: {"sha256": "0" * 64} for tensor in weights.tensors(cfg)}
    ttt = next(name for name in files if name.startswith("ttt"))
    changed = {**files, ttt: {"sha256": "1" * 64}}
    beside = {**files, "LICENSE": {"sha256": "2" * 64}}
    base, whole = weights.base(cfg), weights.tensors(cfg)
    assert weights.digest(base, changed) == weights.digest(base, files)
    assert weights.digest(whole, changed) != weights.digest(whole, files)
    assert weights.digest(whole, beside) == weights.digest(whole, files)


def test_a_model_that_was_trained_with_kernels_does_not_ask_for_them(tmp_path):
    from tests.helpers.eval_models import write_run

    for impl, loaded in (("pallas", "auto"), ("xla", "xla")):
        model = dataclasses.replace(CFG.model, ttt=dataclasses.replace(CFG.model.ttt, impl=impl))
        run = write_run(tmp_path / impl, dataclasses.replace(CFG, model=model))
        assert loading.load(run).cfg.ttt.impl == loaded
