"""How streams are cut into calls and files into batches."""

import itertools

import pytest

from eval.streaming.runner import batches, plan


@pytest.mark.parametrize("length", [1, 5, 8, 9, 64])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize("reset_every", [None, 1, 5, 8, 70])
def test_a_plan_covers_every_frame_once_and_no_call_reaches_over_a_reset(length, chunk, reset_every):
    calls = plan(length, chunk, reset_every)
    covered = [start + i for start, n in zip(calls.starts, calls.lengths, strict=True) for i in range(n)]
    assert covered == list(range(length))
    assert calls.lengths.max() <= calls.frames <= chunk
    assert calls.frames < 2 * length
    for start, n, resets in zip(calls.starts, calls.lengths, calls.resets, strict=True):
        if reset_every:
            assert start // reset_every == (start + n - 1) // reset_every
        assert resets == (reset_every is not None and start > 0 and start % reset_every == 0)


@pytest.mark.parametrize("reset_every", [None, 250])
def test_streams_of_many_lengths_need_few_programs(reset_every):
    assert len({plan(length, 1000, reset_every).frames for length in range(1, 5000)}) <= 11


def test_batches_hold_every_file_once_and_leave_none_alone_where_two_are_needed():
    for count, rows in itertools.product(range(2, 9), (2, 3)):
        found = list(batches(list(range(count)), rows, least=2))
        assert sorted(i for batch in found for i in batch) == list(range(count))
        assert min(map(len, found)) >= 2
    assert [len(batch) for batch in batches([5, 1, 9], 2)] == [2, 1]
