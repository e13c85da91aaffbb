"""The memory-less baseline by hand."""

import types
import weakref

import numpy as np

from ttt_jax.data import unigram

FILES = [np.array([[0, 0, 1], [2, -1, 2]]), np.array([[1, 0, 0], [-1, 0, 1]])]


def test_one_is_added_to_every_count_of_known_tokens():
    text, codes = unigram.fit(FILES, (2, 4))
    np.testing.assert_allclose(np.exp(text), [5 / 8, 3 / 8])
    np.testing.assert_allclose(np.exp(codes), [2 / 8, 2 / 8, 3 / 8, 1 / 8])


def test_files_are_counted_one_by_one():
    alive, most = [], []

    def files():
        for file in 20 * FILES:
            tokens = file.copy()
            alive.append(weakref.ref(tokens))
            most.append(sum(reference() is not None for reference in alive))
            yield tokens
            del tokens

    together = unigram.fit([np.concatenate(20 * FILES, axis=1)], (2, 4))
    for table, other in zip(unigram.fit(files(), (2, 4)), together, strict=True):
        np.testing.assert_array_equal(table, other)
    assert max(most) <= 2


def test_nats_are_those_of_each_streams_table_and_nan_where_a_token_is_absent():
    nats = unigram.nats(unigram.fit(FILES, (2, 4)), FILES[0])
    np.testing.assert_allclose(nats, -np.log([[5 / 8, 5 / 8, 3 / 8], [3 / 8, np.nan, 3 / 8]]))


def test_whole_recordings_are_read_until_there_are_enough_frames():
    recordings = [types.SimpleNamespace(num_frames=3, read=lambda file=file: file) for file in (*FILES, FILES[0])]
    assert [frames is file for frames, file in zip(unigram.some(recordings, 4), FILES, strict=True)] == [True, True]
