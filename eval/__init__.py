"""Evaluation: `python -m eval`. What a model predicts over long speech, and what its fast weights bring.

prepare             audio to code files: `prepare.py`, `sources.py` (no jax)
stream              checkpoints x files x arms: `evaluate.py` is the command; it loads `models.py` and `speech.py`, runs
                    `stream.py` (the scan and the scores) under `arms.py`, stores `scores.py`
draw                stored results to numbers, table and figures: `results.py`, `report.py`, `draw.py`, `statistics.py`,
                    `unigram.py` (no jax)
check-state   `check_state.py`
diagnose            `diagnose.py`, `diagnose_report.py`
"""
