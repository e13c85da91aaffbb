"""Whole commands in the process of the tests, which has loaded what takes a process of its own seconds."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import subprocess

from ttt_jax.utils.command import run


def command(module: str, *words: object) -> subprocess.CompletedProcess:
    """Runs `python -m MODULE WORDS` and returns its exit code, standard output and standard error."""
    main = importlib.import_module(f"{module}.__main__").main
    args = [str(word) for word in words]
    with _logging_as_before(), contextlib.ExitStack() as stack:
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            code = run(lambda: main(args))
        except SystemExit as end:  # of the parser
            code = end.code or 0
    return subprocess.CompletedProcess([module, *args], code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _logging_as_before():
    """Takes back what `python -m train` and `python -m ttt_jax.convert` do to their loggers."""
    logs = [logging.getLogger(name) for name in ("train", "convert")]
    before = [(log.handlers[:], log.level, log.propagate) for log in logs]
    try:
        yield
    finally:
        for log, (handlers, level, propagates) in zip(logs, before, strict=True):
            log.handlers[:], log.propagate = handlers, propagates
            log.setLevel(level)
