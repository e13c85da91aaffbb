"""The training loop, of one run or of several side by side: steps, metrics, validation, samples, checkpoints, figures.

Several runs differ in seed and training files alone. They share one program, `jax.vmap` of the step, on one device: it
is compiled once, and small models fill a device together (`bench/train.py` measures it). Each run gets the folder
and, to rounding, the weights that it would get alone, so each can be evaluated or resumed by itself.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import dry_run as train_dry_run
from train import initial_params, messages, plots, trackers
from train.batches import Batch, Batches, Window
from train.config import TrainConfig
from train.metrics import MetricsLog, read
from train.partition import fit, split
from train.samples import Sampler
from train.setup import (
    Run,
    arrays,
    check_alike,
    compiling,
    interrupts,
    keep_in_memory,
    make_folder,
    memory,
    prepare,
    reopen,
    rest,
)
from train.step import TrainState, init_state, init_states, make_steps_together, make_train_step, state_like
from train.validate import Validation, on_mesh
from ttt_jax.checkpoints import checksums
from ttt_jax.checkpoints.run_checkpoints import Checkpoints
from ttt_jax.config import FRAME_RATE
from ttt_jax.data import corpus as corpora
from ttt_jax.data.corpus import Corpus
from ttt_jax.distributed import launch, sharding
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.command import PARTIAL, call, keep_compiled
from ttt_jax.utils.paths import local
from ttt_jax.utils.trees import Tree, merge

log = logging.getLogger("train")


def dry_run(cfg: TrainConfig) -> int:
    """Prints what a run of `cfg` takes, without weights or data, and returns the exit code."""
    print("\n".join(train_dry_run.lines(train_dry_run.plan(fit(cfg)))))
    return 0


def start(cfgs: Sequence[TrainConfig], load: Callable[..., Corpus] | None = None, evaluate: bool = True) -> int:
    """Trains a new run of each of `cfgs` and returns the exit code; a run by itself is evaluated at its end if asked.

    Several differ in name, folder, seed and training files alone. `load` opens the speech: `ttt_jax.data.corpus.load`,
    for several runs `setup.keep_in_memory()`. Raises `InputError` if a run cannot start, and then leaves nothing
    behind; also at the end, if the losses of some runs were not finite.
    """
    check_alike(cfgs)
    keep_compiled(cfgs[0].data.cache_dir / "compiled")
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(launch.agreed(int(time.time()))))
    load = load or (corpora.load if len(cfgs) == 1 else keep_in_memory())
    runs = [prepare(cfg, local(cfg.run_dir or f"runs/{cfg.name}-{stamp}"), load) for cfg in cfgs]
    check_alike([run.cfg for run in runs])  # their codecs decide the cardinalities
    messages.runs(runs)
    with contextlib.ExitStack() as opened:
        opened.enter_context(memory(runs[0].cfg))
        state, frozen = _first_state(runs)
        launch.agreed(0)  # all processes have looked at the folder
        if launch.is_first():
            for run in runs:
                make_folder(run)
        launch.agreed(0)  # the folder is there for all processes
        checkpoints = [opened.enter_context(contextlib.closing(_checkpoints(run))) for run in runs]
        stopped, failed = _train(runs, state, frozen, None, checkpoints)
    del state, frozen  # evaluation loads the checkpoint
    return _end(runs, checkpoints, stopped, failed, evaluate)


def resume(run_dir: Path, **changes: Any) -> int:
    """Resumes the run in `run_dir` from its latest whole checkpoint and returns the exit code.

    `changes` are the fields of its configuration (`config.CHANGEABLE`) that become others. Raises `InputError`.
    """
    run = reopen(run_dir, **changes)
    with contextlib.closing(_checkpoints(run)) as checkpoints, memory(run.cfg):
        state, frozen, position = _stored_state(run, checkpoints)
        messages.runs([run])
        log.info("resuming after step %d", int(state.step))
        stopped, failed = _train([run], state, frozen, position, [checkpoints])
    del state, frozen
    return _end([run], [checkpoints], stopped, failed)


def _first_state(runs: Sequence[Run]) -> tuple[TrainState, Tree]:
    """Returns state and frozen parameters before the first step; of several runs with a leading axis of runs."""
    cfg, mesh = runs[0].cfg, runs[0].mesh
    if len(runs) > 1:
        with compiling("first weights"):
            return init_states(cfg, [run.cfg.seed for run in runs])
    params = initial_params.initial(cfg, mesh)
    messages.weights(params)
    return init_state(cfg, mesh, params.trainable), params.frozen


def _stored_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, Tree, Any]:
    """Returns state, frozen parameters and position in the data from the latest checkpoint."""
    cfg, mesh = run.cfg, run.mesh
    like = rest(state_like(cfg, mesh))
    saved = checkpoints.restore(lambda _: (initial_params.stored_like(cfg, mesh), like))
    trainable, frozen = split(merge(saved.params, initial_params.frozen_base(cfg, mesh)), cfg)
    return TrainState(trainable=trainable, **saved.state), frozen, saved.data


def _train(
    runs: Sequence[Run], state: TrainState, frozen: Tree, position: Any, checkpoints: Sequence[Checkpoints]
) -> tuple[tuple[int, int] | None, dict[int, str]]:
    """Steps until the end or a signal.

    Returns the signal with the last step, None at the end, and a sentence for each of several runs whose numbers were
    not finite.
    """
    from tqdm import tqdm

    cfg, mesh, run_dir, first = runs[0].cfg, runs[0].mesh, Path(runs[0].cfg.run_dir), launch.is_first()
    done = int(np.max(state.step))
    failed: dict[int, str] = {}
    if done >= cfg.steps:
        return None, failed
    with contextlib.ExitStack() as opened:
        batches = [opened.enter_context(contextlib.closing(_batches(run))) for run in runs]
        if position is not None:
            batches[0].set_state(position)
        train_step = _compile(runs, state, frozen, batches)
        validation = sampler = None
        if cfg.eval_every:
            with compiling("validation"):
                validation = Validation(cfg, mesh, runs[0].corpus.validation, runs[0].rows, state.trainable, frozen)
        with compiling("checksums of checkpoints"):
            checksums.sums(arrays(runs[0], _of(state, 0, runs), _of(frozen, 0, runs)))
        if cfg.sample_every:
            corpus = runs[0].corpus
            sampler = Sampler(cfg.model, corpus.validation, corpus.codec, corpus.tokenizer, run_dir, cfg.seed)
        logs = [opened.enter_context(contextlib.closing(_metrics_log(run, done))) for run in runs]
        often = 0.5 if sys.stderr.isatty() else 15
        bar = tqdm(total=cfg.steps, initial=done, unit="step", dynamic_ncols=True, mininterval=often, disable=not first)
        opened.enter_context(bar)
        signals = opened.enter_context(interrupts())
        pending: tuple[int, Any, list[Window]] | None = None
        heard = 0

        def settle() -> None:
            """Takes in the metrics of the last step that was dispatched."""
            nonlocal pending, heard
            if pending is None:
                return
            (step, metrics, windows), pending = pending, None
            metrics = jax.device_get(metrics)
            heard, losses = int(np.max(metrics.stop)), ["failed"] * len(runs)
            for i in range(len(runs)):
                if i in failed:
                    continue
                of_run = _of(metrics, i, runs)
                try:
                    line = logs[i].add(step, of_run, _frames(windows[i], runs[i]), _by_row(windows[i], runs[i]))
                except InputError as error:
                    if len(runs) == 1:
                        raise
                    failed[i] = f"{runs[i].cfg.run_dir}: {error}"
                    log.warning("%s", failed[i])
                    if len(failed) == len(runs):
                        raise InputError(" ".join(failed.values())) from None
                    continue
                losses[i] = "skipped" if line["loss"] is None else f"{line['loss']:.3f}"
                with tqdm.external_write_mode():
                    if step == 1 and len(runs) == 1:
                        messages.initial_loss(cfg, of_run)
                    if "skipped_for" in line:
                        log.warning("skipped %s", line["skipped_for"])
            rate = sum(one.rate for one in logs)
            speed = f"{rate:,.0f} frames/s, {rate / FRAME_RATE:,.0f} x real time"
            bar.set_postfix_str(f"{speed}, loss {' '.join(losses)}", refresh=False)
            bar.update()

        for step in range(done + 1, cfg.steps + 1):
            windows = [next(one) for one in batches]
            state, metrics = train_step(state, frozen, *_inputs(runs, windows, signals))
            settle()  # the step before, while this one computes
            pending = step, metrics, windows
            # A signal may reach one of several processes, but all must stop after the same step: metrics carry it.
            ending = heard if jax.process_count() > 1 else max(signals, default=0)
            score = None
            if validation is not None and (step % cfg.eval_every == 0 or step == cfg.steps):
                settle()
                with _paused(logs):
                    values = _validated(validation, state, frozen, bar)
                logs[0].add_validation(step, values)
                score = values["loss"]
            if step % cfg.checkpoint_every == 0 or step == cfg.steps or ending or score is not None:
                settle()  # finds what is not finite and must not be saved
                with _paused(logs):
                    for i, (run, one, saved) in enumerate(zip(runs, batches, checkpoints, strict=True)):
                        if i not in failed:
                            content = arrays(run, _of(state, i, runs), _of(frozen, i, runs))
                            meta = {"config": config_json.to_dict(run.cfg), **run.meta}
                            saved.save(step, **content, data=one.get_state(), meta=meta, validation=score)
            if sampler is not None and (step % cfg.sample_every == 0 or step == cfg.steps) and not ending:
                settle()
                with _paused(logs):
                    sampler(step, merge(state.trainable, frozen))
            if ending:
                return (ending, step), failed
    return None, failed


def _end(
    runs: Sequence[Run],
    checkpoints: Sequence[Checkpoints],
    stopped: tuple[int, int] | None,
    failed: dict[int, str],
    evaluate: bool = True,
) -> int:
    """Draws the runs, evaluates a run by itself, and returns the exit code."""
    if stopped:
        signal, step = stopped
        resumed = [f"python -m train --resume {run.cfg.run_dir}" for i, run in enumerate(runs) if i not in failed]
        log.info("interrupted after step %d; go on with: %s", step, "; ".join(resumed))
        return 128 + signal
    for i, run in enumerate(runs):
        if i not in failed and launch.is_first():
            run_dir = Path(run.cfg.run_dir)
            plots.draw_run(read(run_dir / "metrics.jsonl"), run.meta.get("unigram"), run_dir)
            log.info("checkpoints, metrics.jsonl and loss.png are in %s", run_dir)
    if failed:
        raise InputError(
            f"of {len(runs)} runs {len(failed)} stopped, the others are whole: {' '.join(failed.values())}"
        )
    code, cfg, corpus = 0, runs[0].cfg, runs[0].corpus
    if cfg.eval_every and (best := checkpoints[0].best()) is not None:
        log.info(
            "the lowest validation loss was that of step %d (%s)", best, Path(cfg.run_dir, "checkpoints", str(best))
        )
    if len(runs) == 1 and evaluate:
        if not corpus.heldout:
            log.info("no held-out files to evaluate: name some with --data.heldout")
        elif jax.process_count() > 1:
            log.info("evaluate it in one process: python -m eval stream %s", cfg.run_dir)
        else:
            with memory(cfg):  # on one device, however many have trained it
                code = call("eval", ["stream", cfg.run_dir])
    return code or (PARTIAL if any(run.corpus.missing for run in runs) else 0)


def _validated(validation: Validation, state: TrainState, frozen: Tree, bar: Any) -> dict[str, Any]:
    bar.set_postfix_str("validating ...")
    values = validation(state.trainable, frozen)
    if values["loss"] is None:
        raise InputError(
            f"the validation after step {int(state.step)} gives a loss that is not finite: start anew (--from) with a"
            " lower optim.lr, optim.ttt_lr or model.ttt.base_lr."
        )
    bar.set_postfix_str(f"validation {values['loss']:.3f}")
    return values


def _compile(runs: Sequence[Run], state: TrainState, frozen: Tree, batches: Sequence[Batches]) -> Callable:
    """Compiles the step for the shapes of the next batches and leaves `batches` where they are."""
    positions = [one.get_state() for one in batches]
    inputs = _inputs(runs, [next(one) for one in batches], [])
    for one, position in zip(batches, positions, strict=True):
        one.set_state(position)
    cfg, several = runs[0].cfg, len(runs) > 1
    with compiling(f"training step of {len(runs)} runs" if several else "training step"):
        train_step = make_steps_together(cfg, len(runs)) if several else make_train_step(cfg, runs[0].mesh)
        return train_step.lower(state, frozen, *inputs).compile()


def _inputs(runs: Sequence[Run], windows: Sequence[Window], signals: Sequence[int]) -> tuple[Batch, Any]:
    """Returns a step's batch and, for every device, the signal that its process got (0: none), int32 [devices]."""
    signal, mesh = max(signals, default=0), runs[0].mesh
    if len(runs) > 1:
        return Batch(*map(np.stack, zip(*(window.batch for window in windows), strict=True))), np.array(
            [signal], np.int32
        )
    stop = np.full(len(mesh.local_devices), signal, np.int32)
    stop = jax.make_array_from_process_local_data(sharding.devices_sharding(mesh), stop, (mesh.size,))
    return on_mesh(windows[0].batch, mesh, runs[0].cfg.data.batch), stop


