"""Evaluation, `python -m eval`: predictions of a model over long speech, and what its fast weights contribute.

__main__      the commands
prepare.py    audio to code files
inputs/       checkpoints and files to evaluate on
streaming/    `stream` and `draw`: checkpoints x files x arms to stored scores, tables and figures
compare/      `compare`: conditions by file, with statistics and a verdict
check_state/  `check-state`: whether the fast weights persist
diagnose/     `diagnose`: what the TTT layers do beside attention
stats/        estimates, paired statistics, verdicts
results/      folders of results and their format
tasks/        controlled tasks, for which the best possible loss is known
benchmarks/   `swuggy`, `sblimp`, `storycloze`, `salmon`, `suite`: which of two recordings is more likely?
mini/         `make-mini`: small benchmarks of synthetic speech
recall/       `recall`: what is left of speech that was heard before a gap
report/       `report`: one HTML page over many results
"""
