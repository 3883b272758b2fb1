"""`align report` and `align diagnose`: read the records of runs, show them as one HTML page, and find faults in their metrics.

Imported by `align.cli`, and by name for the report in Weights & Biases; imports no stage. Public: `read.find_runs` and
`read.read_run` (output folders to `Run`), `diagnose.diagnose` (a run to its faults), `page.write_report`.
"""
