"""Controlled tasks: data sets for which the best possible loss is known."""
