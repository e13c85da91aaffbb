"""Several processes as one program: `jax.distributed`, asked for in so many words and never guessed."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Literal

from ttt_jax.errors import InputError

MODES = ("none", "auto", "manual")


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process finds the others."""

    mode: Literal["none", "auto", "manual"] = "none"
    """none: it is alone; auto: what started it says so (SLURM, Open MPI, TPU pods, GKE); manual: as told by the other fields."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    process: int | None = None


def take(words: Sequence[str]) -> tuple[Launch, list[str]]:
    """The launch flags among the words of a command line, and the other words. Raises `InputError`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--launch", default="none")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    try:
        found, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise InputError(f"{error}: see python -m train --help.") from None
    if found.launch not in MODES:
        raise InputError(f"--launch {found.launch} is not known: give none, auto or manual.")
    launch = Launch(found.launch, found.coordinator, found.processes, found.process)
    told = [getattr(launch, name) is not None for name in ("coordinator", "processes", "process")]
    if launch.mode == "manual" and not (all(told) and 0 <= found.process < found.processes):
        raise InputError(
            f"--launch manual with --coordinator {found.coordinator} --processes {found.processes} --process {found.process} is not"
            " complete: give HOST:PORT of process 0, the number of processes, and which of them this is, from 0."
        )
    if launch.mode != "manual" and any(told):
        raise InputError("--coordinator, --processes and --process are for --launch manual: add it or leave them out.")
    return launch, rest


def start(launch: Launch) -> None:
    """Join the other processes; before anything else touches jax. Raises `InputError` if they cannot be found."""
    if launch.mode == "none":
        return
    import jax

    told = {"coordinator_address": launch.coordinator, "num_processes": launch.processes, "process_id": launch.process}
    try:
        jax.distributed.initialize(**(told if launch.mode == "manual" else {}))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--launch {launch.mode} does not find the other processes ({str(error).splitlines()[0]}): start it as docs/devices.md"
            " says."
        ) from error


def is_first() -> bool:
    """Whether this process writes what is written once."""
    import jax

    return jax.process_index() == 0


def agreed(value: int) -> int:
    """What process 0 calls `value`, in every process; waits for all."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))
