"""`python -m eval tasks`: what the files hold, that their best losses are the best, and that a folder is made whole or
not at all."""

import argparse
import dataclasses
import itertools
import json
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest

from eval.__main__ import main
from eval.compare.bounds import is_task
from eval.inputs import dataset
from eval.results.schema import CheckpointInfo
from eval.tasks import dataset as data_sets
from eval.tasks import facts
from eval.tasks.dataset import CODEC, TASKS, Settings, best, bounds_for, make
from eval.tasks.facts import FACTS, GAP, LEAST_EVERY, QUESTION, SYMBOLS, VOCABULARY
from eval.tasks.streams import CARDINALITY, MOSHI, USER
from experiments import memory
from tests.helpers.micro import CONFIG
from ttt_jax.config import MoshiConfig
from ttt_jax.data import corpus as corpora
from ttt_jax.data.codes import read_codes
from ttt_jax.data.corpus import CorpusConfig
from ttt_jax.data.text import PAD
from ttt_jax.errors import InputError
from ttt_jax.moshi import delays

CFG = MoshiConfig(card=CARDINALITY, text_card=512)  # with Moshi's own delays
columns = jax.jit(partial(delays.columns, cfg=CFG))
FRAMES = 512
EVERY = 13
"""Frames a question: two rounds of questions and a part of a third in `FRAMES`."""
SETTINGS = Settings("recall", files=6, frames=FRAMES, every=EVERY, seed=3)
of_every_task = pytest.mark.parametrize("task", TASKS)
of_answers = pytest.mark.parametrize("task", ["recall", "speaker", "control"])


