"""Accuracies of other systems as their authors published them, for a table of its own: none of it was measured here."""

from __future__ import annotations

from eval.report.parts import NOTHING, Cell, Table

MOSHI = "Moshi, arXiv 2410.00037, Table 7"
SLAM = "documentation of slamkit (github.com/slp-rl/slamkit)"
TASKS = ("sWUGGY (all)", "sBLIMP", "tStoryCloze", "sStoryCloze")

ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("GSLM", ("64.8", "54.2", "66.6", "53.3"), MOSHI),
    ("AudioLM", ("71.5", "64.7", "", ""), MOSHI),
    ("TWIST 1.3B, cold start", ("72.2", "56.5", "", ""), MOSHI),
    ("TWIST 13B, warm start", ("74.5", "59.2", "76.4", "55.4"), MOSHI),
    ("VoxtLM, audio", ("62.9", "53.9", "", ""), MOSHI),
    ("VoxtLM, audio and text", ("66.1", "57.1", "", ""), MOSHI),
    ("SpiRit-LM, audio", ("69.5", "58.0", "72.9", "54.8"), MOSHI),
    ("SpiRit-LM, audio and text", ("69.0", "58.3", "82.9", "61.0"), MOSHI),
    ("Moshi, audio only, cold start", ("74.8", "59.9", "80.9", "56.9"), MOSHI),
    ("Moshi, audio only, warm start", ("74.3", "58.9", "81.8", "58.7"), MOSHI),
    ("Moshi, single stream, with text", ("72.6", "58.8", "83.0", "60.8"), MOSHI),
    ("Moshi, multi-stream, user stream scored", ("63.0", "55.2", "83.6", "62.7"), MOSHI),
    ("Moshi, multi-stream, synthetic voice, user stream scored", ("60.9", "54.6", "82.5", "60.9"), MOSHI),
    ("Slam", ("", "58.86", "82.04", "58.04"), SLAM),
    ("Slam, scaled", ("", "61.11", "84.18", "61.30"), SLAM),
)
"""System, accuracies in percent in the order of `TASKS` with the digits that were published, and source."""

NOTE = (
    "Table 7's multi-stream rows score the stream of the user. Released Moshi weights have no heads for that stream, so"
    " these rows cannot be reproduced with them: scores of released weights, on Moshi's own stream, are another"
    " measure. The single-stream and audio-only rows are other models, whose weights were not released. Mini tasks are"
    " other stimuli altogether and compare with none of these rows."
)


def table() -> Table:
    """Returns the published rows."""
    rows = [
        (Cell(system), *(Cell(x, float(x)) if x else NOTHING for x in values), Cell(source))
        for system, values, source in ROWS
    ]
    caption = "Accuracy in percent as published; nothing in this table was measured here, and no intervals were given."
    return Table("Published results of other systems", caption, ("System", *TASKS, "Source"), rows, apart=True)
