"""Lines about a run before it starts and after its first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
import numpy as np

from train.config import TrainConfig
from train.initial_params import Parameters
from train.setup import Run, inner_loop
from train.step import Metrics
from ttt_jax.config import FRAME_RATE
from ttt_jax.data.corpus import Corpus
from ttt_jax.kernels import choice
from ttt_jax.utils.command import shortened

log = logging.getLogger("train")


def runs(runs: Sequence[Run]) -> None:
    """Reports a run by itself, or the folders of several and their missing files."""
    if len(runs) == 1:
        return _run(runs[0])
    log.info("%d runs side by side: %s", len(runs), ", ".join(run.cfg.run_dir for run in runs))
    for corpus in {id(run.corpus): run.corpus for run in runs}.values():
        _missing(corpus)


def weights(params: Parameters) -> None:
    """Reports how many parameters train, and how many are frozen."""
    trainable, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in params)
    log.info("weights   %s: %s train, %s are frozen", f"{trainable + frozen:,}", f"{trainable:,}", f"{frozen:,}")


def _run(run: Run) -> None:
    cfg, corpus, devices = run.cfg, run.corpus, jax.devices()
    mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1)
    device = devices[0]
    log.info("device    %d x %s (%s)%s", len(devices), device.device_kind, device.platform, mesh and f": {mesh}")
    chunks = f"{cfg.bptt} x {cfg.data.chunk}" if cfg.bptt > 1 else cfg.data.chunk
    log.info("run       %s: %d steps of %d rows x %s frames", cfg.run_dir, cfg.steps, cfg.data.batch, chunks)
    parts = {"": list(corpus.recordings), "; held out ": corpus.heldout}
    if corpus.validation is not corpus.heldout:
        parts["; validation "] = corpus.validation
    sizes = [
        f"{part}{len(files)} files, {sum(file.num_frames for file in files) / FRAME_RATE / 60:.1f} minutes"
        for part, files in parts.items()
    ]
    log.info("speech    %s", "".join(sizes))
    _missing(corpus)
    log.info("codec     %s, %d x %d codes", corpus.codec.name, corpus.codec.num_codebooks, corpus.codec.cardinality)
    log.info("text      %d pieces", corpus.tokenizer.cardinality)
    layers = ", ".join(map(str, cfg.model.ttt_layers)) or "none"
    kept = {"persist": "kept along each file", "reset": "cleared at every chunk"}[cfg.state]
    ttt = (layers, cfg.model.ttt.mini_batch, cfg.model.inner_lr, kept)
    log.info("TTT       layers %s, mini-batch %d, inner rate %g, %s", *ttt)
    if cfg.model.ttt_layers:
        log.info("          run as %s", choice.described(*inner_loop(cfg)))


def _missing(corpus: Corpus) -> None:
    """Reports the files that manifests name and that are missing; the run ends with exit code 3."""
    for reason in shortened([absent.reason for absent in corpus.missing]):
        log.warning("skipped: %s", reason)


def initial_loss(cfg: TrainConfig, metrics: Metrics) -> None:
    """Reports the first losses beside those of random logits, ln(cardinality) + half their variance."""
    if cfg.base is not None:
        return
    log.info("before training, nats per token (expected of random logits: ln cardinality + half their variance)")
    rows = zip(cfg.model.target_streams.items(), metrics.streams, metrics.half_variance, strict=True)
    for (name, card), loss, half in rows:
        if np.isfinite(loss):  # speech without transcripts has no text to score
            expected = np.log(card) + float(half)
            log.info("  %-12s %6.3f   expected %6.3f = ln %d + %.3f", name, float(loss), expected, card, float(half))
