"""`python -m eval swuggy`. Imports no jax."""

from __future__ import annotations

import dataclasses

from eval.benchmarks.commands import options as shared
from eval.benchmarks.commands import run


@dataclasses.dataclass(frozen=True)
class Options(shared.Options):
    """Score words against non-words (ZeroSpeech 2021, lexical), a pair at a time.

    docs/evaluation/benchmarks.md says what the numbers mean. Scores are kept as they come: a run that was killed goes
    on where it stopped.

    Exit code: 0 done, 2 an input to mend, 3 done but something could not be used.
    """


def main(options: Options) -> int:
    """Runs the command; returns the exit code. Raises `InputError`."""
    return run.main(options, "swuggy", "swuggy")
