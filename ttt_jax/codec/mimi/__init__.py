"""Mimi, the neural codec of Moshi, in JAX: audio to Kyutai's codes and back."""
