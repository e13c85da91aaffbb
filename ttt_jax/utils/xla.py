"""XLA's compiler options and flags that the installed XLA knows. It refuses to compile with any other.

`python -m ttt_jax.utils.xla` prints a value of XLA_FLAGS with which programs compile quickly and run slowly.
"""

from __future__ import annotations

import functools

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,  # not in the XLA of jax 0.12
}
"""Options for programs that run a few times only: they compile about six times as fast."""


def known_options(options: dict[str, bool | int]) -> dict[str, bool | int]:
    """Returns those of `options` (the argument `compiler_options` of `jax.jit`) that the installed XLA knows."""
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: bool | int) -> bool:
    import jax

    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def flags(options: dict[str, bool | int]) -> str:
    """Returns the options as a value of the environment variable XLA_FLAGS."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


if __name__ == "__main__":
    print(flags(known_options(QUICK)))
