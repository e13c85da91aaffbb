"""Rows follow files chunk by chunk; positions restore exactly, in any number of processes."""

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers.micro import source
from train.batches import Batches, validation_batches
from train.config import DataConfig
from ttt_jax.errors import InputError

CHUNK = 8


def numbered(lengths, first=0):
    """Files whose tokens are file number * 1000 + frame number, in every stream."""
    return [np.tile(1000 * i + np.arange(n, dtype=np.int32), (3, 1)) for i, n in enumerate(lengths, first)]


FILES = numbered([30, 9, 16, 1, 21])
SOURCE = source(FILES)


def batches(batch=2, seed=0, sources=(SOURCE,), **changes):
    return Batches(sources, batch, CHUNK, seed, **changes)


def take(iterator, count):
    """The next windows of an iterator that is closed behind them."""
    with contextlib.closing(iterator):
        return [next(iterator) for _ in range(count)]


def rows_in_order(taken):
    """Per row the list of (reset, tokens that are not masked), chunk by chunk."""
    chunks = [(b.frames[k], b.mask[k], b.reset[k]) for b, _ in taken for k in range(len(b.reset))]
    rows = range(len(chunks[0][2]))
    return [[(bool(reset[r]), frames[r, 0, mask[r]]) for frames, mask, reset in chunks] for r in rows]


def same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.files == other.files
        for a, b in zip(one.batch, other.batch, strict=True):
            np.testing.assert_array_equal(a, b)


