"""The picture of a talk: words where they are said, without touching each other, and a panel for each TTT layer."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from eval.generating import figure
from eval.generating.text import Spoken


def test_words_stand_at_their_time_and_do_not_touch():
    words = [Spoken("x" * (1 + i % 7), 0.3 * i, 0.3 * i + 0.1) for i in range(100)]
    inches = 0.5
    placed, left_out = figure._lines(words, inches, seconds=40)
    assert left_out == 0
    assert [word for _, _, word in placed] == words
    for line in {line for line, _, _ in placed}:
        spans = [(at, at + len(word.text) * figure.LETTER / inches) for other, at, word in placed if other == line]
        assert all(end < start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert all(at == word.start for _, at, word in placed)


def test_words_that_fit_nowhere_are_counted_and_the_last_stay_inside():
    crowd = [Spoken("many", 1.0, 1.1)] * (figure.LINES + 3)
    placed, left_out = figure._lines(crowd, 0.5, seconds=10)
    assert (len(placed), left_out) == (figure.LINES, 3)
    ((_, at, word),), _ = figure._lines([Spoken("last", 9.9, 10)], 0.5, seconds=10)
    assert at + len(word.text) * figure.LETTER / 0.5 <= 10


@pytest.mark.parametrize("layers", [0, 1, 3, 20])
def test_panels(tmp_path, layers):
    shape = 25, layers
    diagnostics = {name: np.ones(shape) for name in ("loss_base", "loss_before", "displacement")}
    diagnostics |= {"seconds": np.arange(25) / 12.5, "layers": np.arange(layers) + 4}
    voice = np.sin(np.arange(48000)) / 3
    with mock.patch.object(figure, "save", side_effect=lambda drawn, *_: [drawn]):
        drawn = figure.write(
            tmp_path,
            "a",
            "a",
            24000,
            voice,
            0 * voice,
            [Spoken("$x", 0, 1)],
            diagnostics if layers else None,
            layers * [0.1],
        )
    titles = [axis.get_title(loc="left") for axis in drawn.axes if axis.get_title(loc="left").startswith("TTT")]
    assert len(titles) == min(layers, figure.LAYERS)
    if layers:
        assert titles[0] == "TTT layer 4, mean gate 0.1"
        assert titles[-1] == f"TTT layer {3 + layers}, mean gate 0.1"
    assert drawn.axes[0].get_xlim() == (0, 2)
    figure.pyplot().close(drawn)
