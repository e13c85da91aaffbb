"""Losses that are kept on disk: whole lines are read again to the bit, all else is left out."""

import numpy as np
import pytest

from eval.benchmarks.scoring.kept import Kept

SUMS = {"persist": np.array([1 / 3, 2.5]), "off": np.array([np.nan, 1e-300])}


def filled(folder, count=5, **question):
    kept = Kept(folder, question)
    for i in range(count):
        kept.add([(f"key {i}", {arm: values + i for arm, values in SUMS.items()})])
    return kept


def keys(kept, count=5):
    return [i for i in range(count) if f"key {i}" in kept]


def test_what_was_kept_comes_back_to_the_bit(tmp_path):
    filled(tmp_path, weights="a")
    again = Kept(tmp_path, {"weights": "a"})
    for i in range(5):
        for arm, values in SUMS.items():
            np.testing.assert_array_equal(again[f"key {i}"][arm], values + i)
    assert "key 5" not in again


def test_another_question_has_another_file(tmp_path):
    assert filled(tmp_path, weights="a").path != filled(tmp_path, weights="b").path
    assert not keys(Kept(tmp_path, {"weights": "c"}))


def test_a_line_that_was_cut_short_is_left_out_and_the_next_one_is_whole(tmp_path):
    path = filled(tmp_path).path
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        there = keys(Kept(tmp_path, {}))
        assert there == list(range(len(there)))
        assert len(there) <= whole[:end].count(b"\n")
    path.write_bytes(whole[:-3])
    kept = Kept(tmp_path, {})
    assert keys(kept) == [0, 1, 2, 3]
    kept.add([("key 4", SUMS)])
    assert keys(Kept(tmp_path, {})) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_byte_costs_its_line_and_no_wrong_number_is_read(seed, tmp_path):
    rng, path = np.random.default_rng(seed), filled(tmp_path).path
    whole = path.read_bytes()
    for _ in range(100):
        at = int(rng.integers(len(whole)))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
        kept = Kept(tmp_path, {})
        assert len(keys(kept)) >= 3  # a damaged end of line costs two
        for i in keys(kept):
            np.testing.assert_array_equal(kept[f"key {i}"]["off"], SUMS["off"] + i)