def order(row):
    """Numbers of the files that a row took."""
    return [int(tokens[0] // 1000) for reset, tokens in row if reset]


def test_a_chunk_never_holds_two_files_and_is_named():
    for batch, files in take(batches(batch=5, chunks=3, rows=range(1, 3)), 40):
        assert [array.shape for array in batch] == [(3, 2, 3, CHUNK), (3, 2, CHUNK), (3, 2)]
        assert [array.dtype for array in batch] == [np.int32, bool, bool]
        assert [len(names) for names in files] == [2, 2, 2]
        chunks = zip(batch.frames.reshape(-1, 3, CHUNK), batch.mask.reshape(-1, CHUNK), sum(files, ()), strict=True)
        for frames, mask, name in chunks:
            assert {f"micro/{i}" for i in frames[0, mask] // 1000} == {name}


def test_a_row_follows_its_file_to_the_end_without_gap():
    for chunks in rows_in_order(take(batches(seed=3), 60)):
        last = None
        for reset, tokens in chunks:
            np.testing.assert_array_equal(np.diff(tokens), 1)
            if reset:
                ended = last is None or last % 1000 == FILES[last // 1000].shape[1] - 1
                assert ended
                assert tokens[0] % 1000 < CHUNK
            else:
                assert tokens[0] == last + 1
            last = tokens[-1]


def test_only_the_tail_is_masked_and_it_is_absent():
    for (frames, mask, _), _ in take(batches(batch=3), 40):
        assert mask[..., 0].all()
        assert (np.diff(mask.astype(int), axis=-1) <= 0).all()
        assert (np.moveaxis(frames, 2, -1)[~mask] == -1).all()
        assert (np.moveaxis(frames, 2, -1)[mask] >= 0).all()


def test_every_pass_gives_every_file_once_in_an_order_of_its_own():
    taken = order(rows_in_order(take(batches(batch=1), 60))[0])
    passes = [taken[i : i + len(FILES)] for i in range(0, 4 * len(FILES), len(FILES))]
    assert all(sorted(one) == list(range(len(FILES))) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_from_start_every_file_is_read_from_its_first_frame_to_its_last():
    for row in rows_in_order(take(batches(seed=3, from_start=True), 60)):
        read = [[int(token) for token in tokens] for _, tokens in row]
        starts = [i for i, (reset, _) in enumerate(row) if reset]
        for start, end in itertools.pairwise(starts):
            tokens = sum(read[start:end], [])
            assert tokens == list(FILES[tokens[0] // 1000][0])
        assert len(starts) > 2 * len(FILES)
    assert not DataConfig().from_start


def test_the_order_of_a_seed_is_no_later_pass_of_another():
    # Grain takes seed + pass, so with seeds as they are a run would read what its neighbour reads one pass later
    def passes(seed):
        many = source(numbered([1] * 12))
        taken = order(rows_in_order(take(batches(batch=1, seed=seed, sources=[many]), 36))[0])
        return {tuple(taken[i : i + 12]) for i in range(0, 36, 12)}

    assert not passes(0) & passes(1)


def test_order_and_offsets_stay_those_of_stored_runs():
    # a resumed run would read other speech if these moved; computed by the first version that has Grain
    rows = rows_in_order(take(batches(seed=5), 24))
    starts = [[int(tokens[0]) for reset, tokens in row if reset] for row in rows]
    first = [2005, 1, 2001, 4007, 4005, 2006, 3000, 1001, 0, 4003, 1005]
    assert starts == [first, [4007, 3000, 1001, 3000, 1006, 2, 1003, 1, 4002, 3000, 2002, 0]]


def test_sources_of_equal_files_are_shuffled_apart():
    files, taken = numbered([1] * 9), []
    for row in take(batches(batch=1, sources=[source(files, name="a"), source(files, name="b")]), 18):
        taken.append(row.files[0][0].split("/"))
    orders = [[number for name, number in taken if name == source_] for source_ in "ab"]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_sources_give_files_in_proportion_to_their_weights():
    one, two = source(numbered([1] * 3), 3.0, "a"), source(numbered([1] * 7, 3), 1.5, "b")
    taken = order(rows_in_order(take(batches(batch=1, sources=[one, two]), 300))[0])
    counts = np.bincount(taken)
    assert counts[:3].sum() == 200
    assert counts[3:].sum() == 100
    assert np.ptp(counts[:3]) <= 1  # within a source all files alike
    assert np.ptp(counts[3:]) <= 1
    # mixed all along, not one after the other
    assert all(8 <= sum(number < 3 for number in taken[i : i + 15]) <= 12 for i in range(285))


@pytest.mark.parametrize(("before", "from_start"), [(0, False), (7, False), (7, True)])
def test_position_restores_exactly_through_json(before, from_start):
    options = {"chunks": 2, "from_start": from_start}
    with contextlib.closing(batches(**options)) as stopped:
        for _ in range(before):
            next(stopped)
        position = json.dumps(stopped.get_state())
        expected = [next(stopped) for _ in range(20)]
        assert json.dumps(stopped.get_state()) != position
        # in the same iterator, which has read ahead, and in a new one
        stopped.set_state(json.loads(position))
        assert json.dumps(stopped.get_state()) == position
        same(expected, [next(stopped) for _ in range(20)])
    resumed = batches(**options)
    resumed.set_state(json.loads(position))
    same(expected, take(resumed, 20))


def test_chunks_of_a_window_continue_each_other_as_windows_of_one_chunk():
    single, whole = take(batches(batch=3), 16), take(batches(batch=3, chunks=4), 4)
    for i, (one, other) in enumerate(zip(single, [w for w in whole for _ in range(4)], strict=True)):
        assert one.files[0] == other.files[i % 4]
        for a, b in zip(one.batch, other.batch, strict=True):
            np.testing.assert_array_equal(a[0], b[i % 4])


def halves(batch, **changes):
    """Batches of two processes that share the rows unequally."""
    return [batches(batch, rows=rows, **changes) for rows in (range(2), range(2, batch))]


def joined(parts):
    """One process's windows made of those of several."""
    found = []
    for some in zip(*parts, strict=True):
        batch = type(some[0].batch)(*(np.concatenate(x, 1) for x in zip(*(w.batch for w in some), strict=True)))
        names = tuple(sum(files, ()) for files in zip(*(w.files for w in some), strict=True))
        found.append(type(some[0])(batch, names))
    return found


def test_processes_read_together_what_one_reads_alone():
    alone = take(batches(5, chunks=2), 12)
    same(alone, joined([take(half, 12) for half in halves(5, chunks=2)]))


def test_a_run_goes_on_with_another_number_of_processes():
    with contextlib.closing(batches(5)) as alone:
        for _ in range(11):
            next(alone)
        position = json.loads(json.dumps(alone.get_state()))
        expected = [next(alone) for _ in range(15)]
        later, parts = alone.get_state(), []
    for half in halves(5):
        with contextlib.closing(half):
            half.set_state(position)
            parts.append([next(half) for _ in range(15)])
            assert half.get_state() == later
    same(expected, joined(parts))


def with_reading(made, before):
    """`made`, whose files call `before` with their names when they are read."""

    def changed(recording):
        return dataclasses.replace(recording, read=lambda: (before(recording.name), recording.read())[1])

    return made._replace(recordings=tuple(map(changed, made.recordings)))


def test_windows_are_read_ahead_once_the_first_is_taken():
    reads = []
    with contextlib.closing(batches(1, sources=[with_reading(source(numbered([1] * 9)), reads.append)])) as iterator:
        iterator.set_state(iterator.get_state())
        assert reads == []
        next(iterator)
        until = time.monotonic() + 30
        while len(reads) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(reads) >= 3


def test_a_row_reads_its_file_once_and_other_processes_rows_are_not_read():
    reads = []
    long = source(numbered([400] * 6))
    taken = take(batches(6, sources=[with_reading(long, reads.append)], rows=range(2, 4)), 20)
    assert sorted(reads) == sorted(name for name in taken[0].files[0])
    assert len(reads) == 2


@pytest.mark.parametrize("chunks", [1, 3])  # of three the damaged file is not the first
def test_a_damaged_file_is_an_error_for_the_taker_of_the_window(chunks):
    damage = {"micro/2"}

    def fail(name):
        if name in damage:
            raise InputError("file 2 is damaged: make it again.")

    sound, broken = (batches(1, 2, [one], chunks=chunks) for one in (SOURCE, with_reading(SOURCE, fail)))
    with contextlib.closing(broken) as iterator, contextlib.closing(sound) as whole:
        expected = next(whole)
        while ("micro/2",) not in expected.files:
            same([expected], [next(iterator)])
            expected = next(whole)
        assert chunks == 1 or expected.files[0] != ("micro/2",)
        position = iterator.get_state()
        for _ in range(2):  # it is not passed over
            with pytest.raises(InputError, match="file 2 is damaged"):
                next(iterator)
            assert iterator.get_state() == position
        damage.clear()
        same([expected, next(whole)], [next(iterator), next(iterator)])


@pytest.mark.parametrize("sources", [[], [SOURCE, source([], name="none.jsonl")]])
def test_no_files_is_an_input_error(sources):
    with pytest.raises(InputError, match="names no files" if not sources else r"none\.jsonl names no files"):
        batches(sources=sources)


def test_a_position_of_other_rows_or_another_order_is_refused():
    with contextlib.closing(batches(3)) as other:
        with pytest.raises(InputError, match=r"position.*one of 2 rows, but data\.batch is 3"):
            other.set_state(batches(2).get_state())
        position = other.get_state()
        position["rows"][1][3] = (position["rows"][1][3] + 1) % len(FILES)
        for wrong in (position, {"taken": 3, "rows": [[0, 1], [1, 3], [2, 0]]}):  # the second: before Grain
            with pytest.raises(InputError, match="another order of files"):
                other.set_state(wrong)


@pytest.mark.parametrize("batch", [2, 7])
def test_validation_covers_every_frame_once_from_the_start(batch):
    found = list(validation_batches(SOURCE.recordings, batch, CHUNK))
    assert {window.batch.frames.shape for window in found} == {(1, batch, 3, CHUNK)}
    rows = rows_in_order(found)
    tokens = np.concatenate([tokens for row in rows for _, tokens in row])
    assert sorted(tokens) == sorted(np.concatenate([file[0] for file in FILES]))
    for row in rows:
        for i, (reset, tokens) in enumerate(row):
            if len(tokens):
                assert reset == (tokens[0] % 1000 == 0)
                assert reset or tokens[0] == row[i - 1][1][-1] + 1
            else:
                assert not reset


def test_validation_rows_without_a_file_are_masked_and_nameless_and_rows_are_split_among_processes():
    *_, ((frames, mask, reset), files) = validation_batches(SOURCE.recordings, 7, CHUNK)
    idle = [row for row, name in enumerate(files[0]) if not name]
    assert idle[-2:] == [5, 6]
    assert (frames[0, idle] == -1).all()
    assert not mask[0, idle].any()
    assert not reset[0, idle].any()
    assert mask.any()
    parts = [list(validation_batches(SOURCE.recordings, 6, CHUNK, rows)) for rows in (range(4), range(4, 6))]
    same(list(validation_batches(SOURCE.recordings, 6, CHUNK)), joined(parts))
    assert not list(validation_batches((), 6, CHUNK))


@pytest.mark.integration
def test_a_program_that_ends_without_closing_ends_in_silence():
    program = (
        "from tests.helpers.micro import files, source; from train.batches import Batches\n"
        "batches = Batches([source(files())], 4, 32, 0); next(batches)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.integration
def test_reading_configurations_loads_no_grain():
    program = "import sys, train.config, train.batches; sys.exit('grain' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
