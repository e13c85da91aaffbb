"""`python -m eval tasks`: data sets of code streams for which the best possible loss is known. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from tyro.conf import arg

from eval.tasks.dataset import TASKS, Settings, make
from eval.tasks.facts import GAP
from eval.tasks.streams import CARDINALITY
from ttt_jax.codec import load_codec
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import local


@dataclasses.dataclass(frozen=True)
class Options:
    """Make a data set for which the best possible loss is known.

    Train on the folder with --data.train FOLDER --data.codec files --data.from-start --loss.text 0: the facts stand at
    the start of each file, and its text is padding. See docs/evaluation/tasks.md.
    """

    settings: Annotated[Settings, arg(name="")]
    """Settings of the data set."""
    out: str
    """Folder for the code files, manifest.jsonl and task.json; new or empty."""
    codec: Annotated[str | None, arg(metavar="CODEC")] = None
    """Codec whose codes the files claim to hold, kmeans or a path: models that train on them (with --data.codec CODEC)
    can also read speech. Unset: a codec of the tasks' own."""


def main(options: Options) -> int:
    """Makes a data set; returns the exit code. Raises `InputError`, and then leaves nothing behind."""
    settings = options.settings
    data = make(settings, local(options.out), *_digest(options.codec))
    print(f"{settings.task}: {' '.join(TASKS[settings.task].__doc__.split())}")
    print(f"{settings.files} files of {settings.frames} frames in {options.out}")
    print(
        f"best possible loss, nats per answer: {data.with_memory:.4f} with all memory,"
        f" {data.memoryless:.4f} from the last {GAP} frames alone"
    )
    return 0


def _digest(name: str | None) -> tuple[str, ...]:
    """Returns the digest of the codec `name`, if there is one. Raises `InputError` if it has too few entries."""
    if name is None:
        return ()
    codec = load_codec(name)
    if codec.cardinality < CARDINALITY:
        raise InputError(
            f"--codec {name} has codebooks of {codec.cardinality} entries, but the tasks use {CARDINALITY}: give"
            " another codec."
        )
    return (codec.digest,)
