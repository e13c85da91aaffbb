"""Only options that the installed XLA knows are given to it."""

import os
import subprocess
import sys

import jax
import pytest

from ttt_jax.utils import xla


def test_an_option_that_xla_does_not_know_is_left_out():
    found = xla.known_options({"xla_backend_optimization_level": 0, "xla_no_such_option": True})
    assert found == {"xla_backend_optimization_level": 0}
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):  # which is why
        jax.jit(lambda: 0, compiler_options={"xla_no_such_option": True})()


def test_another_error_than_an_unknown_name_is_raised():
    with pytest.raises(jax.errors.JaxRuntimeError):
        xla.known_options({"xla_backend_optimization_level": "fast"})


@pytest.mark.integration
def test_a_process_starts_with_the_flags_that_the_module_prints():
    printed = subprocess.run(
        [sys.executable, "-m", "ttt_jax.utils.xla"], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == xla.flags(xla.known_options(xla.QUICK))
    env = {**os.environ, "XLA_FLAGS": printed.strip()}
    assert subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=env).returncode == 0
    env["XLA_FLAGS"] += " --xla_no_such_option=true"
    assert subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True).returncode
