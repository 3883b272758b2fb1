"""Bad inputs, kills, damaged files and faults: a campaign that counts what ends in lost data, a wrong result, a traceback
or code that runs from a file.

    python -m tests.campaign --fraction 0.1

`world.py` has the models, rows and recipes that every case gets a copy of, `process.py` runs commands in forks and kills
them at a chosen write, `judge.py` says what counts as a failure. The cases are in tables: `recipes.py`, `keys.py`, `rows.py`,
`models.py`, `templates.py` (bad inputs), `kills.py`, `damage.py` and `faults.py`. `campaign.py` draws from them by seed.
"""
