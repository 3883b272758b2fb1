"""Launching and recording a run: manifest, checkpoints, metrics, progress, tables, charts.

Imported by the stages, `align.trainer`, `align.evaluate` and `align.cli`. Public: `stage` (resume, finish), `manifest`
(is it the same run?), `checkpoint`, `files` (atomic writes), `tracker.Tracker`, `results`, `launch`.
"""
