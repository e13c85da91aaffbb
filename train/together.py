"""Runs that differ in seed and data alone, trained side by side in one program: `jax.vmap` over all that a step takes.

The program is compiled once for all of them, and small models share a device (`bench/together.py` times it). Every run gets the folder
that `python -m train` would have given it, and what it learns is the same to rounding, so each can be evaluated, or gone on with, by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import messages, plots
from train.batches import Batch, Batches
from train.config import DataConfig, TrainConfig
from train.metrics import MetricsLog, read
from train.partition import split
from train.setup import Run, arrays, compiling, interrupts, make_folder, memory, prepare
from train.step import TrainState, fresh_state, make_steps_together
from ttt_jax.checkpoints.run_checkpoints import Checkpoints
from ttt_jax.data import corpus as corpora
from ttt_jax.data.corpus import Corpus, CorpusConfig
from ttt_jax.data.frames import Recording
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.utils import config_json
from ttt_jax.utils.command import PARTIAL, keep_compiled
from ttt_jax.utils.paths import local
from ttt_jax.utils.trees import Tree
from ttt_jax.utils.xla import known_options

log = logging.getLogger("train")


def start(cfgs: Sequence[TrainConfig], load: Callable[..., Corpus] | None = None) -> int:
    """Train all of `cfgs`, each in the run folder that it names; the exit code, as of `train.loop.start`.

    Nothing is evaluated at the end. `load` opens the files: a `loader` that other calls have used, or a new one. Raises `InputError`:
    two differ in more than name, folder, seed and files, or ask for what one program cannot do for many; or, once the others have
    come to their end, that some had losses that are not finite.
    """
    _check(cfgs)
    load = load or loader()
    keep_compiled(cfgs[0].data.cache_dir / "compiled")
    runs = [prepare(cfg, local(cfg.run_dir), load) for cfg in cfgs]
    _check([run.cfg for run in runs])  # by now with the cardinalities of their codecs
    cfg = runs[0].cfg
    log.info("%d runs side by side: %s", len(runs), ", ".join(run.cfg.run_dir for run in runs))
    for corpus in {id(run.corpus): run.corpus for run in runs}.values():
        messages.absent(corpus)
    with contextlib.ExitStack() as opened:
        opened.enter_context(memory(cfg))
        with compiling("first weights"):
            state, frozen = fresh(cfg, [run.cfg.seed for run in runs])
        windows = [opened.enter_context(contextlib.closing(_windows(run))) for run in runs]
        for run in runs:
            make_folder(run)
        checkpoints = [
            opened.enter_context(contextlib.closing(Checkpoints(Path(run.cfg.run_dir), keep=cfg.keep))) for run in runs
        ]
        return _train(runs, state, frozen, windows, checkpoints)


def over_seeds(cfg: TrainConfig, seeds: Sequence[int]) -> list[TrainConfig]:
    """`cfg` with each of `seeds`, in folders that end in the seed."""
    folder = str(Path(cfg.run_dir)) if cfg.run_dir else f"runs/{cfg.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return [dataclasses.replace(cfg, seed=seed, run_dir=f"{folder}-{seed}") for seed in seeds]


def fresh(cfg: TrainConfig, seeds: Sequence[int]) -> tuple[TrainState, Tree]:
    """States and frozen parameters of runs of these seeds before their first step, leading axis runs."""

    def one(seed: jax.Array) -> tuple[TrainState, Tree]:
        trainable, frozen = split(model.init_params(cfg.model, jax.random.key(seed)), cfg)
        return fresh_state(cfg, trainable)._replace(trainable=trainable), frozen

    # Random draws of many shapes take long to optimise and run once, as in `train.initial_params`.
    draw = jax.jit(jax.vmap(one), compiler_options=known_options({"xla_backend_optimization_level": 0}))
    return draw(jnp.array(seeds, jnp.uint32))


def _check(cfgs: Sequence[TrainConfig]) -> None:
    first = cfgs[0]
    for cfg in cfgs[1:]:
        if (field := _difference(_shared(cfg), _shared(first))) is not None:
            raise InputError(
                f"{cfg.run_dir} and {first.run_dir} differ in {field}: give runs that train together the same but for seed and files."
            )
    folders = [cfg.run_dir for cfg in cfgs]
    if None in folders or len(set(folders)) < len(folders):
        raise InputError(
            f"the run_dirs {folders} of runs that train together are not all given and different: give each its own."
        )
    asked = [name for name in ("base", "eval_every", "sample_every", "tensorboard", "wandb") if getattr(first, name)]
    if asked:
        raise InputError(
            f"{asked[0]}={getattr(first, asked[0])} is for a run by itself: runs that train together do without, so leave it out or give 0."
        )
    if jax.process_count() > 1:
        raise InputError(
            f"runs train together in one process, but there are {jax.process_count()}: start it without --launch."
        )


def _shared(cfg: TrainConfig) -> TrainConfig:
    """What runs that train together have in common."""
    data = dataclasses.replace(cfg.data, train=None, heldout=None, validation=None)
    return dataclasses.replace(cfg, name="", run_dir=None, seed=0, data=data)


def _difference(a: TrainConfig, b: TrainConfig) -> str | None:
    """The first field in which two configurations differ."""
    return next((f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)), None)


def _train(
    runs: Sequence[Run],
    states: TrainState,
    frozen: Tree,
    windows: Sequence[Batches],
    checkpoints: Sequence[Checkpoints],
) -> int:
    """Steps until the end or an interrupt; the exit code. A run whose numbers are not finite is no longer looked at, the others go on."""
    from tqdm import tqdm

    cfg = runs[0].cfg
    no_stop = np.zeros(1, np.int32)
    positions = [one.get_state() for one in windows]
    with compiling(f"training step of {len(runs)} runs"):
        batch = _stack([next(one).batch for one in windows])
        step_together = make_steps_together(cfg, len(runs)).lower(states, frozen, batch, no_stop).compile()
    for one, position in zip(windows, positions, strict=True):
        one.set_state(position)
    pending: tuple[Any, ...] | None = None
    failed: dict[int, str] = {}
    with contextlib.ExitStack() as opened:
        logs = [opened.enter_context(contextlib.closing(_metrics_log(run))) for run in runs]
        bar = opened.enter_context(tqdm(total=cfg.steps, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15))
        asked = opened.enter_context(interrupts())

        def settle() -> None:
            """Take in the metrics of the last step that was dispatched."""
            nonlocal pending
            if pending is None:
                return
            step, metrics, taken = pending
            metrics, losses = jax.device_get(metrics), [math.nan] * len(runs)
            for i, (own, window) in enumerate(zip(logs, taken, strict=True)):
                if i in failed:
                    continue
                names = {(k, row): name for k, names in enumerate(window.files) for row, name in enumerate(names)}
                try:
                    loss = own.add(step, _of(metrics, i), int(window.batch.mask.sum()), names)["loss"]
                    losses[i] = math.nan if loss is None else loss
                except InputError as error:
                    failed[i] = f"{runs[i].cfg.run_dir}: {error}"
                    log.warning("%s", failed[i])
                    if len(failed) == len(runs):
                        raise InputError(" ".join(failed.values())) from None
            bar.set_postfix_str("loss " + " ".join(f"{loss:.2f}" for loss in losses), refresh=False)
            bar.update()
            pending = None

        for step in range(1, cfg.steps + 1):
            taken = [next(one) for one in windows]
            states, metrics = step_together(states, frozen, _stack([one.batch for one in taken]), no_stop)
            settle()  # the step before, while this one computes
            pending = step, metrics, taken
            if step % cfg.checkpoint_every == 0 or step == cfg.steps or asked:
                settle()  # finds what is not finite and must not be saved
                for i, (run, window, own) in enumerate(zip(runs, windows, checkpoints, strict=True)):
                    if i in failed:
                        continue
                    meta = {"config": config_json.to_dict(run.cfg), **run.meta}
                    own.save(step, **arrays(run, _of(states, i), _of(frozen, i)), data=window.get_state(), meta=meta)
            if asked:
                log.info("interrupted after step %d; each run goes on by itself: python -m train --resume RUN", step)
                return 128 + asked[0]
    for i, run in enumerate(runs):
        if i not in failed:
            folder = Path(run.cfg.run_dir)
            plots.draw_run(read(folder / "metrics.jsonl"), run.meta["unigram"], folder)
    if failed:
        raise InputError(
            f"of {len(runs)} runs {len(failed)} stopped, the others are whole: {' '.join(failed.values())}"
        )
    return PARTIAL if any(run.corpus.missing for run in runs) else 0


def loader() -> Callable[[DataConfig, Any, Any], Corpus]:
    """`ttt_jax.data.corpus.load` that opens equal data once and keeps its files in memory: a step of many small models would wait for them."""
    opened: dict[tuple[Any, ...], Corpus] = {}

    def kept(recording: Recording) -> Recording:
        return dataclasses.replace(recording, read=functools.cache(recording.read))

    def load(data: DataConfig, codec: Any, tokenizer: Any) -> Corpus:
        key = tuple(getattr(data, field.name) for field in dataclasses.fields(CorpusConfig))  # however it is cut
        if key not in opened:
            corpus = corpora.load(data, codec, tokenizer)
            train = (one._replace(recordings=tuple(map(kept, one.recordings))) for one in corpus.train)
            opened[key] = corpus._replace(train=tuple(train))
        return opened[key]

    return load


def _windows(run: Run) -> Batches:
    data = run.cfg.data
    return Batches(run.corpus.train, data.batch, data.chunk, run.cfg.seed, run.cfg.bptt, None, data.from_start)


def _metrics_log(run: Run) -> MetricsLog:
    cfg = run.cfg
    path = Path(cfg.run_dir) / "metrics.jsonl"
    return MetricsLog(path, list(cfg.model.target_streams), cfg.log_every, cfg.steps, 0, cfg.optim.skips)


def _stack(batches: Sequence[Batch]) -> Batch:
    return Batch(*(np.stack(parts) for parts in zip(*batches, strict=True)))


def _of(tree: Any, i: int) -> Any:
    """Those of run `i`."""
    return jax.tree.map(lambda leaf: leaf[i], tree)
