"""The training loop: prepares a run or takes one up again, steps, validates, writes metrics and checkpoints, and evaluates."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from eval import unigram
from eval.evaluate import of_run
from eval.models import Model
from train import announce, parameters, plan, plots, sinks
from train.announce import Run
from train.config import Changes, TrainConfig
from train.metrics import MetricsLog, read
from train.samples import Sampler
from train.step import Metrics, TrainState, init_state, make_train_step, state_like
from train.trained import fit, split
from train.validate import Validation, on_mesh
from train.windows import Windows
from ttt_jax import integrity, launch, record, sharding
from ttt_jax.checkpoint import FOLDER, Checkpoints, open_run
from ttt_jax.codec import Codec
from ttt_jax.command import keep_compiled, machine
from ttt_jax.config import FRAME_RATE
from ttt_jax.data import corpus as corpora
from ttt_jax.data.corpus import Corpus
from ttt_jax.data.text import Tokenizer
from ttt_jax.errors import InputError
from ttt_jax.trees import Tree, merge, pick

log = logging.getLogger("train")


def dry_run(cfg: TrainConfig) -> int:
    """Print what a run of `cfg` takes, without weights or data; the exit code."""
    print("\n".join(plan.lines(plan.plan(fit(cfg)))))
    return 0


def start(cfg: TrainConfig) -> int:
    """Start a run of `cfg`; the exit code. Nothing is left behind if the input is bad. Raises `InputError`."""
    keep_compiled(cfg.data.cache_dir / "compiled")
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(launch.agreed(int(time.time()))))
    run_dir = Path(cfg.run_dir or f"runs/{cfg.name}-{stamp}").expanduser()
    if not _is_free(run_dir):
        raise InputError(
            f"run_dir {run_dir} is taken: give another --run-dir, or go on with the run in it by --resume {run_dir}."
        )
    writable = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not os.access(writable, os.W_OK):
        raise InputError(f"run_dir {run_dir} cannot be made ({writable} is not writable): give another --run-dir.")
    sinks.check(cfg.tensorboard, cfg.wandb)
    parameters.check_base(cfg)
    codec, tokenizer = corpora.load_coders(cfg.data, cfg.model.card, cfg.model.text_card)
    cfg = fit(fit_model(dataclasses.replace(cfg, run_dir=str(run_dir), data=cfg.data.resolved()), codec, tokenizer))
    cfg = dataclasses.replace(cfg, base=cfg.base and str(Path(cfg.base).expanduser().absolute()))
    mesh = _mesh(cfg)
    corpus = corpora.load(cfg.data, codec, tokenizer)
    _check_data(cfg, corpus)
    meta = {**machine(), **corpus.describe(), "base": parameters.base_of(cfg), "stored": parameters.stored(cfg)}
    run = Run(cfg, mesh, sharding.local_rows(mesh, cfg.data.batch), corpus, meta)
    announce.run(run)
    with _memory(cfg):
        found = parameters.initial(cfg, mesh)
        state = init_state(cfg, mesh, found.trained)
    announce.weights(found)
    meta["unigram"] = _unigram(cfg, corpus) if launch.is_first() else None
    launch.agreed(0)  # all have looked at the folder
    if launch.is_first():
        run_dir.mkdir(parents=True, exist_ok=True)
        record.write_json(run_dir / "config.json", record.to_dict(cfg))
        record.write_json(run_dir / "meta.json", meta)
    launch.agreed(0)  # and it is there for all
    return _run(run, state, found.frozen, None, Checkpoints(run_dir, keep=cfg.keep))


def _is_free(run_dir: Path) -> bool:
    """Whether a run may begin in `run_dir`: nothing is there, or a run that ended before its first checkpoint."""
    if not run_dir.exists():
        return True
    if not run_dir.is_dir():
        return False
    inside = {path.name for path in run_dir.iterdir()}
    begun = {"config.json", "meta.json"} <= inside and (run_dir / FOLDER).is_dir()
    return not inside or (begun and not any(path.name.isdecimal() for path in (run_dir / FOLDER).iterdir()))


def resume(run_dir: Path, changes: Changes | None = None) -> int:
    """Go on with the run in `run_dir` from its latest whole checkpoint, with `changes` if asked to; the exit code. Raises `InputError`."""
    with open_run(run_dir) as checkpoints:
        meta = checkpoints.meta()
    cfg = record.from_dict(TrainConfig, meta.pop("config"), f"the checkpoint in {run_dir}")
    cfg = dataclasses.replace(cfg, run_dir=str(run_dir), **(vars(changes) if changes else {}))
    keep_compiled(cfg.data.cache_dir / "compiled")
    sinks.check(cfg.tensorboard, cfg.wandb)
    devices = _mesh(cfg)
    corpus = corpora.load(cfg.data, *corpora.load_coders(cfg.data, cfg.model.card, cfg.model.text_card))
    _check_data(cfg, corpus)
    described = corpus.describe()
    if {key: meta.get(key) for key in described} != described:
        raise InputError(
            f"the data, codec or tokenizer differ from those that {run_dir} was trained on (see its meta.json): bring"
            " the old ones back, or start a new run with --from."
        )
    if parameters.base_of(cfg) != meta["base"]:
        raise InputError(
            f"the weights in {cfg.base} are not those that {run_dir} started from (digest {meta['base']['digest'][:12]}): bring the old"
            " ones back."
        )
    run = Run(cfg, devices, sharding.local_rows(devices, cfg.data.batch), corpus, {**meta, **machine()})
    like = state_like(cfg, devices)
    checkpoints = Checkpoints(run_dir, keep=cfg.keep)
    try:
        with _memory(cfg):
            saved = checkpoints.restore(lambda _: (parameters.stored_like(cfg, devices), _rest(like)))
            trained, frozen = split(merge(saved.params, parameters.frozen_base(cfg, devices)), cfg)
    except BaseException:
        checkpoints.close()
        raise
    announce.run(run)
    log.info("resuming after step %d", saved.step)
    return _run(run, TrainState(trained=trained, **saved.state), frozen, saved.data, checkpoints)


def fit_model(cfg: TrainConfig, codec: Codec, tokenizer: Tokenizer) -> TrainConfig:
    """`cfg` with the model's cardinalities those of the codec and the tokenizer. Raises `InputError` on other misfits."""
    codebooks = codec.num_codebooks
    if (cfg.model.n_q, cfg.model.dep_q) != (2 * codebooks, codebooks):
        raise InputError(
            f"model.n_q={cfg.model.n_q} and model.dep_q={cfg.model.dep_q} do not fit the codec {codec.name}: give"
            f" {2 * codebooks} and {codebooks}, two voices of {codebooks} codebooks of which one is predicted."
        )
    if cfg.base is not None and (cfg.model.card, cfg.model.text_card) != (codec.cardinality, tokenizer.cardinality):
        raise InputError(
            f"the weights in {cfg.base} know {cfg.model.card} codes and {cfg.model.text_card} text pieces, but the codec {codec.name} has"
            f" {codec.cardinality} and the tokenizer {tokenizer.cardinality}: give data.codec and data.tokenizer those that the"
            " weights were trained with."
        )
    # The inner rate in force is stored: a default may change one day, this run's may not.
    ttt = dataclasses.replace(cfg.model.ttt, base_lr=cfg.model.inner_lr)
    model = dataclasses.replace(cfg.model, card=codec.cardinality, text_card=tokenizer.cardinality, ttt=ttt)
    return dataclasses.replace(cfg, model=model)


