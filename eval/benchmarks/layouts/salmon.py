"""SALMon (github.com/slp-rl/salmon): recordings that stay consistent against recordings that do not, in eight parts.

A folder for each part with files `sample_I_J.wav`: of sample I, J = 0 is the positive and J = 1 the first negative.
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

FOLDER = "salmon_benchmark"
PARTS = (
    "bg_alignment",
    "bg_all_consistency",
    "bg_domain_consistency",
    "gender_consistency",
    "rir_consistency",
    "sentiment_alignment",
    "sentiment_consistency",
    "speaker_consistency",
)
_NAME = re.compile(r"sample_(\d+)_(\d+)\.wav")


def read(folder: Path) -> list[Task]:
    """Returns a task for each part, salmon/PART.

    Args:
      folder: holds `salmon_benchmark`, or is it, or is a part of it.

    Raises `InputError` if it is none of these, or a part has no usable pair.
    """
    return [_read(part, folder) for part in parts(folder)]


def parts(folder: Path) -> list[Path]:
    """Returns the folders of the parts that `folder` holds, which may be one itself. Raises `InputError` if none."""
    base = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if whole_name(base) in PARTS:
        return [base]
    found = [base / part for part in PARTS if (base / part).is_dir()]
    if not found:
        raise InputError(f"{folder} holds no part of SALMon ({PARTS[0]}, ...): give the folder {FOLDER}.")
    return found


def _read(part: Path, folder: Path) -> Task:
    names, recordings, problems = joining.wavs(part), [], []
    for name in names:
        if match := _NAME.fullmatch(name):
            sample, rank = map(int, match.groups())
            if rank <= 1:  # further negatives are no part of the score
                recordings.append(Recording((str(sample),), (str(sample),), part / name, rank == 0, {}))
        else:
            problems.append(Skipped(name, "its name is not sample_I_J.wav with two numbers"))
    about = {"folder": str(folder), "names_sha256": joining.names_digest(names)}
    return joining.task(f"salmon/{whole_name(part)}", "", (), recordings, problems, part, about)
