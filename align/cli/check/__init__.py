"""`align check`: whether a recipe would run, and in how much memory, without loading weights.

`check.py` walks a folder; `training.py` is the check of every stage that trains, with a subclass per stage in its own
file; `evaluation.py` checks an evaluation. A stage's entry in `align.config.stages` names its file.
"""
