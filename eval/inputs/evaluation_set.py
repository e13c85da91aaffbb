"""The files of an evaluation: those of `--data`, or the held-out files of the runs themselves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from eval.inputs import dataset
from eval.inputs.dataset import EvalFile, Skipped
from ttt_jax.checkpoints.loading import Checkpoint
from ttt_jax.data import corpus as corpora
from ttt_jax.errors import InputError
from ttt_jax.utils.command import shortened

CORPUS = ("train", "heldout", "codec", "tokenizer")
"""Settings of the data that runs must share to share their held-out files."""


class EvaluationSet(NamedTuple):
    """What checkpoints are evaluated on."""

    files: list[EvalFile]
    skipped: list[Skipped]
    corpus: corpora.Corpus | None
    """Of the runs, if the files are its held-out ones."""


def load(data: str | None, checkpoints: Sequence[Checkpoint], frames: int | None) -> EvaluationSet:
    """Returns the files that `data` names (None: the runs' held-out files), cut to their first `frames`; prints what
    was skipped.

    Raises `InputError` if there is no file that all checkpoints can read.
    """
    if data:
        corpus, (files, skipped) = None, dataset.read(data, checkpoints, frames)
    else:
        corpus = own_corpus(checkpoints)
        files, skipped = dataset.of_corpus(corpus)
        files = [file._replace(frames=file.frames[:, :frames]) for file in files]
    for reason in shortened([file.reason for file in skipped]):
        print(f"skipped: {reason}", file=sys.stderr)
    return EvaluationSet(files, skipped, corpus)


def own_corpus(checkpoints: Sequence[Checkpoint]) -> corpora.Corpus:
    """Returns the corpus of a run, or of runs that share one. Raises `InputError` if there is none or it has
    changed."""
    first = checkpoints[0]
    trained_on = {checkpoint.corpus and attrgetter(*CORPUS)(checkpoint.corpus) for checkpoint in checkpoints}
    if None in trained_on or len(trained_on) > 1:
        raise InputError(
            "there is no --data: give a manifest or a folder of python -m eval prepare (only runs of the same data"
            " bring their own held-out files)."
        )
    cfg = first.cfg
    corpus = corpora.load(first.corpus, *corpora.load_coders(first.corpus, cfg.card, cfg.text_card))
    # The unigram baseline is fitted to the training data, and codes of another codec mean nothing.
    for part, description in corpus.describe().items():
        for checkpoint in checkpoints:
            if part not in ("heldout", "validation") and description != checkpoint.about[part]:
                if part == "train" and corpus.absent[part]:
                    raise InputError(corpus.absent[part][0].reason)
                raise InputError(
                    f"{part} is not what {checkpoint.name} was trained with ({description}, but its meta.json has"
                    f" {checkpoint.about[part]}): bring the old one back."
                )
    if not corpus.heldout:
        raise InputError(f"{first.name} was trained without held-out files: give some with --data.")
    return corpus
