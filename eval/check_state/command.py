"""`python -m eval check-state`: options and output. The checks are in `eval.check_state.checks`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from ttt_jax.config import FRAME_RATE, MODEL_PRESETS
from ttt_jax.errors import InputError

if TYPE_CHECKING:
    from eval.check_state.checks import Trace
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
    print(
        f"{checkpoint.name}: TTT layers {','.join(map(str, cfg.ttt_layers))}, mini-batch {cfg.ttt.mini_batch},"
        f" {cfg.dtype}; {options.frames} frames ({options.frames / FRAME_RATE:.1f} s) of {file.name}, one at a time\n",
        flush=True,
    )
    report = check(checkpoint.params, file.frames[:, : options.frames], cfg)
    width = max(len(entry.what) for entry in report.checks)
    lines = [f"{entry.what:{width}}  {'PASS' if entry.passed else 'FAIL'}  {entry.figure}" for entry in report.checks]
    result = "PASS" if report.passed else "FAIL"
    print("\n".join([*table(report.trace, cfg.ttt_layers[0]), "", *lines, "", report.meaning, result]))
    return 0 if report.passed else 1


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
