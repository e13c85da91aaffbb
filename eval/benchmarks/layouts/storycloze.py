"""Spoken and topic StoryCloze (github.com/slp-rl/SpokenStoryCloze): the right ending of a story against a wrong one.

Two flat folders of files `NUMBER_STORY_correct.wav` and `NUMBER_STORY_incorrect.wav`, joined by the story's id.
"""

from __future__ import annotations

import re
from pathlib import Path

from eval.benchmarks.layouts import joining
from eval.benchmarks.layouts.joining import Recording
from eval.benchmarks.pairs import Task
from eval.results.schema import Skipped
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import whole_name

TASKS = {"sSC": "sstorycloze", "tSC": "tstorycloze"}
"""Task of each folder."""
_NAME = re.compile(r"\d+_([0-9A-Za-z-]+)_(correct|incorrect)\.wav")


def read(folder: Path) -> list[Task]:
    """Returns spoken StoryCloze, topic StoryCloze, or both. Whole stories are compared, not endings alone.

    Args:
      folder: `sSC`, `tSC`, or a folder that holds one of them or both.

    Raises `InputError` if it is none of these, or no pair is usable.
    """
    is_one = whole_name(folder) in TASKS
    places = [folder] if is_one else [folder / name for name in TASKS if (folder / name).is_dir()]
    if not places:
        raise InputError(f"{folder} is not called sSC or tSC and holds no such folder: give one of them.")
    return [_read(place, folder) for place in places]


def _read(place: Path, folder: Path) -> Task:
    names, recordings, problems = joining.wavs(place), [], []
    for name in names:
        if match := _NAME.fullmatch(name):
            story, side = match.groups()
            recordings.append(Recording((story,), (story,), place / name, side == "correct", {}))
        else:
            problems.append(Skipped(name, "its name is not NUMBER_STORY_correct.wav or NUMBER_STORY_incorrect.wav"))
    about = {"folder": str(folder), "names_sha256": joining.names_digest(names)}
    return joining.task(TASKS[whole_name(place)], "", (), recordings, problems, place, about)
