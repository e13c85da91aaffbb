"""From the losses of items to benefits by gap, tests, the gap at which half is left, and a verdict. Imports no jax."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from eval.recall.play import ROWS, Played
from eval.recall.results import (
    BEYOND,
    EXCERPTS,
    REACH,
    WINDOW,
    Against,
    ArmAtGap,
    AtGap,
    Between,
    Curve,
    Half,
    Setting,
)
from eval.results.schema import CheckpointInfo
from eval.stats.estimates import Estimate, band, file_mean, group_means
from eval.stats.paired import ALPHA, holm, mean_test
from eval.stats.verdict import p_words
from ttt_jax.config import FRAME_RATE

OTHERS = ("reset", "frozen")
"""Arms that persist is tested against."""
SAMPLES = 10_000
"""Of the bootstrap."""


def benefits(losses: np.ndarray) -> np.ndarray:
    """Returns nats that having heard the same first saves, losses [..., 2, 2] by first and second -> [...].

    The mean over the second playings that were played; 0 exactly if the loss depends on the second playing alone.
    """
    return file_mean(np.stack([losses[..., 1, 0] - losses[..., 0, 0], losses[..., 0, 1] - losses[..., 1, 1]], -1))


def heard(losses: np.ndarray) -> np.ndarray:
    """Returns the loss where the same was played first, [..., 2, 2] -> [...]."""
    return file_mean(np.stack([losses[..., 0, 0], losses[..., 1, 1]], -1))


def unheard(losses: np.ndarray) -> np.ndarray:
    """Returns the loss where the control was played first, [..., 2, 2] -> [...]."""
    return file_mean(np.stack([losses[..., 1, 0], losses[..., 0, 1]], -1))


def curves(played: Sequence[Played], info: CheckpointInfo, main: str, setting: Setting, unit: str) -> dict[str, Curve]:
    """Returns the curve of each kind that was played.

    Args:
      main: arm that stands for the checkpoint; unit: what speakers are called, in the plural.
    """
    by_kind = {}
    for kind in setting.kinds:
        of_kind = [one for one in played if one.item.kind == kind]
        by_gap = {gap: [one for one in of_kind if one.item.gap == gap] for gap in sorted({p.item.gap for p in of_kind})}
        points = [_at_gap(gap, members, info, setting, unit) for gap, members in by_gap.items()]
        points = _adjusted([point for point in points if point.items])
        if points:
            half = _half(points, of_kind, main, setting)
            by_kind[kind] = Curve(points, half, verdict(info, main, points, half))
    return by_kind


def _at_gap(gap: int, played: Sequence[Played], info: CheckpointInfo, setting: Setting, unit: str) -> AtGap:
    scored = [one for one in played if one.losses is not None]
    groups, several = _groups(scored)

    def by_unit(values: np.ndarray) -> np.ndarray:  # [N, ...] -> [U, ...]
        return group_means(values, groups)

    arms, main_row = {}, ROWS.index(setting.weighting)
    gains: dict[str, np.ndarray] = {}
    for arm in setting.arms if scored else ():
        if arm not in scored[0].losses:
            continue
        losses = np.stack([one.losses[arm] for one in scored])  # [N, R, 2, 2]
        gain = by_unit(benefits(losses))
        gains[arm] = gain[:, main_row]
        arms[arm] = ArmAtGap(
            _estimate(gains[arm]),
            _estimate(by_unit(heard(losses))[:, main_row]),
            _estimate(by_unit(unheard(losses))[:, main_row]),
            {row: _estimate(gain[:, i]) for i, row in enumerate(ROWS)},
        )
    tests = {
        arm: Against(mean_test(gains["persist"] - gains[arm]), math.nan)
        for arm in OTHERS
        if {arm, "persist"} <= {*gains}
    }
    return AtGap(
        gap,
        WINDOW if gap < info.context else REACH if gap < info.reach else BEYOND,
        len(scored),
        len(played) - len(scored),
        len(set(groups)),
        unit if several else EXCERPTS,
        arms,
        tests,
    )


def _groups(played: Sequence[Played]) -> tuple[list[str], bool]:
    """Returns the unit of each item, and whether that is its speaker, as there are several, or the item itself."""
    several = len({one.item.unit for one in played}) > 1
    return [one.item.unit if several else str(one.item.number) for one in played], several


def _estimate(values: np.ndarray) -> Estimate:
    return Estimate(*(number.item() for number in band(values)))


def _adjusted(points: list[AtGap]) -> list[AtGap]:
    """Returns the points with p-values adjusted over the gaps."""
    for arm in OTHERS:
        tested = [point for point in points if arm in point.against]
        for point, p in zip(tested, holm([point.against[arm].test.p for point in tested]), strict=True):
            point.against[arm] = Against(point.against[arm].test, float(p))
    return points


def between(
    first: tuple[Sequence[Played], str], other: tuple[Sequence[Played], str], setting: Setting
) -> dict[str, list[Between]]:
    """Returns by kind how much more the other checkpoint recalls than the first, both given as the items that it was
    played, the same for both, and its main arm."""
    row, (firsts, arm), (others, other_arm) = ROWS.index(setting.weighting), first, other
    both = [pair for pair in zip(firsts, others, strict=True) if None not in (pair[0].losses, pair[1].losses)]
    by_kind = {}
    for kind in setting.kinds:
        tests = {}
        for gap in sorted({one.item.gap for one, _ in both if one.item.kind == kind}):
            pairs = [pair for pair in both if (pair[0].item.kind, pair[0].item.gap) == (kind, gap)]
            more = [benefits(two.losses[other_arm])[row] - benefits(one.losses[arm])[row] for one, two in pairs]
            groups, _ = _groups([one for one, _ in pairs])
            tests[gap] = mean_test(group_means(np.array(more), groups))
        adjusted = holm([test.p for test in tests.values()])
        if tests:
            by_kind[kind] = [Between(*entry, float(p)) for entry, p in zip(tests.items(), adjusted, strict=True)]
    return by_kind


def _half(points: Sequence[AtGap], played: Sequence[Played], main: str, setting: Setting) -> Half | None:
    """Returns the gap at which half of the benefit is left; None unless the first one beyond attention's reach is
    clearly above 0, or if there is no longer one."""
    beyond = [point for point in points if point.where == BEYOND]
    if len(beyond) < 2 or not beyond[0].arms[main].benefit.low > 0:
        return None
    gaps = [point.gap for point in beyond]
    scored = [one for one in played if one.losses is not None and one.item.gap in gaps]
    units, _ = _groups(scored)
    names, row = list(dict.fromkeys(units)), ROWS.index(setting.weighting)
    values = np.full((len(names), len(gaps), len(scored)), np.nan)
    for i, (one, name) in enumerate(zip(scored, units, strict=True)):
        values[names.index(name), gaps.index(one.item.gap), i] = benefits(one.losses[main])[row]
    by_unit = file_mean(values)  # [U, G]
    by_unit = by_unit[np.isfinite(by_unit[:, 0])]
    seconds = np.array(gaps) / FRAME_RATE
    drawn = np.random.default_rng(0).integers(len(by_unit), size=(SAMPLES, len(by_unit)))
    sampled = [half_at(seconds, left(by_unit[rows])) for rows in drawn]
    low, high = np.quantile(sampled, [ALPHA / 2, 1 - ALPHA / 2], method="nearest")
    at = half_at(seconds, left(by_unit))
    return Half(gaps[0], *(float(value) if np.isfinite(value) else None for value in (at, low, high)))


def left(by_unit: np.ndarray) -> np.ndarray:
    """Returns what is left at each gap of the mean benefit at the first, [U, G] -> [G], NaN where nothing can be said.

    Fewer speakers fill a longer gap. Each gap is compared with the first over the speakers that it has, as another mix
    of them would look like forgetting.
    """
    means = file_mean(by_unit.T)
    whole = file_mean(np.where(np.isfinite(by_unit), by_unit[:, :1], np.nan).T)  # of the gap's units, at the first gap
    share = np.divide(means, whole, out=np.full(len(means), np.nan), where=whole > 0)
    return np.append(means[:1], means[0] * share[1:])


def half_at(seconds: np.ndarray, benefit: np.ndarray) -> float:
    """Returns where half of the first of benefits [G] at gaps `seconds` is left, by linear interpolation in the
    logarithm of the gap; NaN benefits (not measured) are passed over.

    The first gap if there is no benefit there, infinity if more than half is left at the last.
    """
    known = np.isfinite(benefit)
    at, left = np.log(seconds[known]), benefit[known]
    if not left[0] > 0:
        return float(seconds[known][0])
    below = np.flatnonzero(left <= left[0] / 2)
    if not len(below):
        return math.inf
    after = below[0]
    share = (left[after - 1] - left[0] / 2) / (left[after - 1] - left[after])
    return float(np.exp(at[after - 1] + share * (at[after] - at[after - 1])))


def verdict(info: CheckpointInfo, main: str, points: Sequence[AtGap], half: Half | None) -> str:
    """Returns one sentence: what is recalled beyond attention's reach, how surely, and how long."""
    beyond = [point for point in points if point.where == BEYOND]
    if not beyond:
        return (
            f"{info.name}: no gap lies beyond attention's reach ({_reach(info)}), so what is recalled may be"
            " attention's doing: give longer gaps."
        )
    if main != "persist":
        return f"{info.name} has no TTT layers: beyond attention's reach ({_reach(info)}) it can recall nothing."
    tested = [(point, point.against["reset"]) for point in beyond]
    if not any(math.isfinite(against.p_holm) for _, against in tested):
        return f"{info.name}: one {beyond[0].unit[:-1]} is too little for a test: give more items or speakers."
    clear = [(point, against.test) for point, against in tested if against.p_holm < ALPHA and against.test.mean > 0]
    if not clear:
        worse = [_time(point.seconds) for point, against in tested if against.p_holm < ALPHA]
        note = f", and having heard it makes it harder at {', '.join(worse)}" if worse else ""
        return (
            f"{info.name} recalls nothing that can be told from chance beyond attention's reach ({_reach(info)})"
            f" at {', '.join(_time(point.seconds) for point in beyond)}{note}."
        )
    (point, test), times = clear[0], [_time(point.seconds) for point, _ in clear]
    sentence = (
        f"{info.name} recalls beyond attention's reach ({_reach(info)}) at {', '.join(times)}: persist against reset"
        f" {test.mean:+.5f} nats per token [{test.low:.5f}, {test.high:.5f}] at {_time(point.seconds)},"
        f" {p_words(point.against['reset'].p_holm)}"
    )
    if half is not None:
        return f"{sentence}; {half_words(half)}."
    if len(beyond) < 2:
        return f"{sentence}; how long it lasts takes a longer gap."
    return f"{sentence}; no benefit to halve at {_time(beyond[0].seconds)}, where persist is not clearly above 0."


def half_words(half: Half) -> str:
    """Returns in words how long a benefit lasts."""
    bounds = [_time(bound) if bound is not None else "beyond the longest gap" for bound in (half.low, half.high)]
    first = _time(half.first / FRAME_RATE)
    if half.seconds is None:
        return f"more than half of the benefit at {first} is left at the longest gap [{bounds[0]}, {bounds[1]}]"
    return f"half of the benefit at {first} is left at {_time(half.seconds)} [{bounds[0]}, {bounds[1]}]"


def _reach(info: CheckpointInfo) -> str:
    return _time(info.reach / FRAME_RATE) if math.isfinite(info.reach) else "everything, by its attention sink"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.3g} min"
