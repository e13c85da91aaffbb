"""Checkpoints to evaluate and to talk with: the folder of a run, or a folder of converted weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax.checkpoints import run_weights, weights
from ttt_jax.codec import MIMI_AT, Codec, CodecInfo, load_codec
from ttt_jax.config import MoshiConfig
from ttt_jax.data import corpus
from ttt_jax.data.corpus import CorpusConfig
from ttt_jax.data.text import Tokenizer, TokenizerInfo, load_tokenizer
from ttt_jax.errors import InputError
from ttt_jax.moshi.model import Params
from ttt_jax.utils import config_json
from ttt_jax.utils.files import CHECKPOINTS, run_and_step
from ttt_jax.utils.paths import local, printable


class Checkpoint(NamedTuple):
    """A loaded checkpoint: of a run, or of converted weights."""

    name: str
    """Name of its folder, printable; reports call the checkpoint by it."""
    cfg: MoshiConfig
    params: Params
    about: dict[str, Any]
    """Facts that results store: path, step, digest of the weights; of a run also its meta (config, codec, data)."""
    corpus: CorpusConfig | None = None
    """Speech that the run was trained on; None for converted weights."""
    chunk: int | None = None
    """Frames of a training chunk; None for converted weights."""

    @property
    def codec(self) -> dict[str, str] | None:
        """Name and digest of the codec of the training data; of converted weights that of the Mimi which came with
        them, None without one."""
        return self.about.get("codec")

    @property
    def seed(self) -> int | None:
        """Seed of the run; None for converted weights."""
        return self.about["config"]["seed"] if self.corpus else None

    @property
    def cache_dir(self) -> Path:
        """Folder for encoded data and compiled programs."""
        return (self.corpus or CorpusConfig()).cache_dir


def load(path: str | Path) -> Checkpoint:
    """Returns the checkpoint in `path`: the latest of the run RUN, RUN/checkpoints/STEP, or converted weights.

    Raises `InputError` if `path` is none of these or cannot be read.
    """
    path = local(path)
    name = _name(path, 1)
    if run_and_step(path) is not None:
        run = run_weights.load_run(path)
        data = run.meta["config"]["data"]
        fields = {field.name: data[field.name] for field in dataclasses.fields(CorpusConfig)}
        speech = config_json.from_dict(CorpusConfig, fields, f"the checkpoint in {path}")
        return Checkpoint(
            name, _portable(run.config), run.params, {"path": str(path), **run.meta}, speech, data["chunk"]
        )
    if (path / weights.CONFIG).is_file():
        folder = weights.load(path)
        digest = weights.digest(weights.tensors(folder.cfg), folder.info["files"])
        return Checkpoint(
            name, _portable(folder.cfg), folder.params, {"path": str(path), **folder.info, "weights": digest}
        )
    raise InputError(
        f"{path} is no checkpoint (it has neither {CHECKPOINTS}/ nor {weights.CONFIG}): give the folder of a"
        " run or of converted weights."
    )


def _portable(cfg: MoshiConfig) -> MoshiConfig:
    """Returns `cfg` without a demand for kernels: where a model was trained binds no other machine."""
    if cfg.ttt.impl != "pallas":
        return cfg
    return dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, impl="auto"))


def load_all(paths: Sequence[str | Path], keep: bool = True) -> list[Checkpoint]:
    """Returns the checkpoints in `paths`, with different names: where folders share a name, more of the path is added.

    Without `keep` the weights are dropped after reading, so that at most one checkpoint's are in memory.

    Raises `InputError` as `load` does, or if a checkpoint is given twice.
    """
    places = [os.path.realpath(local(path)) for path in paths]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise InputError(f"{paths[i]} is given twice: leave it out once.")
    loaded = []
    for path in paths:
        checkpoint = load(path)
        loaded.append(checkpoint if keep else checkpoint._replace(params=None))
        del checkpoint  # its weights, before the next are read
    names, count = [checkpoint.name for checkpoint in loaded], 1
    alike: set[int] = set()
    while len(set(names)) < len(names):
        count += 1
        alike |= {i for i, name in enumerate(names) if names.count(name) > 1}
        names = [_name(Path(place), count) if i in alike else names[i] for i, place in enumerate(places)]
    return [checkpoint._replace(name=name) for checkpoint, name in zip(loaded, names, strict=True)]


def params_of(checkpoint: Checkpoint) -> Params:
    """Returns the weights of a checkpoint, read again if `load_all` has dropped them.

    Raises `InputError` if its folder has another checkpoint by now.
    """
    if checkpoint.params is not None:
        return checkpoint.params
    loaded = load(checkpoint.about["path"])
    if loaded.about["weights"] != checkpoint.about["weights"]:
        raise InputError(
            f"{checkpoint.about['path']} has another checkpoint than when this command began: name one, as"
            " RUN/checkpoints/STEP."
        )
    return loaded.params


def coders(checkpoint: Checkpoint) -> tuple[Codec | CodecInfo, Tokenizer | TokenizerInfo]:
    """Returns codec and tokenizer of the data that a checkpoint was trained on; of converted weights their own.

    Raises `InputError` if one cannot be loaded, or converted weights have no Mimi.
    """
    if checkpoint.corpus is not None:
        return corpus.load_coders(checkpoint.corpus, checkpoint.cfg.card, checkpoint.cfg.text_card, checkpoint.about)
    path = checkpoint.about["path"]
    return load_codec(f"{MIMI_AT}{path}"), tokenizer_of_weights(checkpoint)


def tokenizer_of_weights(checkpoint: Checkpoint) -> Tokenizer | TokenizerInfo:
    """Returns the tokenizer in a folder of converted weights; what is known of it if there is none."""
    path = weights.tokenizer(checkpoint.about["path"])
    return TokenizerInfo(cardinality=checkpoint.cfg.text_card) if path is None else load_tokenizer(path)


def _name(path: Path, count: int) -> str:
    """Returns the last `count` parts of a checkpoint's path; RUN/checkpoints/STEP counts as one part, RUN-STEP."""
    path = Path(os.path.realpath(path))
    run, step = run_and_step(path) or (path, None)
    if step is None:
        name = str(Path(*path.parts[-count:]))
    elif count == 1:
        name = f"{run.name}-{step}"
    else:
        name = str(Path(*run.parts[-(count - 1) :], path.relative_to(run)))
    return printable(name.replace("\\", "\\\\"))  # two paths never look alike
