"""The doctor: its report on a sound machine, missing packages, and checks that fail."""

import dataclasses
import os
import re
import subprocess
import sys
import time
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.places import ROOT
from ttt_jax import doctor
from ttt_jax.ttt import laws
from ttt_jax.ttt.laws import layer_apply


def run(**environment):
    command, env = [sys.executable, "-m", "ttt_jax.doctor"], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.integration
def test_a_sound_machine_passes_in_a_minute():
    before = time.monotonic()
    done = run(JAX_PLATFORMS="cpu")
    assert time.monotonic() - before < 60
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("python", "jaxlib", "orbax-checkpoint", "device 0", "cpu", "TTT layers", "python -m train", "pytest"):
        assert words in done.stdout
    verdicts = re.findall(r"^  (\d) .*(PASS|FAIL)", done.stdout, flags=re.MULTILINE)
    assert {law for law, _ in verdicts} == set("12467")
    assert {verdict for _, verdict in verdicts} == {"PASS"}
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.integration
def test_help_needs_no_jax():
    code = (
        "import sys\nfrom ttt_jax import doctor\ntry: doctor.main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python -m ttt_jax.doctor" in done.stdout


# Laws


@pytest.mark.slow
def test_the_layer_keeps_the_laws_in_float32_too():
    found = laws.check_laws(dtype="float32")
    assert len(found) == len(laws.LAWS)
    assert [f for f in found if not f.holds] == []


def only(monkeypatch, measure):
    """Leaves this one law."""
    monkeypatch.setattr(laws, "LAWS", tuple(law for law in laws.LAWS if law[2] is measure))


def doubles_its_update(params, x, mask, state, cfg):
    out, state = layer_apply(params, x, mask, state, cfg)
    return jnp.where(mask[..., None], x + 2 * (out - x), 0), state


def doubles_its_descent(params, x, mask, state, cfg):
    out, new = layer_apply(params, x, mask, state, cfg)
    return out, new._replace(displacement=jax.tree.map(lambda d: 2 * d, new.displacement))


def reads_masked_frames(params, x, mask, state, cfg):
    out, state = layer_apply(params, x, mask, state, cfg)
    return out + 1e-9 * jnp.where(mask, 0, x.sum(-1)).sum(1)[:, None, None], state


def drops_its_state(params, x, mask, state, cfg):
    return layer_apply(params, x, mask, jax.tree.map(jnp.zeros_like, state), cfg)


def ignores_the_gate(params, x, mask, state, cfg):
    return layer_apply({**params, "gate": params["gate"] + 1e-9}, x, mask, state, cfg)


def forgets_nothing(params, x, mask, state, cfg):
    return layer_apply(params, x, mask, state, dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, horizon=None)))


def cuts_off_the_base(params, x, mask, state, cfg):
    cut = {name: jax.lax.stop_gradient(p) if name.startswith("inner_") else p for name, p in params.items()}
    return layer_apply(cut, x, mask, state, cfg)


def cuts_off_one_bias(params, x, mask, state, cfg):
    return layer_apply({**params, "inner_b0": jax.lax.stop_gradient(params["inner_b0"])}, x, mask, state, cfg)


@pytest.mark.parametrize(
    ("broken", "measure"),
    [
        pytest.param(doubles_its_update, laws._descent, marks=pytest.mark.slow),
        pytest.param(doubles_its_descent, laws._descent, marks=pytest.mark.slow),
        pytest.param(forgets_nothing, laws._descent, marks=pytest.mark.slow),
        (drops_its_state, laws._splits),
        (reads_masked_frames, laws._masked_content),
        (ignores_the_gate, laws._closed_gate),
        pytest.param(cuts_off_the_base, laws._base_gradient, marks=pytest.mark.slow),
        pytest.param(cuts_off_one_bias, laws._base_gradient, marks=pytest.mark.slow),
    ],
    ids=lambda function: function.__name__.strip("_"),
)
def test_a_broken_layer_fails_its_law(monkeypatch, broken, measure):
    only(monkeypatch, measure)
    (found,) = laws.check_laws(broken)
    assert not found.holds
    assert found.problem is None


@pytest.mark.slow
def test_a_doubled_update_keeps_the_other_laws():
    assert {found.law for found in laws.check_laws(doubles_its_update) if not found.holds} == {1}


