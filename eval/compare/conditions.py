"""Conditions of `python -m eval compare`, as the command line gives them. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from eval.compare.experiment import Condition
from eval.results.schema import CheckpointInfo
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import exists, listed, local, printable

ARMS, WITHOUT_TTT = ("persist", "reset", "frozen", "off"), "off"
"""Arms of `eval.streaming.arms` that can be compared, in their order, and the arm of a model without TTT layers."""


class Given(NamedTuple):
    """A condition as the command line gives it."""

    name: str | None
    paths: tuple[str, ...]
    """Its checkpoints; where stored scores are compared, their names."""
    arm: str | None


def parse(text: str, names: Collection[str] | None = None) -> Given:
    """Returns the condition that `text`, [NAME=]CHECKPOINT[,CHECKPOINT...][@ARM], means. Raises `InputError` if it
    means none.

    What exists as a path is a path, whatever =, commas and @ it contains. With `names`, those of stored checkpoints, so
    is a name.
    """
    known = exists if names is None else names.__contains__
    readings = list(_readings(text, known))
    # Where no reading has paths that all exist, whoever opens the paths of the last reading reports which one is
    # missing.
    reading = next((reading for reading in readings if all(map(known, reading.paths))), readings[-1])
    if reading.arm not in (None, *ARMS):
        raise InputError(
            f"{text} is no path, and its arm {reading.arm!r} cannot be compared: give a path, or @ and one of"
            f" {', '.join(ARMS)}."
        )
    if not all(reading.paths):
        raise InputError(
            f"{text!r} names no checkpoint where one is expected: give [NAME=]CHECKPOINT[,CHECKPOINT...][@ARM]."
        )
    paths = reading.paths if names is not None else tuple(str(local(path)) for path in reading.paths)
    return Given(reading.name and printable(reading.name), paths, reading.arm)


def _readings(text: str, known: Callable[[str], bool]) -> Iterator[Given]:
    """Yields what `text` can mean, the shortest name first, then the longest paths; the last reading ignores what
    exists."""
    cuts = [0, *(i + 1 for i, c in enumerate(text) if c == "=" and "/" not in text[:i])]
    for cut in cuts:
        rest, name = text[cut:], text[: max(0, cut - 1)].strip() or None
        yield Given(name, _items(rest, known), None)
        paths, _, arm = rest.rpartition("@")
        if arm in ARMS:
            yield Given(name, _items(paths, known), arm)
    cut = cuts[min(1, len(cuts) - 1)]
    paths, at, arm = text[cut:].rpartition("@")
    if not at or "/" in arm:
        paths, arm = text[cut:], None
    yield Given(text[: max(0, cut - 1)].strip() or None, _items(paths, known), arm)


def _items(text: str, known: Callable[[str], bool]) -> tuple[str, ...]:
    """Returns paths joined by commas; blanks around a path are dropped unless they are part of its name."""
    items = listed(text, lambda item: known(item) or known(item.strip()))
    return tuple(item if known(item) else item.strip() for item in items)


def conditions(given: Sequence[Given], checkpoints: Mapping[str, CheckpointInfo]) -> list[Condition]:
    """Returns the conditions that are given; `checkpoints` by path, with different names.

    Raises `InputError` if they cannot be compared.
    """
    spread = []
    for condition in given:
        plain = [checkpoints[path].name for path in condition.paths if not checkpoints[path].ttt_layers]
        if plain and condition.arm not in (None, WITHOUT_TTT):
            raise InputError(f"{plain[0]} has no TTT layers, so there is no arm {condition.arm}: give @off or no arm.")
        if plain and len(given) == 1:
            raise InputError(f"{plain[0]} has no TTT layers, so there is nothing to compare: give another condition.")
        default = WITHOUT_TTT if plain else "persist"
        arms = ARMS if len(given) == 1 and condition.arm is None else [condition.arm or default]
        spread += [condition._replace(arm=arm) for arm in arms]
    if len(spread) < 2:
        raise InputError(f"{given[0].paths[0]}@{given[0].arm} is a single condition: give another to compare it with.")
    if len(spread) > len(given):
        spread = [
            condition._replace(name=condition.name and f"{condition.name} {condition.arm}") for condition in spread
        ]
    for condition in spread[1:]:
        if len(condition.paths) != len(spread[0].paths):
            raise InputError(
                f"the conditions have {len(spread[0].paths)} and {len(condition.paths)} checkpoints, but seeds are"
                " compared in pairs: give as many in each."
            )
    shared = len({condition.paths for condition in spread}) == 1

    def name(condition: Given) -> str:
        if condition.name or shared:
            return condition.name or condition.arm
        first, *more = (checkpoints[path].name for path in condition.paths)
        return f"{first}{f'+{len(more)}' if more else ''}@{condition.arm}"

    named = [
        Condition(name(condition), condition.arm, tuple(checkpoints[path].name for path in condition.paths))
        for condition in spread
    ]
    names = [condition.name for condition in named]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise InputError(f"two conditions are called {twice}: give them names (NAME=CHECKPOINT), or leave one out.")
    for condition in named:
        if len(set(condition.checkpoints)) < len(condition.checkpoints):
            raise InputError(f"{condition.name} names one checkpoint twice: seeds are different runs, leave it out.")
    return named
