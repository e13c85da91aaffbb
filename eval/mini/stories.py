"""Stories of the mini benchmark (stories.txt): four sentences, a right ending, a wrong one."""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from typing import NamedTuple

from ttt_jax.errors import InputError


class Story(NamedTuple):
    """A story; texts are whole sentences."""

    start: str
    """Four sentences."""
    right: str
    wrong: str
    """Ending of sSC's incorrect story: it does not fit this start."""
    topic: str
    """Ending of tSC's incorrect story: the right one of another story."""

    @property
    def id(self) -> str:
        """UUID in the names of files; the same in every set."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"ttt_jax/mini/{self.start}"))


def read_stories() -> list[tuple[str, str, str]]:
    """Returns start, right and wrong ending of the stories in stories.txt."""
    text = (Path(__file__).parent / "stories.txt").read_text(encoding="utf-8").split("\n", 1)[1]
    stories = [block.splitlines() for block in text.strip().split("\n\n")]
    return [(" ".join(lines[:4]), lines[4], lines[5]) for lines in stories]


def draw(seed: int, count: int) -> list[Story]:
    """Returns `count` stories; each gives its right ending to one other. Raises `InputError` unless there are so many.

    One story has no other to take an ending from.
    """
    stories = read_stories()
    if not 2 <= count <= len(stories):
        raise InputError(f"--stories {count} cannot be made: give 2 to {len(stories)}.")
    chosen = random.Random(f"{seed} stories").sample(stories, count)
    # In random order, each takes the ending of the next.
    return [Story(*story, topic=chosen[(i + 1) % count][1]) for i, story in enumerate(chosen)]
