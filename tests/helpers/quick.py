"""Programs of training and evaluation that compile in a third of the time, and once a process for runs that are alike."""

import dataclasses
from types import SimpleNamespace

import jax

from eval.streaming import runner
from tests.helpers.drawing import OPTIONS

_steps, _weights = {}, {}

scan_calls = jax.jit(
    runner.scan_calls.__wrapped__,
    static_argnames=("cfg", "arms", "measured"),
    donate_argnames="state",
    compiler_options=OPTIONS,
)
"""For `eval.streaming.runner.scan_calls`."""


def quickly(make_step):
    """For `make_train_step` or `make_steps_together`; their programs do not depend on a run's name, folder, seed and files."""

    def made(cfg, other):
        data = dataclasses.replace(cfg.data, train=None, validation=None, heldout=None, cache=None)
        key = make_step, dataclasses.replace(cfg, name="", run_dir=None, seed=0, keep=1, data=data), other

        def lower(*given):
            # What is given later has to have the same types and shapes, or the program refuses it.
            if key not in _steps:
                _steps[key] = make_step(cfg, other).lower(*given).compile(compiler_options=OPTIONS)
            return SimpleNamespace(compile=lambda: _steps[key])

        return SimpleNamespace(lower=lower)

    return made


def remembering(first):
    """For `parameters.initial` or `together.fresh`: equal seeds give equal weights, so they are drawn once."""

    def drawn(cfg, other):
        key = first, cfg.model, cfg.seed, cfg.data.batch, cfg.trainable, str(other)
        if key not in _weights:
            found = first(cfg, other)
            _weights[key] = jax.device_get(found), jax.tree.map(lambda leaf: leaf.sharding, found)
        # Copies, since a step may write over what it is given.
        return jax.tree.map(lambda leaf, place: jax.device_put(leaf.copy(), place), *_weights[key])

    return drawn
