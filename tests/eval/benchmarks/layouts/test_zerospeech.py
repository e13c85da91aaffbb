"""sWUGGY and sBLIMP as they lie on disk: keys, bands, labels, and everything that can be wrong with `gold.csv`."""

import random
import subprocess
import sys

import pytest

from eval.benchmarks.layouts import zerospeech
from tests.helpers import benchmark_files as files
from ttt_jax.errors import InputError
from ttt_jax.utils.files import file_digest


def rows_of(folder, rows):
    """Writes gold.csv of `rows` over the one in a folder that has the recordings, and reads it."""
    files.write_gold(folder, rows)
    return zerospeech.lexical(folder)


def named(task):
    return {problem.name: problem.reason for problem in task.problems}


@pytest.fixture
def words(tmp_path):
    """A folder with two words in two voices, and its rows: those of item 0, then those of item 1."""
    return files.lexical(tmp_path, (3, 30)), files.lexical_rows((3, 30))


def test_words_pair_by_voice_and_id(tmp_path):
    folder = files.lexical(tmp_path, (0, 3, 30), voices=("A", "B"))
    task = zerospeech.lexical(tmp_path)
    assert (task.name, task.split, task.labels) == ("swuggy", "dev", ("frequency", "length", "voice"))
    assert [pair.key for pair in task.pairs] == ["A/0", "A/1", "A/2", "B/0", "B/1", "B/2"]
    assert [pair.item for pair in task.pairs] == ["0", "1", "2"] * 2
    pair = task.pairs[4]
    assert (pair.right, pair.wrong) == (folder / "w1B.wav", folder / "nw1B.wav")
    assert pair.labels == {"frequency": "1-5", "length": "4", "voice": "B"}
    digest = file_digest(folder / "gold.csv")
    assert task.about == {"folder": str(tmp_path), "gold_sha256": digest, "pairs": 6, "items": 3, "problems": 0}


@pytest.mark.parametrize(
    ("frequency", "label"),
    # What pandas.cut gives with the official bins and labels: closed on the left, so the labels are off by one.
    [("0", "oov"), ("1", "1-5"), ("4", "1-5"), ("5", "6-20"), ("19", "6-20"), ("20", "21-100"), ("99", "21-100")]
    + [("100", ">100"), ("123456", ">100"), ("4.0", "1-5"), ("", ""), ("-1", ""), ("nan", "")],
)
def test_bands_have_the_official_labels(words, frequency, label):
    folder, rows = words
    task = rows_of(folder, [row | {"frequency": frequency} if row["id"] == "0" else row for row in rows])
    assert {pair.labels["frequency"] for pair in task.pairs if pair.item == "0"} == {label}
    assert task.problems == []


def test_ids_of_sentences_are_unique_within_a_subtype_only(tmp_path):
    files.syntactic(tmp_path, (("agr", "x"), ("agr", "y"), ("npi", "x")))
    task = zerospeech.syntactic(tmp_path)
    assert (task.name, task.labels) == ("sblimp", ("type", "subtype", "voice"))
    assert len(task.pairs) == 12
    assert task.about["items"] == 6
    assert task.pairs[3]._replace(right=None, wrong=None) == (
        ("agr/x/1/B", None, None, "agr/x/1", {"type": "agr", "subtype": "x", "voice": "B"})
    )


@pytest.mark.parametrize("read", [zerospeech.lexical, zerospeech.syntactic])
def test_the_order_of_rows_and_columns_does_not_matter(tmp_path, read):
    folder = files.lexical(tmp_path) if read is zerospeech.lexical else files.syntactic(tmp_path)
    rows = files.lexical_rows((0, 3, 30))
    if read is zerospeech.syntactic:
        rows = files.syntactic_rows((("agr", "x"), ("agr", "y"), ("npi", "x")))
    first = read(folder)
    columns = list(rows[0])
    random.Random(0).shuffle(rows)
    random.Random(1).shuffle(columns)
    files.write_gold(folder, rows, columns)
    again = read(folder)
    assert again.about.pop("gold_sha256") != first.about.pop("gold_sha256")
    assert again == first


def test_a_byte_order_mark_other_line_ends_and_more_columns_are_read(words):
    folder, rows = words
    first = zerospeech.lexical(folder).pairs
    files.write_gold(folder, [row | {"note": "a, b"} for row in rows], bom=True, end="\r\n")
    assert zerospeech.lexical(folder).pairs == first


@pytest.mark.parametrize("place", ["", "lexical", "lexical/test"])
def test_any_folder_of_the_set_may_be_given(tmp_path, place):
    files.lexical(tmp_path, split="test")
    task = zerospeech.lexical(tmp_path / place)
    assert (task.split, len(task.pairs)) == ("test", 6)


def test_the_split_is_dev_unless_asked_for_test(tmp_path):
    files.lexical(tmp_path, (1,), split="dev")
    files.lexical(tmp_path, (1, 2), split="test")
    assert zerospeech.lexical(tmp_path).split == "dev"
    task = zerospeech.lexical(tmp_path, "test")
    assert (task.split, task.about["items"]) == ("test", 2)
    with pytest.raises(InputError, match="not called dev"):
        zerospeech.lexical(tmp_path / "lexical/test", "dev")
    with pytest.raises(InputError, match="no split train"):
        zerospeech.lexical(tmp_path, "train")


