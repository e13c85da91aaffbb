"""Converts weights between Kyutai's layouts and ours: `python -m ttt_jax.convert`, in Python `kyutai`, `mimi` and
`export`."""

from ttt_jax.convert.from_kyutai import kyutai
from ttt_jax.convert.mimi_files import mimi
from ttt_jax.convert.to_kyutai import export

__all__ = ["export", "kyutai", "mimi"]
