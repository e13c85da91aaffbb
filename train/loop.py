"""The training loop: prepares a run or takes one up again, steps, writes metrics and checkpoints, and evaluates."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eval import unigram
from eval.evaluate import of_run
from eval.models import Model
from eval.statistics import file_mean
from train import plots
from train.config import TrainConfig
from train.metrics import MetricsLog, read
from train.step import Metrics, TrainState, init, make_train_step
from train.windows import Windows
from ttt_jax import record
from ttt_jax.checkpoint import Checkpoints, open_run
from ttt_jax.codec import Codec
from ttt_jax.command import INTERRUPTED, keep_compiled, machine
from ttt_jax.data import corpus as corpora
from ttt_jax.data.corpus import Corpus
from ttt_jax.data.text import Tokenizer
from ttt_jax.errors import InputError

log = logging.getLogger("train")


def start(cfg: TrainConfig) -> int:
    """Start a run of `cfg`; the exit code. Nothing is left behind if the input is bad. Raises `InputError`."""
    keep_compiled(cfg.data.cache_dir / "compiled")
    run_dir = Path(cfg.run_dir or f"runs/{cfg.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}").expanduser()
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(
            f"run_dir {run_dir} is taken: give another --run-dir, or go on with the run in it by --resume {run_dir}."
        )
    writable = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not os.access(writable, os.W_OK):
        raise InputError(f"run_dir {run_dir} cannot be made ({writable} is not writable): give another --run-dir.")
    codec, tokenizer = corpora.load_coders(cfg.data)
    cfg = dataclasses.replace(fit_model(cfg, codec, tokenizer), run_dir=str(run_dir), data=cfg.data.resolved())
    corpus = corpora.load(cfg.data, codec, tokenizer)
    _announce(cfg, corpus)
    state = init(cfg)
    _announce_parameters(state.params)
    run_dir.mkdir(parents=True, exist_ok=True)
    meta = {**machine(), **corpus.describe()}
    record.write_json(run_dir / "config.json", record.to_dict(cfg))
    record.write_json(run_dir / "meta.json", meta)
    return _run(cfg, corpus, state, _windows(cfg, corpus), meta)


def resume(run_dir: Path) -> int:
    """Go on with the run in `run_dir` from its latest checkpoint; the exit code. Raises `InputError`."""
    with open_run(run_dir) as checkpoints:
        meta = checkpoints.meta()
        cfg = record.from_dict(TrainConfig, meta.pop("config"), f"the checkpoint in {run_dir}")
        cfg = dataclasses.replace(cfg, run_dir=str(run_dir))
        keep_compiled(cfg.data.cache_dir / "compiled")
        corpus = corpora.load(cfg.data, *corpora.load_coders(cfg.data))
        if {key: meta[key] for key in corpus.describe()} != corpus.describe():
            raise InputError(
                f"the data, codec or tokenizer differ from those that {run_dir} was trained on (see its meta.json): bring"
                " the old ones back, or start a new run with --from."
            )
        state = init.eval_shape(cfg)
        saved = checkpoints.restore(state.params, _rest(state))
    state = TrainState(params=saved.params, **saved.state)
    windows = _windows(cfg, corpus)
    windows.set_state(saved.data)
    _announce(cfg, corpus)
    log.info("resuming after step %d", saved.step)
    return _run(cfg, corpus, state, windows, {**meta, **machine()})


def fit_model(cfg: TrainConfig, codec: Codec, tokenizer: Tokenizer) -> TrainConfig:
    """`cfg` with the model's cardinalities those of the codec and the tokenizer. Raises `InputError` on other misfits."""
    codebooks = codec.num_codebooks
    if (cfg.model.n_q, cfg.model.dep_q) != (2 * codebooks, codebooks):
        raise InputError(
            f"model.n_q={cfg.model.n_q} and model.dep_q={cfg.model.dep_q} do not fit the codec {codec.name}: give"
            f" {2 * codebooks} and {codebooks}, two voices of {codebooks} codebooks of which one is predicted."
        )
    # The inner rate in force is stored: a default may change one day, this run's may not.
    ttt = dataclasses.replace(cfg.model.ttt, base_lr=cfg.model.inner_lr)
    model = dataclasses.replace(cfg.model, card=codec.cardinality, text_card=tokenizer.cardinality, ttt=ttt)
    return dataclasses.replace(cfg, model=model)


def _run(cfg: TrainConfig, corpus: Corpus, state: TrainState, windows: Windows, meta: dict[str, Any]) -> int:
    run_dir = Path(cfg.run_dir)
    tables = unigram.fit(corpus.train, cfg.model.target_streams.values())
    checkpoints = Checkpoints(run_dir, keep=cfg.keep)
    try:
        state, finished = _train(cfg, state, windows, checkpoints, {"config": record.to_dict(cfg), **meta})
    finally:
        checkpoints.close()
    baseline = dict(zip(cfg.model.target_streams, _unigram_loss(tables, corpus.train), strict=True))
    plots.loss_curve(read(run_dir / "metrics.jsonl"), baseline, run_dir / "loss.png")
    log.info("checkpoints, metrics.jsonl and loss.png are in %s", run_dir)
    if not finished:
        log.info("interrupted after step %d; go on with: python -m train --resume %s", int(state.step), run_dir)
        return INTERRUPTED
    if corpus.heldout:
        about = {"path": str(run_dir), "config": record.to_dict(cfg), "step": cfg.steps, **meta}
        of_run(Model(run_dir.resolve().name, cfg.model, state.params, cfg, about), corpus, run_dir / "eval")
    else:
        log.info("no held-out files to evaluate: name some with --data.heldout")
    return 0


