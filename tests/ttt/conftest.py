"""The fused path of the inner loop on a CPU."""

import pytest

from ttt_jax.kernels import choice, plain


@pytest.fixture(autouse=True)
def plain_chain(monkeypatch: pytest.MonkeyPatch):
    """Layers with `impl="pallas"` take the fused path on its plain chain, whatever their sizes; others the scan."""
    monkeypatch.setattr(choice, "chain", lambda cfg, *_: plain if cfg.impl == "pallas" else None)
