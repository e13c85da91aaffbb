"""Evaluation: `python -m eval`. What a model predicts over long speech, and what its fast weights bring.

- `arms.py`: settings of an experiment: memory kept, reset, frozen, off
- `stream.py`: files through the model frame by frame, in one jitted scan
- `statistics.py`: means with intervals; the file is the unit
- `unigram.py`: the memory-less baseline
- `report.py`: results.json, the terminal table, the picture
"""
