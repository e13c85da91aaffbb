"""Subsets of a task: seeded, stratified, complete items, independent of what else lies on disk."""

import random
from collections import Counter
from pathlib import Path

import pytest

from eval.benchmarks.pairs import Pair, Task
from eval.benchmarks.subset import limit
from ttt_jax.errors import InputError


def task_of(sizes, voices=("A", "B"), labels=("kind", "voice")):
    """A task with sizes[kind] items of each kind."""
    pairs = [
        Pair(f"{kind}/{i}/{voice}", Path("r"), Path("w"), f"{kind}/{i}", {"kind": kind, "voice": voice})
        for kind, size in sizes.items()
        for i in range(size)
        for voice in voices
    ]
    return Task("sblimp", "dev", pairs, labels, [], {"items": sum(sizes.values())})


SIZES = {"many": 600, "some": 300, "few": 90, "rare": 10}
TASK = task_of(SIZES)


def items(task):
    return {pair.item for pair in task.pairs}


def kinds(task):
    return Counter(item.split("/")[0] for item in items(task))


@pytest.mark.parametrize("count", [100, 217, 500, 999])
def test_groups_keep_their_shares(count):
    for seed in range(20):
        found = kinds(limit(TASK, count, seed))
        assert sum(found.values()) == count
        for kind, size in SIZES.items():
            assert abs(found[kind] - size * count / 1000) <= 1.5  # one, and the rounding of the other groups


def test_many_small_groups_are_drawn_by_their_sizes():
    task = task_of({f"large{i}": 30 for i in range(10)} | {f"small{i}": 3 for i in range(100)})
    counts = [limit(task, 40, seed) for seed in range(50)]
    share = sum(kind.startswith("large") for subset in counts for kind in kinds(subset).elements()) / (40 * 50)
    assert share == pytest.approx(0.5, abs=0.05)


def test_every_item_is_as_likely():
    task = task_of({"a": 7, "b": 3}, voices=("A",))
    found = Counter(item for seed in range(2000) for item in items(limit(task, 3, seed)))
    # 600 of 2000 expected, standard deviation 20.5; the groups' rounding moves it a little.
    assert all(500 < found[item] < 700 for item in items(task))


def test_items_keep_all_of_their_voices_and_the_order_of_the_task():
    subset = limit(TASK, 50, 0)
    assert len(subset.pairs) == 100
    assert set(Counter(pair.item for pair in subset.pairs).values()) == {2}
    assert subset.pairs == [pair for pair in TASK.pairs if pair.item in items(subset)]


def test_a_seed_decides_and_the_order_does_not():
    shuffled = list(TASK.pairs)
    random.Random(0).shuffle(shuffled)
    assert items(limit(TASK, 50, 3)) == items(limit(TASK._replace(pairs=shuffled), 50, 3))
    assert limit(TASK, 50, 3) == limit(TASK, 50, 3)
    assert len(items(limit(TASK, 50, 3)) & items(limit(TASK, 50, 4))) < 20


def test_a_larger_limit_contains_a_smaller_one():
    subsets = [items(limit(TASK, count, 5)) for count in (1, 10, 11, 200, 990)]
    assert all(small < large for small, large in zip(subsets, subsets[1:], strict=False))


def test_a_missing_item_hardly_changes_the_draw_of_others():
    whole = items(limit(TASK, 100, 1))
    gone = min(whole)
    rest = items(limit(TASK._replace(pairs=[pair for pair in TASK.pairs if pair.item != gone]), 100, 1))
    assert len(rest & whole) >= 98


def test_what_was_drawn_is_recorded():
    subset = limit(TASK, 50, 9)
    assert subset.about == {"items": 1000, "limit": {"items": 50, "pairs": 100, "seed": 9, "strata": ["kind"]}}
    assert "limit" not in TASK.about
    assert limit(task_of({"a": 3}), 10, 0).about["limit"]["items"] == 3
    with pytest.raises(InputError, match="the limit is 0 items"):
        limit(TASK, 0, 0)


def test_a_task_without_labels_is_one_group():
    task = Task("salmon/x", "", [Pair(str(i), Path("r"), Path("w"), str(i), {}) for i in range(20)], (), [], {})
    assert len(limit(task, 7, 0).pairs) == 7
