"""`python -m eval diagnose`: options, and the way from a recording to records and a figure."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from eval.diagnose import records as report
from eval.diagnose.records import Record
from eval.results import folder as folders
from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import file_name, local

if TYPE_CHECKING:
    from eval.inputs.checkpoints import Checkpoint
    from eval.inputs.dataset import EvalFile


@dataclasses.dataclass(frozen=True)
class Options:
    """Record what the TTT layers do beside attention.

    A record of a frame and a TTT layer gives the norms of the stream after attention, which the layer reads, and of the layer's
    output, their cosines, how far the gate is open, the change since the record before, the displacement of the fast weights and the
    inner losses. Records are printed, stored as records.jsonl and drawn as diagnose.png and diagnose.pdf. Between records nothing is
    measured, so records cost next to nothing.
    """

    checkpoint: Annotated[Positional[str | None], arg(metavar="[CHECKPOINT]")] = None
    """Folder of a run or of converted weights."""
    data: str | None = None
    """Audio, codes (.safetensors) or a manifest, of which the first file is read; unset: the run's held-out files, or the embedded
    ones."""
    every: int = 100
    """Frames from one record to the next."""
    frames: int | None = None
    """First frames that are streamed; unset: all."""
    chunk: int | None = None
    """Most frames of a call between records; 1 is a live stream; unset: 128."""
    compare: str | None = None
    """A second checkpoint, measured on the same audio; both are shown side by side."""
    out: str | None = None
    """Folder for the results; unset: diagnose in CHECKPOINT's folder, diagnose-DATA with --data, diagnose-OTHER with --compare.
    Records of the same data and checkpoints are replaced; a folder with others is refused."""
    draw: str | None = None
    """Draws the figure again from the records in this folder, and does nothing else."""

    def __post_init__(self) -> None:
        if self.checkpoint is None and self.draw is None:
            raise InputError(
                "there is no CHECKPOINT: give the folder of a run or of converted weights, or --draw FOLDER."
            )
        for name in ("every", "frames", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is out of range: give 1 or more.")
        if self.frames is not None and self.frames < self.every:
            raise InputError(
                f"--frames {self.frames} end before the first record, which --every {self.every} makes: give more frames or records"
                " more often."
            )


def main(options: Options) -> int:
    """Diagnose what `options` ask for, or draw the figures of an earlier diagnosis; the exit code. Raises `InputError`."""
    if options.draw is not None:
        folder = local(options.draw)
        for path in report.write_figures(report.read(folder), folder):
            print(path)
        return 0
    from tqdm import tqdm

    from eval.diagnose.measure import walk
    from eval.inputs import dataset
    from ttt_jax.data.corpus import CorpusConfig
    from ttt_jax.utils.command import keep_compiled

    keep_compiled(CorpusConfig().cache_dir / "compiled")
    checkpoints = load(options.checkpoint, options.compare)
    kind = "diagnose" if options.compare is None else f"diagnose-{file_name(checkpoints[1].name)}"
    folder = folders.find(options.out, kind, options.checkpoint, options.data)
    folders.make(folder)  # what cannot be is told before the work
    heard = dataset.first(options.data or dataset.heldout(checkpoints[0]), checkpoints, options.frames or options.every)
    heard = heard._replace(frames=heard.frames[:, : options.frames])
    frames, subject = heard.frames, _subject(options, checkpoints, heard)
    _check_replaced(folder, subject)
    records: list[Record] = []
    for checkpoint in checkpoints:
        of = {"checkpoint": checkpoint.name, **{name: checkpoint.about.get(name) for name in ("step", "weights")}}
        of |= {"data": options.data, "file": heard.name, "frames": frames.shape[1], "tokens": heard.digest}
        print(
            f"{checkpoint.name}: TTT layers {','.join(map(str, checkpoint.cfg.ttt_layers))}; {frames.shape[1]} frames"
            f" ({frames.shape[1] / FRAME_RATE:.1f} s) of {heard.name}, a record every {options.every} frames",
            flush=True,
        )
        found = walk(checkpoint.params, frames, checkpoint.cfg, options.every, options.chunk)
        total = frames.shape[1] // options.every * len(checkpoint.cfg.ttt_layers)
        for record in tqdm(found, total=total, unit="record", leave=False, mininterval=0.5):
            records.append(of | record)
            if options.compare is None:
                tqdm.write(f"\n{report.block(records[-1])}")  # above the bar
    if options.compare is not None:
        print(f"\n{report.comparison(records)}")
    print(f"\n{report.explanation()}\n")
    _check_replaced(folder, subject)  # another command may have written there meanwhile
    for path in (report.write_records(records, folder), *report.write_figures(records, folder)):
        print(path)
    return 0


def load(checkpoint: str, other: str | None) -> list[Checkpoint]:
    """The checkpoint, and the one that it is compared with if there is one. Raises `InputError`."""
    from eval.inputs.checkpoints import load_all

    if other is not None and os.path.realpath(local(checkpoint)) == os.path.realpath(local(other)):
        raise InputError(f"--compare {other} is the checkpoint itself: give another one.")
    paths = [path for path in (checkpoint, other) if path is not None]
    found = load_all(paths)
    for one in found:
        if not one.cfg.ttt_layers:
            raise InputError(f"{one.name} has no TTT layers to look into: give a checkpoint with TTT layers.")
    return found


def _check_replaced(folder: Path, subject: folders.Subject) -> None:
    """Raise `InputError` if what `folder` holds is not to be replaced by records of `subject`."""
    old = folders.stored(folder, report.RECORDS, lambda folder: _subject_of(report.read(folder)), report.DRAWN)
    if old is not None:
        folders.check(folder, old, subject)


def _subject(options: Options, checkpoints: Sequence[Checkpoint], heard: EvalFile) -> folders.Subject:
    """What is asked for."""
    return folders.Subject(
        options.data or folders.OWN_DATA,
        {heard.name: heard.digest},
        frozenset(),
        tuple(folders.checkpoint(one.name, one.about) for one in checkpoints),
        {"--every": options.every},
        frames={heard.name: heard.frames.shape[1]},
    )


def _subject_of(old: Sequence[Record]) -> folders.Subject:
    """What stored records are of."""
    first = {one["checkpoint"]: one for one in reversed(old)}
    return folders.Subject(
        old[0].get("data") or folders.OWN_DATA,
        {one.get("file", ""): one.get("tokens", "") for one in old},
        frozenset(),
        tuple(folders.checkpoint(name, first[name]) for name in report.names(old)),
        {"--every": min(one["frame"] for one in old)},
        frames={one.get("file", ""): one.get("frames", 0) for one in old},
    )
