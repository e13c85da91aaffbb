"""What the README and the documents show runs as it stands there."""

import importlib
import re
import shlex

import pytest

from eval.__main__ import COMMANDS as EVAL
from tests.helpers.places import ROOT
from train.__main__ import parse as parse_train
from ttt_jax.convert import __main__ as convert
from ttt_jax.utils.command import parse

README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"python -m (train|eval [a-z-]+|ttt_jax\.convert)(?=[ \n`])([^`\"#\n]*)")
PAGES = {
    str(page.relative_to(ROOT)): commands
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (commands := COMMAND.findall(page.read_text().replace("\\\n", " ")))
}
"""Command lines by page: the command and its arguments."""
PLACEHOLDERS = {"PRESET", "TASK", "[--weighting"}


@pytest.mark.integration
def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(code, names)
    assert names["outputs"].text_logits.shape == (1, 100, names["cfg"].text_card)
    assert int(names["state"].position[0]) == 101  # a call of 100 frames and a step
    assert names["mine"].shape == (1, 9)
    assert names["gain"].shape == (1, 1, 100, names["cfg"].num_heads)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_documents_are_understood(page):
    for command, arguments in PAGES[page]:
        words = [word for word in shlex.split(arguments) if word != "..."]
        if PLACEHOLDERS & set(words):
            continue
        if command == "train":
            if not {"--from", "--resume", "--help"} & set(words):  # those need a stored run, or end the process
                assert parse_train(words)[1] is not None
        elif words:  # else the page names the command
            name = command.removeprefix("eval ")
            options = convert.Options if name == command else importlib.import_module(EVAL[name][0]).Options
            parse(options, command, words)


def test_the_readme_trains_and_evaluates():
    commands = [command for command, _ in PAGES["README.md"]]
    assert commands.count("train") >= 3
    assert "eval stream" in commands


def test_ci_finds_the_two_commands_of_the_readme():
    assert len(re.findall(r"^python3 -m venv ", README, flags=re.MULTILINE)) == 2
