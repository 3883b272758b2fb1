"""Tokens per second of the SFT and reward stages, compared with plain TRL in the same environment.

    python benchmarks/trainers.py --sizes 1M 10M --json results.json

Both programs train the same model on the same rows in the same order, with the same batches, epochs and optimizer steps.
Their rounds alternate. The seconds of a step are the median over rounds, without loading, tokenization, evaluation, saving and
the first steps of a process. Peak memory is that of the entire process. The work is checked to be the same: the numbers of
real tokens must agree with each other and with the rows, and losses are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from countdown import SIZES, make_untrained, write_rows
from machine import describe
from programs import ROOT, report, run, short
from rich.console import Console
from rich.table import Table

MODES = {  # stage and recipe keys of each comparison
    "sft, padding-free": ("sft", {"padding_free": True}),
    "sft, padded": ("sft", {"padding_free": False}),
    "reward": ("reward", {}),
}
COMPARED = 5  # steps whose losses are compared; later ones diverge by rounding
SAME = {"learning_rate": 1e-4, "seed": 42}
Step = dict[str, float]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"machine": describe(device), "arguments": vars(arguments)}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_untrained(Path(folder), size)
            results[size] = {mode: measure(arguments, mode, size, Path(folder)) for mode in arguments.modes}
        show(size, results[size])
    report(results, arguments.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1M", "10M"], choices=list(SIZES))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--rows", type=int, default=640, help="demonstrations, or pairs; whole batches")
    parser.add_argument("--batch", type=int, default=32, help="rows an optimizer step")
    parser.add_argument("--micro_batch", type=int, default=8, help="rows in a training pass")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--warm_up", type=int, default=4, help="first steps of a process, which are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="write the results there instead of printing them")
    arguments = parser.parse_args()
    if arguments.rows % arguments.batch or arguments.batch % arguments.micro_batch:
        parser.error("--rows must be a multiple of --batch, and --batch of --micro_batch")
    if not 1 <= arguments.warm_up < arguments.rows // arguments.batch * arguments.epochs:
        parser.error("--warm_up must be at least 1 (the first step starts up), and leave steps to count")
    return arguments


def measure(arguments: argparse.Namespace, mode: str, size: str, folder: Path) -> dict[str, Any]:
    stage, keys = MODES[mode]
    rows = folder / f"{stage}.jsonl"
    expected = arguments.epochs * write_rows(rows, stage, size, arguments.rows)
    runs: dict[str, list[list[Step]]] = {"align": [], "trl": []}
    peaks: dict[str, list[int]] = {"align": [], "trl": []}
    for number in range(arguments.rounds):
        for name in runs:
            program = run_align if name == "align" else run_trl
            steps, peak = program(arguments, stage, keys, folder / f"{mode}-{name}-{number}", rows)
            if steps[-1]["tokens"] != expected:
                sys.exit(f"{mode}, {name}: trained on {steps[-1]['tokens']:.0f} tokens, but the rows have {expected}")
            runs[name].append(steps)
            peaks[name].append(peak)
    return compare(runs, peaks, arguments.warm_up)


def compare(runs: dict[str, list[list[Step]]], peaks: dict[str, list[int]], warm_up: int) -> dict[str, Any]:
    """The results of both programs. Ratios are above 1 where align is faster or takes less memory."""
    first = {name: rounds[0] for name, rounds in runs.items()}
    tokens = {name: steps[-1]["tokens"] - steps[warm_up - 1]["tokens"] for name, steps in first.items()}
    if tokens["align"] != tokens["trl"]:
        sys.exit(f"the steps that are counted have {tokens} tokens: not the same work")
    found: dict[str, Any] = {"tokens": tokens["align"], "steps": len(first["align"]) - warm_up}
    totals = {}
    for name, rounds in runs.items():
        seconds = sum(statistics.median(step["seconds"] for step in steps) for steps in zip(*rounds, strict=True)
                      if steps[0]["step"] > warm_up)  # fmt: skip
        found[name] = {
            "seconds_per_step": seconds / found["steps"],
            "tokens_per_second": found["tokens"] / seconds,
            "peak_gib": statistics.median(peaks[name]) / 2**30,
        }
        totals[name] = [sum(step["seconds"] for step in steps[warm_up:]) for steps in rounds]
    mine, theirs = found["align"], found["trl"]
    found["ratio"] = {
        "tokens_per_second": mine["tokens_per_second"] / theirs["tokens_per_second"],
        "tokens_per_second_by_round": [b / a for a, b in zip(totals["align"], totals["trl"], strict=True)],
        "peak_gib": theirs["peak_gib"] / mine["peak_gib"],
    }
    losses = {name: [step["loss"] for step in steps[:COMPARED]] for name, steps in first.items()}
    found["losses"] = losses
    found["largest_loss_difference"] = max(abs(a - b) for a, b in zip(losses["align"], losses["trl"], strict=True))
    return found


def run_align(
    arguments: argparse.Namespace, stage: str, keys: dict[str, Any], output: Path, rows: Path
) -> tuple[list[Step], int]:
    recipe = {
        "stage": stage,
        "output_dir": str(output),
        "model_name_or_path": str(rows.parent / stage),
        "train_dataset": str(rows),
        "eval_fraction": 0.0,
        "train_batch_size": arguments.batch,
        "per_device_train_batch_size": arguments.micro_batch,
        "num_train_epochs": arguments.epochs,
        "logging_steps": 1,
        **SAME,
        **keys,
    }
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    _, peak = run([sys.executable, "-m", f"align.{stage}", str(file)], arguments.threads)
    return read_steps((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()), peak


def read_steps(lines: Sequence[str]) -> list[Step]:
    """Steps from `metrics.jsonl`; the seconds of a step are those since the previous line, and unknown for the first."""
    logged = [entry for entry in map(json.loads, lines) if "train/loss" in entry]
    stamps = [datetime.fromisoformat(entry["time"]).timestamp() for entry in logged]
    seconds = [float("nan"), *(after - before for before, after in itertools.pairwise(stamps))]
    return [
        {"step": entry["step"], "seconds": each, "loss": entry["train/loss"], "tokens": entry["train/num_tokens"]}
        for entry, each in zip(logged, seconds, strict=True)
    ]


def run_trl(
    arguments: argparse.Namespace, stage: str, keys: dict[str, Any], output: Path, rows: Path
) -> tuple[list[Step], int]:
    sizes = {name: getattr(arguments, name) for name in ("batch", "micro_batch", "epochs")}
    spec = {"stage": stage, "model": str(rows.parent / stage), "rows": str(rows), "folder": str(output), **sizes}
    file = output.with_suffix(".json")
    file.write_text(json.dumps({**spec, **SAME, **keys}), encoding="utf-8")
    text, peak = run([sys.executable, str(ROOT / "benchmarks" / "trl_trainers.py"), str(file)], arguments.threads)
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"step"')], peak


def show(size: str, found: dict[str, Any]) -> None:
    table = Table("", "align", "TRL", "ratio", "align, GiB", "TRL, GiB", "ratio", "loss differs by",
                  title=f"{size} parameters: real tokens a second, and peak memory")  # fmt: skip
    for mode, each in found.items():
        keys = ("tokens_per_second", "peak_gib")
        numbers = [each[name][key] for key in keys for name in ("align", "trl", "ratio")]
        table.add_row(mode, *map(short, numbers), f"{each['largest_loss_difference']:.1e}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
