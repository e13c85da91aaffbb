"""Settings that every test shares: CPU, full precision, compiled programs kept between runs, 4 examples a property."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Nearly all of the time is compiling; programs that run a few times need no optimising. XLA_FLAGS= pytest: as users compile.
    flags = (
        "xla_backend_optimization_level=0",
        "xla_llvm_disable_expensive_passes=true",
        "xla_cpu_use_fusion_emitters=false",
    )
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--{flag}" for flag in flags))

import jax
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
