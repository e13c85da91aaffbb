"""Data sets with a known answer."""
