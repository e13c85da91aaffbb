"""Where the fused kernels run, and what is said where they do not."""

import logging
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.places import ROOT
from tests.helpers.small_ttt import config, setting
from ttt_jax import kernels
from ttt_jax.config import TTTConfig
from ttt_jax.errors import InputError
from ttt_jax.kernels import choice
from ttt_jax.ttt.layer import TTTLayer, init_state

HOPPER = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
CALL = 128, 2048, jnp.dtype("float32")
"""Head width, frames and type of a call that the kernels can run."""


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU and a jax that knows it, and stands for the modules of the kernels; that of the MLP's."""
    modules = [ModuleType(name) for name in ("hopper", "hopper_linear")]
    monkeypatch.setattr(choice, "_device", lambda: HOPPER)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    for module in modules:
        monkeypatch.setitem(sys.modules, f"ttt_jax.kernels.{module.__name__}", module)
        monkeypatch.setattr(kernels, module.__name__, module, raising=False)
    choice._say.cache_clear()
    return modules[0]


@pytest.mark.parametrize(
    ("impl", "width", "b", "hidden", "name"),
    [
        ("auto", 128, 16, (4,), "hopper"),
        ("pallas", 128, 1, (4,), "hopper"),
        ("pallas", 64, 16, (4,), "hopper"),
        ("pallas", 128, 16, (), "hopper_linear"),
    ],
)
def test_a_hopper_gpu_runs_them(hopper, impl, width, b, hidden, name):
    cfg = TTTConfig(impl=impl, mini_batch=b, hidden=hidden)
    assert choice.why_not(cfg, width, *CALL[1:]) is None
    assert choice.chain(cfg, width, *CALL[1:]).__name__ == name


def test_auto_takes_them_only_where_they_were_timed(hopper):
    assert choice.why_not(TTTConfig(), 64, *CALL[1:]) == "kernels for heads of width 64 were not timed"
    assert choice.why_not(TTTConfig(mini_batch=4), *CALL) == "kernels for mini-batches of 4 were not timed"
    assert choice.why_not(TTTConfig(hidden=()), *CALL) == "kernels for the linear network were not timed"


@pytest.mark.parametrize(
    ("cfg", "call", "reason"),
    [
        ({"hidden": (2,)}, {}, "ttt.hidden is (2,), not () or (4,)"),
        ({"hidden": (4, 4)}, {}, "ttt.hidden is (4, 4), not () or (4,)"),
        ({"max_displacement": 2.0}, {}, "ttt.max_displacement is 2.0, a bound that the kernels do not apply"),
        ({"base_lr": 1e-4}, {}, "ttt.base_lr is 0.0001, and steps below 0.01 are too small for float16"),
        ({}, {"width": 32}, "heads are 32 wide, not 64 or 128"),
        ({}, {"dtype": jnp.dtype("float64")}, "the layer computes in float64, not float32"),
    ],
)
def test_each_reason_sends_a_call_to_the_scan_or_is_refused(hopper, cfg, call, reason):
    call = tuple({"width": 128, "frames": 2048, "dtype": jnp.dtype("float32"), **call}.values())
    assert choice.why_not(TTTConfig(**cfg), *call) == reason
    assert choice.chain(TTTConfig(**cfg), *call) is None
    assert choice.chain(TTTConfig(**cfg, impl="xla"), *call) is None
    with pytest.raises(InputError) as error:
        choice.chain(TTTConfig(**cfg, impl="pallas"), *call)
    assert str(error.value) == (
        f"ttt.impl=pallas cannot run here: {reason}; give ttt.impl=auto, which then takes the scan."
    )


def test_an_older_jax_does_not_run_them(hopper, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    monkeypatch.setattr(jax, "__version__", "0.11.1")
    assert choice.why_not(TTTConfig(), *CALL) == "jax is 0.11.1, older than 0.11.2"


@pytest.mark.parametrize(
    "device",
    [
        SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0"),
        SimpleNamespace(platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0"),
        SimpleNamespace(platform="tpu", device_kind="TPU v5"),
        SimpleNamespace(platform="cpu", device_kind="cpu"),
    ],
)
def test_other_devices_do_not_run_them(hopper, monkeypatch, device):
    monkeypatch.setattr(choice, "_device", lambda: device)
    expected = f"the device is {device.device_kind}, no NVIDIA GPU of compute capability 9.0"
    assert choice.why_not(TTTConfig(), *CALL) == expected


def test_the_device_is_the_one_that_programs_are_traced_for(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [backend or HOPPER])
    assert choice._device() is HOPPER
    cpu = jax.devices("cpu")[0]
    for chosen, device in ((cpu, cpu), ("cpu", "cpu")):
        with jax.default_device(chosen):
            assert choice._device() is device


def test_short_calls_take_them_only_where_they_are_asked_for(hopper):
    call = 128, choice.SHORTEST - 1, jnp.dtype("float32")
    assert choice.why_not(TTTConfig(), *call) == "the call has fewer than 32 frames"
    assert choice.why_not(TTTConfig(), 128, choice.SHORTEST, call[2]) is None
    assert choice.chain(TTTConfig(impl="pallas"), *call) is hopper


def test_xla_never_takes_them(hopper):
    assert choice.chain(TTTConfig(impl="xla"), *CALL) is None
    assert choice.described(TTTConfig(impl="xla"), *CALL) == "a scan, since ttt.impl is xla"


def test_auto_says_what_it_takes_once_for_each_reason(hopper, caplog):
    with caplog.at_level(logging.INFO, "ttt_jax"):
        for frames in (2048, 1024, 8, 4, 2048):
            choice.chain(TTTConfig(), 128, frames, CALL[2])
        choice.chain(TTTConfig(impl="xla"), *CALL)
        choice.chain(TTTConfig(impl="pallas"), *CALL)
    assert [record.getMessage() for record in caplog.records] == [
        "TTT layers run as fused kernels",
        "TTT layers run as a scan, since the call has fewer than 32 frames",
    ]


def test_a_layer_that_asks_for_them_is_refused_but_for_calls_of_one_frame():
    cfg = config(dtype="float32", impl="pallas")
    params, x, _ = setting(cfg, 0, frames=3)

    def shapes(frames):
        mask = jnp.ones((len(x), frames), bool)
        return jax.eval_shape(TTTLayer(cfg).apply, {"params": params}, x[:, :frames], mask, init_state(cfg, len(x)))

    assert shapes(1)[0].shape == (len(x), 1, cfg.dim)
    with pytest.raises(InputError, match="ttt.impl=pallas cannot run here: the device is cpu, no NVIDIA GPU"):
        shapes(3)


def test_kernels_are_not_imported_where_they_cannot_run():
    code = """import sys, jax.numpy as jnp
from ttt_jax.config import TTTConfig
from ttt_jax.kernels import choice
import ttt_jax.ttt.layer
assert choice.chain(TTTConfig(), 128, 2048, jnp.dtype("float32")) is None
assert not {"jax.experimental.pallas.mosaic_gpu", "ttt_jax.kernels.cluster"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
