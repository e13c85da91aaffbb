"""What the README and the documents show runs as it stands there."""

import re
import shlex

import pytest

from tests.helpers.places import ROOT
from train.__main__ import parse

README = (ROOT / "README.md").read_text()
PAGES = {
    str(page.relative_to(ROOT)): commands
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (commands := re.findall(r"python -m train(?=[ \n`])([^`\"#\n]*)", page.read_text().replace("\\\n", " ")))
}
"""Command lines of `python -m train` by page."""


@pytest.mark.integration
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


@pytest.mark.parametrize("page", PAGES)
def test_the_training_commands_of_the_documents_are_understood(page):
    for command in PAGES[page]:
        words = [word for word in shlex.split(command) if word != "..."]
        # These three need a stored run, print, or stand for a preset.
        if not {"--from", "--resume", "--help", "PRESET"} & set(words):
            assert parse(words)[1] is not None


def test_the_readme_trains():
    assert len(PAGES["README.md"]) >= 3


def test_ci_finds_the_two_commands_of_the_readme():
    assert len(re.findall(r"^python3 -m venv ", README, flags=re.MULTILINE)) == 2
