"""One way from files to scores: checkpoints x files x arms, streamed and stored, an npz for each file and
checkpoint."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from eval.inputs.dataset import EvalFile
from eval.results.schema import CheckpointInfo, FileInfo, scores_path
from eval.streaming import scores
from eval.streaming.runner import batches, stream
from ttt_jax.checkpoints import loading
from ttt_jax.checkpoints.loading import Checkpoint
from ttt_jax.data import unigram
from ttt_jax.errors import InputError

ROWS = 8
"""Files side by side by default; in bfloat16 it is 1."""


class Outcome(NamedTuple):
    """Results of a scoring beside the stored scores."""

    failed: dict[str, str]
    """Reason by file whose predictions were not finite under some checkpoint; none of its scores is stored."""
    partners: dict[str, dict[str, str]]
    """By checkpoint and file: the file whose memory it had in the arm permuted."""


def score_files(
    checkpoints: Sequence[Checkpoint],
    files: Sequence[EvalFile],
    arms: Mapping[str, Sequence[str]],
    folder: Path,
    *,
    reset_every: int,
    chunk: int | None = None,
    batch: int | None = None,
    inner: Collection[str] = (),
    baseline: list[np.ndarray] | None = None,
    losses_only: bool = False,
) -> Outcome:
    """Streams all files through all checkpoints, each from a fresh state, and stores the scores in `folder`.

    Args:
      checkpoints: those without weights are loaded when their turn comes, one at a time.
      arms: by the checkpoint's name; chunk: most frames of a call, by default by the device; batch: files side by side,
        by default by the model; inner: names of checkpoints whose inner losses are measured.
      baseline: unigram tables, which are scored too; losses_only: whether to store tokens and losses alone.

    Raises:
      InputError: no file has finite predictions, or a file has no partner for the arm permuted.
    """
    from tqdm import tqdm

    infos, outcome, chunk = file_infos(files), Outcome({}, {}), chunk or call_frames(checkpoints)
    lengths = [info.frames for info in infos]
    for checkpoint in checkpoints:
        name = checkpoint.name
        scores_path(folder, name, infos[0]).parent.mkdir(parents=True)
        params = loading.params_of(checkpoint)
        permuted, rows = "permuted" in arms[name], batch or (1 if checkpoint.cfg.dtype == "bfloat16" else ROWS)
        with tqdm(total=sum(lengths), desc=name, unit="frame", unit_scale=True, leave=False, mininterval=0.5) as bar:
            for members in batches(lengths, rows, least=2 if permuted else 1):
                together = [files[i] for i in members]
                partners = _partners(together) if permuted else None
                scored = stream(
                    params,
                    [file.frames for file in together],
                    checkpoint.cfg,
                    arms[name],
                    chunk=chunk,
                    reset_every=reset_every,
                    measured=name in inner,
                    partners=partners,
                    on_frames=bar.update,
                )
                for row, (i, file_scores) in enumerate(zip(members, scored, strict=True)):
                    if reason := _diverged(name, files[i], file_scores):
                        if files[i].name not in outcome.failed:
                            tqdm.write(f"skipped: {reason}", file=sys.stderr)
                        outcome.failed.setdefault(files[i].name, reason)
                        continue
                    if baseline is not None:
                        nats = unigram.nats(baseline, file_scores.tokens).astype(np.float32)
                        file_scores = file_scores._replace(unigram=nats)
                    if losses_only:
                        file_scores = scores.losses_only(file_scores)
                    scores.save(scores_path(folder, name, infos[i]), file_scores)
                    if partners is not None:
                        outcome.partners.setdefault(name, {})[files[i].name] = together[partners[row]].name
        del params  # at most one checkpoint is in memory
    if len(outcome.failed) == len(files):
        raise InputError(next(iter(outcome.failed.values())))
    for checkpoint in checkpoints:
        for info in infos:
            if info.name in outcome.failed:
                scores_path(folder, checkpoint.name, info).unlink(missing_ok=True)
    return outcome


def file_infos(files: Sequence[EvalFile]) -> list[FileInfo]:
    """Returns what results store of each file."""
    return [
        FileInfo(
            file.name,
            file.group,
            file.frames.shape[1],
            f"{i:04d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', file.name)[-80:]}.npz",
            file.boundaries,
            file.digest,
        )
        for i, file in enumerate(files)
    ]


def checkpoint_info(checkpoint: Checkpoint, brief: bool = False) -> CheckpointInfo:
    """Returns what results store of a checkpoint; where it is `brief` only path, step and digest of the weights."""
    cfg, about = checkpoint.cfg, checkpoint.about
    if brief:
        about = {key: about[key] for key in ("path", "step", "weights") if key in about}
    return CheckpointInfo(
        checkpoint.name,
        cfg.contexts,
        cfg.ttt_layers,
        cfg.max_delay,
        cfg.dtype,
        checkpoint.seed,
        about,
        cfg.attention_sink,
    )


def _diverged(name: str, file: EvalFile, file_scores: scores.FileScores) -> str | None:
    """Returns a sentence if the predictions of a file are not all finite numbers; None if they are."""
    bad = scores.not_finite(file_scores)
    return bad and (
        f"{name} under {bad[0]} gives no finite predictions of {file.name} from frame {bad[1]} on: its fast weights"
        " or its weights have diverged, so lower ttt.base_lr or bound them (ttt.horizon, ttt.max_displacement)."
    )


def _partners(files: Sequence[EvalFile]) -> list[int]:
    """Returns for each file of a batch the longest one of another speaker."""
    partners = []
    for file in files:
        others = [i for i, other in enumerate(files) if other.group != file.group]
        if not others:
            raise InputError(
                f"the arm permuted finds no file of another speaker beside {file.name} among the {len(files)} that go"
                " side by side: raise --batch."
            )
        partners.append(max(others, key=lambda i: files[i].frames.shape[1]))
    return partners


def call_frames(checkpoints: Sequence[Checkpoint]) -> int:
    """Returns frames of a call: on a GPU long ones read the weights seldom, on a CPU short ones stay in its caches."""
    longest = max(max(checkpoint.cfg.contexts) for checkpoint in checkpoints)
    return 250 if jax.default_backend() == "cpu" else max(1000, 4 * longest)
