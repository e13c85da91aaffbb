"""Estimates with intervals, paired tests, and the verdict on a comparison."""
