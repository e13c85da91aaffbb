"""Metrics to where people watch them: TensorBoard, Weights & Biases. Their packages are imported where they are asked for."""

from __future__ import annotations

import importlib.util
import logging
import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

log = logging.getLogger("train")


class Tracker(Protocol):
    """Takes what a step or a validation reported."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Keep `values`, by the names that `flatten` gives, as those of `step`."""
        ...

    def close(self) -> None:
        """Send what is left; nothing can be written afterwards."""
        ...


def flatten(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by path ("ttt/29/gate_abs", "streams/codebook_1"); what is no finite number is left out."""
    found: dict[str, float] = {}
    for key, value in line.items():
        name = key.replace(" ", "_")
        if isinstance(value, dict):
            found |= {f"{name}/{rest}": number for rest, number in flatten(value).items()}
        elif name != "step" and isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def check(tensorboard: bool, wandb: str | None) -> None:
    """Raise `InputError` where a package is missing that `open_sinks` would need with these arguments."""
    for package, flag, asked in (
        ("tensorboardX", "--tensorboard", tensorboard),
        ("wandb", "--wandb", wandb is not None),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise InputError(
                f"the package {package} is not installed: install what {flag} needs by pip install -e '.[log]', or leave {flag} out."
            )


def open_trackers(
    tensorboard: bool, wandb: str | None, run_dir: Path, config: dict[str, Any], done: int
) -> list[Tracker]:
    """The sinks that are asked for; one that fails later is told of and left, the run goes on.

    Args:
        tensorboard: whether to write event files to RUN/tensorboard.
        wandb: project of Weights & Biases; None: none.
        run_dir: folder of the run, which is there.
        config: of the run, as W&B shows it.
        done: steps done before; what sinks hold of later ones gives way.

    Raises:
        InputError: a package is missing, or W&B cannot be reached or refuses.
    """
    check(tensorboard, wandb)
    sinks: list[Tracker] = []
    if tensorboard:
        sinks.append(_Guarded("TensorBoard", _TensorBoard(run_dir, done)))
    if wandb is not None:
        sinks.append(_Guarded("Weights & Biases", _WandB(wandb, run_dir, config)))
    return sinks


class _Guarded:
    """A sink whose failures end itself, not the run."""

    def __init__(self, name: str, sink: Tracker):
        self._name = name
        self._sink: Tracker | None = sink

    def write(self, step: int, values: dict[str, float]) -> None:
        """As `Sink.write`."""
        self._try(lambda sink: sink.write(step, values))

    def close(self) -> None:
        """As `Sink.close`."""
        self._try(lambda sink: sink.close())

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self._sink is None:
            return
        try:
            call(self._sink)
        except Exception as error:  # noqa: BLE001  whatever it is, hours of training are worth more
            self._sink = None
            log.warning(
                "%s failed (%s: %s) and gets no more metrics; metrics.jsonl has them all",
                self._name,
                type(error).__name__,
                error,
            )


class _TensorBoard:
    """Event files in RUN/tensorboard.

    Not by `tensorboardX.SummaryWriter`: its queue is emptied by a thread that dies with the first error of the disk, after
    which the next scalars would wait for it forever.
    """

    def __init__(self, run_dir: Path, done: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The file's name has the time in seconds: the step tells apart a run and its quick resumption.
        self._file = EventsWriter(str(folder / "events"), f".{done}")
        if done:  # TensorBoard forgets what files hold of this step and later ones, which come again
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(done + 1, session_log=restart)

    def write(self, step: int, values: dict[str, float]) -> None:
        """As `Sink.write`."""
        value = self._summary.Value
        self._write(step, summary=self._summary(value=[value(tag=name, simple_value=x) for name, x in values.items()]))

    def close(self) -> None:
        """As `Sink.close`."""
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **what))
        self._file.flush()


class _WandB:
    """A W&B run of the run folder's name; its id is kept in RUN/wandb_id.txt, so that a resumed run goes on in it."""

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any]):
        import wandb

        kept = run_dir / "wandb_id.txt"
        own = kept.read_text(encoding="utf-8").strip() if kept.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project, name=run_dir.resolve().name, dir=str(run_dir), id=own, resume="allow", config=config,
                settings=wandb.Settings(console="off"),  # the progress bar is no log
            )  # fmt: skip
        except wandb.Error as error:
            raise InputError(
                f"--wandb {project} cannot be opened ({str(error).strip().rstrip('.')}): log in by `wandb login`, set WANDB_MODE=offline,"
                " or leave it out."
            ) from None
        write_atomically(kept, own.encode())

    def write(self, step: int, values: dict[str, float]) -> None:
        """As `Sink.write`."""
        # Steps only grow in W&B. What a killed run had sent of steps that now come again stands: they come again the same.
        if step >= self._run.step:
            self._run.log(values, step=step)

    def close(self) -> None:
        """As `Sink.close`."""
        self._run.finish()
