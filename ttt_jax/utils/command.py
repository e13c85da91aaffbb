"""What every command shares: mistakes end in one sentence and an exit code; its cost, versions and options."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from ttt_jax import __version__
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import printable

Options = TypeVar("Options")

BAD_INPUT = 2
PARTIAL = 3
"""Exit code when some inputs were unusable: the command has named them and has done the rest."""
INTERRUPTED = 130

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

log = logging.getLogger("ttt_jax")
"""Warnings of the library: one sentence each, which begins with the file's path."""

_started = time.perf_counter()


def cost() -> dict[str, float]:
    """Returns the seconds since the command began and its peak of memory in gigabytes (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": round(time.perf_counter() - _started, 1), "peak_gigabytes": round(peak / 1e9, 2)}


def machine() -> dict[str, Any]:
    """Returns versions and device, on which numbers depend, as results store them."""
    import jax

    versions = {"ttt_jax": version(), "python": sys.version.split()[0]}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    return {"versions": versions, "device": jax.devices()[0].device_kind}


def version() -> str:
    """Returns the package's version; in a checkout with commit and changes, as 0.1.0+g4e77721.dirty."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed, perhaps inside another repository
        return __version__
    words = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=.dirty"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return f"{__version__}+g{done.stdout.strip()}" if done.returncode == 0 else __version__


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in `folder` for the next run, unless the user has chosen a place."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class _Notices(logging.Handler):
    """Writes warnings of the library on standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(f"warning: {record.getMessage()}")
        tqdm = sys.modules.get("tqdm")  # no bar can be there before it is loaded
        if tqdm is None:
            print(text, file=sys.stderr)
        else:
            tqdm.tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def _notices() -> Iterator[None]:
    """Shows warnings of the library once. Without this the handler of absl, which Orbax loads, shows them too."""
    handler, propagated = _Notices(), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagated


def shortened(sentences: Sequence[str], most: int = 10) -> list[str]:
    """Returns the first `most` of the sentences, each on one line, and a line for all others."""
    rest = len(sentences) - most
    others = [f"{rest:,} more, the last: {sentences[-1]}"] if rest > 0 else []
    return [printable(sentence) for sentence in [*sentences[:most], *others]]


def run(command: Callable[[], int]) -> int:
    """Returns the exit code of `command`, 2 for an error that the user can mend, or 130 if interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name may have what a terminal lacks
    try:
        with _notices():
            return command()
    except InputError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("ttt_jax", "train", "eval"):
            raise
        problem = f"the package {error.name} is not installed: run pip install -e '.[all]'."
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        problem = f"{error.filename or 'the disk'}: {error.strerror}; mend that, or give another path, and run again."
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"error: {printable(problem)}", file=sys.stderr)
    return BAD_INPUT


def call(package: str, args: Sequence[str]) -> int:
    """Runs the command line of `python -m PACKAGE ARGS` in this process and returns its exit code.

    The package is imported by name, so that a package can call another without depending on it.
    """
    return importlib.import_module(f"{package}.__main__").main(args)


@contextlib.contextmanager
def plain_input_errors() -> Iterator[None]:
    """Raises the `InputError` behind tyro's exit, if there is one, instead of tyro's drawing of it."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            yield
    except SystemExit as exit_:
        cause: BaseException | None = exit_
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(shown.getvalue())
        raise


def parse(options: type[Options], prog: str, args: Sequence[str], **settings: Any) -> Options:
    """Returns the `options` (a frozen dataclass; docstrings are the help text) that the command line `args` gives.

    `prog` names the command in its help; `settings` are further arguments of `tyro.cli`. Raises `InputError` where the
    dataclass does. Exits with 0 on --help and with 2 on wrong flags and values.
    """
    import tyro

    settings = {"config": (tyro.conf.FlagCreatePairsOff,), **settings}
    with plain_input_errors():
        return tyro.cli(options, prog=prog, args=list(args), **settings)
