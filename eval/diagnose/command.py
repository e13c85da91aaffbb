"""`python -m eval diagnose`: options, and the way from a recording to records and a figure."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from eval.diagnose import records
from eval.diagnose.figure import FILES, write_figures
from eval.diagnose.records import Record, Results
from eval.results import folder as folders
from eval.results import schema
from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.utils.command import cost, keep_compiled, machine
from ttt_jax.utils.paths import file_name, local

if TYPE_CHECKING:
    from ttt_jax.checkpoints.loading import Checkpoint


@dataclasses.dataclass(frozen=True)
class Options:
    """Record what the TTT layers do beside attention.

    A record of a frame and a TTT layer gives the norms of the stream after attention, which the layer reads, and of the
    layer's output, their cosines, how far the gate is open, the change since the record before, the displacement of the
    fast weights and the inner losses. Records are printed, stored in results.json and drawn as diagnose.png and
    diagnose.pdf. Between records nothing is measured, so records cost next to nothing.
    """

    checkpoint: Annotated[Positional[str | None], arg(metavar="[CHECKPOINT]")] = None
    """Folder of a run or of converted weights."""
    data: str | None = None
    """Audio, codes (.safetensors) or a manifest, whose first file is read; unset: the held-out files of the run."""
    every: int = 100
    """Frames from one record to the next."""
    frames: int | None = None
    """First frames that are streamed; unset: all."""
    compare: str | None = None
    """A second checkpoint, measured on the same audio; both are shown side by side."""
    out: str | None = None
    """Folder for the results; unset: diagnose in CHECKPOINT's folder, diagnose-DATA with --data, diagnose-OTHER with
    --compare. Records of the same data and checkpoints are replaced; a folder with others is refused."""
    draw: str | None = None
    """Draws the figure again from the records in this folder, and does nothing else."""

    def __post_init__(self) -> None:
        if self.checkpoint is None and self.draw is None:
            raise InputError(
                "there is no CHECKPOINT: give the folder of a run or of converted weights, or --draw FOLDER."
            )
        for name in ("every", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is out of range: give 1 or more.")
        if self.frames is not None and self.frames < self.every:
            raise InputError(
                f"--frames {self.frames} end before the first record, which --every {self.every} makes: give more"
                " frames or records more often."
            )


def main(options: Options) -> int:
    """Measures a recording, or draws the figure of stored records; returns the exit code. Raises `InputError`."""
    if options.draw is not None:
        folder = local(options.draw)
        print("\n".join(map(str, write_figures(schema.read(folder, Results), folder))))
        return 0
    from tqdm import tqdm

    from eval.diagnose.measure import walk
    from eval.inputs import dataset
    from eval.streaming.score_files import checkpoint_info, file_infos
    from ttt_jax.data.corpus import CorpusConfig

    keep_compiled(CorpusConfig().cache_dir / "compiled")
    checkpoints = load(options.checkpoint, options.compare)
    kind = "diagnose" if options.compare is None else f"diagnose-{file_name(checkpoints[1].name)}"
    folder = folders.find(options.out, kind, options.checkpoint, options.data)
    folders.make(folder)  # before the work, so that a bad --out is reported at once
    file = dataset.first(options.data or dataset.heldout(checkpoints[0]), checkpoints, options.frames or options.every)
    file = file._replace(frames=file.frames[:, : options.frames])
    length, made = file.frames.shape[1], list[Record]()
    infos = [checkpoint_info(checkpoint, brief=True) for checkpoint in checkpoints]
    results = Results(options.data, options.every, file_infos([file])[0], infos, made)
    check_replaced(folder, results)
    for checkpoint in checkpoints:
        layers = checkpoint.cfg.ttt_layers
        print(
            f"{checkpoint.name}: TTT layers {','.join(map(str, layers))}; {length} frames ({length / FRAME_RATE:.1f} s)"
            f" of {file.name}, a record every {options.every} frames",
            flush=True,
        )
        measured = walk(checkpoint.params, file.frames, checkpoint.cfg, options.every)
        total = length // options.every * len(layers)
        for record in tqdm(measured, total=total, unit="record", leave=False, mininterval=0.5):
            made.append({"checkpoint": checkpoint.name} | record)
            if options.compare is None:
                tqdm.write(f"\n{records.block(made[-1])}")  # above the bar
    if options.compare is not None:
        print(f"\n{records.comparison(results)}")
    print(f"\n{records.EXPLANATION}\n")
    check_replaced(folder, results)  # another command may have written there meanwhile
    about = {"notes": records.FIGURES, "evaluated_with": machine(), "cost": cost()}
    print("\n".join(map(str, [schema.write(folder, results, about), *write_figures(results, folder)])))
    return 0


def load(checkpoint: str, other: str | None) -> list[Checkpoint]:
    """Returns the checkpoint and, if there is one, the one to compare with. Raises `InputError`."""
    from ttt_jax.checkpoints.loading import load_all

    if other is not None and os.path.realpath(local(checkpoint)) == os.path.realpath(local(other)):
        raise InputError(f"--compare {other} is the checkpoint itself: give another one.")
    loaded = load_all([path for path in (checkpoint, other) if path is not None])
    for entry in loaded:
        if not entry.cfg.ttt_layers:
            raise InputError(f"{entry.name} has no TTT layers to look into: give a checkpoint with TTT layers.")
    return loaded


def check_replaced(folder: Path, results: Results) -> None:
    """Raises `InputError` if `folder` holds anything but results of the same data, checkpoints and interval."""
    earlier = folders.stored(folder, lambda folder: schema.read(folder, Results), FILES)
    if earlier is not None:
        folders.check(folder, _subject(earlier), _subject(results))


def _subject(results: Results) -> folders.Subject:
    checkpoints = [folders.checkpoint(info.name, info.about) for info in results.checkpoints]
    return folders.subject(results.data, [results.file], [], checkpoints, {"--every": results.every})
