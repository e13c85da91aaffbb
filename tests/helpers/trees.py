"""Trees of files and links, and what `python -m eval prepare` prints of them."""

import os
import re

from ttt_jax.data import sources


def put(path, content=b"never read"):
    """A file with its folders."""
    os.makedirs(os.path.dirname(os.fsencode(path)), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
    return path


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def found(*where, layout="auto", below=None):
    """The recordings' paths, below the first source or `below`."""
    return [r.path.relative_to(below or where[0]).as_posix() for r in sources.find(where, layout).recordings]


def reported(capsys):
    """Lines on skipped files, and the output."""
    shown = capsys.readouterr()
    return [line for line in re.split(r"[\r\n]", shown.err) if line.startswith(("skipped", "error"))], shown.out
