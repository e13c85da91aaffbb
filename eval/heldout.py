"""Held-out files of a run, streamed under every arm: numbers on the terminal and in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval import report, unigram
from eval.arms import ARMS
from eval.stream import stream
from train.config import TrainConfig
from ttt_jax import record
from ttt_jax.checkpoint import load_run
from ttt_jax.command import cost, keep_compiled, machine
from ttt_jax.config import FRAME_RATE, MoshiConfig
from ttt_jax.data import corpus as corpora
from ttt_jax.errors import InputError
from ttt_jax.moshi.model import Params

WINDOW = 125
"""Frames (10 s) over which losses by position are averaged."""


def of_run(run_dir: str, out: str | None) -> int:
    """Evaluate the latest checkpoint in `run_dir`; the exit code. Raises `InputError`."""
    folder = Path(out or Path(run_dir) / "eval")
    run = load_run(run_dir)
    cfg = record.from_dict(TrainConfig, run.meta["config"], f"the checkpoint in {run_dir}")
    keep_compiled(cfg.data.cache_dir / "compiled")
    corpus = corpora.load(cfg.data, *corpora.load_coders(cfg.data))
    # The unigram model is fitted to the training data, the codes mean nothing with another codec.
    for part, found in corpus.describe().items():
        if part != "heldout" and found != run.meta[part]:
            raise InputError(
                f"{part} is not what {run_dir} was trained with ({found}, but its meta.json has {run.meta[part]}): bring"
                " the old one back."
            )
    if not corpus.heldout:
        raise InputError(f"{run_dir} was trained without held-out files: train with --data.heldout MANIFEST.")
    folder.mkdir(parents=True, exist_ok=True)  # a path that cannot be one is told before the work
    evaluate(run.params, cfg.model, corpus, cfg.data.chunk, {**run.meta, **corpus.describe()}, Path(run_dir), folder)
    return 0


def evaluate(
    params: Params,
    cfg: MoshiConfig,
    corpus: corpora.Corpus,
    chunk: int,
    about: dict[str, Any],
    run_dir: Path,
    folder: Path,
) -> None:
    """Stream the held-out files of `corpus` under every arm, each from a fresh state; print the results and store them.

    Args:
      chunk: frames between resets in the arm that resets; about: what results.json says of the run; run_dir: its folder;
        folder: where the results go.
    """
    seconds = sum(file.shape[1] for file in corpus.heldout) / FRAME_RATE
    print(
        f"streaming {seconds / 60:.1f} minutes of held-out speech frame by frame, memory {', '.join(ARMS)} ...",
        flush=True,
    )
    tables = unigram.fit(corpus.train, cfg.target_streams.values())
    scores = {arm: stream(params, corpus.heldout, arm, chunk, cfg) for arm in ARMS}
    results = report.summarise(
        scores, tables, list(cfg.target_streams), corpus.heldout_names, chunk, WINDOW, cfg.context, corpus.codec.name
    )
    print(f"\n{report.table(results)}\n")
    spent = cost()
    about = {**about, "evaluated_with": machine(), "cost": spent, "run": str(run_dir)}
    for path in report.write(results, scores, about, folder):
        print(path)
    print(f"took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
