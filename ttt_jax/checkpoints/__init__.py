"""Weights, checkpoints of runs and states of streams on disk."""
