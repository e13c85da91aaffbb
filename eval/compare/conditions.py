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
    # Whoever opens the paths of the last reading reports which one is missing.
    name, paths, arm = next((reading for reading in readings if all(map(known, reading.paths))), readings[-1])
    if arm not in (None, *ARMS):
        raise InputError(
            f"{text} is no path, and its arm {arm!r} cannot be compared: give a path, or @ and one of"
            f" {', '.join(ARMS)}."
        )
    if not all(paths):
        raise InputError(
            f"{text!r} names no checkpoint where one is expected: give [NAME=]CHECKPOINT[,CHECKPOINT...][@ARM]."
        )
    if names is None:
        paths = tuple(str(local(path)) for path in paths)
    elif unknown := next((path for path in paths if path not in names), None):
        raise InputError(f"there are no scores of the checkpoint {unknown}: give some of {', '.join(names)}.")
    return Given(name and printable(name), paths, arm)


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


def conditions(
    given: Sequence[Given],
    checkpoints: Mapping[str, CheckpointInfo],
    stored: Mapping[str, Collection[str]] | None = None,
) -> list[Condition]:
    """Returns the conditions that are given.

    Args:
      checkpoints: by path, with different names; stored: arms by checkpoint, where stored scores are compared.

    Raises `InputError` if they cannot be compared, or are not stored.
    """
    spread = []
    for condition in given:
        plain = [checkpoints[path].name for path in condition.paths if not checkpoints[path].ttt_layers]
        if plain and condition.arm not in (None, WITHOUT_TTT):
            raise InputError(f"{plain[0]} has no TTT layers, so there is no arm {condition.arm}: give @off or no arm.")
        if plain and len(given) == 1:
            raise InputError(f"{plain[0]} has no TTT layers, so there is nothing to compare: give another condition.")
        if len(given) == 1 and condition.arm is None:
            arms = [arm for arm in ARMS if stored is None or all(arm in stored[path] for path in condition.paths)]
            spread = [Given(condition.name and f"{condition.name} {arm}", condition.paths, arm) for arm in arms]
        else:
            spread.append(condition._replace(arm=condition.arm or (WITHOUT_TTT if plain else "persist")))
    if len(spread) < 2:
        arm = given[0].arm or spread[0].arm
        raise InputError(f"{given[0].paths[0]}@{arm} is a single condition: give another to compare it with.")
    seeds = [len(condition.paths) for condition in spread]
    if other := next((count for count in seeds if count != seeds[0]), None):
        raise InputError(
            f"the conditions have {seeds[0]} and {other} checkpoints, but seeds are compared in pairs: give as many in"
            " each."
        )
    shared = len({condition.paths for condition in spread}) == 1
    named: dict[str, Condition] = {}
    for condition in spread:
        first, *more = names = tuple(checkpoints[path].name for path in condition.paths)
        several = f"{first}+{len(more)}" if more else first
        name = condition.name or (condition.arm if shared else f"{several}@{condition.arm}")
        if name in named:
            raise InputError(f"two conditions are called {name}: give them names (NAME=CHECKPOINT), or leave one out.")
        if len(set(names)) < len(names):
            raise InputError(f"{name} names one checkpoint twice: seeds are different runs, leave it out.")
        if lacking := next((path for path in condition.paths if stored and condition.arm not in stored[path]), None):
            raise InputError(
                f"there are no scores of {lacking} under {condition.arm}, only under {', '.join(stored[lacking])}: run"
                " python -m eval stream with that arm."
            )
        named[name] = Condition(name, condition.arm, names)
    return list(named.values())
