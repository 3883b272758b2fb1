"""`align diagnose RUN`: print the faults that `align.report.diagnose` finds in runs, finished or not."""

from __future__ import annotations

import sys
from pathlib import Path

from align.config.paths import expand
from align.report.diagnose import diagnose
from align.report.overview import describe_state
from align.report.read import EVALUATIONS, Run, find_runs, read_run, with_members
from align.terminal import counted, say

WARNING, SEVERE = 3, 4  # exit codes; 0: nothing was found


def run(directory: str) -> int:
    """Print each fault with its evidence and remedy; returns 0 for none, 3 for warnings, 4 for severe ones.

    Raises:
        UserError: there is no run, or its record is damaged.
    """
    worst = 0
    for folders in find_runs(Path(expand(directory, "align diagnose"))):
        runs = [read_run(folder) for folder in with_members(folders)]
        for each in runs:
            found = diagnose(each, runs)
            counts = [sum(finding.severity == kind for finding in found) for kind in ("severe", "warning")]
            counts_text = f"{counts[0]} severe, {counts[1]} warning" + "s" * (counts[1] != 1)
            if not found:
                counts_text = f"nothing found in {counted(len(each.lines), 'line')} of metrics"
            if each.stage in EVALUATIONS:
                counts_text = _describe_evaluation(each) + f"; {counts_text}" * bool(found)
            say(f"{each.folder} ({each.stage}, {describe_state(each)}): {counts_text}", sys.stdout)
            for line in each.verdict:
                say(f"  verdict: {line}", sys.stdout)
            for finding in found:
                say(f"  {finding.severity}: {finding.name}: {finding.title}", sys.stdout)
                say(f"    {finding.evidence}", sys.stdout)
                say(f"    Remedy: {finding.remedy.replace('`', '')}", sys.stdout)
                worst = max(worst, SEVERE if finding.severity == "severe" else WARNING)
            for problem in each.problems:
                say(problem)
    return worst


def _describe_evaluation(run: Run) -> str:
    """The status of a stage that has no training metrics."""
    if run.stage == "judge-reward":
        return "a report card of a reward" + (f", verdict {run.record['verdict']}" if run.finished else "")
    return "results of an evaluation, which has no training metrics" + "; see results.md" * run.finished