def _of(tree: Any, i: int, runs: Sequence[Run]) -> Any:
    """Returns the part of `tree` of run `i`."""
    return tree if len(runs) == 1 else jax.tree.map(lambda leaf: leaf[i], tree)


def _frames(window: Window, run: Run) -> int:
    """Valid frames of a step; those of the rows of other processes are estimated from the rows of this one."""
    return int(window.batch.mask.sum()) * run.cfg.data.batch // len(run.rows)


def _by_row(window: Window, run: Run) -> dict[tuple[int, int], str]:
    """Returns the names of the files by chunk and row."""
    return {(k, row): name for k, names in enumerate(window.files) for row, name in zip(run.rows, names, strict=True)}


def _batches(run: Run) -> Batches:
    cfg, data = run.cfg, run.cfg.data
    return Batches(run.corpus.train, data.batch, data.chunk, cfg.seed, cfg.bptt, run.rows, data.from_start)


def _checkpoints(run: Run) -> Checkpoints:
    return Checkpoints(Path(run.cfg.run_dir), keep=run.cfg.keep)


def _metrics_log(run: Run, done: int) -> MetricsLog:
    """The log behind step `done`, which the first process writes."""
    cfg, run_dir = run.cfg, Path(run.cfg.run_dir)
    path, others = None, []
    if launch.is_first():
        path = run_dir / "metrics.jsonl"
        others = trackers.open_trackers(cfg.tensorboard, cfg.wandb, run_dir, config_json.to_dict(cfg), done)
    return MetricsLog(path, list(cfg.model.target_streams), cfg.log_every, cfg.steps, done, cfg.optim.skips, others)


@contextlib.contextmanager
def _paused(logs: Sequence[MetricsLog]) -> Iterator[None]:
    with contextlib.ExitStack() as paused:
        for one in logs:
            paused.enter_context(one.paused())
        yield
