"""Validation: whole files with the state carried as in training. The state of training stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.batches import Batch, validation_batches
from train.config import TrainConfig
from train.metrics import finite
from train.step import Sums, chunk_sums
from ttt_jax.data.frames import Recording
from ttt_jax.distributed import sharding
from ttt_jax.moshi import model
from ttt_jax.utils.trees import Tree, merge


def on_mesh(batch: Batch, mesh: Mesh, rows: int) -> Batch:
    """Returns a batch [K, B, ...] of this process's rows as global arrays of `rows` rows."""
    where = sharding.rows_sharding(mesh, 1)
    return Batch(*(jax.make_array_from_process_local_data(where, x, (x.shape[0], rows, *x.shape[2:])) for x in batch))


class Validation:
    """Callable that scores `recordings` with given parameters."""

    def __init__(
        self, cfg: TrainConfig, mesh: Mesh, recordings: Sequence[Recording], rows: range, trainable: Tree, frozen: Tree
    ):
        """Compiles for the shapes of `trainable` and `frozen`; `rows` are the rows of this process."""
        self._cfg, self._mesh, self._recordings, self._rows = cfg, mesh, recordings, rows
        fresh = partial(model.init_state, cfg.model, cfg.data.batch)
        where = sharding.state_shardings(mesh, jax.eval_shape(fresh))
        self._fresh = jax.jit(fresh, out_shardings=where)
        score = jax.jit(self._score, donate_argnums=2, out_shardings=(where, sharding.replicated(mesh)))
        batch = next(validation_batches(recordings, cfg.data.batch, cfg.data.chunk, rows)).batch
        self._chunk = score.lower(trainable, frozen, self._fresh(), on_mesh(batch, mesh, cfg.data.batch)).compile()

    def __call__(self, trainable: Tree, frozen: Tree) -> dict[str, Any]:
        """Returns the loss, the losses of streams and the TTT layers' inner losses, as metrics.jsonl stores them.

        They are means over all targets, frames and heads of all files.
        """
        stream, total = self._fresh(), None
        for batch, _ in validation_batches(self._recordings, self._cfg.data.batch, self._cfg.data.chunk, self._rows):
            stream, sums = self._chunk(trainable, frozen, stream, on_mesh(batch, self._mesh, self._cfg.data.batch))
            sums = jax.device_get(sums._replace(rows=None))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        streams = {
            name: finite(loss / count) if count else None
            for name, loss, count in zip(self._cfg.model.target_streams, total.streams, total.counts, strict=True)
        }
        names = ("loss_base", "loss_before", "loss_after")
        inner = total.inner if total.inner is not None else ()
        ttt = {
            str(layer): dict(zip(names, (finite(x / total.frames) for x in losses), strict=True))
            for layer, losses in zip(self._cfg.model.ttt_layers, inner, strict=True)
        }
        return {
            "loss": finite(total.loss / max(total.weight, 1e-8)),
            "streams": streams,
            "frames": int(total.frames),
            "ttt": ttt,
        }

    def _score(self, trainable: Tree, frozen: Tree, stream: model.State, batch: Batch) -> tuple[model.State, Sums]:
        block = self._cfg.loss.block * self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            chunk = jax.tree.map(lambda x: x[0], batch)
            sums, stream = chunk_sums(merge(trainable, frozen), chunk, stream, self._cfg, block, measured=True)
        return stream, sums
