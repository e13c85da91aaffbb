"""The training loop: prepares a run or takes one up again, steps, validates, writes metrics and checkpoints, and evaluates."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train import dry_run as train_dry_run
from train import initial_params, messages, plots, trackers
from train.batches import Batches
from train.config import Changes, TrainConfig
from train.metrics import MetricsLog, read
from train.partition import fit, split
from train.samples import Sampler
from train.setup import Run, arrays, check_data, compiling, find_mesh, interrupts, make_folder, memory, prepare, rest
from train.step import Metrics, TrainState, init_state, make_train_step, state_like
from train.validate import Validation, on_mesh
from ttt_jax.checkpoints import checksums
from ttt_jax.checkpoints.run_checkpoints import Checkpoints, open_run
from ttt_jax.config import FRAME_RATE
from ttt_jax.data import corpus as corpora
from ttt_jax.distributed import launch, sharding
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.command import PARTIAL, call, keep_compiled, machine
from ttt_jax.utils.paths import local
from ttt_jax.utils.trees import Tree, merge

log = logging.getLogger("train")


def dry_run(cfg: TrainConfig) -> int:
    """Print what a run of `cfg` takes, without weights or data; the exit code."""
    print("\n".join(train_dry_run.lines(train_dry_run.plan(fit(cfg)))))
    return 0


def start(cfg: TrainConfig) -> int:
    """Start a run of `cfg`; the exit code. Nothing is left behind if the input is bad. Raises `InputError`."""
    keep_compiled(cfg.data.cache_dir / "compiled")
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(launch.agreed(int(time.time()))))
    run = prepare(cfg, local(cfg.run_dir or f"runs/{cfg.name}-{stamp}"))
    messages.run(run)
    with memory(run.cfg):
        found = initial_params.initial(run.cfg, run.mesh)
        state = init_state(run.cfg, run.mesh, found.trainable)
    messages.weights(found)
    launch.agreed(0)  # all have looked at the folder
    if launch.is_first():
        make_folder(run)
    launch.agreed(0)  # and it is there for all
    return _run(run, state, found.frozen, None, Checkpoints(Path(run.cfg.run_dir), keep=cfg.keep))


def resume(run_dir: Path, changes: Changes | None = None) -> int:
    """Go on with the run in `run_dir` from its latest whole checkpoint, with `changes` if asked to; the exit code. Raises `InputError`."""
    with open_run(run_dir) as checkpoints:
        meta = checkpoints.meta()
    cfg = config_json.from_dict(TrainConfig, meta.pop("config"), f"the checkpoint in {run_dir}")
    cfg = dataclasses.replace(cfg, run_dir=str(run_dir), **(vars(changes) if changes else {}))
    keep_compiled(cfg.data.cache_dir / "compiled")
    trackers.check(cfg.tensorboard, cfg.wandb)
    devices = find_mesh(cfg)
    corpus = corpora.load(cfg.data, *corpora.load_coders(cfg.data, cfg.model.card, cfg.model.text_card))
    check_data(cfg, corpus)
    described = corpus.describe()
    if {key: meta.get(key) for key in described} != described:
        if corpus.missing:
            raise InputError(f"the data differ from those that {run_dir} was trained on: {corpus.missing[0].reason}")
        raise InputError(
            f"the data, codec or tokenizer differ from those that {run_dir} was trained on (see its meta.json): bring"
            " the old ones back, or start a new run with --from."
        )
    if initial_params.base_of(cfg) != meta["base"]:
        raise InputError(
            f"the weights in {cfg.base} are not those that {run_dir} started from (digest {meta['base']['digest'][:12]}): bring the old"
            " ones back."
        )
    run = Run(cfg, devices, sharding.local_rows(devices, cfg.data.batch), corpus, {**meta, **machine()})
    like = state_like(cfg, devices)
    checkpoints = Checkpoints(run_dir, keep=cfg.keep)
    try:
        with memory(cfg):
            saved = checkpoints.restore(lambda _: (initial_params.stored_like(cfg, devices), rest(like)))
            trainable, frozen = split(merge(saved.params, initial_params.frozen_base(cfg, devices)), cfg)
    except BaseException:
        checkpoints.close()
        raise
    messages.run(run)
    log.info("resuming after step %d", saved.step)
    return _run(run, TrainState(trainable=trainable, **saved.state), frozen, saved.data, checkpoints)


def _run(run: Run, state: TrainState, frozen: Tree, position: Any, checkpoints: Checkpoints) -> int:
    cfg, run_dir = run.cfg, Path(run.cfg.run_dir)
    with contextlib.ExitStack() as opened:
        opened.enter_context(memory(cfg))
        opened.enter_context(contextlib.closing(checkpoints))
        windows = Batches(
            run.corpus.train, cfg.data.batch, cfg.data.chunk, cfg.seed, cfg.bptt, run.rows, cfg.data.from_start
        )
        opened.enter_context(contextlib.closing(windows))
        if position is not None:
            windows.set_state(position)
        state, code = _train(run, state, frozen, windows, checkpoints)
    if code:
        log.info("interrupted after step %d; go on with: python -m train --resume %s", int(state.step), run_dir)
        return code
    if launch.is_first():
        plots.draw_run(read(run_dir / "metrics.jsonl"), run.meta.get("unigram"), run_dir)
        log.info("checkpoints, metrics.jsonl and loss.png are in %s", run_dir)
    if cfg.eval_every and (best := checkpoints.best()) is not None:
        log.info("the lowest validation loss was that of step %d (%s)", best, run_dir / "checkpoints" / str(best))
    if not run.corpus.heldout:
        log.info("no held-out files to evaluate: name some with --data.heldout")
    elif jax.process_count() > 1:
        log.info("evaluate it in one process: python -m eval stream %s", run_dir)
    else:
        del state, frozen  # evaluation loads the checkpoint
        code = call("eval", ["stream", str(run_dir)])
        return code or (PARTIAL if run.corpus.missing else 0)
    return PARTIAL if run.corpus.missing else 0


def _train(
    run: Run, state: TrainState, frozen: Tree, windows: Batches, checkpoints: Checkpoints
) -> tuple[TrainState, int]:
    """Steps until the end or an interrupt; the state, and the exit code: 0 at the end."""
    from tqdm import tqdm

    cfg, mesh, run_dir = run.cfg, run.mesh, Path(run.cfg.run_dir)
    done = int(state.step)
    if done >= cfg.steps:
        return state, 0
    train_step = _compile(run, state, frozen, windows)
    validation = None
    if cfg.eval_every:
        with compiling("validation"):
            validation = Validation(cfg, mesh, run.corpus.validation, run.rows, state.trainable, frozen)
    with compiling("checksums of checkpoints"):
        checksums.sums(arrays(run, state, frozen))
    sampler = None
    if cfg.sample_every:
        sampler = Sampler(cfg.model, run.corpus.validation, run.corpus.codec, run.corpus.tokenizer, run_dir, cfg.seed)
    first = launch.is_first()
    others = (
        trackers.open_trackers(cfg.tensorboard, cfg.wandb, run_dir, config_json.to_dict(cfg), done) if first else []
    )
    metrics_log = MetricsLog(
        run_dir / "metrics.jsonl" if first else None,
        list(cfg.model.target_streams),
        cfg.log_every,
        cfg.steps,
        done,
        cfg.optim.skips,
        others,
    )
    pending: tuple[int, Metrics, int, dict[tuple[int, int], str]] | None = None
    told = 0
    bar = tqdm(
        total=cfg.steps,
        initial=done,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        disable=not first,
    )

    def settle() -> None:
        """Take in the metrics of the last step that was dispatched."""
        nonlocal pending, told
        if pending is None:
            return
        line = metrics_log.add(*pending)
        told = int(pending[1].stop)
        with tqdm.external_write_mode():
            if pending[0] == 1:
                messages.initial_loss(cfg, pending[1])
            if "skipped_for" in line:
                log.warning("skipped %s", line["skipped_for"])
        rate, loss = metrics_log.rate, "skipped" if line["loss"] is None else f"{line['loss']:.3f}"
        bar.set_postfix_str(f"{rate:,.0f} frames/s, {rate / FRAME_RATE:,.0f} x real time, loss {loss}", refresh=False)
        bar.update()
        pending = None

    with contextlib.closing(metrics_log), bar, interrupts() as asked:
        for step in range(done + 1, cfg.steps + 1):
            batch, files = next(windows)
            state, metrics = train_step(state, frozen, on_mesh(batch, mesh, cfg.data.batch), _stop(mesh, asked))
            settle()  # the step before, while this one computes
            pending = (step, metrics, _frames(batch, run), _by_row(files, run.rows))
            # Of several processes one may be asked and all must stop, after the same step: all learn of it from the step before.
            ending = told if jax.process_count() > 1 else max(asked, default=0)
            score = None
            if validation is not None and (step % cfg.eval_every == 0 or step == cfg.steps):
                settle()
                with metrics_log.paused():
                    values = _validated(validation, state, frozen, bar)
                metrics_log.add_validation(step, values)
                score = values["loss"]
            if step % cfg.checkpoint_every == 0 or step == cfg.steps or ending or score is not None:
                settle()  # refuses to save what is not finite
                meta = {"config": config_json.to_dict(cfg), **run.meta}
                with metrics_log.paused():
                    checkpoints.save(
                        step, **arrays(run, state, frozen), data=windows.get_state(), meta=meta, validation=score
                    )
            if sampler is not None and (step % cfg.sample_every == 0 or step == cfg.steps) and not ending:
                settle()
                with metrics_log.paused():
                    sampler(step, merge(state.trainable, frozen))
            if ending:
                return state, 128 + ending
    return state, 0


def _validated(validation: Validation, state: TrainState, frozen: Tree, bar: Any) -> dict[str, Any]:
    bar.set_postfix_str("validating ...")
    values = validation(state.trainable, frozen)
    if values["loss"] is None:
        raise InputError(
            f"the validation after step {int(state.step)} gives a loss that is not finite: start anew (--from) with a lower"
            " optim.lr, optim.ttt_lr or model.ttt.base_lr."
        )
    bar.set_postfix_str(f"validation {values['loss']:.3f}")
    return values


def _compile(run: Run, state: TrainState, frozen: Tree, windows: Batches) -> Callable:
    position = windows.get_state()
    batch = on_mesh(next(windows).batch, run.mesh, run.cfg.data.batch)
    windows.set_state(position)
    stop = _stop(run.mesh, [])
    with compiling("training step"):
        return make_train_step(run.cfg, run.mesh).lower(state, frozen, batch, stop).compile()


def _frames(batch: Any, run: Run) -> int:
    """Valid frames of a step; over several processes those of this one times their number, which costs no message."""
    return int(batch.mask.sum()) * run.cfg.data.batch // len(run.rows)


def _by_row(files: tuple[tuple[str, ...], ...], rows: range) -> dict[tuple[int, int], str]:
    return {(chunk, row): name for chunk, names in enumerate(files) for row, name in zip(rows, names, strict=True)}


def _stop(mesh: Mesh, asked: list[int]) -> jax.Array:
    """For every device the signal that its process got, int32 [devices]; 0: none."""
    local = np.full(len(mesh.local_devices), max(asked, default=0), np.int32)
    return jax.make_array_from_process_local_data(sharding.devices_sharding(mesh), local, (mesh.size,))
