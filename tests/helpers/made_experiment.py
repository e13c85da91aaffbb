"""Made-up experiments of `python -m eval compare` with known effects."""

import dataclasses

import numpy as np

from eval.compare.experiment import Condition, Experiment, Setting
from eval.results.schema import CheckpointInfo, FileInfo

CHUNK, FRAMES = 100, 860


def made(effects, files=12, seeds=1, noise=0.01, seed=0, groups=None, reach=430, **setting):
    """Losses under conditions whose difference from the first grows to `effects` (by arm) nats on average after the
    first chunk.

    The window ends at frame 150 and attention's reach at `reach`; the last file is short.
    """
    rng = np.random.default_rng(seed)
    setting = Setting(CHUNK, "equal", 150, reach, **setting)
    lengths = [FRAMES] * (files - 1) + [520]
    pieces = setting.pieces(max(lengths))
    weight = np.stack([np.diff(np.minimum(np.append(pieces, max(lengths)), length)) * 8.0 for length in lengths])
    base = rng.normal(3, 0.3, (1, files, 1)) + rng.normal(0, 0.05, (1, files, len(pieces)))
    base = base + rng.normal(0, 0.02, (seeds, 1, 1))
    arms, losses = {"persist": 0.0} | effects, {}
    for arm, effect in arms.items():
        apart = rng.normal(0, noise, (seeds, files, 1)) if effect or arm != "persist" else 0
        losses[arm] = np.where(weight > 0, np.round(base + (pieces >= CHUNK) * (effect + apart), 9), np.nan)
    names = tuple(f"run{i}" for i in range(seeds))
    return Experiment(
        setting,
        [Condition(arm, arm, names) for arm in arms],
        [CheckpointInfo(name, (150, 150, 133), (1,), about={"step": 1}) for name in names],
        [
            FileInfo(f"file{i}", groups[i] if groups else f"file{i}", length, f"file{i}.npz")
            for i, length in enumerate(lengths)
        ],
        [],
        weight,
        losses,
    )


def changed(experiment, **losses):
    """The experiment with other losses of some conditions."""
    return dataclasses.replace(experiment, losses=experiment.losses | losses)


def spoilt(experiment, amount, condition="reset"):
    """The experiment with losses of one condition that differ by `amount` in the first chunk of a file."""
    losses = experiment.losses[condition].copy()
    losses[0, 3, 0] += amount
    return changed(experiment, **{condition: losses})
