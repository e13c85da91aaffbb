"""``python -m train.plot RUN [RUN ...]``: draw a run, or several side by side, from their metrics.jsonl. Loads no jax."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train import metrics, plots
from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.command import run
from ttt_jax.utils.paths import local


def main(args: Sequence[str]) -> int:
    """Run the command line `args`; the exit code. Raises `InputError`: no such run, no metrics, no place to write to."""
    parser = argparse.ArgumentParser(
        prog="python -m train.plot",
        description="Draw a run's losses, TTT layers, gradients, learning rates and speed; several runs: their losses side by side.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, finished or not")
    parser.add_argument(
        "--out",
        metavar="FILE.png",
        help="where to draw, with a PDF beside it; unset: loss.png in the run's folder, of several runs runs.png here",
    )
    options = parser.parse_args(args)
    out = _check_out(local(options.out)) if options.out is not None else None
    folders = [local(name) for name in options.runs]
    lines = [_read(folder) for folder in folders]
    if len(folders) == 1:
        paths = plots.draw_run(lines[0], _unigram(folders[0]), folders[0], out)
    else:
        runs = [
            plots.Run(name, found, _hours(folder))
            for name, found, folder in zip(_names(folders), lines, folders, strict=True)
        ]
        paths = plots.draw_runs(runs, out or Path("runs.png"))
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
    """Losses of the unigram model by stream, from a run's meta.json; None where metrics.jsonl came alone."""
    path = folder / "meta.json"
    stored = config_json.read_json(path, "a run's meta.json") if path.exists() else {}
    found = stored.get("unigram") if isinstance(stored, dict) else stored
    if not isinstance(found, dict | None) or not all(
        isinstance(one, float | int | None) for one in (found or {}).values()
    ):
        raise InputError(f"{path} has no losses by stream under 'unigram': bring it back, or remove it.")
    return found


def _hours(folder: Path) -> float | None:
    """Hours of speech that a step reads, from a run's config.json; None where metrics.jsonl came alone."""
    path = folder / "config.json"
    if not path.exists():
        return None
    stored = config_json.read_json(path, "a run's config.json")
    try:
        frames = stored["data"]["batch"] * stored["data"]["chunk"] * stored.get("bptt", 1)
        return frames / FRAME_RATE / 3600
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path} has no numbers data.batch, data.chunk and bptt: bring it back, or remove it."
        ) from None


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where two share a name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
