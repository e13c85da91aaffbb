"""`python -m eval draw`: the table and the figures of stored results again."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from tyro.conf import Positional, arg

from eval.streaming.weighting import Weighting
from ttt_jax.utils.paths import local


@dataclasses.dataclass(frozen=True)
class Options:
    """Print the table and draw the figures of stored results again.

    results.json stays as it is: it records the evaluation.
    """

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """Folder of the results, such as runs/NAME/eval."""
    weighting: Weighting | None = None
    """How the codebooks become one loss; unset: as stored."""
    window: Annotated[int | None, arg(metavar="N")] = None
    """Frames that a position averages; unset: as stored."""


def main(options: Options) -> int:
    """Runs the command; returns the exit code.

    Raises `InputError` if the folder holds no results of this version, or scores are missing or damaged.
    """
    from eval.streaming import plots, results, table
    from eval.streaming.summary import summarise

    folder = local(options.folder)
    stored = results.read(folder)
    changes = {name: value for name in ("weighting", "window") if (value := getattr(options, name)) is not None}
    if changes:
        setting = dataclasses.replace(stored.setting, **changes)
        infos = [checkpoint.info for checkpoint in stored.checkpoints]
        stored = summarise(setting, infos, stored.files, stored.skipped, folder)
    print(f"{table.table(stored)}\n")
    for path in plots.draw_all(folder, stored):
        print(path)
    return 0
