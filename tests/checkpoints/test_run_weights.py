"""The weights of a run, completed from its base."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.helpers import kyutai_files
from tests.helpers.comparing import same
from tests.helpers.converting import parameters_of
from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.run_checkpoints import Checkpoints
from ttt_jax.checkpoints.run_weights import load_run
from ttt_jax.config import TTTConfig
from ttt_jax.convert import kyutai
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json, trees


@pytest.fixture
def fine_tuned(tmp_path):
    """The folder of a run that stores its TTT layers alone, and all its weights."""
    c = kyutai_files.config()
    kyutai(kyutai_files.write(tmp_path / "source", c, kyutai_files.weights(c)), tmp_path / "base")
    cfg, params, info = weights.load(tmp_path / "base")
    cfg = dataclasses.replace(cfg, ttt=TTTConfig(layers="0,1"))
    ttt = {name: leaf for name, leaf in trees.named(parameters_of(cfg)).items() if "/ttt/" in name}
    stored = trees.nested({name: np.full(leaf.shape, 0.5, leaf.dtype) for name, leaf in ttt.items()})
    meta = {
        "config": {"model": config_json.to_dict(cfg)},
        "base": {"path": str(tmp_path / "base"), "digest": info["digest"]},
        "stored": list(ttt),
    }
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(7, stored, {"x": np.zeros(1)}, {}, meta)
    checkpoints.close()
    return tmp_path, trees.merge(params, stored)


def test_what_a_run_does_not_store_comes_from_its_base(fine_tuned):
    folder, params = fine_tuned
    found = load_run(folder / "run")
    assert found.meta["step"] == 7
    same(found.params, params)


def test_a_base_that_is_gone_or_another_is_refused(fine_tuned):
    folder, _ = fine_tuned
    config = folder / "base" / weights.CONFIG
    about = json.loads(config.read_text())
    config.write_text(json.dumps({**about, "digest": "0" * 64}))
    with pytest.raises(InputError, match="base, the base weights of .*run, is gone or another"):
        load_run(folder / "run")
    shutil.rmtree(folder / "base")
    with pytest.raises(InputError, match="base, the base weights of .*run, is gone"):
        load_run(folder / "run")
