"""A run before, between and behind its steps: what it needs to start, its folder, what its checkpoints hold."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from train import dry_run, initial_params, trackers
from train.config import TrainConfig
from train.partition import fit
from train.step import TrainState, state_like
from ttt_jax.checkpoints.run_checkpoints import FOLDER
from ttt_jax.codec import Codec
from ttt_jax.data import corpus as corpora
from ttt_jax.data import unigram
from ttt_jax.data.corpus import Corpus
from ttt_jax.data.text import Tokenizer
from ttt_jax.distributed import sharding
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.command import machine
from ttt_jax.utils.paths import local
from ttt_jax.utils.trees import Tree, merge, pick

log = logging.getLogger("train")


class Run(NamedTuple):
    """A run that is ready to go on."""

    cfg: TrainConfig
    mesh: Mesh
    rows: range
    """Rows of a batch that this process reads."""
    corpus: Corpus
    meta: dict[str, Any]
    """What every checkpoint tells beside the configuration: versions, codec, data, base."""


def prepare(cfg: TrainConfig, run_dir: Path, load: Callable[..., Corpus] = corpora.load) -> Run:
    """A new run of `cfg` in `run_dir`, of which nothing is written yet; `load` opens its files. Raises `InputError`."""
    if not _is_free(run_dir):
        raise InputError(
            f"run_dir {run_dir} is taken: give another --run-dir, or go on with the run in it by --resume {run_dir}."
        )
    writable = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not os.access(writable, os.W_OK):
        raise InputError(f"run_dir {run_dir} cannot be made ({writable} is not writable): give another --run-dir.")
    trackers.check(cfg.tensorboard, cfg.wandb)
    initial_params.check_base(cfg)
    codec, tokenizer = corpora.load_coders(cfg.data, cfg.model.card, cfg.model.text_card)
    cfg = fit(fit_model(dataclasses.replace(cfg, run_dir=str(run_dir), data=cfg.data.resolved()), codec, tokenizer))
    cfg = dataclasses.replace(cfg, base=None if cfg.base is None else str(local(cfg.base).absolute()))
    mesh = find_mesh(cfg)
    corpus = load(cfg.data, codec, tokenizer)
    check_data(cfg, corpus)
    meta = {**machine(), **corpus.describe(), "base": initial_params.base_of(cfg), "stored": initial_params.stored(cfg)}
    return Run(cfg, mesh, sharding.local_rows(mesh, cfg.data.batch), corpus, meta)


def make_folder(run: Run) -> None:
    """Make the folder of a new run, with its configuration and what is known of its data."""
    run.meta["unigram"] = _unigram(run.cfg, run.corpus)
    folder = Path(run.cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config_json.write_json(folder / "config.json", config_json.to_dict(run.cfg))
    config_json.write_json(folder / "meta.json", run.meta)


def fit_model(cfg: TrainConfig, codec: Codec, tokenizer: Tokenizer) -> TrainConfig:
    """Returns `cfg` with the model fitted to codec and tokenizer. Raises `InputError` if they do not fit."""
    weights = None if cfg.base is None else f"the checkpoint in {cfg.base}"
    model = corpora.fit_model(cfg.model, codec, tokenizer, weights)
    # The default inner rate may change in later versions: the run stores its own.
    ttt = dataclasses.replace(model.ttt, base_lr=model.inner_lr)
    return dataclasses.replace(cfg, model=dataclasses.replace(model, ttt=ttt))


def find_mesh(cfg: TrainConfig) -> Mesh:
    """The mesh of `cfg`. Raises `InputError` if it does not fit the devices, the rows or the model."""
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    sharding.check_rows(mesh, cfg.data.batch, cfg.accumulate)
    state_like(cfg, mesh)
    return mesh


def check_data(cfg: TrainConfig, corpus: Corpus) -> None:
    """Raise `InputError` if the corpus lacks files that the run needs."""
    for name in ("eval_every", "sample_every"):
        if getattr(cfg, name) and not corpus.validation:
            raise InputError(
                f"{name}={getattr(cfg, name)} needs files, but there are none to validate on: name some with --data.validation."
            )
    if cfg.sample_every and jax.process_count() > 1:
        raise InputError(f"sample_every={cfg.sample_every} works in one process only: leave it out.")


def arrays(run: Run, state: TrainState, frozen: Tree) -> dict[str, Any]:
    """The arrays of a checkpoint."""
    params = merge(state.trainable, frozen)
    stored = params if run.meta["stored"] is None else pick(params, set(run.meta["stored"]))
    return {"params": stored, "state": rest(state)}


def rest(state: TrainState) -> dict[str, Any]:
    """All of the state but the weights, which have a place of their own in a checkpoint."""
    return {name: leaf for name, leaf in state._asdict().items() if name != "trainable"}


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Says that `what` is compiled, and how long it took."""
    log.info("compiling the %s (kept in %s for the next run) ...", what, jax.config.jax_compilation_cache_dir)
    begin = time.perf_counter()
    yield
    log.info("compiled in %.0f s", time.perf_counter() - begin)


@contextlib.contextmanager
def memory(cfg: TrainConfig) -> Iterator[None]:
    """Tells of too little memory in one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (told := dry_run.too_large(error, cfg)) is not None:
            raise told from error
        raise


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """The signals that asked to stop so far (Ctrl-C, SIGTERM): a step is never torn apart. The second one interrupts at once."""
    asked: list[int] = []

    def on_signal(number: int, *_: object) -> None:
        if asked:
            raise SystemExit(128 + number)
        asked.append(number)
        log.info("\nsaving a checkpoint after this step; a second signal stops at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_free(run_dir: Path) -> bool:
    """Whether a run may begin in `run_dir`: nothing is there, or a run that ended before its first checkpoint."""
    if not run_dir.exists():
        return True
    if not run_dir.is_dir():
        return False
    inside = {path.name for path in run_dir.iterdir()}
    begun = {"config.json", "meta.json"} <= inside and (run_dir / FOLDER).is_dir()
    return not inside or (begun and not any(path.name.isdecimal() for path in (run_dir / FOLDER).iterdir()))


def _unigram(cfg: TrainConfig, corpus: Corpus) -> dict[str, float]:
    """Nats of each stream of the training data under its own unigram model: what memory and attention have to beat."""
    names = list(cfg.model.target_streams)
    tables = unigram.fit(unigram.some(corpus.recordings), cfg.model.target_streams.values())
    total, counts = np.zeros(len(names)), np.zeros(len(names))
    for file in unigram.some(corpus.recordings):
        nats = unigram.nats(tables, file)
        total, counts = total + np.nansum(nats, -1), counts + np.isfinite(nats).sum(-1)
    return {
        name: loss / count for name, loss, count in zip(names, total.tolist(), counts.tolist(), strict=True) if count
    }
