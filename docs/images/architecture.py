"""Draws docs/images/architecture.png: `python docs/images/architecture.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, GREEN, ORANGE, GREY = (
    ("#3b6fb6", "#eaf1fb"),
    ("#3f8f46", "#e9f6ea"),
    ("#b4621f", "#fdeedd"),
    ("#7a7a7a", "#f5f5f5"),
)


def box(ax, x, y, width, height, colours, title, *lines, size=8.6):
    """Draws a rounded box with a bold title and lines of text below it."""
    edge, fill = colours
    style = "round,pad=0,rounding_size=0.09"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, ec=edge, fc=fill, lw=1.4))
    step = 0.235
    top = y + height / 2 + step * len(lines) / 2
    ax.text(x + width / 2, top, title, ha="center", va="center", fontsize=size, fontweight="bold", color="#1d1d1d")
    for i, line in enumerate(lines, 1):
        ax.text(x + width / 2, top - step * i, line, ha="center", va="center", fontsize=size - 1.3, color="#333333")


def arrow(ax, start, end, colour="#333333", bend=0.0):
    """Draws an arrow."""
    style = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.4, connectionstyle=style)
    )


def draw():
    """The figure."""
    figure, ax = plt.subplots(figsize=(10.6, 4.9))
    figure.patch.set_facecolor("white")
    ax.set_xlim(0, 12.8)
    ax.set_ylim(0, 6)
    ax.axis("off")

    ax.text(1.3, 5.68, "one frame, 80 ms", ha="center", fontsize=8.5, color="#333333")
    box(ax, 0.2, 4.55, 2.2, 0.85, GREY, "text", "1 token")
    box(ax, 0.2, 3.45, 2.2, 0.85, GREY, "Moshi's stream", "8 codebooks")
    box(ax, 0.2, 2.35, 2.2, 0.85, GREY, "user's stream", "8 codebooks")
    for y in (4.97, 3.87, 2.77):
        arrow(ax, (2.42, y), (3.38, 3.87))

    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((3.4, 2.05), 5.1, 3.35, boxstyle=style, ec=BLUE[0], fc="#fbfcff", lw=1.6))
    ax.text(5.95, 5.68, "temporal transformer (7B: 32 layers, TTT in some)", ha="center", fontsize=8.5, color="#333333")
    box(ax, 3.6, 2.75, 1.4, 2.1, BLUE, "attention", "the last", "3,000 frames", "(4 minutes)")
    box(
        ax,
        5.25,
        2.75,
        1.75,
        2.1,
        ORANGE,
        "TTT layer",
        "reads through fast",
        "weights and takes a",
        "gradient step on",
        "them, every frame",
    )
    box(ax, 7.25, 2.75, 1.0, 2.1, BLUE, "feed-", "")
    ax.text(7.75, 3.69, "forward", ha="center", va="center", fontsize=8.6, fontweight="bold", color="#1d1d1d")
    arrow(ax, (5.02, 3.87), (5.23, 3.87))
    arrow(ax, (7.02, 3.87), (7.23, 3.87))

    arrow(ax, (8.52, 3.55), (8.98, 3.2))
    box(ax, 9.0, 2.35, 1.5, 1.7, BLUE, "depth", "transformer:", "one codebook", "after another")
    ax.text(11.65, 5.68, "predicted", ha="center", fontsize=8.5, color="#333333")
    arrow(ax, (8.52, 4.97), (10.83, 4.97))
    arrow(ax, (10.52, 3.2), (10.83, 3.2))
    box(ax, 10.85, 4.55, 1.7, 0.85, GREY, "text", "next frame")
    box(ax, 10.85, 2.77, 1.7, 0.85, GREY, "Moshi's stream", "next frame")

    box(ax, 3.4, 0.35, 5.1, 0.9, GREEN, "state: a value, passed in and returned")
    for x, label in ((4.2, "KV cache"), (6.2, "fast weights − W₀")):
        arrow(ax, (x - 0.1, 1.27), (x - 0.1, 2.73), GREEN[0])
        arrow(ax, (x + 0.1, 2.73), (x + 0.1, 1.27), GREEN[0])
        ax.text(x + 0.27, 1.65, label, ha="left", va="center", fontsize=8, color=GREEN[0])
    arrow(ax, (2.4, 0.8), (3.38, 0.8), GREEN[0])
    arrow(ax, (8.52, 0.8), (9.5, 0.8), GREEN[0])
    ax.text(2.3, 0.8, "from the frame before", ha="right", va="center", fontsize=8.2, color=GREEN[0])
    ax.text(9.6, 0.8, "to the next frame", ha="left", va="center", fontsize=8.2, color=GREEN[0])
    ax.text(9.6, 0.5, "save it, fork it, reset one row", ha="left", va="center", fontsize=8.2, color=GREEN[0])
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=170, bbox_inches="tight", pad_inches=0.08)
