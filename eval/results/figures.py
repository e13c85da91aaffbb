"""What figures share: colours, axes, legends, and files: PNG for screens, PDF for papers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttt_jax.config import FRAME_RATE
from ttt_jax.utils.files import write_atomically

# Colours of Okabe and Ito, which people with any kind of colour vision tell apart.
COLOURS = {"persist": "#0072B2", "reset": "#D55E00", "frozen": "#6B6B6B", "off": "#E69F00", "permuted": "#009E73"}
DASHES = {"reset": (4, 2), "permuted": (1, 1)}
"""Arms that may lie on persist: what is under them still shows."""
CHECKPOINTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
KINDS = ("png", "pdf")
"""Kinds of file."""


def pyplot() -> Any:
    """Returns matplotlib's pyplot, which needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def time_axis(axis: Any, offset: float) -> None:
    """Names an axis of frames and puts one of time under it: seconds, or minutes of a long stream."""
    name, seconds = ("minutes", 60) if axis.get_xlim()[1] > 300 * FRAME_RATE else ("seconds", 1)
    frames = FRAME_RATE * seconds
    axis.set_xlabel("frames")
    axis.secondary_xaxis(-offset, functions=(lambda x: x / frames, lambda x: x * frames)).set_xlabel(name)


def legend(figure: Any, axes: Sequence[Any], columns: int) -> None:
    """Puts one legend of all axes below them."""
    handles = {}
    for axis in axes:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    columns = min(columns, len(handles))
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9}
    figure.legend(handles.values(), handles.keys(), **place)


def save(figure: Any, folder: Path, name: str, kinds: Sequence[str] = KINDS) -> list[Path]:
    """Writes a figure to `folder` in all `kinds`, and closes it; returns the paths."""
    from matplotlib.text import Text

    paths = []
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in a name is a $
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is settled once, not for each kind
    for kind in kinds:
        content = io.BytesIO()
        # Without a date the same results give the same file.
        figure.savefig(content, dpi=120, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
        paths.append(folder / f"{name}.{kind}")
        write_atomically(paths[-1], content.getvalue())
    pyplot().close(figure)
    return paths
