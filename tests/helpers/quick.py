"""Programs of training and evaluation that compile in a third of the time, once a process for runs that are alike."""

import contextlib
import dataclasses
import signal
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np

from eval.streaming import runner
from tests.helpers.drawing import OPTIONS
from train import loop, plots
from train.batches import Batches
from train.config import DataConfig
from ttt_jax.checkpoints import checksums

_steps, _weights = {}, {}

scan_calls = jax.jit(
    runner.scan_calls.__wrapped__,
    static_argnames=("cfg", "arms", "measured"),
    donate_argnames="state",
    compiler_options=OPTIONS,
)
"""For `eval.streaming.runner.scan_calls`."""


def quickly(make_step):
    """For `make_train_step` or `make_steps_together`: names, folders, seeds, files and checkpoints do not matter."""

    def made(cfg, other):
        data = DataConfig(chunk=cfg.data.chunk, batch=cfg.data.batch)
        apart = {"name": "", "run_dir": None, "seed": 0, "keep": 1, "checkpoint_every": 1, "data": data}
        key = make_step, dataclasses.replace(cfg, **apart), other

        def lower(*given):
            # What is given later has to have the same types and shapes, or the program refuses it.
            if key not in _steps:
                _steps[key] = make_step(cfg, other).lower(*given).compile(compiler_options=OPTIONS)
            return SimpleNamespace(compile=lambda: _steps[key])

        return SimpleNamespace(lower=lower)

    return made


def remembering(first):
    """For `initial_params.initial`: equal seeds give equal weights, so they are drawn once."""

    def drawn(cfg, other):
        key = first, cfg.model, cfg.seed, cfg.data.batch, cfg.trainable, str(other)
        if key not in _weights:
            found = first(cfg, other)
            _weights[key] = jax.device_get(found), jax.tree.map(lambda leaf: leaf.sharding, found)
        # Copies, since a step may write over what it is given.
        return jax.tree.map(lambda leaf, place: jax.device_put(leaf.copy(), place), *_weights[key])

    return drawn


def sums_of_group(arrays):
    """For `checksums._sums_of_group`: the same numbers without a program."""

    def sum_of(array):
        array = np.ascontiguousarray(jax.device_get(array)).reshape(-1)
        unsigned = {1: np.uint8, 2: np.uint16}.get(array.itemsize, np.uint32)
        bits = array.view(unsigned).astype(np.uint32)
        return checksums._mix(bits ^ checksums._mix(np.arange(bits.size, dtype=np.uint32))).sum(dtype=np.uint32)

    return {name: sum_of(array) for name, array in arrays.items()}


def quicken(patch):
    """Makes `train.loop` quick: quick programs, weights drawn once, no programs of checksums, no figures."""
    patch.setattr(checksums, "_sums_of_group", sums_of_group)
    patch.setattr(loop, "make_steps_together", quickly(loop.make_steps_together))
    patch.setattr(loop, "make_train_step", quickly(loop.make_train_step))
    patch.setattr(loop.initial_params, "initial", remembering(loop.initial_params.initial))
    patch.setattr(plots, "draw_run", lambda *_: [])


@contextlib.contextmanager
def interrupted(step):
    """Presses Ctrl-C once while `step` is prepared; the loop looks at one batch before the first step."""
    pressed = []

    class Interrupted(Batches):
        def __next__(self):
            self.taken = getattr(self, "taken", 0) + 1
            if self.taken == 1 + step and not pressed:
                pressed.append(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().__next__()

    with mock.patch.object(loop, "Batches", Interrupted):
        yield
