"""The commands other than stages: `align run`, `check`, `merge`, `verify`, `report`, `diagnose`.

Imported by `align.__main__` only; may import everything else. Public: `run.run`, `check.check.run`, `merge.run`,
`merge_rewards.run`, `verify.run`, `report.run`, `diagnose.run`.
"""
