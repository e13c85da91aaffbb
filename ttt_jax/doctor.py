"""`python -m ttt_jax.doctor`: installed packages, devices, and the laws of the TTT layer on this machine.

It starts without jax, so that it can report a missing jax.
"""

from __future__ import annotations

import argparse
import operator
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ttt_jax.utils.command import PACKAGES, run, version

PYTHON = (3, 11)
"""Oldest Python: `tomllib`, which reads the other bounds, came with it."""
OPTIONAL = ("log", "test", "browser", "cuda")
"""Extras that the commands can do without."""
OPERATORS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}


def main(args: Sequence[str]) -> int:
    """Prints the report. Returns 0 if all is well, 1 if a package that the commands need is missing or a law fails."""
    argparse.ArgumentParser(
        prog="python -m ttt_jax.doctor",
        description="Show versions, devices and what is missing, and try the laws of the TTT layer on this machine.",
        epilog="Takes about ten seconds. Exit code 0: all is well; 1: something needed is missing or a law fails.",
    ).parse_args(args)
    _show_versions()
    if sys.version_info < PYTHON:
        print(f"\nThis Python is too old: install {PYTHON[0]}.{PYTHON[1]} or later and make the environment with it.")
        return 1
    complete = _show_packages()
    sound = _show_devices() and _show_laws()
    if not complete:
        print("\nThe commands need packages that are missing: pip install -e '.[all]' installs all of them.")
        return 1
    if not sound:
        print("\nJAX does not start or a law fails: results of this installation would mean nothing.")
        return 1
    print("\nAll is well. Next, from a clone:")
    print("  python -m train                                             a small model, minutes on a CPU")
    print("  pip install -e '.[all,test]' && python -m pytest            the tests")
    return 0


def _line(name: str, text: str) -> None:
    print(f"  {name:18}{text}")


def _first_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}".splitlines()[0], 80, placeholder=" ...")


# Packages


def installed(name: str) -> str | None:
    """Returns the version of the distribution `name`, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def needs() -> dict[str, list[str]]:
    """Returns the requirements of ttt_jax by extra, such as "optax>=0.2.5"; those without an extra under "core".

    Reads `pyproject.toml`, since an editable installation's metadata may be older, or else a wheel's metadata.
    """
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if pyproject.is_file():
        import tomllib

        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        extras = {"core": project["dependencies"], **project["optional-dependencies"]}
    else:
        names = metadata.metadata("ttt_jax").get_all("Provides-Extra")
        extras = {extra or "core": _of_extra("ttt_jax", extra) for extra in (None, *names)}
    return {extra: requirements for extra, requirements in extras.items() if extra != "all"}


def _of_extra(name: str, extra: str | None) -> list[str]:
    """Returns the requirements of the distribution `name` with the extra `extra`; None: those without an extra."""
    parts = (requirement.partition(";") for requirement in metadata.requires(name) or [])
    marked = ((need.strip(), re.search(r"""extra == ['"](.+?)['"]""", marker)) for need, _, marker in parts)
    return [need for need, match in marked if (match and match[1]) == extra]


def unmet(requirement: str) -> list[str]:
    """Returns the problems of the distribution that `requirement` names, and of those that its extras need."""
    name, extra, bounds = re.fullmatch(r"([\w.-]+)(?:\[(.*)\])?(.*)", requirement).groups()
    version = installed(name)
    if version is None:
        return [f"{name} is not installed"]
    if not fits(version, bounds):
        return [f"{name} {version} is not {bounds}"]
    return [problem for need in _of_extra(name, extra) for problem in unmet(need)] if extra else []


def fits(version: str, bounds: str) -> bool:
    """Returns whether `version` keeps `bounds` such as ">=0.9,<0.13", by numbers alone, other bounds aside."""
    numbers = lambda text: tuple(int(n) for n in re.match(r"[\d.]*", text)[0].split(".") if n)  # noqa: E731
    signs = re.findall(r"(>=|<=|==|>|<)\s*([\d.]+)(?![\d.]*\*)", bounds)
    return all(OPERATORS[sign](numbers(version), numbers(bound)) for sign, bound in signs)


def _show_versions() -> None:
    print("Versions")
    _line("python", f"{sys.version.split()[0]} at {sys.executable}")
    _line("ttt_jax", version())
    for name in PACKAGES:
        _line(name, installed(name) or "not installed")


def _show_packages() -> bool:
    """Prints the problems of each extra and how to install it. Returns whether the commands have all they need."""
    print("\nPackages")
    complete = True
    for extra, requirements in needs().items():
        problems = [problem for need in requirements for problem in unmet(need)]
        if not problems:
            _line(extra, "ok")
            continue
        complete &= extra in OPTIONAL
        _line(extra, "absent, not needed by the commands" if extra in OPTIONAL else "MISSING")
        for text in (*problems, "pip install -e ." if extra == "core" else f"pip install -e '.[{extra}]'"):
            _line("", text)
    return complete


# The machine


def _show_devices() -> bool:
    """Prints the host and JAX's devices. Returns whether JAX runs."""
    print("\nMachine")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _line("host", f"{os.cpu_count()} cores, {memory / 1e9:.1f} GB of memory")
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # noqa: BLE001  a plugin may break in any way, and JAX asserts where it finds no device
        chosen = os.environ.get("JAX_PLATFORMS")
        _line("JAX", f"does not start{f' with JAX_PLATFORMS={chosen}' if chosen else ''}: {_first_line(error)}")
        return False
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 1e9:.1f} GB of memory for JAX" if limit else ""
        _line(f"device {device.id}", f"{device.device_kind} ({device.platform}){memory}")
    _line("TTT layers", inner_loop())
    if {device.platform for device in devices} == {"cpu"} and shutil.which("nvidia-smi"):
        print(textwrap.fill(unused_gpu(), 98, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
    return True


def inner_loop() -> str:
    """Returns what runs the inner loop on this machine at default settings, in the 7B's sizes, and why."""
    import numpy as np

    from ttt_jax.config import MoshiConfig
    from ttt_jax.kernels import choice

    cfg = MoshiConfig()
    return choice.described(cfg.ttt, cfg.head_dim, cfg.context, np.dtype("float32"))


def unused_gpu() -> str:
    """Returns advice for a machine with an NVIDIA GPU on which JAX sees CPUs only."""
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return f"JAX leaves this machine's NVIDIA GPU alone, since JAX_PLATFORMS is {chosen}: unset it to use the GPU."
    (requirement,) = needs()["cuda"]
    if unmet(requirement):
        return f'JAX does not see this machine\'s NVIDIA GPU: pip install -U "{requirement}"'
    return (
        "JAX does not see this machine's NVIDIA GPU, though its CUDA libraries are installed: update the NVIDIA driver."
    )


def _show_laws() -> bool:
    """Prints each law and the layer's error. Returns whether all hold."""
    if any(unmet(requirement) for requirement in needs()["core"]):
        return False  # `_show_packages` reports it
    import jax

    from ttt_jax.ttt.laws import check_laws

    backend = jax.default_backend()
    dtype = "float64" if backend in ("cpu", "gpu") else "float32"  # a TPU has no float64
    print(f"\nLaws of the TTT layer, tried in {dtype} on {backend}", flush=True)
    sound = True
    for finding in check_laws(dtype=dtype):
        sound &= finding.holds
        verdict = "PASS" if finding.holds else "FAIL"
        error = f"error {finding.error:.2g}, allowed {finding.allowed:g}"
        print(f"  {finding.law} {finding.text:40}{verdict}  {error}")
        if finding.problem:
            _line("", _first_line(finding.problem))
    return sound


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
