"""The command line of eval: one module a command, options as dataclasses, help without jax."""

import dataclasses
import importlib
import resource
import subprocess
import sys

import pytest

from eval.__main__ import COMMANDS, main
from ttt_jax.errors import InputError


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_a_frozen_dataclass_and_help_has_every_field(name, capsys):
    options = importlib.import_module(COMMANDS[name][0]).Options
    assert options.__dataclass_params__.frozen
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m eval {name} ")
    for field in dataclasses.fields(options):
        flag, metavar = f"--{field.name.replace('_', '-')}", field.name.rstrip("s").upper()
        assert flag in shown or metavar in shown or field.name == "settings"


@pytest.mark.parametrize("args", [["--farmes", "3"], ["--frames", "x"]])
def test_a_wrong_flag_or_value_ends_with_2_and_names_the_flag(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check-state", *args])
    assert stopped.value.code == 2
    assert "--frames" in capsys.readouterr().err


def test_an_unknown_command_is_an_input_error():
    with pytest.raises(InputError, match="there is no command perplexity: give one of prepare, tasks, "):
        main(["perplexity"])


@pytest.mark.integration
def test_help_needs_no_jax_and_less_than_a_second():
    code = (
        "import contextlib, io, sys\n"
        "from eval.__main__ import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main([sys.argv[1], '--help'])\n"
        "sys.exit('jax' in sys.modules)"
    )
    for name in COMMANDS:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert subprocess.run([sys.executable, "-c", code, name]).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