def settings(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def streams(task, count, frames=FRAMES, every=EVERY, seed=0):
    """Streams of a task, without files."""
    return [TASKS[task](np.random.default_rng((seed, i)), frames, every) for i in range(count)]


def parts(frames, every):
    """How many questions or tokens a file holds behind the gap."""
    return (frames - FACTS - GAP) // every


def content(folder):
    """All files in a folder, by their names; of code files all that they say (safetensors writes metadata in any
    order)."""

    def one(path):
        if path.suffix != ".safetensors":
            return path.read_bytes()
        codes = read_codes(path)
        return codes.codes.tolist(), codes._replace(codes=None)

    return {str(path.relative_to(folder)): one(path) for path in Path(folder).rglob("*") if path.is_file()}


def read(folder):
    """The recordings of a data set as training reads them: the corpus, and their frames."""
    cfg = CorpusConfig(train=str(folder), codec=corpora.FILES)
    corpus = corpora.load(cfg, *corpora.load_coders(cfg))
    return corpus, [recording.read() for recording in corpus.recordings]


def answers(stream):
    """Frames at which Moshi speaks."""
    return np.flatnonzero(stream[MOSHI] >= 0)


def grid(stream):
    """What the model has read when it predicts the token of each frame, and what it predicts: columns [T, 17] each."""
    history, mask = delays.init_history(CFG, 1), np.ones((1, stream.shape[1]), bool)
    result, _ = columns(history, stream[None], mask)
    return np.asarray(result.inputs[0]), np.asarray(result.targets[0])


def facts_of(stream):
    """(frame, key, value) of the facts, as columns of the grid show it."""
    inputs, _ = grid(stream)
    facts = (inputs[:, USER] < SYMBOLS) & (inputs[:, USER + 1] < SYMBOLS)
    return [(int(t), *map(int, inputs[t, USER : USER + 2])) for t in np.flatnonzero(facts)]


def questions(stream):
    """(frame of the answer, key) of the questions, as columns of the grid show it."""
    inputs, _ = grid(stream)
    turns = (inputs[:, USER] < SYMBOLS) & (inputs[:, USER + 1] == QUESTION)
    return [(int(t), int(inputs[t, USER])) for t in np.flatnonzero(turns)]


# What the files hold


@of_every_task
def test_the_same_settings_give_the_same_files_and_another_seed_others(task, tmp_path):
    for name, changes in {"one": {}, "same": {}, "other": {"seed": 4}}.items():
        make(settings(task=task, **changes), tmp_path / name)
    one, same, other = (content(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    described = [read(tmp_path / name)[0].describe() for name in ("one", "same", "other")]
    assert described[0] == described[1] != described[2]  # by which a run knows its data again
    assert one.keys() == other.keys()
    different = {name for name in one if one[name] != other[name]}
    assert different >= {f"codes/{i:05d}.safetensors" for i in range(6)} | {"task.json"}


@of_every_task
def test_a_larger_data_set_begins_with_the_files_of_a_smaller_one(task, tmp_path):
    for files in (3, 5):
        make(settings(task=task, files=files), tmp_path / str(files))
    small, large = (content(tmp_path / name) for name in "35")
    codes = [name for name in small if name.startswith("codes/")]
    assert len(codes) == 3
    assert all(small[name] == large[name] for name in codes)
    assert large["manifest.jsonl"].startswith(small["manifest.jsonl"])
    assert len({str(large[name]) for name in large if name.startswith("codes/")}) == 5  # no file twice


@of_answers
def test_files_are_training_data_whose_only_targets_are_answers(task, tmp_path):
    make(settings(task=task), tmp_path / "data")
    corpus, result = read(tmp_path / "data")
    assert (corpus.codec.digest, corpus.codec.cardinality) == (CODEC, CARDINALITY)
    assert [frames.shape for frames in result] == [(17, FRAMES)] * 6
    for frames, generated in zip(result, streams(task, 6, seed=3), strict=True):
        np.testing.assert_array_equal(frames, generated)
        assert (frames[0] == PAD).all()
        assert (frames[2:9] == -1).all()  # the other codebooks of Moshi
        assert (frames[11:] == -1).all()
        assert ((frames[9:11] >= 0) & (frames[9:11] < CARDINALITY)).all()
        assert 0 < len(answers(frames)) < FRAMES / 4
        assert frames[MOSHI].max() < CARDINALITY


def test_data_sets_of_several_tasks_can_be_trained_on_together(tmp_path):
    for task in TASKS:
        make(settings(task=task, files=2), tmp_path / task)
    cfg = CorpusConfig(train=",".join(f"{tmp_path / task}:1" for task in TASKS), codec=corpora.FILES)
    assert len(list(corpora.load(cfg, *corpora.load_coders(cfg)).recordings)) == 2 * len(TASKS)


@pytest.mark.parametrize("task", ["recall", "control"])
@pytest.mark.parametrize("every", [11, *(pytest.param(every, marks=pytest.mark.slow) for every in (3, 27, 60))])
def test_each_key_has_one_fact_and_questions_take_turns_behind_the_gap(task, every):
    for stream in streams(task, 12, every=every):
        facts, turns = facts_of(stream), questions(stream)
        count = parts(FRAMES, every)
        # That much and nothing else: the user's fillers are neither key nor question.
        assert sorted(key for _, key, _ in facts) == list(range(SYMBOLS))
        assert (stream[USER] < SYMBOLS).sum() == SYMBOLS + count
        assert (stream[USER + 1] == QUESTION).sum() == count
        assert max(t for t, _, _ in facts) <= FACTS
        assert min(t for t, _ in turns) > FACTS + GAP
        assert len(turns) == count
        for start in range(0, count, SYMBOLS):
            turn = {key for _, key in turns[start : start + SYMBOLS]}
            assert len(turn) == min(SYMBOLS, count - start)  # none twice before all were asked for
        # The token right behind a question is its answer.
        _, targets = grid(stream)
        np.testing.assert_array_equal(answers(stream), [t for t, _ in turns])
        assert all(0 <= targets[t, MOSHI] < SYMBOLS for t, _ in turns)


@of_answers
@pytest.mark.parametrize(("frames", "every"), [(17 * 128, 131), (17 * 128, 48), (FRAMES, EVERY)])
def test_answers_are_spread_over_the_whole_file(task, frames, every):
    count = parts(frames, every)
    for stream in streams(task, 12, frames=frames, every=every):
        at = answers(stream) if task == "speaker" else answers(stream) - 1
        later, width = at[at >= FACTS] - FACTS - GAP, (frames - FACTS - GAP) / count
        assert len(later) == count
        assert (later >= np.floor(np.arange(count) * width)).all()
        assert (later < np.floor(np.arange(1, count + 1) * width)).all()


def test_the_report_asks_once_for_each_key_and_in_each_later_chunk():
    held = memory.HELDOUT
    for stream in streams("recall", 12, held.frames, held.every):
        assert sorted(key for _, key in questions(stream)) == list(range(SYMBOLS))
    result = [answers(stream) // memory.CHUNK for stream in streams("speaker", 12, held.frames, held.every)]
    assert {int(chunk) for chunks in result for chunk in chunks} == set(range(17))


def test_every_answer_of_recall_is_the_value_of_the_fact():
    orders = set()
    for stream in streams("recall", 12):
        value = {key: value for _, key, value in facts_of(stream)}
        _, targets = grid(stream)
        assert [value[key] for _, key in questions(stream)] == [int(targets[t, MOSHI]) for t, _ in questions(stream)]
        orders.add(tuple(key for _, key in questions(stream)[:SYMBOLS]))
    assert len(orders) == 12


def near(result, expected, count):
    """Whether a rate over `count` draws is what is expected, by four standard deviations."""
    return abs(np.mean(result) - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_values_of_recall_are_uniform_and_independent():
    counts, alike = np.zeros((SYMBOLS, SYMBOLS)), []
    for stream in streams("recall", 500, frames=128, every=3):
        facts = facts_of(stream)
        for _, key, value in facts:
            counts[key, value] += 1
        alike += [one == other for (*_, one), (*_, other) in itertools.combinations(facts, 2)]
    squares = ((counts - 500 / SYMBOLS) ** 2).sum() / (500 / SYMBOLS)
    degrees = SYMBOLS * (SYMBOLS - 1)
    assert abs(squares - degrees) < 4 * math.sqrt(2 * degrees)
    assert near(alike, 1 / SYMBOLS, len(alike))  # and of one key as if the others were not known


def test_answers_of_control_depend_on_their_key_alone():
    fact_hits, key_hits, before = [], [], []
    for stream in streams("control", 150):
        value = {key: value for _, key, value in facts_of(stream)}
        given = {}
        for t, key in questions(stream):
            answer = int(stream[MOSHI, t])
            fact_hits.append(answer == value[key])
            key_hits.append(answer == key)
            if answer != key:
                before += [given[key] == answer] if key in given else []
                given[key] = answer
    count = len(key_hits)
    assert count == 150 * parts(FRAMES, EVERY)
    assert near(fact_hits, 1 / SYMBOLS, count)
    assert near(key_hits, 0.5 + 0.5 / SYMBOLS, count)  # 0.53
    assert near(before, 1 / (SYMBOLS - 1), len(before))  # nor with what was answered before


def test_a_speaker_has_eight_tokens_of_equal_probability():
    used, counts, ranks = [], Counter(), []
    for stream in streams("speaker", 200):
        spoken = stream[MOSHI, answers(stream)]
        used.append(frozenset(spoken.tolist()))
        counts.update(used[-1])
        _, frequencies = np.unique(spoken, return_counts=True)
        ranks.append(((frequencies - len(spoken) / VOCABULARY) ** 2).sum() / (len(spoken) / VOCABULARY))
        # Through the start, not in the gap, then now and then.
        at = answers(stream)
        np.testing.assert_array_equal(at[:FACTS], np.arange(FACTS))
        assert at[FACTS:].min() >= FACTS + GAP
        assert (stream[USER : USER + 2] >= 32).all()
    assert max(map(len, used)) == VOCABULARY
    assert len(set(used)) > 190
    assert set(counts) == set(range(CARDINALITY))
    expected = sum(counts.values()) / CARDINALITY
    assert max(abs(n - expected) for n in counts.values()) < 5 * math.sqrt(expected)
    assert abs(np.mean(ranks) - (VOCABULARY - 1)) < 4 * math.sqrt(2 * (VOCABULARY - 1) / 200)


# The best possible losses


def by_enumeration(inputs, targets, t, symbols, reach):
    """Nats of the answer in frame t by Bayes' rule over all possible facts; what the last `reach` columns show
    is known."""
    seen = inputs[max(0, t + 1 - reach) : t + 1]
    key = int(seen[-1, USER])
    chances = np.zeros(symbols)
    for values in itertools.product(range(symbols), repeat=symbols):
        possible = True
        for i, column in enumerate(seen):
            shown, beside = int(column[USER]), int(column[USER + 1])
            if shown < symbols and beside < symbols:
                possible &= values[shown] == beside
            if shown < symbols and beside == QUESTION and i + 1 < len(seen):
                possible &= values[shown] == seen[i + 1, MOSHI]
        chances[values[key]] += possible
    return -math.log(chances[targets[t, MOSHI]] / chances.sum())


@pytest.mark.parametrize("reach", [2, 9, 17, 200])
def test_best_losses_of_recall_are_those_of_bayes_rule(reach, monkeypatch):
    for name, value in {"SYMBOLS": 3, "FACTS": 8, "GAP": 10}.items():
        monkeypatch.setattr(facts, name, value)
    kinds = set()
    for stream in streams("recall", 8, frames=60, every=4):
        memoryless, with_memory, shown = (
            best(settings(task="recall"), stream, reach),
            best(settings(task="recall"), stream),
            grid(stream),
        )
        for t in answers(stream):
            expected = by_enumeration(*shown, t, 3, reach)
            if stream[MOSHI, max(0, t - reach)] >= 0 and reach < t:
                # An answer whose question is just out of reach: a guess whose it is can be right, none can do better.
                assert memoryless[t] <= expected + 1e-9
                continue
            assert memoryless[t] == pytest.approx(expected, abs=1e-9)
            kinds.add(memoryless[t] > 0)
            assert with_memory[t] == 0 == by_enumeration(*shown, t, 3, 60)
    assert kinds == ({True} if reach == 2 else {False} if reach == 200 else {True, False})


@pytest.mark.parametrize("reach", [1, 3, 10])
def test_best_losses_of_a_speaker_are_those_of_bayes_rule(reach, monkeypatch):
    # Small enough that all sets of tokens can be tried.
    for name, value in {"CARDINALITY": 6, "VOCABULARY": 3}.items():
        monkeypatch.setattr(facts, name, value)
    for stream in streams("speaker", 6, frames=256):
        memoryless, with_memory = best(settings(task="speaker"), stream, reach), best(settings(task="speaker"), stream)
        for t in answers(stream):
            for nats, start in ((memoryless[t], max(0, t - reach)), (with_memory[t], 0)):
                heard = {int(token) for token in stream[MOSHI, start:t] if token >= 0}
                sets = [set(candidate) for candidate in itertools.combinations(range(6), 3) if heard <= set(candidate)]
                chance = sum(int(stream[MOSHI, t]) in candidate for candidate in sets) / len(sets) / 3
                assert nats == pytest.approx(-math.log(chance))


def test_memory_in_recall_is_worth_ln_16_beyond_the_reach():
    for frames, every in ((128, 3), (17 * 128, 131)):
        for stream in streams("recall", 8, frames=frames, every=every):
            memoryless = best(settings(task="recall"), stream, GAP)
            np.testing.assert_array_equal(memoryless[answers(stream)], math.log(16))
            assert np.isfinite(memoryless).sum() == np.isfinite(best(settings(task="recall"), stream)).sum() == SYMBOLS


def test_memory_of_control_is_worth_nothing_and_its_best_loss_is_its_entropy():
    hit, miss = 17 / 32, 1 / 32
    nats = []
    for stream in streams("control", 150):
        losses, (_, targets) = best(settings(task="control"), stream), grid(stream)
        np.testing.assert_array_equal(losses, best(settings(task="control"), stream, GAP))
        nats += [losses[t] for t, _ in questions(stream)]
        right = [targets[t, MOSHI] == key for t, key in questions(stream)]
        np.testing.assert_allclose(nats[-len(right) :], -np.log(np.where(right, hit, miss)))
        assert np.isfinite(losses).sum() == len(right)
    assert abs(np.mean(nats) + hit * math.log(hit) + 15 * miss * math.log(miss)) < 4 * np.std(nats) / len(nats) ** 0.5


def test_attention_of_the_models_of_the_report_does_not_reach_over_the_gap():
    for way in memory.WAYS.values():
        cfg = way(memory.TASK).model
        assert CheckpointInfo("a", cfg.contexts, cfg.ttt_layers, cfg.max_delay).reach <= GAP


# The command


def arguments(folder, *more, task="recall"):
    return ["tasks", task, "--out", str(folder), "--files", "3", "--frames", "200", *more]


@of_every_task
def test_the_command_prints_the_best_losses_that_it_stores(task, tmp_path, capsys):
    assert main(arguments(tmp_path / "new" / "data", "--seed", "5", task=task)) == 0
    shown = capsys.readouterr().out
    stored = json.loads((tmp_path / "new" / "data" / "task.json").read_text())
    _, frames = read(tmp_path / "new" / "data")
    expected = [
        np.nanmean([best(settings(task=task, every=16), stream, reach) for stream in frames]) for reach in (None, GAP)
    ]
    assert [stored[name] for name in ("with_memory", "memoryless", "reach")] == [*map(pytest.approx, expected), GAP]
    assert stored["settings"] == {"task": task, "files": 3, "frames": 200, "every": 16, "seed": 5}
    assert f"{expected[0]:.4f} with all memory, {expected[1]:.4f} from the last {GAP} frames" in shown
    assert "3 files of 200 frames" in shown


def test_the_command_knows_the_tasks_that_there_are():
    assert get_args(get_type_hints(Settings)["task"]) == tuple(TASKS)


def test_a_folder_that_is_empty_is_taken_as_new(tmp_path):
    (tmp_path / "data").mkdir()
    assert main(arguments(tmp_path / "data")) == 0
    assert (tmp_path / "data" / "task.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--frames", "95"), "--frames 95 is too few: give 96 or more"),
        (("--frames", "200", "--every", "121"), "--frames 200 is too few: give 201 or more"),
        (("--files", "0"), "--files 0 is too few: give 1 or more"),
        (("--every", "2"), "--every 2 is too few: give 3 or more"),
        (("--seed", "-1"), "--seed -1 is negative: give 0 or more"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence_and_nothing_is_made(flags, message, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        main(arguments(tmp_path / "new" / "data", *flags))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@of_answers
def test_the_fewest_allowed_frames_are_enough(task):
    for every in (LEAST_EVERY, 50):
        least = FACTS + GAP + every
        for stream in streams(task, 5, frames=Settings(task, 1, least, every, 0).frames, every=every):
            assert (answers(stream) >= FACTS + GAP).sum() == 1
            assert task == "speaker" or len(questions(stream)) == 1


def test_a_folder_that_is_taken_is_refused_and_left_as_it_is(tmp_path):
    assert main(arguments(tmp_path / "data")) == 0
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path)
    for name in ("data", "file"):
        with pytest.raises(InputError, match=f"--out .*{name} is taken: give a folder that is new or empty"):
            main(arguments(tmp_path / name, "--seed", "9"))
    with pytest.raises(InputError, match="--out .*below cannot be made .*: give another folder"):
        main(arguments(tmp_path / "file" / "below"))
    assert content(tmp_path) == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_failure_half_way_leaves_nothing_behind(failure, tmp_path, monkeypatch):
    written = []

    def write(path, codes):
        if len(written) == 2:
            raise failure("half way")
        written.append(path)
        whole(path, codes)

    whole = data_sets.write_codes
    monkeypatch.setattr(data_sets, "write_codes", write)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        written.clear()
        with pytest.raises(failure):
            main(arguments(tmp_path / name))
        assert written
        assert [path.name for path in tmp_path.iterdir()] == ["empty"]
        assert not list((tmp_path / "empty").iterdir())


# For `python -m eval compare`


def model():
    """What reading of files asks of a model: its shape, and no codec."""
    return argparse.Namespace(name="a", cfg=CONFIG.model, corpus=None, codec=None)


@of_every_task
def test_the_best_losses_of_a_data_set_come_from_its_files(task, tmp_path):
    make(settings(task=task), tmp_path / "data")
    files, skipped = dataset.read(tmp_path / "data", [model()])
    assert not skipped
    result = bounds_for(tmp_path / "data", files, 20)
    for i, stream in enumerate(streams(task, 6, seed=3)):
        for losses, reach in zip(result, (None, 20), strict=True):
            np.testing.assert_array_equal(losses[i], best(settings(task=task), stream, reach))
    # Files of which the first frames alone are streamed have the same, as far as they go.
    short, _ = dataset.read(tmp_path / "data", [model()], 150)
    for whole, part in zip(result, bounds_for(tmp_path / "data", short, 20), strict=True):
        np.testing.assert_array_equal(whole[0][:150], part[0])


def test_a_folder_with_task_json_is_a_task(tmp_path):
    assert not is_task(None)
    assert not is_task(str(tmp_path))
    make(settings(), tmp_path / "data")
    assert is_task(str(tmp_path / "data"))


@pytest.mark.parametrize("content", ['{"task": "chess"}', '["recall"]', "recall"])
def test_a_task_json_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(InputError, match="task.json (does not name its command|is not JSON)"):
        bounds_for(tmp_path, [], 20)
