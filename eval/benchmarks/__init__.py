"""Benchmarks of pairs: which of two recordings does a model find more likely?"""
