"""Which implementation runs a call of the inner loop: fused kernels where they can run and are quicker, or the scan.

Kernels are imported here alone, and only where they can run.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import jax
import numpy as np

from ttt_jax.config import TTTConfig
from ttt_jax.errors import InputError

CAPABILITY = "9.0"
"""Compute capability of Hopper GPUs: no other has what the kernels use."""
OLDEST_JAX = (0, 11, 2)
"""Of whose Pallas the kernels are written."""
WIDTHS = (64, 128)
"""Of heads."""
HIDDEN = (), (4,)
"""Of inner networks: the linear one and the 2-layer MLP."""
SMALLEST_LR = 0.01
"""Inner learning rate below which steps come too near to float16's smallest numbers (6e-8)."""
SHORTEST, NARROWEST, SMALLEST_BATCH = 32, 128, 16
"""Frames of a call, head width and mini-batch from which `auto` takes the kernels: smaller ones were not timed."""

log = logging.getLogger("ttt_jax")


def chain(cfg: TTTConfig, head_dim: int, frames: int, dtype: np.dtype) -> ModuleType | None:
    """The module of the kernels that a call of the inner loop takes; None: the scan.

    With `auto` the log says once which it is, and why. Arguments as of `why_not`. Raises `InputError` where `cfg.impl`
    asks for kernels that cannot run.
    """
    reason = why_not(cfg, head_dim, frames, dtype)
    if cfg.impl == "pallas" and reason:
        raise InputError(f"ttt.impl=pallas cannot run here: {reason}; give ttt.impl=auto, which then takes the scan.")
    if cfg.impl == "auto":
        _say(described(cfg, head_dim, frames, dtype))
    if reason:
        return None
    from ttt_jax.kernels import hopper, hopper_linear

    return hopper if cfg.hidden else hopper_linear


def why_not(cfg: TTTConfig, head_dim: int, frames: int, dtype: np.dtype) -> str | None:
    """Why a call of the inner loop does not run in the fused kernels; None where it does.

    Args:
      cfg: of the layer. With `impl` "pallas" short calls are no reason.
      head_dim: width of a head.
      frames: of the call.
      dtype: of queries, keys and targets.
    """
    if cfg.impl == "xla":
        return "ttt.impl is xla"
    device = _device()
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != CAPABILITY:
        return f"the device is {device.device_kind}, no NVIDIA GPU of compute capability {CAPABILITY}"
    if jax.__version_info__ < OLDEST_JAX:
        return f"jax is {jax.__version__}, older than {'.'.join(map(str, OLDEST_JAX))}"
    if cfg.hidden not in HIDDEN:
        return f"ttt.hidden is {cfg.hidden}, not {' or '.join(map(str, HIDDEN))}"
    if cfg.max_displacement is not None:
        return f"ttt.max_displacement is {cfg.max_displacement}, a bound that the kernels do not apply"
    if head_dim not in WIDTHS:
        return f"heads are {head_dim} wide, not {' or '.join(map(str, WIDTHS))}"
    if dtype != np.float32:
        return f"the layer computes in {np.dtype(dtype)}, not float32"
    if cfg.base_lr is not None and 0 < cfg.base_lr < SMALLEST_LR:
        return f"ttt.base_lr is {cfg.base_lr}, and steps below {SMALLEST_LR} are too small for float16"
    if cfg.impl == "auto" and not cfg.hidden:
        return "kernels for the linear network were not timed"
    if cfg.impl == "auto" and frames < SHORTEST:
        return f"the call has fewer than {SHORTEST} frames"
    if cfg.impl == "auto" and head_dim < NARROWEST:
        return f"kernels for heads of width {head_dim} were not timed"
    if cfg.impl == "auto" and cfg.mini_batch < SMALLEST_BATCH:
        return f"kernels for mini-batches of {cfg.mini_batch} were not timed"
    return None


def described(cfg: TTTConfig, head_dim: int, frames: int, dtype: np.dtype) -> str:
    """The implementation that a call takes, and why, for people; arguments as of `why_not`."""
    reason = why_not(cfg, head_dim, frames, dtype)
    return f"a scan, since {reason}" if reason else "fused kernels"


def _device() -> jax.Device:
    """The device for which programs are traced: the one of `jax.default_device`, or else the first."""
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen


@functools.cache
def _say(text: str) -> None:
    log.info("TTT layers run as %s", text)
