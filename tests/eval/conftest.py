"""Result folders with made-up scores, which tests read and do not change."""

import dataclasses

import pytest

from eval.results.schema import CheckpointInfo
from tests.helpers.made_scores import CHECKPOINT, write, write_results


@pytest.fixture(scope="session")
def summarised(tmp_path_factory):
    """A folder with results of one checkpoint, the scores of its files, and the results."""
    folder = tmp_path_factory.mktemp("summarised")
    files = write(folder)
    return folder, files, write_results(folder, [CHECKPOINT])


@pytest.fixture(scope="session")
def several(tmp_path_factory):
    """The same of a model with memory, one without TTT layers, and one that is 0.03 nats better."""
    folder = tmp_path_factory.mktemp("several")
    base = CheckpointInfo("base", contexts=(30,), ttt_layers=())
    better = dataclasses.replace(CHECKPOINT, name="better")
    files = write(folder), write(folder, base, arms=("off",), unigram=False), write(folder, better, shift=-0.03)
    return folder, files, write_results(folder, [CHECKPOINT, base, better])
