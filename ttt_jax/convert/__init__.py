"""Kyutai's weights in and out: `python -m ttt_jax.convert`, or `kyutai` and `export` from Python."""

from ttt_jax.convert.incoming import kyutai
from ttt_jax.convert.outgoing import export

__all__ = ["export", "kyutai"]
