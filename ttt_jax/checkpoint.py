"""A run's checkpoints on disk, by Orbax: weights apart from the rest, so that they can be read alone.

RUN/checkpoints/STEP/params   weights
                     state    optimiser, state of the running streams
                     data     position in the training data (JSON)
                     meta     the resolved configuration and what it stands on (JSON)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ttt_jax import record
from ttt_jax.config import MoshiConfig
from ttt_jax.errors import InputError

FOLDER = "checkpoints"


class Saved(NamedTuple):
    """A checkpoint's content."""

    step: int
    params: Any
    state: Any
    data: Any


class Run(NamedTuple):
    """What evaluating a run needs."""

    config: MoshiConfig
    params: Any
    meta: dict[str, Any]
    """The whole resolved configuration under "config"; versions and digests of codec, tokenizer and corpus; "step"."""


class Checkpoints:
    """The checkpoints of one run folder. Saves in the background; `close` waits for the last one."""

    def __init__(self, run_dir: Path, keep: int | None = None):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of every save
        self._args = ocp.args
        self._folder = Path(run_dir).absolute() / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None, read_only=keep is None)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, params: Any, state: Any, data: Any, meta: Any) -> None:
        """Save a checkpoint; returns when the arrays may be donated, before they are on disk."""
        args = self._args
        self._manager.save(
            step,
            args=args.Composite(
                params=args.StandardSave(params),
                state=args.StandardSave(state),
                data=args.JsonSave(data),
                meta=args.JsonSave(meta),
            ),
        )

    def latest(self) -> int:
        """Step of the latest checkpoint. Raises `InputError` if there is none."""
        step = self._manager.latest_step()
        if step is None:
            raise InputError(f"{self._folder} holds no checkpoint: the run ended before its first, so start it anew.")
        return step

    def meta(self) -> dict[str, Any]:
        """What the latest checkpoint says of its run."""
        return self._restore(self.latest(), meta=self._args.JsonRestore())["meta"]

    def params(self, like: Any) -> Any:
        """The latest weights, in the structure, shapes and types of `like`."""
        return self._restore(self.latest(), params=self._args.StandardRestore(_target(like)))["params"]

    def restore(self, params: Any, state: Any) -> Saved:
        """The latest checkpoint, in the structure, shapes and types of `params` and `state`."""
        args, step = self._args, self.latest()
        found = self._restore(
            step,
            params=args.StandardRestore(_target(params)),
            state=args.StandardRestore(_target(state)),
            data=args.JsonRestore(),
        )
        return Saved(step, found["params"], found["state"], found["data"])

    def close(self) -> None:
        """Wait until everything saved is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._args.Composite(**items))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._folder / str(step)} is damaged or of another version and cannot be restored: remove it to go back"
                " to the checkpoint before, or start the run anew."
            ) from error


@contextlib.contextmanager
def open_run(run_dir: str | Path) -> Iterator[Checkpoints]:
    """The checkpoints of an existing run, to read. Raises `InputError` if `run_dir` is no run folder."""
    run_dir = Path(run_dir)
    if not (run_dir / FOLDER).is_dir():
        raise InputError(
            f"{run_dir} is not the folder of a run (it has no {FOLDER}/): give one that python -m train made."
        )
    checkpoints = Checkpoints(run_dir)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def load_run(run_dir: str | Path) -> Run:
    """The latest weights of a run with their configuration.

    Raises `InputError` if there is no run, no checkpoint in it, or the checkpoint is damaged.
    """
    from ttt_jax.moshi import model

    with open_run(run_dir) as checkpoints:
        meta = checkpoints.meta()
        config = record.from_dict(MoshiConfig, meta["config"]["model"], f"the checkpoint in {run_dir}")
        like = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
        return Run(config, checkpoints.params(like), {**meta, "step": checkpoints.latest()})


def _target(tree: Any) -> Any:
    """Shapes and types of `tree`, to be placed where its arrays are, or else on the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first)

    return jax.tree.map(one, tree)
