"""`python -m eval report`: options, and the way from folders to one HTML file."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, shortened
from ttt_jax.utils.paths import local


@dataclasses.dataclass(frozen=True)
class Options:
    """Write one HTML page over many results, which needs no network.

    It shows a table of the runs, and what is there of: benchmarks, losses by position, inner losses (Figure 5), spoken
    recall, persistence, diagnostics, training, differences between configurations. What was not run is absent.

    Exit code: 0 done, 2 an input to mend, 3 done but some results could not be read (the page names them).
    """

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH [PATH ...]")] = ()
    """Folders of runs, whose results are all found, or of results."""
    out: str = "report.html"
    """File to write; an earlier page of this command is replaced, any other file is refused."""
    title: str = "Results"
    """Heading of the page."""
    tag: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="RUN=TAG,TAG")] = ()
    """Tags of a run, which the page filters by; may be given several times."""


def main(options: Options) -> int:
    """Writes the page; returns the exit code: 0, or 3 if some results could not be read. Raises `InputError`."""
    from eval.report import page
    from eval.report.collect import collect
    from eval.report.runs import Runs
    from ttt_jax.utils.files import write_atomically

    if not options.paths:
        raise InputError("there is no PATH: give folders of runs or of results.")
    out = local(options.out)
    page.check(out)  # errors are reported before the work
    collected = collect(options.paths)
    runs = Runs(collected, options.tag)
    content, left_out = page.render(collected, runs, options.title)
    try:
        write_atomically(out, content)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}): give another file.") from None
    wrong = [f"{entry.path} is left out: {entry.reason}" for entry in left_out if entry.wrong]
    for sentence in shortened(wrong):
        print(f"warning: {sentence}", file=sys.stderr)
    print(f"{out}: {len(runs.all)} runs, {len(collected.sources)} result folders, {len(content) / 1e6:.1f} MB")
    return PARTIAL if wrong else 0
