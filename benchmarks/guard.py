"""Does the guard keep a policy from a reward model that it cheats? In the world of the quickstart, as JSON.

    OMP_NUM_THREADS=1 python benchmarks/guard.py outputs/guard --start outputs/quickstart

Three reward models are trained on pairs from annotators of one kind each: honest ones, ones who prefer the longer answer, and
ones who like to hear of the soup. PPO then runs against each on several seeds, with the true reward as its judge, to the end.
`early_stopping_patience` would stop it after so many evaluations in a row of which the run says that the judge fell: since it
changes nothing before, both the run that it stops and the whole run are read from one. `kept` is the true reward of the
checkpoint that the stopped run keeps as `best/` over that of the best evaluation of the whole run, `last` the same of the last
evaluation. Finished stages are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes/quickstart"
ANNOTATORS: dict[str, dict[str, float]] = {"honest": {}, "length": {"length_bonus": 100.0}, "soup": {"soup_bonus": 3.0}}
KL_COEF = {"length": 0.0}  # where it is not the recipe's: a penalty keeps the answers from getting much longer
FELL = re.compile(r"update (\d+): judge is \S+ \(\S+ to \S+\) from its best")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train against reward models that can be cheated, with a judge.")
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--start", type=Path, required=True, help="outputs of the quickstart, with its stage 1_sft")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--annotators", nargs="+", default=list(ANNOTATORS), choices=list(ANNOTATORS))
    parser.add_argument("--patience", type=int, default=2, help="evaluations in a row that are worse than the best")
    parser.add_argument("--episodes", type=int, default=2560, help="responses that PPO trains on")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(QUICKSTART / "world.py", folder)
    found: dict[str, Any] = {}
    for kind in arguments.annotators:
        train_reward(folder, kind, arguments.start.resolve())
        runs = {}
        for seed in arguments.seeds:
            said = train_policy(folder, kind, seed, arguments.start.resolve(), arguments.episodes)
            runs[seed] = read(folder / f"ppo_{kind}_{seed}", said, arguments.patience)
        found[kind] = runs
    print(json.dumps(found, indent=2))


def train_reward(folder: Path, kind: str, start: Path) -> None:
    """The quickstart's reward stage on the pairs of one kind of annotator."""
    recipe = yaml.safe_load((QUICKSTART / "2_reward.yaml").read_text())
    for rows in ("train_dataset", "eval_dataset"):
        recipe[rows]["generator_kwargs"] |= ANNOTATORS[kind]
    stage(folder, f"reward_{kind}", recipe | {"model_name_or_path": str(start / "1_sft")})


def train_policy(folder: Path, kind: str, seed: int, start: Path, episodes: int) -> str:
    """The quickstart's PPO stage against one reward model, judged by the true reward; returns what it said."""
    recipe = yaml.safe_load((QUICKSTART / "3_ppo.yaml").read_text())
    del recipe["eval_reward_funcs"]
    recipe |= {
        "sft_model_path": str(start / "1_sft"),
        "reward_model_path": str(folder / f"reward_{kind}"),
        "judge_reward_funcs": ["world:true_reward"],
        "total_episodes": episodes,
        "eval_steps": 2,
        "seed": seed,
        "kl_coef": KL_COEF.get(kind, recipe["kl_coef"]),
    }
    return stage(folder, f"ppo_{kind}_{seed}", recipe)


def stage(folder: Path, name: str, recipe: dict[str, Any]) -> str:
    """Run a stage by its command; returns all that it said."""
    path, log = folder / f"{name}.yaml", folder / f"{name}.log"
    path.write_text(yaml.safe_dump(recipe | {"output_dir": str(folder / name)}))
    if not (folder / name / "stage.json").is_file():
        command = [sys.executable, "-m", "align", recipe["stage"], str(path)]
        with log.open("a") as file:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True, env=environment)
    return log.read_text()


def read(run: Path, said: str, patience: int) -> dict[str, Any]:
    """What the guard kept, and what the whole run had."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"]: row["eval/judge"] for row in rows if "eval/judge" in row}
    sft = next(row[1] for row in json.loads((run / "stage.json").read_text())["results"]["table"] if row[0] == "judge")
    describe_fall = {int(update) for update in FELL.findall(" ".join(said.split()))}
    in_a_row, stopped = 0, None
    for update in curve:
        in_a_row = in_a_row + 1 if update in describe_fall else 0
        if in_a_row == patience:
            stopped = update
            break
    seen = {0: sft} | {update: value for update, value in curve.items() if stopped is None or update <= stopped}
    chosen = max(seen, key=lambda update: seen[update])
    most = max(sft, *curve.values())
    return {
        "sft": sft,
        "most": most,
        "chosen_update": chosen,
        "stopped_at": stopped,
        "kept": seen[chosen] / most,
        "last": curve[max(curve)] / most,
        "curve": curve,
    }


if __name__ == "__main__":
    main()
