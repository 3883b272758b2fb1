"""True reward of PPO and trajectory balance on the quickstart, by episodes and by CPU seconds, as JSON lines and a plot.

    OMP_NUM_THREADS=1 python benchmarks/quickstart_episodes.py 42=outputs/quickstart 1=outputs/seed1 2=outputs/seed2 \\
        --jsonl quickstart.jsonl --picture quickstart.svg

Each SEED=FOLDER holds stages 0 to 2 of `align run recipes/quickstart --seed SEED`. A run that the file has is not repeated.
Seconds are those of updates, without loading and evaluations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panels import Panel, draw
from rich.console import Console
from rich.table import Table

from align.config.load import load_recipe
from align.ppo.train import run as run_ppo
from align.runs.quiet import quiet
from align.runs.tables import make_table

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes/quickstart"
RECIPES = {"PPO": "3_ppo.yaml", "trajectory balance": "trajectory_balance.yaml"}
EVALUATIONS = 10  # of a run
FULL = 6.0  # points of the best answer
TRUE = "eval/true/world:true_reward"
MEASURED = {"true": TRUE, "win_rate": "eval/true_win_rate/world:true_reward", "score": "eval/score", "kl": "eval/kl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("starts", nargs="+", metavar="SEED=FOLDER", help="outputs of the quickstart's stages 0 to 2")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--episodes", type=int, nargs="+", default=[640, 2560])
    parser.add_argument(
        "--jsonl", default="quickstart_episodes.jsonl", help="the results, one a line; those there are kept"
    )
    parser.add_argument("--picture", help="where to write the plot")
    arguments = parser.parse_args()
    quiet()
    results = Path(arguments.jsonl)
    time.perf_counter = time.process_time  # of this process alone, whatever else the machine does
    for start, episodes, name in itertools.product(arguments.starts, arguments.episodes, arguments.recipes):
        seed, folder = start.split("=", 1)
        key = {"recipe": name, "episodes": episodes, "seed": int(seed)}
        if not any(key.items() <= run.items() for run in read(results)):
            run = key | measure(name, episodes, int(seed), folder)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
    runs = read(results)
    Console(width=140).print(table_of(runs))
    if arguments.picture:
        Path(arguments.picture).write_text(picture(runs), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measure(name: str, episodes: int, seed: int, start: str) -> dict[str, Any]:
    """Run the recipe; returns a point for each evaluation, the SFT model's first."""
    with tempfile.TemporaryDirectory(prefix="align-quickstart-") as folder:
        keys = {"seed": seed, "total_episodes": episodes, "output_dir": f"{folder}/out"}
        keys |= {"sft_model_path": f"{start}/1_sft", "reward_model_path": f"{start}/2_reward"}
        path = str(QUICKSTART / RECIPES[name])
        updates = load_recipe("ppo", path, words(keys)).num_updates  # type: ignore[attr-defined]
        recipe = load_recipe("ppo", path, words(keys | {"eval_steps": max(1, updates // EVALUATIONS)}))
        result = run_ppo(recipe)  # type: ignore[arg-type]
        lines = (Path(folder) / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    before = next(row[1] for row in result.table if row[0].startswith("true reward"))
    return {"curve": curve_of([json.loads(line) for line in lines], before)}


def words(keys: dict[str, Any]) -> list[str]:
    return [word for name, value in keys.items() for word in (f"--{name}", str(value))]


def curve_of(rows: Sequence[dict[str, Any]], before: float) -> list[dict[str, float]]:
    """Episodes, seconds and what was measured, at each evaluation of a run's metrics."""
    points, episode, seconds = [{"episode": 0.0, "seconds": 0.0, "true": before}], 0.0, 0.0
    for row in rows:
        episode, seconds = row.get("episode", episode), seconds + row.get("time/total", 0.0)
        if TRUE in row:
            measured = {short: row[name] for short, name in MEASURED.items()}
            points.append({"episode": episode, "seconds": seconds, **measured})
    return points


def means(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, list[float]]]]:
    """For each recipe and number of episodes the points of its curve, each with the numbers of all seeds."""
    found = {}
    for kind in dict.fromkeys((run["recipe"], run["episodes"]) for run in runs):
        curves = [run["curve"] for run in runs if (run["recipe"], run["episodes"]) == kind]
        points = zip(*curves, strict=True)
        found[kind] = [{name: [each[name] for each in point] for name in point[0]} for point in points]
    return found


def table_of(runs: Sequence[dict[str, Any]]) -> Table:
    """The mean true reward at each evaluation, with that of each seed."""
    table = make_table("true reward", "recipe", "episodes", "of", "CPU seconds", "mean", "seeds", "KL", "win rate")
    for (name, total), points in means(runs).items():
        for point in points[1:]:
            kl, wins, seconds = (f"{statistics.fmean(point[key]):.2f}" for key in ("kl", "win_rate", "seconds"))
            seeds = ", ".join(f"{number:.2f}" for number in point["true"])
            mean = f"{statistics.fmean(point['true']):.2f}"
            table.add_row(name, f"{point['episode'][0]:.0f}", str(total), seconds, mean, seeds, kl, wins)
    return table


def picture(runs: Sequence[dict[str, Any]]) -> str:
    """The points that are missing to the best answer, over the episodes and over the seconds, mean of the seeds, as SVG."""
    panels = []
    for axis, title, ticks in (("episode", "episodes", (128, 512, 2560)), ("seconds", "CPU seconds", (3, 10, 30, 100))):
        curves = {
            f"{name} {total}": {
                statistics.fmean(point[axis]): FULL - statistics.fmean(point["true"]) for point in points[1:]
            }
            for (name, total), points in means(runs).items()
        }
        places = sorted(set(ticks).union(*curves.values()))
        lines = {name: [curve.get(place, 0.0) for place in places] for name, curve in curves.items()}
        panels.append(Panel(title, places, lines, ticks))
    return draw(panels, "points below the best", "")


if __name__ == "__main__":
    main()
