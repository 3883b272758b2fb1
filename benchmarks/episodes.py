"""How near to the exact optimum after how many responses? PPO, RLOO and trajectory balance on one language, as JSON.

    OMP_NUM_THREADS=1 python benchmarks/episodes.py --episodes 2560 5120 20480 --seeds 1 2 3 --json results.json

The language `dense` of `align verify` has 4 prompts with 1,464 responses each, which are all enumerated after training. Every
point is a run of the stage of its own, since a schedule that ends at 0 belongs to its number of episodes. The score is 0 at
the reference and 1 at the optimum of E[score] - beta KL.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe
from programs import report
from rich.console import Console
from rich.table import Table

from align.cli import verify
from align.cli.verify_languages import DENSE
from align.runs.quiet import quiet

COMMON = {"num_generations": 64, "warmup_steps": 0, "per_device_train_batch_size": 1024}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ppo": {**COMMON, "num_generations": 1, "num_ppo_epochs": 4},
    "rloo": {**COMMON, "advantage_estimator": "rloo", "num_ppo_epochs": 4},
    "trajectory_balance": {
        **COMMON,
        "objective": "trajectory_balance",
        "warmup_steps": 0.4,  # a policy that moves late has seen more of the reference's responses
        "minibatch_size": 1024,
        "gradient_steps": 16,
        "replay_size": 20,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--episodes", type=int, nargs="+", default=[2560, 5120, 10240, 20480])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", help="write the results there instead of printing them")
    arguments = parser.parse_args()
    quiet()
    runs = []
    with contextlib.redirect_stdout(sys.stderr):
        for episodes, objective, beta, seed in itertools.product(
            arguments.episodes, arguments.objectives, arguments.betas, arguments.seeds
        ):
            runs.append(measure(objective, beta, episodes, seed))
            print(json.dumps(runs[-1]), flush=True)
    results = {"machine": describe(torch.device("cpu")), "language": "dense", "settings": OBJECTIVES, "runs": runs}
    report(results, arguments.json)
    show(runs)


def measure(objective: str, beta: float, episodes: int, seed: int, **changes: Any) -> dict[str, Any]:
    """Train, and enumerate what was trained."""
    began, worked = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        keys = {**OBJECTIVES[objective], **changes, "total_episodes": episodes, "seed": seed}
        case = verify.write_case(Path(folder), DENSE, beta, **keys)
        verify.train(folder, [case])
        found = verify.measure(case)
    return {
        "objective": objective,
        "beta": beta,
        "episodes": episodes,
        "seed": seed,
        "score": found.normalised,
        "kl_to_optimum": found.divergence,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - worked,
    }


def show(runs: list[dict[str, Any]]) -> None:
    """A table of the mean score over seeds, with the least and the greatest."""
    episodes = sorted({run["episodes"] for run in runs})
    table = Table(
        "objective", "beta", *(f"{count:,}" for count in episodes), title="score by episodes, mean (range) of seeds"
    )
    for objective, beta in dict.fromkeys((run["objective"], run["beta"]) for run in runs):
        row = []
        for count in episodes:
            scores = [
                run["score"]
                for run in runs
                if (run["objective"], run["beta"], run["episodes"]) == (objective, beta, count)
            ]
            row.append(f"{statistics.fmean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})" if scores else "")
        table.add_row(objective, str(beta), *row)
    Console(stderr=True, width=140).print(table)


if __name__ == "__main__":
    main()
