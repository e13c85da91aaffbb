"""From the recordings of tasks to the scores of their pairs: encoded once, scored by every checkpoint, looked up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.benchmarks.commands.options import Options
from eval.benchmarks.pairs import Task
from eval.benchmarks.rules import RULES
from eval.benchmarks.rules import score as by_rule
from eval.benchmarks.scored import Scored, View
from eval.benchmarks.scoring.kept import Kept
from eval.benchmarks.scoring.losses import Entry, score
from eval.benchmarks.scoring.recordings import encode
from eval.results.schema import Skipped
from ttt_jax.checkpoints import loading
from ttt_jax.checkpoints.loading import Checkpoint
from ttt_jax.codec import Codec
from ttt_jax.data.encode import Encoder
from ttt_jax.data.text import TokenizerInfo
from ttt_jax.utils.command import machine

Losses = dict[tuple[Path, str, str], tuple[int, dict[str, np.ndarray]]]
"""By path, text policy and voice: frames, and by arm the sums of the losses, float64 [Q]."""


def scores(
    options: Options, checkpoints: Sequence[Checkpoint], tasks: Sequence[Task], codec: Codec
) -> tuple[list[dict[View, Scored]], list[list[Skipped]]]:
    """Returns the scores of each task's pairs by view, and what could not be scored."""
    paths = dict.fromkeys(path for task in tasks for pair in task.pairs for path in (pair.right, pair.wrong))
    print(f"encoding {len(paths):,} recordings with {codec.name} ...", flush=True)
    with tqdm(total=len(paths), desc="encoding", unit="file", leave=False, mininterval=0.5) as bar:
        encoded = encode(paths, codec, checkpoints[0].cache_dir, bar.update)
    problems = [
        [
            Skipped(pair.key, encoded.unreadable[path])
            for pair in task.pairs
            for path in (pair.right, pair.wrong)
            if path in encoded.unreadable
        ]
        for task in tasks
    ]
    longest = max((codes.shape[1] for codes in encoded.codes.values()), default=0)
    silence = Encoder(codec, TokenizerInfo()).silence(longest)
    scored: list[dict[View, Scored]] = [{} for _ in tasks]
    for checkpoint in checkpoints:
        losses = _losses(options, checkpoint, encoded.codes, silence, codec)
        for arm in options.arms_of(checkpoint):
            for text in options.texts:
                for voice in options.voices:
                    view = View(checkpoint.name, arm, text, voice)
                    for task, views, bad in zip(tasks, scored, problems, strict=True):
                        views[view] = _scored(task, losses, view)
                        bad += _diverged(task, losses, view)
    return scored, problems


def _losses(
    options: Options, checkpoint: Checkpoint, codes: dict[Path, np.ndarray], silence: np.ndarray, codec: Codec
) -> Losses:
    """Returns the losses of recordings under a checkpoint; those that are kept are not computed again."""
    arms = options.arms_of(checkpoint)
    entries: dict[str, Entry] = {}
    keys: dict[tuple[Path, str, str], str] = {}
    for path, found in codes.items():
        for text in options.texts:
            for voice in options.voices:
                entry = Entry(found, text, voice)
                keys[path, text, voice] = entry.key
                entries.setdefault(entry.key, entry)
    question = {
        "weights": checkpoint.about["weights"],
        "model": repr(checkpoint.cfg),
        "codec": codec.digest,
        "arms": arms,
        "batch": options.batch,
        "machine": machine(),
    }
    kept = Kept(checkpoint.cache_dir, question)
    names = list(entries)
    before = sum(name in kept for name in names)
    print(
        f"scoring {len(names):,} recordings under {checkpoint.name}"
        + (f", {before:,} of them scored before ..." if before else " ..."),
        flush=True,
    )
    with tqdm(total=len(names), desc=checkpoint.name, unit="recording", leave=False, mininterval=0.5) as bar:
        calls = score(
            loading.params_of(checkpoint),
            checkpoint.cfg,
            list(entries.values()),
            silence,
            arms,
            options.batch,
            lambda i: names[i] in kept,
        )
        for call in calls:
            kept.add((names[i], losses.nats) for i, losses in call)
            bar.update(len(call))
    return {place: (entries[key].codes.shape[1], kept[key]) for place, key in keys.items()}


def _scored(task: Task, losses: Losses, view: View) -> Scored:
    """Returns the scores of a task's pairs in a view, by all rules."""
    codebooks = next((len(sums[view.arm]) for _, sums in losses.values()), 1)
    unscored = 1, {view.arm: np.full(codebooks, np.nan)}

    def of_side(paths: Sequence[Path]) -> dict[str, np.ndarray]:
        found = [losses.get((path, view.text, view.voice), unscored) for path in paths]
        nats = np.stack([sums[view.arm] for _, sums in found])
        frames = np.array([frames for frames, _ in found])
        return {rule: by_rule(nats, frames, rule) for rule in RULES}

    return Scored(of_side([pair.right for pair in task.pairs]), of_side([pair.wrong for pair in task.pairs]))


def _diverged(task: Task, losses: Losses, view: View) -> list[Skipped]:
    """Returns the pairs of which a recording was scored and its losses are not finite numbers."""
    bad = []
    for pair in task.pairs:
        for path in (pair.right, pair.wrong):
            found = losses.get((path, view.text, view.voice))
            if found and not np.isfinite(found[1][view.arm]).all():
                reason = f"{view.checkpoint} under {view.arm} gives no finite predictions of {path.name}"
                bad.append(Skipped(pair.key, reason))
    return bad
