"""`python -m eval generate --score`: given conversations through `python -m eval stream`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from eval.generating import inputs as recordings
from eval.inputs import dataset
from eval.inputs.evaluation_set import EvaluationSet
from eval.results import folder as folders
from eval.streaming import arms
from eval.streaming import command as stream
from ttt_jax.checkpoints import loading
from ttt_jax.utils.command import PARTIAL, keep_compiled, shortened

if TYPE_CHECKING:
    from eval.generating.command import Options


def main(options: Options) -> int:
    """Scores the files; returns the exit code: 0, or 3 if files were skipped. Raises `InputError`."""
    inputs, skipped = recordings.find(options.files)
    checkpoints = loading.load_all([options.checkpoint])
    keep_compiled(checkpoints[0].cache_dir / "compiled")
    if options.arm is not None:
        arms.check([options.arm], checkpoints[0].cfg, checkpoints[0].name)
    files, unusable = dataset.read_paths([source.path for source in inputs], options.data, checkpoints)
    skipped += unusable
    for reason in shortened([file.reason for file in skipped]):
        print(f"skipped: {reason}", file=sys.stderr)
    streamed = stream.Options(
        (options.checkpoint,), options.data, options.arm, reset_every=options.reset_every, batch=options.batch
    )
    folder = folders.find(options.out, "score", options.checkpoint, options.data)
    evaluated = stream.evaluate(checkpoints, EvaluationSet(files, skipped, None), streamed, folder)
    return PARTIAL if evaluated.skipped else 0
