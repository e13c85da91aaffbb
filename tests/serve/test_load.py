"""Another attention window than the checkpoint's."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers import micro
from tests.helpers.eval_models import params
from ttt_jax.config import MoshiConfig
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.serve.load import with_window

CFG = dataclasses.replace(micro.MODEL, num_layers=4, layer_context=((1, 4), (3, 3)))


def by_layer(tree: dict, cfg: MoshiConfig) -> list[dict]:
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"][run.name])
        for run in cfg.runs
        for i in range(run.stop - run.start)
    ]


@pytest.mark.parametrize(
    ("context", "windows"),
    [(None, (8, 4, 8, 3)), (5, (5, 4, 5, 3)), (4, (4, 4, 4, 3)), (2, (2,) * 4), (9, (9, 4, 9, 3))],
)
def test_longer_windows_are_cut_and_layers_stacked_anew(context, windows):
    given = params(CFG)
    changed, cfg = with_window(given, CFG, context, None)
    assert cfg.contexts == windows
    expected = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    assert jax.tree.structure(expected) == jax.tree.structure(changed)
    assert jax.tree.leaves(jax.tree.map(np.shape, expected)) == jax.tree.leaves(jax.tree.map(np.shape, changed))
    for before, after in zip(by_layer(given, CFG), by_layer(changed, cfg), strict=True):
        jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_window_that_cannot_be():
    with pytest.raises(InputError, match="context=0"):
        with_window(params(CFG), CFG, 0, None)
