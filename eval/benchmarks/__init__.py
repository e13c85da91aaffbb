"""Benchmarks of pairs: which of two recordings does a model find more likely?

pairs.py, rules.py, scored.py        a task, a rule, scores: what all others speak of
layouts/, subset.py, submission.py   recordings on disk; subsets; files for ZeroSpeech's toolkit
scoring/                             from recordings to scores
official.py, summary.py              from scores to accuracies and comparisons
results.py, table.py, figure.py      stored, printed, drawn
commands/                            `swuggy`, `sblimp`, `storycloze`, `salmon`, `suite`
"""
