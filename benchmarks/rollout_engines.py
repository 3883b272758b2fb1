"""The quickstart's PPO with responses by transformers, by vLLM, and by vLLM one step off, as JSON: true reward and seconds by phase.

    OMP_NUM_THREADS=1 python benchmarks/rollout_engines.py vllm-env/bin/python 42=outputs/quickstart 1=outputs/seed1 --json engines.json

Each SEED=FOLDER holds stages 0 to 2 of `align run recipes/quickstart --seed SEED`. Seconds are medians over updates, of wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ppo import phases
from programs import report, short
from quickstart_episodes import MEASURED, QUICKSTART, words
from rich.console import Console

from align.config.load import load_recipe
from align.ppo.train import run as run_ppo
from align.runs.quiet import quiet
from align.runs.tables import make_table

ENGINES: dict[str, dict[str, Any]] = {
    "transformers": {},
    "vllm": {"rollout_engine": "vllm"},
    "vllm, one step off": {"rollout_engine": "vllm", "one_step_off_policy": True},
}
POLICY = ("policy/sampler_gap", "policy/importance_ess")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="interpreter of an environment with vLLM")
    parser.add_argument("starts", nargs="+", metavar="SEED=FOLDER", help="outputs of the quickstart's stages 0 to 2")
    parser.add_argument("--episodes", type=int, default=2560)
    parser.add_argument("--json", help="write the results there instead of printing them")
    arguments = parser.parse_args()
    quiet()
    runs = []
    for start in arguments.starts:
        seed, folder = start.split("=", 1)
        for engine in ENGINES:
            found = measure(engine, arguments.python, int(seed), folder, arguments.episodes)
            runs.append({"engine": engine, "seed": int(seed), **found})
    show(runs)
    report({"runs": runs}, arguments.json)


def measure(engine: str, python: str, seed: int, start: str, episodes: int) -> dict[str, Any]:
    """Run the recipe; returns a point for each evaluation, medians of the seconds, and the largest gap of the sampler in nats."""
    keys: dict[str, Any] = {"seed": seed, "total_episodes": episodes, **ENGINES[engine]}
    if keys.get("rollout_engine") == "vllm":
        keys["vllm_python"] = python
    keys |= {"sft_model_path": f"{start}/1_sft", "reward_model_path": f"{start}/2_reward"}
    with tempfile.TemporaryDirectory(prefix="align-engines-") as folder:
        recipe = load_recipe("ppo", str(QUICKSTART / "3_ppo.yaml"), words(keys | {"output_dir": f"{folder}/out"}))
        run_ppo(recipe)  # type: ignore[arg-type]
        lines = [json.loads(line) for line in (Path(folder) / "out/metrics.jsonl").read_text().splitlines()]
    updates = [phases(line) for line in lines if "time/total" in line]
    curve = [
        {"update": line["step"], **{short: line[name] for short, name in MEASURED.items()}}
        for line in lines
        if MEASURED["true"] in line
    ]
    seen = {name: [line[name] for line in lines if name in line] for name in POLICY}
    return {
        "curve": curve,
        "seconds": {name: statistics.median(each.get(name, 0.0) for each in updates) for name in set().union(*updates)},
        "largest_sampler_gap": max(seen[POLICY[0]]),
        "least_importance_ess": min(seen[POLICY[1]], default=1.0),
    }


def show(runs: list[dict[str, Any]]) -> None:
    """The last point of each run, and where its seconds went."""
    names = ("generate", "send_weights", "score", "update", "other", "total")
    table = make_table(
        "the last evaluation, and seconds of an update", "engine", "seed", *MEASURED, "gap", "ESS", *names
    )
    for run in runs:
        numbers = [run["curve"][-1][name] for name in MEASURED]
        numbers += [
            run["largest_sampler_gap"],
            run["least_importance_ess"],
            *(run["seconds"].get(name) for name in names),
        ]
        table.add_row(run["engine"], str(run["seed"]), *map(short, numbers))
    Console(stderr=True, width=150).print(table)


if __name__ == "__main__":
    main()
