"""Experiments whose results are in docs/results: each a module that runs all of one again."""
