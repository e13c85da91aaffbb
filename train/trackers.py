"""Trackers of metrics: TensorBoard and Weights & Biases. A package is imported only for a run that uses it."""

from __future__ import annotations

import importlib.util
import logging
import math
import secrets
import time
from pathlib import Path
from typing import Any

from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

log = logging.getLogger("train")


class Tracker:
    """Sends metrics to `service`. If that fails, the run goes on without it."""

    def __init__(self, name: str, service: Any):
        self._name, self._service = name, service

    def write(self, step: int, values: dict[str, float]) -> None:
        """Stores `values`, named as by `flatten`, for `step`."""
        self._try("write", step, values)

    def close(self) -> None:
        """Sends what is left; nothing can be written afterwards."""
        self._try("close")

    def _try(self, method: str, *args: Any) -> None:
        if self._service is None:
            return
        try:
            getattr(self._service, method)(*args)
        except Exception as error:  # noqa: BLE001  hours of training are worth more than any error here
            self._service, reason = None, f"{type(error).__name__}: {error}"
            log.warning("%s failed (%s) and gets no more metrics; metrics.jsonl has them all", self._name, reason)


def flatten(line: dict[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of a line of metrics.jsonl by path ("ttt/29/gate_abs", "streams/codebook_1")."""
    numbers: dict[str, float] = {}
    for key, value in line.items():
        name = key.replace(" ", "_")
        if isinstance(value, dict):
            numbers |= {f"{name}/{rest}": number for rest, number in flatten(value).items()}
        elif name != "step" and isinstance(value, int | float) and math.isfinite(value):
            numbers[name] = float(value)
    return numbers


def check(tensorboard: bool, wandb: str | None) -> None:
    """Raises `InputError` if a package is missing that `open_trackers` needs with these arguments."""
    for package, flag, used in (
        ("tensorboardX", "--tensorboard", tensorboard),
        ("wandb", "--wandb", wandb is not None),
    ):
        if used and importlib.util.find_spec(package) is None:
            raise InputError(
                f"the package {package} is not installed: install what {flag} needs by pip install -e '.[log]', or"
                f" leave {flag} out."
            )


def open_trackers(
    tensorboard: bool, wandb: str | None, run_dir: Path, config: dict[str, Any], done: int
) -> list[Tracker]:
    """Returns the trackers of a run: TensorBoard, the project `wandb` of W&B, which shows `config`, or none.

    Stored metrics of steps after `done` are replaced. Call `check` first. Raises `InputError` if W&B refuses.
    """
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(Tracker("TensorBoard", _TensorBoard(run_dir, done)))
    if wandb is not None:
        trackers.append(Tracker("Weights & Biases", _WandB(wandb, run_dir, config)))
    return trackers


class _TensorBoard:
    """Event files in RUN/tensorboard.

    `tensorboardX.SummaryWriter` is not used: the thread that empties its queue dies with the first error of the disk,
    and then the run would wait for it forever. Its `EventsWriter` writes at once.
    """

    def __init__(self, run_dir: Path, done: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The file's name has the time in seconds; the step distinguishes a run that is resumed within a second.
        self._file = EventsWriter(str(folder / "events"), f".{done}")
        if done:  # TensorBoard then drops stored values of this step and later ones, which are written again
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(done + 1, session_log=restart)

    def write(self, step: int, values: dict[str, float]) -> None:
        value = self._summary.Value
        self._write(step, summary=self._summary(value=[value(tag=name, simple_value=x) for name, x in values.items()]))

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **what))
        self._file.flush()


class _WandB:
    """A W&B run named like the run folder. RUN/wandb_id.txt stores its id, so that a resumed run continues it."""

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any]):
        import wandb

        path = run_dir / "wandb_id.txt"
        identity = path.read_text(encoding="utf-8").strip() if path.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project, name=run_dir.resolve().name, dir=str(run_dir), id=identity, resume="allow",
                config=config,
                settings=wandb.Settings(console="off"),  # the progress bar is no log
            )  # fmt: skip
        except wandb.Error as error:
            raise InputError(
                f"--wandb {project} cannot be opened ({str(error).strip().rstrip('.')}): log in by `wandb login`, set"
                " WANDB_MODE=offline, or leave it out."
            ) from None
        write_atomically(path, identity.encode())

    def write(self, step: int, values: dict[str, float]) -> None:
        # Steps only grow in W&B. Steps that a killed run has sent already are computed again with the same values.
        if step >= self._run.step:
            self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
