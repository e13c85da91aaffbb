"""Held-out files of a run, streamed under every arm: numbers on the terminal and in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval import report, unigram
from eval.arms import ARMS
from eval.stream import stream
from train import corpus as corpora
from train.config import TrainConfig
from ttt_jax import record
from ttt_jax.checkpoint import load_run
from ttt_jax.command import cost
from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.moshi.model import Params

WINDOW = 125
"""Frames (10 s) over which losses by position are averaged."""


def of_run(run_dir: str, out: str | None) -> int:
    """Evaluate the latest checkpoint in `run_dir`; the exit code. Raises `InputError`."""
    run = load_run(run_dir)
    cfg = record.from_dict(TrainConfig, run.meta["config"], f"the checkpoint in {run_dir}")
    codec, tokenizer = corpora.load_coders(cfg.data)
    if codec.digest != run.meta["codec"]["digest"] or tokenizer.digest != run.meta["tokenizer"]["digest"]:
        raise InputError(
            f"the codec {codec.name} or the tokenizer differ from those that {run_dir} was trained with (see its"
            " meta.json): bring the old ones back."
        )
    corpus = corpora.load(cfg.data, codec, tokenizer)
    if not corpus.heldout:
        raise InputError(f"{run_dir} was trained without held-out files: train with --data.heldout MANIFEST.")
    evaluate(run.params, cfg, corpus, {"run": str(run_dir), **run.meta}, Path(out or Path(run_dir) / "eval"))
    return 0


def evaluate(params: Params, cfg: TrainConfig, corpus: corpora.Corpus, meta: dict[str, Any], folder: Path) -> None:
    """Stream the held-out files of `corpus` under every arm; print the results and store them in `folder` with `meta`."""
    seconds = sum(file.shape[1] for file in corpus.heldout) / FRAME_RATE
    print(
        f"streaming {seconds / 60:.1f} minutes of held-out speech frame by frame, memory {', '.join(ARMS)} ...",
        flush=True,
    )
    tables = unigram.fit(corpus.train, [cfg.model.text_card] + cfg.model.dep_q * [cfg.model.card])
    scores = {arm: stream(params, corpus.heldout, arm, cfg.data.chunk, cfg.model) for arm in ARMS}
    results = report.summarise(scores, tables, corpus.heldout_names, cfg.data.chunk, WINDOW, cfg.model.context)
    print(f"\n{report.table(results)}\n")
    spent = cost()
    for path in report.write(results, scores, {**meta, "cost": spent}, folder):
        print(path)
    print(f"took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
