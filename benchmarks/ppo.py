"""The cost of a PPO step by phase, compared with the machine's limit and with TRL 1.12.

    python benchmarks/ppo.py --sizes 1M 10M --json results.json
    python benchmarks/ppo.py --sizes 10M --against-trl "$(benchmarks/trl_env.sh)"
    python benchmarks/ppo.py --sizes 10M --ranks 2 --zero 3

Runs the stage as a user would, on synthetic models and prompts (`countdown.py`). Rounds alternate between the programs, and
medians over all updates of all rounds are reported; the first update of a process is a warm-up. Peak memory is that of the
largest process, including libraries; on a GPU also the most that torch allocated there in each phase.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from countdown import COUNTS, SIZES, make_models, write_prompts
from machine import decode_bytes, describe, rates, step_flops
from memory import planned
from programs import ROOT, free_port, report, run, short
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer

from align.cli.check.memory import activation_bytes
from align.cli.check.ppo import PPOCheck
from align.cli.check.sample_rows import Start
from align.config.load import load_recipe
from align.config.ppo import PPORecipe
from align.generation.batch_size import row_bytes

PHASES = ("generate", "score", "update", "communication", "other", "total")


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"machine": describe(device), "rates": rates(device), "arguments": vars(arguments)}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            results[size] = measure(arguments, size, Path(folder), results["rates"])
        show(size, results[size], bool(arguments.against_trl))
    report(results, arguments.json)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1M", "10M"], choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=32, help="responses an update; one optimizer step per epoch")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences in a training pass")
    parser.add_argument("--max_tokens", type=int, help="tokens in a training pass, in place of --micro_batch")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--prompt_lengths", type=int, nargs=2, default=[16, 64])
    parser.add_argument("--response_lengths", type=int, nargs=2, default=[8, 64], help="spread evenly")
    parser.add_argument("--updates", type=int, default=4, help="of a process, the first of which is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ranks", type=int, default=1, help="processes, under the deepspeed launcher if more than one")
    parser.add_argument(
        "--zero", type=int, choices=[1, 2, 3], help="ZeRO stage; without, plain torch or stage 0 on ranks"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter with vLLM, which then samples the responses")
    parser.add_argument("--against-trl", metavar="PYTHON", help="interpreter of an environment made by trl_env.sh")
    parser.add_argument("--json", help="write the results there instead of printing them")
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace, size: str, folder: Path, machine: dict[str, float]) -> dict[str, Any]:
    paths = make_models(folder, size)
    prompts = folder / "prompts.jsonl"
    write_prompts(prompts, size, arguments.batch, tuple(arguments.prompt_lengths), tuple(arguments.response_lengths))
    runs: dict[str, list[dict[str, float]]] = {"align": []}
    peaks: dict[str, list[int]] = {"align": []}
    if arguments.against_trl:
        runs["trl"], peaks["trl"] = [], []
    for number in range(arguments.rounds):
        for name in runs:
            run = run_align if name == "align" else run_trl
            updates, peak = run(arguments, folder / f"{name}-{number}", paths, prompts)
            runs[name] += updates[1:]
            peaks[name].append(peak)
    found: dict[str, Any] = {
        name: {
            "seconds": {phase: statistics.median(update.get(phase, 0.0) for update in updates) for phase in updates[0]},
            "peak_gib": statistics.median(peaks[name]) / 2**30,
        }
        for name, updates in runs.items()
    }
    for numbers in found.values():
        numbers["episodes_per_second"] = arguments.batch / numbers["seconds"]["total"]
    lengths = [
        (len(words), (int(words[-1][1:]) % COUNTS) + 1)
        for words in (json.loads(line)["prompt"].split() for line in prompts.read_text().splitlines())
    ]
    mine = found["align"]
    mine["plan_gib"] = plan_gib(folder / "align-0.yaml", paths, arguments.ranks)
    if torch.cuda.is_available():
        mine["gpu_peak_gib"] = gpu_peaks(folder.glob("align-*/metrics.jsonl"))
    mine["padding"] = training_padding(folder.glob("align-*/metrics.jsonl"))
    mine["response_tokens_per_second"] = sum(r for _, r in lengths) / mine["seconds"]["total"]
    mine["share_of_limit"] = share_of_limit(arguments, size, lengths, machine, mine["seconds"])
    if arguments.against_trl:
        theirs = found["trl"]
        found["ratio"] = {phase: theirs["seconds"][phase] / mine["seconds"][phase] for phase in theirs["seconds"]}
        found["ratio"]["peak_memory"] = mine["peak_gib"] / theirs["peak_gib"]
    return found


def training_padding(files: Iterable[Path]) -> float:
    """Share of padding in training passes, the median over updates."""
    lines = (json.loads(line) for file in files for line in file.read_text().splitlines())
    return statistics.median(line["policy/padding"] for line in lines if "policy/padding" in line)


def plan_gib(file: Path, paths: dict[str, str], ranks: int) -> dict[str, float]:
    """What `align check` plans of a process's memory: of the models, and what an update and decoding add to it, in GiB."""
    recipe = load_recipe("ppo", str(file))
    assert isinstance(recipe, PPORecipe)
    policy, *others = (AutoConfig.from_pretrained(paths[name]) for name in ("policy", "value", "reward"))
    start = Start(
        policy,
        AutoTokenizer.from_pretrained(paths["policy"]),
        others=dict(zip(("value", "reward"), others, strict=True)),
    )
    lengths, width = (recipe.max_prompt_length, recipe.response_length), 2 if recipe.bf16 else 4
    rows, tokens = recipe.per_device_train_batch_size, sum(lengths)
    if recipe.max_tokens_per_device is not None:
        rows, tokens = 1, recipe.max_tokens_per_device
    decoded = min(recipe.rollout_batch_size // ranks, recipe.per_device_eval_batch_size)
    parts = {
        "models": planned(recipe, PPOCheck(), start, ranks).gpu_peak,
        "update": activation_bytes(policy, rows, tokens, recipe.bf16, recipe.gradient_checkpointing, True),
        "generate": decoded * row_bytes(policy, *lengths, width),
    }
    return {name: size / 2**30 for name, size in parts.items()}


def gpu_peaks(files: Iterable[Path]) -> dict[str, float]:
    """The most memory that torch allocated on the GPU in each phase, in GiB."""
    most: dict[str, float] = {}
    for file in files:
        for line in map(json.loads, file.read_text().splitlines()):
            for name in (name for name in line if name.startswith("memory/")):
                phase = name.removeprefix("memory/")
                most[phase] = max(most.get(phase, 0.0), line[name])
    return most


def share_of_limit(
    arguments: argparse.Namespace,
    size: str,
    lengths: Sequence[tuple[int, int]],
    machine: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, float]:
    """Minimum time of each phase, by operations and by bytes, divided by the measured time."""
    kind = "bfloat16" if arguments.bf16 else "float32"
    work = step_flops(SIZES[size], [p for p, _ in lengths], [r for _, r in lengths], arguments.epochs)
    least = {phase: flops / (machine[f"{kind}_gflops"] * 1e9) for phase, flops in work.items()}
    read = decode_bytes(SIZES[size], [r for _, r in lengths], 2 if arguments.bf16 else 4)
    least["generate"] = max(least["generate"], read / (machine["memory_gbytes"] * 1e9))
    return {phase: least[phase] / seconds[phase] for phase in least}


def run_align(
    arguments: argparse.Namespace, output: Path, paths: dict[str, str], prompts: Path
) -> tuple[list[dict[str, float]], int]:
    recipe: dict[str, Any] = {
        "stage": "ppo",
        "output_dir": str(output),
        "sft_model_path": paths["policy"],
        "value_model_path": paths["value"],
        "reward_model_path": paths["reward"],
        "normalize_scores": False,  # as TRL
        "train_dataset": str(prompts),
        "eval_fraction": 0.0,
        "total_episodes": arguments.batch * arguments.updates,
        "rollout_batch_size": arguments.batch,
        "minibatch_size": arguments.batch,
        "num_ppo_epochs": arguments.epochs,
        **(
            {"per_device_train_batch_size": arguments.micro_batch}
            if arguments.max_tokens is None
            else {"max_tokens_per_device": arguments.max_tokens}
        ),
        "per_device_eval_batch_size": arguments.batch,
        "max_prompt_length": max(arguments.prompt_lengths),
        "response_length": max(arguments.response_lengths),
        "learning_rate": 1e-9,  # the response lengths must not change
        "bf16": arguments.bf16,
        "logging_steps": 1,
        "skip_self_checks": True,
    }
    if arguments.vllm:
        recipe |= {"rollout_engine": "vllm", "vllm_python": arguments.vllm}
    if arguments.zero is not None:
        recipe["deepspeed"] = str(ROOT / "recipes" / "deepspeed" / f"zero{arguments.zero}.json")
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    words = [sys.executable, "-m", "align.ppo", str(file)]
    if arguments.ranks > 1:
        count = "--num_gpus" if torch.cuda.is_available() else "--num_accelerators"
        port = ["--master_port", str(free_port())]
        words = ["deepspeed", count, str(arguments.ranks), *port, "--module", "align.ppo", str(file)]
    _, peak = run(words, arguments.threads // arguments.ranks)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [phases(line) for line in lines if "time/total" in line], peak


def phases(line: dict[str, float]) -> dict[str, float]:
    parts = {name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/")}
    together = {
        phase: sum(value for name, value in parts.items() if name.startswith(f"{phase}_"))
        for phase in ("score", "update")
    }
    return {**parts, **together}


def run_trl(
    arguments: argparse.Namespace, output: Path, paths: dict[str, str], prompts: Path
) -> tuple[list[dict[str, float]], int]:
    spec = {
        **paths,
        "prompts": str(prompts),
        "folder": str(output),
        "threads": arguments.threads,
        "episodes": arguments.batch * arguments.updates,
        "batch": arguments.batch,
        "micro_batch": arguments.micro_batch,
        "epochs": arguments.epochs,
        "response_length": max(arguments.response_lengths),
        "learning_rate": 1e-9,
        "bf16": arguments.bf16,
    }
    file = output.with_suffix(".json")
    file.write_text(json.dumps(spec), encoding="utf-8")
    text, peak = run([arguments.against_trl, str(ROOT / "benchmarks" / "trl_ppo.py"), str(file)], arguments.threads)
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"generate')], peak


def show(size: str, found: dict[str, Any], compared: bool) -> None:
    console = Console(stderr=True)
    names = ["align", "trl"] if compared else ["align"]
    table = Table("phase", *(f"{name}, s" for name in names), *(["ratio"] if compared else []), "share of limit",
                  title=f"{size} parameters: seconds an update")  # fmt: skip
    mine = found["align"]
    for phase in [*PHASES, *(name for name in mine["seconds"] if name not in PHASES)]:
        row = [short(found[name]["seconds"].get(phase)) for name in names]
        if compared:
            row.append(short(found["ratio"].get(phase)))
        table.add_row(phase, *row, short(mine["share_of_limit"].get(phase)))
    table.add_row("peak memory, GiB", *(short(found[name]["peak_gib"]) for name in names),
                  *([short(found["ratio"]["peak_memory"])] if compared else []), "")  # fmt: skip
    table.add_row("episodes/s", *(short(found[name]["episodes_per_second"]) for name in names))
    console.print(table)


if __name__ == "__main__":
    main()
