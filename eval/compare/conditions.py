"""Conditions of `python -m eval compare`, as the command line gives them. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from eval.compare.experiment import Condition
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import exists, listed, local, printable

if TYPE_CHECKING:
    from eval.inputs.checkpoints import Checkpoint

ARMS, WITHOUT_TTT = ("persist", "reset", "frozen", "off"), "off"
"""Those of `eval.streaming.arms` that can be compared, in their order, and the one of a model without TTT layers."""


class Asked(NamedTuple):
    """A condition as the command line gives it."""

    name: str | None
    paths: tuple[str, ...]
    """Its checkpoints."""
    arm: str | None


def parse(text: str) -> Asked:
    """A condition, [NAME=]CHECKPOINT[,CHECKPOINT...][@ARM]. Raises `InputError` if it is none.

    What exists as a path is one, whatever it has of =, commas and @: nothing is taken off its front or its end.
    """
    readings = list(_readings(text))
    # Where no reading has paths that all exist the last one is as good as any: which path is missing is told by who opens it.
    found = next((one for one in readings if all(map(exists, one.paths))), readings[-1])
    if found.arm not in (None, *ARMS):
        raise InputError(
            f"{text} is no path, and its arm {found.arm!r} cannot be compared: give a path, or @ and one of {', '.join(ARMS)}."
        )
    if not all(found.paths):
        raise InputError(
            f"{text!r} names no checkpoint where one is expected: give [NAME=]CHECKPOINT[,CHECKPOINT...][@ARM]."
        )
    return found._replace(
        name=found.name and printable(found.name), paths=tuple(str(local(path)) for path in found.paths)
    )


def _readings(text: str) -> Iterator[Asked]:
    """What `text` can mean: as little as possible taken off its front, then off its end; the last without a look at what exists."""
    cuts = [0, *(i + 1 for i, c in enumerate(text) if c == "=" and "/" not in text[:i])]
    for cut in cuts:
        rest, name = text[cut:], text[: max(0, cut - 1)].strip() or None
        yield Asked(name, _items(rest), None)
        paths, _, arm = rest.rpartition("@")
        if arm in ARMS:
            yield Asked(name, _items(paths), arm)
    cut = cuts[min(1, len(cuts) - 1)]
    paths, at, arm = text[cut:].rpartition("@")
    if not at or "/" in arm:
        paths, arm = text[cut:], None
    yield Asked(text[: max(0, cut - 1)].strip() or None, _items(paths), arm)


def _items(text: str) -> tuple[str, ...]:
    """Paths joined by commas; blanks around one that is no path with them are none of its own."""
    found = listed(text, lambda item: exists(item) or exists(item.strip()))
    return tuple(item if exists(item) else item.strip() for item in found)


def conditions(asked: Sequence[Asked], models: dict[str, Checkpoint]) -> list[Condition]:
    """The conditions that are asked for; `models` by path, each of another name.

    Raises `InputError` if they cannot be compared.
    """
    spread = []
    for one in asked:
        plain = [models[path].name for path in one.paths if not models[path].cfg.ttt_layers]
        if plain and one.arm not in (None, WITHOUT_TTT):
            raise InputError(f"{plain[0]} has no TTT layers, so there is no arm {one.arm}: give @off or no arm.")
        if plain and len(asked) == 1:
            raise InputError(f"{plain[0]} has no TTT layers, so there is nothing to compare: give another condition.")
        arms = ARMS if len(asked) == 1 and one.arm is None else [one.arm or (WITHOUT_TTT if plain else "persist")]
        spread += [one._replace(arm=arm) for arm in arms]
    if len(spread) < 2:
        raise InputError(f"{asked[0].paths[0]}@{asked[0].arm} is a single condition: give another to compare it with.")
    if len(spread) > len(asked):
        spread = [one._replace(name=one.name and f"{one.name} {one.arm}") for one in spread]
    for one in spread[1:]:
        if len(one.paths) != len(spread[0].paths):
            raise InputError(
                f"the conditions have {len(spread[0].paths)} and {len(one.paths)} checkpoints, but seeds are compared in pairs: give as"
                " many in each."
            )
    shared = len({one.paths for one in spread}) == 1

    def named(one: Asked) -> str:
        if one.name or shared:
            return one.name or one.arm
        first, *more = (models[path].name for path in one.paths)
        return f"{first}{f'+{len(more)}' if more else ''}@{one.arm}"

    found = [Condition(named(one), one.arm, tuple(models[path].name for path in one.paths)) for one in spread]
    names = [one.name for one in found]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise InputError(f"two conditions are called {twice}: give them names (NAME=CHECKPOINT), or leave one out.")
    for one in found:
        if len(set(one.checkpoints)) < len(one.checkpoints):
            raise InputError(f"{one.name} names one checkpoint twice: seeds are different runs, leave it out.")
    return found
