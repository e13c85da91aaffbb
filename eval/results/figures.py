"""Colours of figures, and their files: PNG for screens, PDF for papers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ttt_jax.utils.files import write_atomically

# Colours of Okabe and Ito, which people with any kind of colour vision tell apart.
COLOURS = {"persist": "#0072B2", "reset": "#D55E00", "frozen": "#6B6B6B", "off": "#E69F00", "permuted": "#009E73"}
DASHES = {"reset": (4, 2), "permuted": (1, 1)}
"""Arms that may lie on persist: what is under them still shows."""
CHECKPOINTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
KINDS = ("png", "pdf")
"""Kinds of file."""


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a figure to `folder` in all of `KINDS`, and close it; the paths."""
    from matplotlib import pyplot as plt
    from matplotlib.text import Text

    paths = []
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in a name is a $
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # where things lie is settled once, not for each kind
    for kind in KINDS:
        content = io.BytesIO()
        # Without a date the same results give the same file.
        figure.savefig(content, dpi=120, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
        paths.append(folder / f"{name}.{kind}")
        write_atomically(paths[-1], content.getvalue())
    plt.close(figure)
    return paths