def test_a_layer_that_does_not_run_fails_with_its_reason(capsys, monkeypatch):
    def stumbles(params, x, mask, state, cfg):
        raise RuntimeError("no convolution found\nand much more")

    found = laws.check_laws(stumbles)
    assert len(found) == len(laws.LAWS)
    assert {f.holds for f in found} == {False}
    monkeypatch.setattr(laws, "check_laws", lambda dtype: found)
    assert not doctor._show_laws()
    out = capsys.readouterr().out
    assert out.count("FAIL") == out.count("  RuntimeError: no convolution found\n") == len(found)


@pytest.mark.parametrize("got", [[float("nan"), 0.0], [0.0, float("nan")]])
def test_a_nan_is_the_worst_error(got):
    error = laws._off([np.float64(value) for value in got], [np.float64(0)] * 2)
    assert np.isnan(error)
    assert not laws.Finding(1, "", error, 1.0, None).holds


# Packages and devices


def pretend(monkeypatch, **versions):
    """Versions that the doctor finds instead; None for a distribution that is not installed."""
    found = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: versions[name] if name in versions else found(name))


@pytest.mark.parametrize(
    ("versions", "messages"),
    [
        (
            {"optax": None, "tyro": None},
            ["optax is not installed", "tyro is not installed", "pip install -e '.[train]'"],
        ),
        ({"soxr": None}, ["soxr is not installed", "pip install -e '.[audio]'"]),
        ({"jax": "0.8.3"}, ["jax 0.8.3 is not >=", "pip install -e ."]),
    ],
)
def test_what_is_missing_comes_with_the_command_to_type(monkeypatch, capsys, versions, messages):
    pretend(monkeypatch, **versions)
    monkeypatch.setattr(doctor, "_show_laws", lambda: True)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    for words in ["MISSING", *messages]:
        assert words in out


def test_what_the_commands_do_not_need_may_be_absent(monkeypatch, capsys):
    pretend(monkeypatch, hypothesis=None)
    monkeypatch.setattr(doctor, "_show_laws", lambda: True)
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "pip install -e '.[test]'" in out
    assert "MISSING" not in out


def test_without_jax_the_doctor_still_reports_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)  # importing it fails
    pretend(monkeypatch, jax=None)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "jax is not installed" in out
    assert "does not start" in out
    assert "pip install -e '.[all]'" in out


@pytest.mark.integration
def test_a_missing_platform_is_reported_without_traceback():
    done = run(JAX_PLATFORMS="rocm")
    assert done.returncode == 1
    assert "does not start with JAX_PLATFORMS=rocm" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_wheel_has_the_requirements_of_a_checkout(monkeypatch, tmp_path):
    checkout = doctor.needs()
    lines = [
        need if extra == "core" else f"{need}; extra == '{extra}'"
        for extra, needs in checkout.items()
        for need in needs
    ]
    described = type("", (), {"get_all": lambda self, field: [extra for extra in checkout if extra != "core"]})()
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "ttt_jax" / "doctor.py"))
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: described)
    assert doctor.needs() == checkout


@pytest.mark.parametrize(
    ("version", "bounds", "kept"),
    [
        ("0.10.2", ">=0.9,<0.13", True),
        ("0.13.0", ">=0.9,<0.13", False),
        ("0.8.3", ">=0.9,<0.13", False),
        ("2.0.0rc1", ">=2.0", True),
        ("0.0.42.1", "==0.0.42.*", True),
        ("1.0", "", True),
    ],
)
def test_bounds_are_compared_by_number(version, bounds, kept):
    assert doctor.fits(version, bounds) == kept


def test_the_oldest_python_and_the_optional_extras_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.PYTHON))
    extras = project["optional-dependencies"]
    assert extras["all"] == [f"ttt_jax[{','.join(e for e in extras if e not in (*doctor.OPTIONAL, 'all'))}]"]


def test_an_older_python_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PYTHON", (99, 0))
    assert doctor.main([]) == 1
    assert "install 99.0 or later" in capsys.readouterr().out


def test_the_implementation_of_the_inner_loop_is_reported(capsys):
    assert doctor._show_devices()
    line = "  TTT layers        a scan, since the device is cpu, no NVIDIA GPU of compute capability 9.0"
    assert line in capsys.readouterr().out.splitlines()


def test_an_unused_gpu_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    pretend(monkeypatch, **{"jax-cuda13-plugin": None})
    assert doctor._show_devices()
    out = " ".join(capsys.readouterr().out.split())
    assert 'pip install -U "jax[cuda13]>=' in out
    monkeypatch.setattr(doctor, "unmet", lambda requirement: [])
    assert "update the NVIDIA driver" in doctor.unused_gpu()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS is cpu: unset it" in doctor.unused_gpu()
