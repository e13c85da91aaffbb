"""`python -m eval check-state`: options and output. The checks are in `eval.check_state.checks`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from ttt_jax.config import FRAME_RATE, MODEL_PRESETS
from ttt_jax.errors import InputError

if TYPE_CHECKING:
    from eval.check_state.checks import Check, Trace
    from eval.inputs.checkpoints import Checkpoint

SHOWN_LAYERS, HEAD, TAIL = 3, 4, 3
"""Layers in the table, and frames at its start and end."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Check whether the fast weights persist: PASS or FAIL.

    Streams a recording frame by frame. Prints digests of the fast weights, then a line for each property: they change
    at every frame, build on the frame before, survive saving, are cleared by a reset of their row alone, do not depend
    on other rows, leave the parameters alone, and are the same in calls of any length. The last line is PASS (exit code
    0) or FAIL (1).
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
    from eval.inputs import checkpoints, dataset
    from ttt_jax.data.corpus import CorpusConfig
    from ttt_jax.utils.command import keep_compiled

    keep_compiled(CorpusConfig().cache_dir / "compiled")
    checkpoint = fresh_tiny() if options.checkpoint is None else checkpoints.load(options.checkpoint)
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
    print("\n".join([*table(report.trace, cfg.ttt_layers), "", *lines(report.checks), "", report.meaning]))
    print("PASS" if report.passed else "FAIL")
    return 0 if report.passed else 1


def fresh_tiny() -> Checkpoint:
    """Returns the model tiny with untrained weights."""
    import jax

    from eval.inputs.checkpoints import Checkpoint
    from ttt_jax.data.corpus import CorpusConfig
    from ttt_jax.moshi import model

    cfg = MODEL_PRESETS["tiny"]
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles in a third of the time of the default generator
    return Checkpoint("tiny, freshly initialised", cfg, model.init_params(cfg, key), {}, CorpusConfig(), None)


def table(trace: Trace, layers: tuple[int, ...]) -> list[str]:
    """Returns the digests of row 0 as lines: the first and last frames, and at most `SHOWN_LAYERS` layers."""
    shown = [*range(len(layers))] if len(layers) <= SHOWN_LAYERS else [0, len(layers) // 2, len(layers) - 1]
    frames, digest = len(trace.digest), trace.digest[:, :, 0]
    rows = [" frame  layer  digest        changed"]
    for t in range(frames):
        if t <= HEAD or t >= frames - TAIL:
            for i in shown:
                changed = "(fresh)" if t == 0 else "yes" if digest[t, i] != digest[t - 1, i] else "NO"
                rows.append(f"{t:6}  {layers[i]:5}  {digest[t, i][:12]:12}  {changed}")
        elif t == HEAD + 1:
            rows.append("   ...")
    return rows + ([f"({len(shown)} of {len(layers)} TTT layers)"] if len(shown) < len(layers) else [])


def lines(checks: list[Check]) -> list[str]:
    """Returns a line for each check."""
    width = max(len(check.what) for check in checks)
    return [f"{check.what:{width}}  {'PASS' if check.passed else 'FAIL'}  {check.figure}" for check in checks]