def _run(run: Run, state: TrainState, frozen: Tree, position: Any, checkpoints: Checkpoints) -> int:
    cfg, run_dir = run.cfg, Path(run.cfg.run_dir)
    with contextlib.ExitStack() as opened:
        opened.enter_context(_memory(cfg))
        opened.enter_context(contextlib.closing(checkpoints))
        windows = Windows(run.corpus.train, cfg.data.batch, cfg.data.chunk, cfg.seed, cfg.bptt, run.rows)
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
        about = {"path": str(run_dir), "config": record.to_dict(cfg), "step": cfg.steps, **run.meta}
        model = Model(run_dir.resolve().name, cfg.model, merge(state.trained, frozen), cfg, about)
        of_run(model, run.corpus, run_dir / "eval")
    return 0


def _train(
    run: Run, state: TrainState, frozen: Tree, windows: Windows, checkpoints: Checkpoints
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
        with _compiling("validation"):
            validation = Validation(cfg, mesh, run.corpus.validation, run.rows, state.trained, frozen)
    with _compiling("checksums of checkpoints"):
        integrity.sums(_stored(run, state, frozen))
    sampler = None
    if cfg.sample_every:
        sampler = Sampler(cfg.model, run.corpus.validation, run.corpus.codec, run.corpus.tokenizer, run_dir, cfg.seed)
    first = launch.is_first()
    others = sinks.open_sinks(cfg.tensorboard, cfg.wandb, run_dir, record.to_dict(cfg), done) if first else []
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
                announce.initial_loss(cfg, pending[1])
            if "skipped_for" in line:
                log.warning("skipped %s", line["skipped_for"])
        rate, loss = metrics_log.rate, "skipped" if line["loss"] is None else f"{line['loss']:.3f}"
        bar.set_postfix_str(f"{rate:,.0f} frames/s, {rate / FRAME_RATE:,.0f} x real time, loss {loss}", refresh=False)
        bar.update()
        pending = None

    with contextlib.closing(metrics_log), bar, _interrupts() as asked:
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
                meta = {"config": record.to_dict(cfg), **run.meta}
                with metrics_log.paused():
                    arrays = _stored(run, state, frozen)
                    checkpoints.save(step, **arrays, data=windows.get_state(), meta=meta, validation=score)
            if sampler is not None and (step % cfg.sample_every == 0 or step == cfg.steps) and not ending:
                settle()
                with metrics_log.paused():
                    sampler(step, merge(state.trained, frozen))
            if ending:
                return state, 128 + ending
    return state, 0


def _validated(validation: Validation, state: TrainState, frozen: Tree, bar: Any) -> dict[str, Any]:
    bar.set_postfix_str("validating ...")
    values = validation(state.trained, frozen)
    if values["loss"] is None:
        raise InputError(
            f"the validation after step {int(state.step)} gives a loss that is not finite: start anew (--from) with a lower"
            " optim.lr, optim.ttt_lr or model.ttt.base_lr."
        )
    bar.set_postfix_str(f"validation {values['loss']:.3f}")
    return values


def _compile(run: Run, state: TrainState, frozen: Tree, windows: Windows) -> Callable:
    position = windows.get_state()
    batch = on_mesh(next(windows).batch, run.mesh, run.cfg.data.batch)
    windows.set_state(position)
    stop = _stop(run.mesh, [])
    with _compiling("training step"):
        return make_train_step(run.cfg, run.mesh).lower(state, frozen, batch, stop).compile()


@contextlib.contextmanager
def _compiling(what: str) -> Iterator[None]:
    log.info("compiling the %s (kept in %s for the next run) ...", what, jax.config.jax_compilation_cache_dir)
    begin = time.perf_counter()
    yield
    log.info("compiled in %.0f s", time.perf_counter() - begin)


@contextlib.contextmanager
def _memory(cfg: TrainConfig) -> Iterator[None]:
    """Tells of too little memory in one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (told := plan.too_large(error, cfg)) is not None:
            raise told from error
        raise


def _mesh(cfg: TrainConfig) -> Mesh:
    """The mesh of `cfg`. Raises `InputError` if it does not fit the devices, the rows or the model."""
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    sharding.check_rows(mesh, cfg.data.batch, cfg.accumulate)
    state_like(cfg, mesh)
    return mesh


def _check_data(cfg: TrainConfig, corpus: Corpus) -> None:
    for name in ("eval_every", "sample_every"):
        if getattr(cfg, name) and not corpus.validation:
            raise InputError(
                f"{name}={getattr(cfg, name)} needs files, but there are none to validate on: name some with --data.validation."
            )
    if cfg.sample_every and jax.process_count() > 1:
        raise InputError(f"sample_every={cfg.sample_every} works in one process only: leave it out.")


def _stored(run: Run, state: TrainState, frozen: Tree) -> dict[str, Any]:
    """The arrays of a checkpoint."""
    params = merge(state.trained, frozen)
    stored = params if run.meta["stored"] is None else pick(params, set(run.meta["stored"]))
    return {"params": stored, "state": _rest(state)}


def _rest(state: TrainState) -> dict[str, Any]:
    """All of the state but the weights, which have a place of their own in a checkpoint."""
    return {name: leaf for name, leaf in state._asdict().items() if name != "trained"}


def _frames(batch: Any, run: Run) -> int:
    """Valid frames of a step; over several processes those of this one times their number, which costs no message."""
    return int(batch.mask.sum()) * run.cfg.data.batch // len(run.rows)


def _by_row(files: tuple[tuple[str, ...], ...], rows: range) -> dict[tuple[int, int], str]:
    return {(chunk, row): name for chunk, names in enumerate(files) for row, name in zip(rows, names, strict=True)}


def _stop(mesh: Mesh, asked: list[int]) -> jax.Array:
    """For every device the signal that its process got, int32 [devices]; 0: none."""
    local = np.full(len(mesh.local_devices), max(asked, default=0), np.int32)
    return jax.make_array_from_process_local_data(sharding.devices_sharding(mesh), local, (mesh.size,))


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
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
