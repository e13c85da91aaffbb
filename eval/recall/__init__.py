"""Spoken recall: what a model still knows, after a gap, of speech that it heard before."""
