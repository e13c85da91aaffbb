"""Moshi with test-time-training layers, in JAX.

Light to import: the sub-packages load jax when they are used.

- `ttt_jax.config`: architecture as frozen dataclasses, presets
- `ttt_jax.ttt`: the TTT layer: inner loop and state as plain functions
- `ttt_jax.moshi`: Moshi's language model: one ``forward`` for training, evaluation and streaming
- `ttt_jax.codec`: audio to codes and back
- `ttt_jax.data`: audio files, transcripts and alignments to 17-stream frames
"""

__version__ = "0.1.0"
