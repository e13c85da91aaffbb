"""The weights of a training run, completed from its base, with their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax

from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.differences import differences
from ttt_jax.checkpoints.run_checkpoints import Saved, open_run
from ttt_jax.config import MoshiConfig
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.utils import config_json, trees
from ttt_jax.utils.files import run_and_step


class Run(NamedTuple):
    """The weights of a run, for evaluation and export."""

    config: MoshiConfig
    params: Any
    meta: dict[str, Any]
    """The whole resolved configuration ("config"), versions, digests of codec, tokenizer and corpus, "step", and the
    digest of the weights ("weights")."""


def load_run(path: str | Path) -> Run:
    """Returns the latest weights of a run, or those of a checkpoint (RUN/checkpoints/STEP), and their configuration.

    Weights that a fine-tuning run did not change come from its base. Raises `InputError` if there is no run, no whole
    checkpoint in it, or its base is gone or another.
    """
    run_dir, step = run_and_step(Path(path)) or (path, None)

    def config_of(meta: dict[str, Any]) -> MoshiConfig:
        return config_json.from_dict(MoshiConfig, meta["config"]["model"], f"the checkpoint in {run_dir}")

    def shapes_of(meta: dict[str, Any]) -> Any:
        config = config_of(meta)
        return jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))

    def like(meta: dict[str, Any]) -> tuple[Any, None]:
        stored = meta.get("stored")
        return (shapes_of(meta) if stored is None else trees.pick(shapes_of(meta), set(stored))), None

    saved = open_run(run_dir).restore(like, step)
    config, params = config_of(saved.meta), saved.params
    if saved.meta.get("stored") is not None:
        params = _with_base(run_dir, saved, config, shapes_of(saved.meta))
    return Run(config, params, {**saved.meta, "step": saved.step, "weights": saved.digest})


def _with_base(run_dir: str | Path, saved: Saved, config: MoshiConfig, like: Any) -> dict[str, Any]:
    """Returns the stored weights and those of the base, together of the shapes of `like`."""
    base = saved.meta["base"]
    missing = trees.named(like).keys() - trees.named(saved.params).keys()
    with weights.base_of_run(run_dir, **base) as folder:
        params = trees.merge(weights.read(folder, config, missing), saved.params)
    shapes = [{name: leaf.shape for name, leaf in trees.named(tree).items()} for tree in (like, params)]
    if problems := "; ".join(differences(*shapes)):
        both = f"{run_dir} with its base {base['path']}"
        raise InputError(f"{both} {problems}: load it with the version of ttt_jax in its meta.")
    return params
