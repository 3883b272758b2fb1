"""The commands that are no stage: `align run`, `align check`, `align merge`, `align verify`.

Imported by `align.__main__` only; may import everything else. Public: `run.run`, `check.check.run`, `merge.run`,
`verify.run`.
"""
