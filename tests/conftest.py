"""Settings that every test shares: CPU, full precision, compiled programs kept between runs, 4 examples a property."""

import ctypes
import gc
import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu" and "XLA_FLAGS" not in os.environ:
    # Nearly all of the time is compiling; programs that run a few times need no optimising. XLA_FLAGS= pytest: as users compile.
    # Another process asks which flags XLA knows, since asking fixes those of the process that asks.
    asked = subprocess.run([sys.executable, "-m", "ttt_jax.utils.xla"], stdout=subprocess.PIPE, text=True, check=True)
    os.environ["XLA_FLAGS"] = asked.stdout.strip()

import jax
import psutil
import pytest
from hypothesis import HealthCheck, settings

# A property's example takes as long as its first compilation; fixtures here hold settings, which examples may share.
_allowed = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("default", max_examples=4, deadline=None, derandomize=True, suppress_health_check=_allowed)
settings.register_profile("thorough", max_examples=40, deadline=None, suppress_health_check=_allowed)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Fixes what numbers depend on, and keeps compiled programs in pytest's own cache folder."""
    if "slow" in config.option.markexpr and "not slow" not in config.option.markexpr:
        settings.load_profile("thorough")
    jax.config.update("jax_default_matmul_precision", "highest")
    if getattr(config, "cache", None) is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture
def x64():
    """float64 in JAX for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory):
    """Paths of a small run, trained, exported and evaluated once for all workers (`tests.helpers.tiny_run`): do not write into them."""
    from tests.helpers import tiny_run

    base = tmp_path_factory.getbasetemp()
    return tiny_run.shared(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


MOST = 1.2e9
"""Bytes of memory from which on a worker forgets its compiled programs between two tests: kept, they would take gigabytes."""


@pytest.fixture(autouse=True)
def memory_stays_small():
    """Forgets compiled programs where they have become many."""
    yield
    if psutil.Process().memory_info().rss > MOST:
        jax.clear_caches()
        gc.collect()
        if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed, unless asked
            ctypes.CDLL(None).malloc_trim(0)
