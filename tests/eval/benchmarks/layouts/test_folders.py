"""StoryCloze and SALMon, whose file names say which recordings belong together."""

import pytest

from eval.benchmarks.layouts import salmon, storycloze
from tests.helpers import benchmark_files as files
from ttt_jax.errors import InputError


def named(task):
    return {problem.name: problem.reason for problem in task.problems}


@pytest.fixture
def stories(tmp_path):
    """The folder sSC with three stories."""
    return files.storycloze(tmp_path, 3, ("sSC",)) / "sSC"


@pytest.fixture
def speakers(tmp_path):
    """A part of SALMon with three samples."""
    return files.salmon(tmp_path, ("speaker_consistency",), 3) / "speaker_consistency"


def test_endings_pair_by_story_whatever_their_numbers(tmp_path):
    spoken, topic = storycloze.read(files.storycloze(tmp_path, 3))
    assert (spoken.name, topic.name, spoken.split, spoken.labels) == ("sstorycloze", "tstorycloze", "", ())
    assert [pair.key for pair in spoken.pairs] == [pair.item for pair in topic.pairs] == [*map(files.story, range(3))]
    for i, pair in enumerate(topic.pairs):
        assert pair.right == tmp_path / "tSC" / f"{i}_{files.story(i)}_correct.wav"
        assert pair.wrong == tmp_path / "tSC" / f"{6 - i}_{files.story(i)}_incorrect.wav"
    assert {name: spoken.about[name] for name in ("folder", "pairs", "items", "problems")} == {
        "folder": str(tmp_path),
        "pairs": 3,
        "items": 3,
        "problems": 0,
    }


def test_one_folder_of_stories_may_be_given(stories):
    assert [task.name for task in storycloze.read(stories)] == ["sstorycloze"]
    assert [task.name for task in storycloze.read(stories.parent)] == ["sstorycloze"]
    with pytest.raises(InputError, match="is not called sSC or tSC and holds no such folder"):
        storycloze.read(stories.rename(stories.parent / "stories"))


def test_bad_files_of_stories_are_named(stories):
    right, wrong = (
        [f"{n}_{files.story(i)}_{side}.wav" for i, n in enumerate(numbers)]
        for side, numbers in (("correct", range(3)), ("incorrect", (6, 5, 4)))
    )
    (stories / wrong[0]).unlink()
    files.wav(stories / f"9_{files.story(1)}_correct.wav")
    files.wav(stories / "7_story_mutual.wav")
    files.wav(stories / "._hidden.wav")
    (stories / "README.txt").write_text("stories")
    (task,) = storycloze.read(stories)
    assert [pair.item for pair in task.pairs] == [files.story(2)]
    assert named(task) == {
        files.story(0): f"one side only: no wrong recording beside {right[0]}",
        files.story(1): f"duplicate: 2 right recordings ({right[1]}, 9_{files.story(1)}_correct.wav)",
        "7_story_mutual.wav": "its name is not NUMBER_STORY_correct.wav or NUMBER_STORY_incorrect.wav",
    }
    assert task.about["problems"] == 3
    (stories / wrong[2]).write_bytes(b"")
    with pytest.raises(InputError, match=r"no usable pair \(00000000-.*one side only"):
        storycloze.read(stories)


def test_each_part_of_salmon_is_a_task(tmp_path):
    folder = files.salmon(tmp_path, ("speaker_consistency", "bg_alignment"), 12)
    first, second = salmon.read(tmp_path)
    assert (first.name, second.name, first.split) == ("salmon/bg_alignment", "salmon/speaker_consistency", "")
    assert len(first.pairs) == len(second.pairs) == 12
    pair = next(pair for pair in second.pairs if pair.key == "10")
    part = folder / "speaker_consistency"
    assert (pair.right, pair.wrong) == (part / "sample_10_0.wav", part / "sample_10_1.wav")
    assert [task.name for task in salmon.read(folder)] == [first.name, second.name]
    assert [task.name for task in salmon.read(part)] == [second.name]


def test_bad_files_of_salmon_are_named(speakers):
    (speakers / "sample_0_1.wav").unlink()  # its third recording does not step in
    files.wav(speakers / "sample_01_0.wav")
    files.wav(speakers / "sample_x_0.wav")
    (task,) = salmon.read(speakers)
    assert [pair.key for pair in task.pairs] == ["2"]
    assert named(task) == {
        "0": "one side only: no wrong recording beside sample_0_0.wav",
        "1": "duplicate: 2 right recordings (sample_01_0.wav, sample_1_0.wav)",
        "sample_x_0.wav": "its name is not sample_I_J.wav with two numbers",
    }


def test_a_folder_without_parts_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no part of SALMon"):
        salmon.read(tmp_path)
    (tmp_path / "salmon_benchmark/bg_alignment").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no recordings of this benchmark"):
        salmon.read(tmp_path)


def test_the_digest_is_of_the_names(stories):
    (before,) = storycloze.read(stories)
    files.wav(stories / f"0_{files.story(0)}_correct.wav", 640)
    assert storycloze.read(stories)[0].about == before.about
    files.storycloze(stories.parent, 4, ("sSC",))
    assert storycloze.read(stories)[0].about["names_sha256"] != before.about["names_sha256"]


def test_sets_of_make_mini_have_names_of_their_own(tmp_path):
    root = files.mark_mini(tmp_path)
    tasks = [*storycloze.read(files.storycloze(root)), *salmon.read(files.salmon(root, ("rir_consistency",)))]
    assert [task.name for task in tasks] == ["mini-sstorycloze", "mini-tstorycloze", "mini-salmon/rir_consistency"]
