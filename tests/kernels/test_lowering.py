"""The fused inner loop on its kernels lowers for CUDA, which needs no GPU: this finds layouts that do not fit and too
much shared memory."""

import jax
import pytest

from tests.helpers.hopper import Setting, value_and_grads

# ruff: noqa: E402  the kernels are imported where jax has what they need
pytest.importorskip("jax", minversion="0.11.2", reason="the kernels need jax 0.11.2")

from ttt_jax.kernels import hopper
from ttt_jax.ttt.fused import fused_scan


@pytest.mark.parametrize("mini_batch", [1, 16, 64])
@pytest.mark.parametrize("width", [64, 128])
def test_the_fused_inner_loop_lowers_for_cuda(width, mini_batch):
    setting = Setting(width, mini_batch, frames=max(32, 4 * mini_batch))

    def forward(*args):
        return fused_scan(*args, setting.cfg, chain=hopper)

    def gradients(args, weights):
        return value_and_grads(lambda *args: fused_scan(*args, chain=hopper), setting.cfg, args, weights)

    args, weights = setting.drawn(0)
    for function, inputs, kernels in ((forward, args, 1), (gradients, (args, weights), 2)):
        lowered = jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == kernels
