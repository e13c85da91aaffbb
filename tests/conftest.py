"""Settings that every test shares: CPU, full precision, compiled programs kept between runs, 4 examples a property."""

import ctypes
import gc
import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu" and "XLA_FLAGS" not in os.environ:
    # Nearly all of the time is compiling, and programs that run a few times need no optimising.
    # XLA_FLAGS= pytest compiles as users do. Another process finds the flags, since finding them out fixes them.
    flags = subprocess.run([sys.executable, "-m", "ttt_jax.utils.xla"], stdout=subprocess.PIPE, text=True, check=True)
    os.environ["XLA_FLAGS"] = flags.stdout.strip()

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
    """A `tests.helpers.tiny_run.TinyRun`: paths of a run that is made once for all workers. Copy before writing."""
    from tests.helpers import tiny_run

    base = tmp_path_factory.getbasetemp()
    return tiny_run.shared(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="session")
def small_mimi(tmp_path_factory: pytest.TempPathFactory):
    """The path of a small Mimi's file. Beside it lies `weights`, converted weights that this Mimi came with."""
    from tests.helpers import small_mimi

    folder = tmp_path_factory.mktemp("small_mimi")
    small_mimi.write_model(folder)
    return small_mimi.write(folder)


MOST = 1.2e9
"""Bytes of memory above which a worker forgets its compiled programs between two tests."""


@pytest.fixture(autouse=True)
def memory_stays_small():
    """Forgets compiled programs when they have become many: they would take gigabytes."""
    yield
    if psutil.Process().memory_info().rss > MOST:
        jax.clear_caches()
        gc.collect()
        if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory otherwise
            ctypes.CDLL(None).malloc_trim(0)
