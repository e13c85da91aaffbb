"""Plays items to a model or to any other player, and takes the losses of the second playing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from eval.recall.items import CALL, Item
from eval.recall.results import TEXT
from eval.stats.estimates import file_mean
from eval.streaming.weighting import WEIGHTINGS, weights

if TYPE_CHECKING:
    from ttt_jax.config import MoshiConfig
    from ttt_jax.moshi.model import Params

CUE = 4
"""First frames of the second playing that are not scored, beside the longest delay: the cue, from which one can tell
what is being played again."""
ROWS = (TEXT, *WEIGHTINGS)

Player = Callable[[list[np.ndarray]], list[dict[str, np.ndarray] | None]]
"""Takes streams of one length, int32 [17, T]. Returns for each the nats of its tokens by arm, float [S, T] (text, then
Moshi's codebooks; NaN was not scored), or None if they are not finite."""


class Played(NamedTuple):
    """An item and what was lost on it."""

    item: Item
    losses: dict[str, np.ndarray] | None
    """By arm: nats per token of the second playing, float64 [R, 2, 2] by `ROWS`, first and second; NaN where nothing
    was scored. None: not finite."""


def of_model(params: Params, cfg: MoshiConfig, arms: Sequence[str]) -> Player:
    """Returns a player that streams through a model under every arm.

    `reset` clears the memory every `CALL` frames, also at the first of the second playing. Once, at the second playing,
    would leave what the memory has told attention's rings by then.
    """
    from eval.streaming.runner import stream
    from eval.streaming.scores import not_finite

    def player(streams: list[np.ndarray]) -> list[dict[str, np.ndarray] | None]:
        scored = stream(params, streams, cfg, arms, chunk=CALL, reset_every=CALL)
        return [
            None if not_finite(scores) else {arm: values.nats for arm, values in scores.arms.items()}
            for scores in scored
        ]

    return player


def play(items: Sequence[Item], player: Player, skip: int, together: int) -> Iterator[Played]:
    """Yields every item with its losses.

    Args:
      skip: first frames of the second playing that are not scored; together: items side by side. A batch that items do
        not fill is filled up, so that all have one shape.
    """
    for _, alike in groupby(items, key=lambda item: (item.kind, item.gap, len(item.seconds))):
        of_gap = list(alike)
        width = min(together, len(of_gap))
        for begin in range(0, len(of_gap), width):
            batch = of_gap[begin : begin + width]
            streams = [stream for item in batch for stream in item.streams()]
            per_item = len(streams) // len(batch)
            streams += streams[-1:] * (width * per_item - len(streams))
            scored = player(streams)
            for i, item in enumerate(batch):
                of_item = scored[i * per_item : (i + 1) * per_item]
                yield Played(item, None if None in of_item else _losses(item, of_item, skip))


def _losses(item: Item, scored: Sequence[dict[str, np.ndarray]], skip: int) -> dict[str, np.ndarray]:
    losses = {}
    for arm in scored[0]:
        values = np.full((len(ROWS), 2, 2), np.nan)
        for i, nats in enumerate(scored):
            first, second = divmod(i, len(item.seconds))
            values[:, first, second] = by_row(nats[arm][:, item.start + skip :])
        losses[arm] = values
    return losses


def by_row(nats: np.ndarray) -> np.ndarray:
    """Returns nats per token of frames by `ROWS`, [1 + Q, T] (text first) -> float64 [R]; NaN where nothing is scored.

    A weighting is a mean over the codebooks of which tokens are known, each the mean of its frames.
    """
    text, *codebooks = file_mean(nats.astype(np.float64))
    codebooks = np.array(codebooks)
    known = np.isfinite(codebooks)
    rows = [text]
    for weighting in WEIGHTINGS:
        weight = weights(weighting, len(codebooks)) * known
        rows.append(weight @ np.where(known, codebooks, 0) / weight.sum() if weight.any() else np.nan)
    return np.array(rows)
