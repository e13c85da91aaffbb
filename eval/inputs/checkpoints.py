"""Checkpoints to evaluate: the folder of a run, or a folder of converted weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.config import TrainConfig
from ttt_jax.checkpoints import run_checkpoints, run_weights, weights
from ttt_jax.config import MoshiConfig
from ttt_jax.data.corpus import CorpusConfig
from ttt_jax.errors import InputError
from ttt_jax.moshi.model import Params
from ttt_jax.utils import config_json
from ttt_jax.utils.files import run_and_step
from ttt_jax.utils.paths import local, printable


class Model(NamedTuple):
    """A checkpoint, loaded."""

    name: str
    """Of its folder, to be printed: how reports call it."""
    cfg: MoshiConfig
    params: Params
    run: TrainConfig | None
    """What made it; None for converted weights."""
    about: dict[str, Any]
    """What results.json says of it: path, step, digest of its weights; of a run also its meta (versions, codec, tokenizer, data)."""

    @property
    def codec(self) -> dict[str, str] | None:
        """Name and digest of the codec that it was trained on; None where that is not recorded (converted weights)."""
        return self.about.get("codec")

    @property
    def cache_dir(self) -> Path:
        """Folder for encoded data and compiled programs."""
        return (self.run.data if self.run else CorpusConfig()).cache_dir


def load(path: str | Path) -> Model:
    """The model in `path`: the latest checkpoint of a run, one of its checkpoints, or weights that `python -m ttt_jax.convert` made.

    Raises:
      InputError: `path` is neither, or cannot be read.
    """
    path = local(path)
    name = _name(path, 1)
    if run_and_step(path) is not None:
        run = run_weights.load_run(path)
        cfg = config_json.from_dict(TrainConfig, run.meta["config"], f"the checkpoint in {path}")
        return Model(name, cfg.model, run.params, cfg, {"path": str(path), **run.meta})
    if (path / weights.CONFIG).is_file():
        found = weights.load(path)
        about = {"path": str(path), **found.info, "weights": weights.whole_digest(found.cfg, found.info["files"])}
        return Model(name, found.cfg, found.params, None, about)
    raise InputError(
        f"{path} is no checkpoint (it has neither {run_checkpoints.FOLDER}/ nor {weights.CONFIG}): give the folder of a run or of converted"
        " weights."
    )


def load_all(paths: Sequence[str | Path], keep: bool = True) -> list[Model]:
    """The models in `paths`, each of a name of its own: those that share one get as much of their path as tells all apart.

    Args:
      paths: as for `load`; keep: whether they keep their weights, or are described only.

    Raises `InputError` as `load` does, or if two are the same checkpoint.
    """
    places = [os.path.realpath(local(path)) for path in paths]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise InputError(f"{paths[i]} is given twice: leave it out once.")
    models = []
    for path in paths:  # at most one that is not kept lies in memory
        model = load(path)
        models.append(model if keep else model._replace(params=None))
    names = [model.name for model in models]
    shared, count = {name for name in names if names.count(name) > 1}, 1
    while len(set(names)) < len(names):
        count += 1
        names = [
            _name(Path(place), count) if model.name in shared else model.name
            for model, place in zip(models, places, strict=True)
        ]
        shared |= {name for name in names if names.count(name) > 1}
    return [model._replace(name=name) for model, name in zip(models, names, strict=True)]


def _name(path: Path, count: int) -> str:
    """The last `count` parts of a checkpoint's path; RUN-STEP stands for all of RUN/checkpoints/STEP where that is one part."""
    path = Path(os.path.realpath(path))
    run, step = run_and_step(path) or (path, None)
    if step is None:
        name = str(Path(*path.parts[-count:]))
    elif count == 1:
        name = f"{run.name}-{step}"
    else:
        name = str(Path(*run.parts[-(count - 1) :], path.relative_to(run)))
    return printable(name.replace("\\", "\\\\"))  # two paths never look alike
