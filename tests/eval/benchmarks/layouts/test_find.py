"""All benchmarks in a folder, what is not there, what is broken, and the headers of recordings."""

import numpy as np
import pytest
import soundfile

from eval.benchmarks.layouts import find
from eval.benchmarks.layouts.salmon import PARTS
from tests.helpers import benchmark_files as files
from ttt_jax.errors import InputError


def names(tasks):
    return [task.name for task in tasks]


def everything(root, split="dev"):
    files.lexical(root / "sLM21-dataset", split=split)
    files.syntactic(root / "sLM21-dataset", split=split)
    files.storycloze(root)
    files.salmon(root / "salmon", PARTS, 1)
    return root


def test_all_benchmarks_of_a_folder_are_found(tmp_path):
    found = find.find(everything(tmp_path))
    assert names(found.tasks) == [
        "swuggy",
        "sblimp",
        "sstorycloze",
        "tstorycloze",
        *(f"salmon/{part}" for part in PARTS),
    ]
    assert (found.absent, found.broken) == ([], [])
    assert names(find.find(tmp_path / "sLM21-dataset").tasks) == ["swuggy", "sblimp"]
    assert names(find.find(tmp_path / "sSC").tasks) == ["sstorycloze"]


def test_the_split_is_dev_where_it_exists(tmp_path):
    everything(tmp_path, "test")
    assert {task.split for task in find.find(tmp_path).tasks[:2]} == {"test"}
    files.lexical(tmp_path / "sLM21-dataset")
    found = find.find(tmp_path)
    assert [task.split for task in found.tasks[:2]] == ["dev", "test"]
    assert find.find(tmp_path, "test").tasks[0].split == "test"
    found = find.find(tmp_path, "dev")
    assert "sblimp" not in names(found.tasks)
    assert [problem.name for problem in found.broken] == ["sblimp"]


def test_what_is_not_there_is_said(tmp_path):
    files.salmon(tmp_path, PARTS[1:], 1)
    found = find.find(tmp_path)
    assert [problem.name for problem in found.absent] == [
        "swuggy",
        "sblimp",
        "sstorycloze",
        "tstorycloze",
        "salmon/bg_alignment",
    ]
    assert "no folder salmon_benchmark/bg_alignment in" in found.absent[-1].reason
    empty = tmp_path / "empty"
    empty.mkdir()
    absent = [problem.name for problem in find.find(empty).absent]
    assert absent == ["swuggy", "sblimp", "sstorycloze", "tstorycloze", "salmon"]
    with pytest.raises(InputError, match="is no folder"):
        find.find(tmp_path / "nowhere")


def test_a_broken_benchmark_leaves_the_others_usable(tmp_path):
    everything(tmp_path)
    (tmp_path / "sLM21-dataset/lexical/dev/gold.csv").unlink()
    for path in (tmp_path / "salmon/salmon_benchmark" / PARTS[3]).iterdir():
        path.unlink()
    found = find.find(tmp_path)
    assert len(found.tasks) == 10
    assert [problem.name for problem in found.broken] == ["swuggy", f"salmon/{PARTS[3]}"]
    assert "has no gold.csv" in found.broken[0].reason


def test_two_folders_of_one_benchmark_are_refused_but_a_mini_one_is_another(tmp_path):
    files.lexical(tmp_path / "real")
    files.lexical(files.mark_mini(tmp_path / "mini"))
    assert names(find.find(tmp_path).tasks) == ["mini-swuggy", "swuggy"]
    files.lexical(tmp_path / "copy")
    with pytest.raises(InputError, match=r"copy/lexical and .*real/lexical both hold swuggy"):
        find.find(tmp_path)


def test_only_the_benchmarks_that_are_asked_for_are_read(tmp_path):
    everything(tmp_path)
    files.lexical(tmp_path / "copy")  # that sWUGGY is there twice is no matter to the others
    assert names(find.find(tmp_path, names=["sblimp"]).tasks) == ["sblimp"]
    assert names(find.find(tmp_path, names=["salmon"]).tasks) == [f"salmon/{part}" for part in PARTS]
    (tmp_path / "sLM21-dataset/syntactic/dev/gold.csv").unlink()
    found = find.find(tmp_path, names=["sstorycloze", "tstorycloze"])
    assert (names(found.tasks), found.absent, found.broken) == (["sstorycloze", "tstorycloze"], [], [])


def test_headers_of_recordings_are_checked(tmp_path):
    folder = files.lexical(tmp_path, (1, 2, 3, 4), voices=("A",))
    (folder / "w0A.wav").write_bytes(b"this is no recording")
    files.wav(folder / "nw1A.wav", samples=0)
    soundfile.write(folder / "w2A.wav", np.zeros(301 * 8), 8, format="WAV", subtype="PCM_U8")
    (task,) = find.find(tmp_path).tasks
    soundfile.write(folder / "nw3A.wav", np.zeros((8, 2)), 16000)
    problems = find.check(task)
    assert [problem.name for problem in problems] == ["A/0", "A/1", "A/2", "A/3"]
    assert problems[0].reason.startswith("w0A.wav is unreadable (")
    assert [problem.reason for problem in problems[1:]] == [
        "nw1A.wav holds no samples",
        "w2A.wav lasts 301 s, more than 300 s",
        "nw3A.wav has 2 channels, not one",
    ]
