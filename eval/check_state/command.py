"""`python -m eval check-state`: options and output. The checks are in `eval.check_state.checks`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from eval.check_state.results import Results
from eval.results import folder as folders
from eval.results import schema
from ttt_jax.config import FRAME_RATE, MODEL_PRESETS
from ttt_jax.errors import InputError
from ttt_jax.utils.command import cost, machine
from ttt_jax.utils.paths import local

if TYPE_CHECKING:
    from eval.check_state.checks import Report, Trace
    from eval.inputs.dataset import EvalFile
    from ttt_jax.checkpoints.loading import Checkpoint

HEAD, TAIL = 4, 3
"""Frames at the start and the end of the table."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Check whether the fast weights persist: PASS or FAIL.

    Streams a recording frame by frame. Prints digests of the fast weights, then a line for each property: they change
    at every frame, build on the frame before, survive saving, are cleared by a reset of their row alone, do not depend
    on other rows, leave the parameters alone, and are the same in calls of any length. Exit code: 0 PASS, 1 FAIL.
    """

    checkpoint: Annotated[Positional[str | None], arg(metavar="[CHECKPOINT]")] = None
    """Folder of a run or of converted weights; unset: the model tiny, untrained."""
    audio: str | None = None
    """Audio, codes (.safetensors) or a manifest, whose first file is read; unset: the held-out embedded speech."""
    frames: int = 50
    """Frames to stream, 80 ms each."""
    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder for results.json, which `python -m eval report` shows; unset: nothing is stored. Checks of the same
    recording and checkpoint are replaced; a folder with other results is refused."""

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise InputError(f"--frames {self.frames} cannot show persistence: give 2 or more.")


def main(options: Options) -> int:
    """Checks a checkpoint and prints the report; returns the exit code: 0 PASS, 1 FAIL. Raises `InputError`."""
    from eval.check_state.checks import check
    from eval.inputs import dataset
    from ttt_jax.checkpoints import loading
    from ttt_jax.data.corpus import CorpusConfig
    from ttt_jax.utils.command import keep_compiled

    keep_compiled(CorpusConfig().cache_dir / "compiled")
    checkpoint = fresh_tiny() if options.checkpoint is None else loading.load(options.checkpoint)
    cfg = checkpoint.cfg
    if not cfg.ttt_layers:
        raise InputError(
            f"{checkpoint.name} has no TTT layers, so it has no fast weights: give a checkpoint with TTT layers"
            " (python -m ttt_jax.convert kyutai --ttt-layers adds them)."
        )
    file = dataset.first(options.audio or dataset.embedded(), [checkpoint], options.frames)
    file = file._replace(frames=file.frames[:, : options.frames])
    if options.out is not None:
        folders.make(local(options.out))  # before the work, so that a bad --out is reported at once
        check_replaced(local(options.out), results_of(options, checkpoint, file))
    print(
        f"{checkpoint.name}: TTT layers {','.join(map(str, cfg.ttt_layers))}, mini-batch {cfg.ttt.mini_batch},"
        f" {cfg.dtype}; {options.frames} frames ({options.frames / FRAME_RATE:.1f} s) of {file.name}, one at a time\n",
        flush=True,
    )
    report = check(checkpoint.params, file.frames, cfg)
    width = max(len(entry.what) for entry in report.checks)
    lines = [f"{entry.what:{width}}  {'PASS' if entry.passed else 'FAIL'}  {entry.figure}" for entry in report.checks]
    result, stored = "PASS" if report.passed else "FAIL", list[str]()
    if options.out is not None:
        folder, made = local(options.out), results_of(options, checkpoint, file, report)
        check_replaced(folder, made)  # another command may have written there meanwhile
        stored = [str(schema.write(folder, made, {"evaluated_with": machine(), "cost": cost()})), ""]
    print("\n".join([*table(report.trace, cfg.ttt_layers[0]), "", *lines, "", *stored, report.meaning, result]))
    return 0 if report.passed else 1


def results_of(options: Options, checkpoint: Checkpoint, file: EvalFile, report: Report | None = None) -> Results:
    """Returns what is stored; without the checks before there is a report."""
    from eval.streaming.score_files import checkpoint_info, file_infos

    found = (report.checks, report.meaning, report.passed) if report else ([], "", False)
    return Results(options.audio, file_infos([file])[0], checkpoint_info(checkpoint, brief=True), *found)


def check_replaced(folder: Path, results: Results) -> None:
    """Raises `InputError` if `folder` holds anything but checks of the same recording and checkpoint."""
    earlier = folders.stored(folder, lambda folder: schema.read(folder, Results), ())
    if earlier is not None:
        old, new = (
            folders.subject(r.data, [r.file], [], [folders.checkpoint(r.checkpoint.name, r.checkpoint.about)], {})
            for r in (earlier, results)
        )
        folders.check(folder, old, new)


def fresh_tiny() -> Checkpoint:
    """Returns the model tiny with untrained weights."""
    import jax

    from ttt_jax.checkpoints.loading import Checkpoint
    from ttt_jax.data.corpus import CorpusConfig
    from ttt_jax.moshi import model

    cfg = MODEL_PRESETS["tiny"]
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles in a third of the time of the default generator
    return Checkpoint("tiny, freshly initialised", cfg, model.init_params(cfg, key), {}, CorpusConfig())


def table(trace: Trace, layer: int) -> list[str]:
    """Returns the digests of row 0 in the first TTT layer, `layer`, as lines: the first and the last frames."""
    digests = trace.digest[:, 0, 0]
    lines = [f" frame  digest of layer {layer}  changed"]
    for t, digest in enumerate(digests):
        if t <= HEAD or t >= len(digests) - TAIL:
            changed = "(fresh)" if t == 0 else "yes" if digest != digests[t - 1] else "NO"
            lines.append(f"{t:6}  {digest[:12]:{16 + len(str(layer))}}  {changed}")
        elif t == HEAD + 1:
            lines.append("   ...")
    return lines
