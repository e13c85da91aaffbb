"""Checkpoints to evaluate: the folder of a run, or a folder of converted weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from train.config import TrainConfig
from ttt_jax import checkpoint, record, weights
from ttt_jax.config import MoshiConfig
from ttt_jax.data.corpus import CorpusConfig
from ttt_jax.errors import InputError
from ttt_jax.files import run_and_step
from ttt_jax.moshi.model import Params


class Model(NamedTuple):
    """A checkpoint, loaded."""

    name: str
    """Of its folder: how reports call it."""
    cfg: MoshiConfig
    params: Params
    run: TrainConfig | None
    """What made it; None for converted weights."""
    about: dict[str, Any]
    """What results.json says of it: path and step; of a run also its meta (versions, codec, tokenizer, data)."""

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
    path = Path(path).expanduser()
    name = path.resolve().name
    if (found := run_and_step(path.resolve())) is not None:
        name = found[0].name if found[1] is None else f"{found[0].name}-{found[1]}"
        run = checkpoint.load_run(path)
        cfg = record.from_dict(TrainConfig, run.meta["config"], f"the checkpoint in {path}")
        return Model(name, cfg.model, run.params, cfg, {"path": str(path), **run.meta})
    if (path / weights.CONFIG).is_file():
        found = weights.load(path)
        return Model(name, found.cfg, found.params, None, {"path": str(path), **found.info})
    raise InputError(
        f"{path} is no checkpoint (it has neither {checkpoint.FOLDER}/ nor {weights.CONFIG}): give the folder of a run or of converted"
        " weights."
    )
