"""`python -m train.plot RUN ...`: draws a run, or several side by side, from their metrics.jsonl. Loads no jax."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from train import metrics, plots
from train.config import load
from ttt_jax.config import FRAME_RATE, check
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.command import parse, run
from ttt_jax.utils.paths import local


@dataclasses.dataclass(frozen=True)
class Options:
    """Draw a run's losses, TTT layers, gradients, learning rates and speed; several runs: their losses side by side."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs, finished or not."""
    out: str | None = None
    """PNG to draw, with a PDF beside it; unset: loss.png in the run's folder, or runs.png here for several runs."""


def main(args: Sequence[str]) -> int:
    """Runs the command line `args` and returns the exit code.

    Raises `InputError` where there is no such run, no metrics, or no place to write to.
    """
    options = parse(Options, "python -m train.plot", args)
    check(bool(options.runs), "no run is named: give the folder of at least one, such as runs/NAME.")
    out = _check_out(local(options.out)) if options.out is not None else None
    folders = [local(name) for name in options.runs]
    lines = [_read(folder) for folder in folders]
    if len(folders) == 1:
        paths = plots.draw_run(lines[0], _unigram(folders[0]), folders[0], out)
    else:
        runs = zip(_names(folders), lines, map(_hours, folders), strict=True)
        paths = plots.draw_runs([plots.Run(*run) for run in runs], out or Path("runs.png"))
    for path in paths:
        print(path)
    return 0


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{folder} is not the folder of a run (it has no metrics.jsonl): give one, such as runs/NAME.")
    lines = metrics.read(path)
    if not any("loss" in line for line in lines):
        raise InputError(f"{path} holds no step of training yet: wait for the first, or give another run.")
    return lines


def _check_out(out: Path) -> Path:
    if out.suffix != ".png":
        raise InputError(f"--out {out} does not end in .png: give a file that does, a PDF is written beside it.")
    if not out.parent.is_dir():
        raise InputError(f"--out {out} lies in no folder that there is: make {out.parent} first, or give another file.")
    return out


def _unigram(folder: Path) -> dict[str, float | None] | None:
    """Losses of the unigram model by stream from meta.json; None without it."""
    path = folder / "meta.json"
    stored = config_json.read_json(path, "a run's meta.json") if path.exists() else {}
    losses = stored.get("unigram") if isinstance(stored, dict) else stored
    sound = isinstance(losses, dict | None) and all(isinstance(x, float | int | None) for x in (losses or {}).values())
    if not sound:
        raise InputError(f"{path} has no losses by stream under 'unigram': bring it back, or remove it.")
    return losses


def _hours(folder: Path) -> float | None:
    """Hours of speech in a step from config.json; None without it."""
    path = folder / "config.json"
    if not path.exists():
        return None
    cfg = load(path)
    return cfg.bptt * cfg.data.batch * cfg.data.chunk / FRAME_RATE / 3600


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths if two share a name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
