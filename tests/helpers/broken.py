"""Broken copies of this library: its own text with a snippet replaced, which a check must be seen to fail on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock


class Flaw(NamedTuple):
    """A flaw of the original, as an edit of this library."""

    check: Callable[[], None]
    modules: tuple[ModuleType, ...]
    """The one that is edited, then those that hold names or compiled programs of it."""
    edits: dict[str, str]
    """Snippets that occur once, and what stands in their place."""


def edited(flaw: Flaw) -> str:
    """The first module's source with the flaw in it."""
    source = Path(flaw.modules[0].__file__).read_text()
    for snippet, replacement in flaw.edits.items():
        assert source.count(snippet) == 1, f"{flaw.modules[0].__name__} moved on: it should have, once,\n{snippet}"
        source = source.replace(snippet, replacement)
    return source


@contextmanager
def broken(flaw: Flaw) -> Iterator[None]:
    """Executes the modules anew, the first one edited, in place: who holds them sees the flaw. Then they are as
    before."""
    with ExitStack() as stack:
        for i, module in enumerate(flaw.modules):
            source = Path(module.__file__).read_text() if i else edited(flaw)
            stack.enter_context(mock.patch.dict(vars(module)))
            exec(compile(source, f"broken {module.__name__}", "exec", dont_inherit=True), vars(module))
        yield
