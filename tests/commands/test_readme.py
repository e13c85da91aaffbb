"""What the README shows runs as it stands there."""

import re

import pytest

from tests.helpers.places import ROOT
from train.config import parse

README = (ROOT / "README.md").read_text()


def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(code, names)
    assert names["outputs"].text_logits.shape == (1, 100, names["cfg"].text_card)
    assert int(names["state"].position[0]) == 201  # two calls of 100 frames and a step
    assert names["mine"].shape == (1, 9)
    assert (tmp_path / "conversation.safetensors").is_file()
    assert names["gain"].shape == (1, 1, 100, names["cfg"].num_heads)


def test_the_command_lines_are_understood():
    lines = re.findall(r"^python -m train( .*?)?(?:#.*)?$", README, flags=re.MULTILINE)
    plain = [line.split() for line in lines if not any(word in line for word in ("--help", "--from", "--resume"))]
    assert len(plain) >= 2
    for words in plain:
        assert parse(words).config is not None


@pytest.mark.parametrize("page", ["training", "devices", "data", "checkpoints", "results/memory"])
def test_the_training_commands_of_the_documents_are_understood(page):
    text = (ROOT / "docs" / f"{page}.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"-m train (moshi-7b [^`\"#\n]*|small [^`\"#\n]*)", text)
    assert commands or page in ("data", "checkpoints")
    for command in commands:
        words = [word for word in command.split() if word != "..."]
        assert parse(words).config is not None


def test_the_two_commands_are_there_for_ci():
    assert len(re.findall(r"^python3 -m venv ", README, flags=re.MULTILINE)) == 2
