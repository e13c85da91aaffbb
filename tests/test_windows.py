"""Rows follow files chunk by chunk; positions restore exactly."""

import json

import numpy as np
import pytest

from train.windows import Windows
from ttt_jax.errors import InputError

CHUNK = 8


def numbered_files(lengths):
    """Files whose tokens are file number * 1000 + frame number, in every stream."""
    return [np.tile(1000 * i + np.arange(n, dtype=np.int32), (3, 1)) for i, n in enumerate(lengths)]


FILES = numbered_files([30, 9, 16, 1, 21])


def rows_in_order(batches):
    """Per row the list of (reset, tokens that are not masked)."""
    rows = range(len(batches[0].reset))
    return [[(bool(b.reset[r]), b.frames[r, 0, b.mask[r]]) for b in batches] for r in rows]


def take(windows, count):
    return [next(windows) for _ in range(count)]


def test_a_chunk_never_holds_two_files():
    for batch in take(Windows(FILES, 2, CHUNK, 0), 40):
        for frames, mask in zip(batch.frames, batch.mask, strict=True):
            assert len(set(frames[0, mask] // 1000)) == 1


def test_a_row_follows_its_file_to_the_end_without_gap():
    for chunks in rows_in_order(take(Windows(FILES, 2, CHUNK, 3), 60)):
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
    for batch in take(Windows(FILES, 3, CHUNK, 0), 40):
        assert batch.mask[:, 0].all()
        assert (np.diff(batch.mask.astype(int), axis=1) <= 0).all()
        assert (batch.frames.transpose(0, 2, 1)[~batch.mask] == -1).all()
        assert (batch.frames.transpose(0, 2, 1)[batch.mask] >= 0).all()


def test_first_batch_resets_every_row():
    assert next(Windows(FILES, 3, CHUNK, 0)).reset.all()


def test_every_pass_gives_every_file_once_in_an_order_of_its_own():
    chunks = rows_in_order(take(Windows(FILES, 1, CHUNK, 0), 60))[0]
    order = [int(tokens[0] // 1000) for reset, tokens in chunks if reset]
    passes = [order[i : i + len(FILES)] for i in range(0, 4 * len(FILES), len(FILES))]
    assert all(sorted(one) == list(range(len(FILES))) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_offsets_vary_between_passes():
    chunks = rows_in_order(take(Windows(FILES, 1, CHUNK, 0), 100))[0]
    starts = {int(tokens[0]) for reset, tokens in chunks if reset and tokens[0] < 1000}
    assert len(starts) > 2


def test_seed_decides_the_order():
    def tokens(seed):
        return np.stack([b.frames for b in take(Windows(FILES, 2, CHUNK, seed), 8)])

    np.testing.assert_array_equal(tokens(1), tokens(1))
    assert (tokens(1) != tokens(2)).any()


def test_order_and_offsets_stay_those_of_stored_runs():
    # a resumed run would read other speech if these moved; computed by the first version
    batches = take(Windows(FILES, 2, CHUNK, 5), 24)
    starts = [int(b.frames[r, 0, 0]) for b in batches for r in range(2) if b.reset[r]]
    expected = [4005, 3000, 1001, 2006, 1, 2000, 6, 4001, 3000, 1007, 5, 3000, 4001]
    assert starts == [*expected, 1006, 2002, 4001, 1002, 3000, 7, 2002, 3000, 1000, 2005, 7, 4005]


def test_the_order_of_a_pass_is_drawn_once(monkeypatch):
    draw, passes = np.random.default_rng, []

    def counted(key):
        passes.extend(key[1:] if len(key) == 2 else ())  # an offset's key has three parts
        return draw(key)

    monkeypatch.setattr(np.random, "default_rng", counted)
    take(Windows(FILES, 2, CHUNK, 12345), 60)
    assert len(passes) > 5
    assert passes == list(range(len(passes)))


@pytest.mark.parametrize("before", [0, 1, 7, 23])
def test_position_restores_exactly_through_json(before):
    windows = Windows(FILES, 2, CHUNK, 0)
    take(windows, before)
    position = json.dumps(windows.get_state())
    expected = take(windows, 20)
    resumed = Windows(FILES, 2, CHUNK, 0)
    resumed.set_state(json.loads(position))
    for one, other in zip(expected, take(resumed, 20), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_no_files_is_an_input_error():
    with pytest.raises(InputError, match="no files"):
        Windows([], 2, CHUNK, 0)