def test_a_set_of_make_mini_has_a_name_of_its_own(tmp_path):
    files.lexical(files.mark_mini(tmp_path, seed=7))
    for place in ("", "lexical", "lexical/dev"):
        task = zerospeech.lexical(tmp_path / place)
        assert task.name == "mini-swuggy"
        assert task.about["mini"]["seed"] == 7


@pytest.mark.parametrize("column", ["filename", "id", "voice", "frequency", "length", "correct"])
def test_a_missing_column_is_named(words, column):
    folder, rows = words
    with pytest.raises(InputError, match=f"gold.csv has no column {column} "):
        rows_of(folder, [{name: cell for name, cell in row.items() if name != column} for row in rows])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column filename"),
        (b"w0A,0,A,3,word,W,3,1\n", "no column filename"),
        (b"filename,id,id,voice,frequency,length,correct\n", "two columns id"),
        (b"filename,id,voice,frequency,length,correct\n", "no usable pair"),
        ("filename,id,voice,frequency,length,correct\nw\xe9,0,A,3,3,1\n".encode("latin-1"), "comma-separated UTF-8"),
    ],
)
def test_a_table_that_is_none_is_refused(words, content, message):
    folder, _ = words
    (folder / "gold.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        zerospeech.lexical(folder)


def test_the_old_download_without_its_table_is_explained(words, tmp_path):
    folder, _ = words
    (folder / "gold.csv").unlink()
    with pytest.raises(InputError, match=r"dev has no gold\.csv"):
        zerospeech.lexical(tmp_path)
    with pytest.raises(InputError, match="holds no syntactic/dev or syntactic/test"):
        zerospeech.syntactic(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"correct": "yes"}, "correct of w0A is 'yes'"),
        ({"correct": "0"}, "one side only: no right recording"),
        ({"frequency": "often"}, "frequency of w0A is 'often'"),
        ({"length": "long"}, "length of w0A is 'long'"),
        ({"filename": "nowhere"}, "nowhere.wav is not there"),
        ({"filename": "../dev/w0A"}, "'../dev/w0A' is a path"),
        ({"filename": "..\\dev\\w0A"}, "is a path"),
        ({"filename": "/etc/passwd"}, "is a path"),
        ({"filename": ""}, "filename is empty"),
        ({"filename": "nw0A"}, "duplicate: 2 rows name the file nw0A"),
    ],
)
def test_a_bad_row_is_named_and_its_pair_left_out(words, change, reason):
    folder, (first, *others) = words
    task = rows_of(folder, [first | change, *others])
    assert reason in named(task)["A/0"]
    assert [pair.key for pair in task.pairs] == ["A/1", "B/0", "B/1"]
    assert task.about["problems"] == len(task.problems) == 1


def test_an_id_with_one_side_only_is_named(words):
    folder, rows = words
    for left_out, side in (("w0A", "right"), ("nw0A", "wrong")):
        task = rows_of(folder, [row for row in rows if row["filename"] != left_out])
        assert f"no {side} recording" in named(task)["A/0"]
        assert "A/0" not in [pair.key for pair in task.pairs]


def test_a_key_that_comes_twice_is_named_and_never_guessed(words):
    folder, rows = words
    twin = rows[0] | {"filename": "w0A2"}
    files.wav(folder / "w0A2.wav")
    assert named(rows_of(folder, [*rows, twin])) == {"A/0": "duplicate: 2 right recordings (w0A.wav, w0A2.wav)"}
    assert "rows name the file w0A" in named(rows_of(folder, [*rows, rows[0]]))["A/0"]


def test_lines_of_another_width_are_named(words):
    folder, _ = words
    with (folder / "gold.csv").open("a") as file:
        file.write("w9A,9,A\n\n")
    task = zerospeech.lexical(folder)
    assert named(task) == {"line 10 of gold.csv": "it has 3 fields, the header has 8"}
    assert len(task.pairs) == 4


def test_missing_empty_and_unfetched_recordings_are_named(words):
    folder, _ = words
    (folder / "w0A.wav").unlink()
    (folder / "nw1A.wav").write_bytes(b"")
    (folder / "w0B.wav").unlink()
    (folder / "w0B.wav").symlink_to(folder / "annex")
    task = zerospeech.lexical(folder)
    assert named(task) == {
        "A/0": "w0A.wav is not there",
        "A/1": "nw1A.wav is empty (0 bytes)",
        "B/0": "w0B.wav is a link to what is not here",
    }
    assert [pair.key for pair in task.pairs] == ["B/1"]


def test_without_any_pair_the_first_problem_is_told(words):
    folder, _ = words
    for path in folder.glob("*.wav"):
        path.unlink()
    with pytest.raises(InputError, match=r"no usable pair \(A/0: .*w0A.wav is not there\)"):
        zerospeech.lexical(folder)


def test_parts_of_a_key_with_a_slash_do_not_collide(tmp_path):
    rows = files.syntactic_rows((("a", "b/c"), ("a/b", "c")), ids=1, voices=("A",))
    rows = [row | {"filename": f"s{i}"} for i, row in enumerate(rows)]
    files.zerospeech(tmp_path / "syntactic/dev", rows)
    assert [pair.key for pair in zerospeech.syntactic(tmp_path).pairs] == ["a/b%2Fc/0/A", "a%2Fb/c/0/A"]


def test_readers_need_no_jax():
    modules = "eval.benchmarks.layouts.find, eval.benchmarks.subset, eval.benchmarks.submission"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
