"""results.json and pairs.csv of benchmarks of pairs come back as they were written."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from eval.benchmarks import results, summary
from eval.benchmarks.rules import DEFAULT, RULES
from eval.results import schema
from tests.helpers.scored_pairs import OFF, PERSIST, flat, from_outcomes, random_outcomes, scored, words
from tests.helpers.scored_pairs import results as made
from ttt_jax.errors import InputError


def test_results_come_back(tmp_path):
    written = made()
    results.write(tmp_path, written, {"versions": {"jax": "0"}})
    read = results.read(tmp_path)
    assert schema.plain(read) == schema.plain(written)
    assert read.tasks[0].views[1].view == OFF
    assert read.comparisons[0].base == PERSIST
    assert type(read.tasks[0].views[0].by["frequency"]["oov"]) is type(written.tasks[0].views[0].accuracies[DEFAULT])
    failed = read.tasks[3].views[1].accuracies[DEFAULT]
    assert np.isnan(failed.mean)  # not measured: null in the file, never 0
    assert failed.n == 0
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"failed": 20', '"failed": 0'))
    with pytest.raises(InputError, match="checksum"):
        results.read(tmp_path)


def test_every_rule_has_a_meaning():
    assert set(results.RULE_MEANINGS) == set(RULES)
    assert len(set(results.RULE_MEANINGS.values())) == len(RULES)


def test_the_names_of_the_original(tmp_path):
    found = made()
    content = json.loads(results.write(tmp_path, found, {}).read_text())
    first = found.tasks[0].views[0]
    assert content["swuggy_accuracy"] == first.accuracies[DEFAULT].mean
    assert content["swuggy_samples"] == first.scored
    flat_keys = {key for key in content if key.endswith(("_accuracy", "_samples"))}
    assert flat_keys == {"swuggy_accuracy", "swuggy_samples", "sblimp_accuracy", "sblimp_samples"}
    stories = []
    for name in ("tstorycloze", "sstorycloze", "mini-swuggy"):
        task = flat(name, 4)
        stories.append(summary.summarise(task, {PERSIST: from_outcomes(np.array([1, 1, 0, 0.5]))}, DEFAULT))
    assert dataclasses.replace(found, tasks=stories).flat == {
        "tstory_accuracy": 0.625,
        "tstory_samples": 4,
        "sstory_accuracy": 0.625,
        "sstory_samples": 4,
    }


def test_a_row_for_every_pair_and_view(tmp_path):
    task, other = words(5), flat('sblimp, "x"', 3)
    rng = np.random.default_rng(0)
    right, wrong = rng.normal(size=(2, len(task.pairs)))
    right[0], wrong[1], right[2] = np.nan, np.nan, wrong[2]
    tasks = [
        (task, {PERSIST: scored(right, wrong, RULES), OFF: scored(wrong, right, RULES)}),
        (other, {OFF: from_outcomes(random_outcomes(other, 0, failed=0), RULES)}),
    ]
    with results.write_pairs(tmp_path, tasks, DEFAULT).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(task.pairs) + 3
    own = rows[: len(task.pairs)]
    assert [row["key"] for row in own] == [pair.key for pair in task.pairs]
    assert [row["outcome"] for row in own[:3]] == ["", "", "0.5"]
    assert [(row["right"], row["wrong"] == "") for row in own[:2]] == [("", False), (repr(float(right[1])), True)]
    for row, pair, a, b in zip(own[3:], task.pairs[3:], right[3:], wrong[3:], strict=True):
        assert (row["task"], row["split"], row["item"]) == ("swuggy", "dev", pair.item)
        assert (row["checkpoint"], row["arm"], row["text"], row["voice"]) == PERSIST
        assert {name: row[f"label_{name}"] for name in task.labels} == pair.labels
        assert row["outcome"] == ("1" if a > b else "0")
        assert (float(row["right"]), float(row["wrong"])) == (a, b)  # exact
        assert all((float(row[f"right {rule}"]), float(row[f"wrong {rule}"])) == (a, b) for rule in RULES)
    assert rows[-1]["task"] == 'sblimp, "x"'
    assert rows[-1]["label_voice"] == ""


def test_pairs_in_blocks_or_not_at_all(tmp_path):
    task = flat("sblimp", 20)
    scores = {PERSIST: from_outcomes(random_outcomes(task, 0), RULES)}
    rows = list(results._rows([(task, scores)], DEFAULT))
    blocks = [bytes(block) for block in results._blocks(rows, characters=500)]
    assert len(blocks) == 5
    assert b"".join(blocks) == results.write_pairs(tmp_path, [(task, scores)], DEFAULT).read_bytes()
    short = from_outcomes(np.ones(19), RULES)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="shorter"):
        results.write_pairs(empty, [(task, {PERSIST: short})], DEFAULT)
    assert list(empty.iterdir()) == []
