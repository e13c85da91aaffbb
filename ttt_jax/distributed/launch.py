"""Several processes as one program: `jax.distributed`, started by flags and never guessed."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ttt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process finds the others (docs/devices.md)."""

    launch: Literal["none", "auto", "manual"] = "none"
    """none: one process; auto: SLURM, Open MPI, TPU pods or GKE name the others; manual: the three flags below do."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""

    def __post_init__(self) -> None:
        fields = (self.coordinator, self.processes, self.process)
        complete = None not in fields and 0 <= self.process < self.processes
        if self.launch == "manual" and not complete:
            raise InputError(
                f"--launch manual with --coordinator {self.coordinator} --processes {self.processes} --process"
                f" {self.process} is not complete: give HOST:PORT of process 0, the number of processes, and which of"
                " them this is, from 0."
            )
        if self.launch != "manual" and fields != (None, None, None):
            raise InputError(
                "--coordinator, --processes and --process are for --launch manual: add it or leave them out."
            )


def start(launch: Launch) -> None:
    """Joins the other processes. Call it before anything else uses jax. Raises `InputError` if they cannot be found."""
    if launch.launch == "none":
        return
    import jax

    address = {
        "coordinator_address": launch.coordinator,
        "num_processes": launch.processes,
        "process_id": launch.process,
    }
    try:
        jax.distributed.initialize(**(address if launch.launch == "manual" else {}))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--launch {launch.launch} does not find the other processes ({str(error).splitlines()[0]}): start it as"
            " docs/devices.md says."
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which writes the files."""
    import jax

    return jax.process_index() == 0


def agreed(value: int) -> int:
    """Returns the `value` of process 0 in every process, and so waits for all."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))