def _train(
    cfg: TrainConfig, state: TrainState, windows: Windows, checkpoints: Checkpoints, meta: dict[str, Any]
) -> tuple[TrainState, bool]:
    """Steps until the end or an interrupt; the state, and whether the end was reached."""
    from tqdm import tqdm

    done = int(state.step)
    if done >= cfg.steps:
        return state, True
    train_step = _compile(cfg, state, windows)
    metrics_log = MetricsLog(
        Path(cfg.run_dir) / "metrics.jsonl", list(cfg.model.target_streams), cfg.log_every, cfg.steps, done
    )
    pending: tuple[int, Metrics, int] | None = None
    bar = tqdm(
        total=cfg.steps, initial=done, unit="step", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15
    )

    def settle() -> None:
        """Take in the metrics of the last step that was dispatched."""
        nonlocal pending
        if pending is None:
            return
        line = metrics_log.add(*pending)
        if pending[0] == 1:
            with tqdm.external_write_mode():
                _announce_initial_loss(cfg, pending[1])
        bar.set_postfix_str(f"{metrics_log.rate:,.0f} frames/s, loss {line['loss']:.3f}", refresh=False)
        bar.update()
        pending = None

    with contextlib.closing(metrics_log), bar, _interrupt_flag() as interrupted:
        for step in range(done + 1, cfg.steps + 1):
            batch = next(windows)
            state, metrics = train_step(state, batch)
            settle()  # the step before, while this one computes
            pending = (step, metrics, int(batch.mask.sum()))
            stop = bool(interrupted)
            if step % cfg.checkpoint_every == 0 or step == cfg.steps or stop:
                settle()  # refuses to save what is not finite
                checkpoints.save(step, state.params, _rest(state), windows.get_state(), meta)
            if stop and step < cfg.steps:
                return state, False
    return state, True


def _compile(cfg: TrainConfig, state: TrainState, windows: Windows) -> Any:
    position = windows.get_state()
    batch = next(windows)
    windows.set_state(position)
    log.info("compiling the training step (kept in %s for the next run) ...", jax.config.jax_compilation_cache_dir)
    begin = time.perf_counter()
    compiled = make_train_step(cfg).lower(state, batch).compile()
    log.info("compiled in %.0f s", time.perf_counter() - begin)
    return compiled


def _rest(state: TrainState) -> dict[str, Any]:
    """All of the state but the weights, which have a place of their own in a checkpoint."""
    return {"step": state.step, "opt_state": state.opt_state, "stream": state.stream}


def _windows(cfg: TrainConfig, corpus: Corpus) -> Windows:
    return Windows(corpus.train, cfg.data.batch, cfg.data.chunk, cfg.seed)


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[list[bool]]:
    """A list that is empty until Ctrl-C: a step is never torn apart. The second Ctrl-C interrupts at once."""
    flag: list[bool] = []

    def on_signal(*_: object) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)
        log.info("\nsaving a checkpoint after this step; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def _announce(cfg: TrainConfig, corpus: Corpus) -> None:
    devices = jax.devices()
    log.info("device    %d x %s (%s)", len(devices), devices[0].device_kind, devices[0].platform)
    log.info("run       %s: %d steps of %d rows x %d frames", cfg.run_dir, cfg.steps, cfg.data.batch, cfg.data.chunk)
    minutes = [
        sum(file.shape[1] for file in files) / corpus.codec.frame_rate / 60 for files in (corpus.train, corpus.heldout)
    ]
    log.info(
        "speech    %d files, %.1f minutes; held out %d files, %.1f minutes",
        len(corpus.train), minutes[0], len(corpus.heldout), minutes[1],
    )  # fmt: skip
    log.info("codec     %s, %d x %d codes", corpus.codec.name, corpus.codec.num_codebooks, corpus.codec.cardinality)
    log.info("text      %d pieces", corpus.tokenizer.cardinality)
    layers = ", ".join(map(str, cfg.model.ttt_layers)) or "none"
    log.info(
        "TTT       layers %s, mini-batch %d, inner rate %g",
        layers,
        cfg.model.ttt.mini_batch,
        cfg.model.inner_lr,
    )


def _announce_parameters(params: Any) -> None:
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        ttt, layer, depth = "/ttt/" in name, name.startswith("layers/"), name.startswith("depth/")
        part = (
            "TTT layers"
            if ttt
            else "temporal layers"
            if layer
            else "depth transformer"
            if depth
            else "embeddings and text head"
        )
        counts[part] = counts.get(part, 0) + leaf.size
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    log.info("weights   %s: %s", f"{sum(counts.values()):,}", parts)


def _announce_initial_loss(cfg: TrainConfig, metrics: Metrics) -> None:
    """How far the untrained model is from what random logits give: ln(cardinality) + half their variance."""
    log.info("before training, nats per token (expected of random logits: ln cardinality + half their variance)")
    rows = zip(cfg.model.target_streams.items(), metrics.streams, metrics.half_variance, strict=True)
    for (name, card), loss, half in rows:
        if np.isfinite(loss):  # speech without transcripts has no text to score
            expected = np.log(card) + float(half)
            log.info("  %-12s %6.3f   expected %6.3f = ln %d + %.3f", name, float(loss), expected, card, float(half))


def _unigram_loss(tables: list[np.ndarray], files: list[np.ndarray]) -> list[float]:
    return file_mean(np.concatenate([unigram.nats(tables, file) for file in files], axis=-1)).tolist()
