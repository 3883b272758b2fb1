"""The curve of `align verify --episodes` on several seeds, with TRL 1.12's PPO, as JSON lines and a plot.

    OMP_NUM_THREADS=1 python benchmarks/episodes.py --jsonl episodes.jsonl --picture episodes.svg
    OMP_NUM_THREADS=1 python benchmarks/episodes.py ... --against-trl "$(benchmarks/trl_env.sh)"

A run that the file has is not repeated, so that the command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe
from panels import Panel, draw
from programs import run as run_program
from rich.console import Console

from align.cli import verify
from align.cli.verify_episodes import BETAS, OBJECTIVES, measure, scores_of, scores_table
from align.cli.verify_languages import DENSE
from align.runs.quiet import quiet

Point = tuple[int, int, float, str]
TRL = "TRL 1.12 PPO"
# The best of those tried, as for the others; `cliprange_value` as theirs.
TRL_SETTINGS = {"learning_rate": 5e-4, "num_ppo_epochs": 8, "num_mini_batches": 4, "lam": 1.0, "cliprange_value": 10.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="*", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--episodes", type=int, nargs="+", default=[2560, 5120, 10240, 20480])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--against-trl", metavar="PYTHON", help="of an environment with TRL 1.12")
    parser.add_argument("--jsonl", default="episodes.jsonl", help="the results, one a line; those there are kept")
    parser.add_argument("--picture", help="where to write the plot")
    arguments = parser.parse_args()
    quiet()
    results = Path(arguments.jsonl)
    for episodes in arguments.episodes:
        points = itertools.product([episodes], arguments.seeds, arguments.betas, arguments.objectives)
        for _, seed, beta, objective in missing(points, results):
            add(results, measure(objective, beta, episodes, seed=seed))
        if arguments.against_trl:
            points = itertools.product([episodes], arguments.seeds, arguments.betas, [TRL])
            for found in measure_trl(arguments.against_trl, missing(points, results)):
                add(results, found)
    runs = read(results)
    Console(stderr=True, width=140).print(scores_table(runs))
    if arguments.picture:
        Path(arguments.picture).write_text(picture(runs), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def missing(points: Iterable[Point], results: Path) -> list[Point]:
    """The points (episodes, seed, beta, objective) that a file does not have."""
    there = {(run["episodes"], run["seed"], run["beta"], run["objective"]) for run in read(results)}
    return [point for point in points if point not in there]


def add(results: Path, run: dict[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run | {"machine": describe(torch.device("cpu"))}) + "\n")


def measure_trl(python: str, points: Sequence[Point], **settings: Any) -> Iterator[dict[str, Any]]:
    """TRL's results, of one process: the same model, prompts, rewards and responses an update."""
    with tempfile.TemporaryDirectory() as folder:
        case = verify.write_case(Path(folder), DENSE, 1.0)
        runs = [
            {"kl_coef": beta, "total_episodes": episodes, "seed": seed, **TRL_SETTINGS, **settings}
            for episodes, seed, beta, _ in points
        ]
        spec = {
            "folder": folder,
            "start": case.recipe.sft_model_path,
            "module": verify.MODULE,
            "reward": DENSE.reward,
            "prompts": list(DENSE.prompts) * (verify.ROLLOUT // len(DENSE.prompts)),
            "batch": verify.ROLLOUT,
            "response_length": DENSE.length,
            "outputs": [f"{folder}/trained-{number}" for number in range(len(runs))],
            "runs": runs,
        }
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        script = Path(__file__).with_name("trl_episodes.py")
        output = run_program([python, str(script), str(path)], threads=1)[0] if runs else ""
        lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"seconds"')]
        for run, trained, seconds in zip(runs, spec["outputs"], lines, strict=True):
            recipe = dataclasses.replace(case.recipe, output_dir=trained, kl_coef=run["kl_coef"])
            found = verify.measure(dataclasses.replace(case, recipe=recipe))
            yield {
                "objective": TRL,
                "beta": run["kl_coef"],
                "episodes": run["total_episodes"],
                "seed": run["seed"],
                "score": found.normalised,
                "kl_to_optimum": found.divergence,
                **seconds,
            }


def picture(runs: list[dict[str, Any]]) -> str:
    """What is missing to the optimum over the episodes, on logarithmic axes, as SVG; a panel for each beta."""
    names = list(dict.fromkeys(run["objective"] for run in runs))
    panels = []
    for beta in sorted({run["beta"] for run in runs}):
        episodes = sorted({run["episodes"] for run in runs if run["beta"] == beta})
        curves = {}
        for name in names:
            scores = [scores_of(runs, name, beta, count) for count in episodes]
            curves[name] = [1 - statistics.fmean(each) if each else 0.0 for each in scores]
        panels.append(Panel(f"episodes, beta {beta}", episodes, curves))
    return draw(panels, "1 - score, mean of seeds", TRL)


if __name__ == "__main__":
    main()
