"""Trained parameters, memory, time and loss of each `method` of the SFT stage, on one model, as a table.

    OMP_NUM_THREADS=1 python benchmarks/methods.py

Prints the measurements as JSON, and a table.

Nothing is downloaded: a Llama of about ten million parameters is trained from scratch briefly on the texts of
`recipes/quickstart/world.py`, then fine-tuned on its demonstrations by the actual stage, each method in its own process.
Memory is the peak resident set of that process, including Python and libraries, up to the end of training. Time is the
median over optimizer steps of the CPU time from one step to the next, which hardly depends on other load of the machine.
With one thread (`OMP_NUM_THREADS=1`) it is the wall time on an idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = {
    "model_type": "llama",
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
}
COMMON = {
    "train_batch_size": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 32,
    "max_length": 128,
    "logging_steps": 10,
    "seed": 1,
}
# Learning rates by the size of what is trained; the other keys as a recipe would have them.
METHODS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 3e-4},
    "freeze": {"learning_rate": 3e-4, "freeze_layers": 4},
    "head": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 2e-3, "lora_r": 8, "lora_alpha": 16},
    "dora": {"learning_rate": 2e-3, "lora_r": 8, "lora_alpha": 16},
    "qlora": {"learning_rate": 2e-3, "lora_r": 8, "lora_alpha": 16},
    "ia3": {"learning_rate": 2e-2},
    "prompt": {"learning_rate": 5e-2, "num_virtual_tokens": 20},
    "prefix": {"learning_rate": 2e-2, "num_virtual_tokens": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the methods of the SFT stage side by side.")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each method")
    parser.add_argument("--base-steps", type=int, default=200, help="optimizer steps of the model they start from")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each method, which take turns")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), arguments)
    print(json.dumps(found, indent=2))
    show(found)


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All methods on one model: parameters, memory, times and losses by method, with machine and date."""
    base = {
        **COMMON,
        "output_dir": str(folder / "base"),
        "model_config": MODEL,
        "tokenizer_vocab_size": 1024,
        "train_dataset": {"generator": "world:corpus", "generator_kwargs": {"num_rows": 3000}},
        "eval_fraction": 0.02,
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "max_steps": arguments.base_steps,
    }
    run(folder / "base.json", base)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in arguments.methods}
    for repeat in range(arguments.repeats):
        for method in arguments.methods:
            recipe = {
                **COMMON,
                "output_dir": str(folder / f"{method}{repeat}"),
                "model_name_or_path": str(folder / "base"),
                "train_dataset": {"generator": "world:demonstrations", "generator_kwargs": {"num_rows": 2000}},
                "eval_dataset": {
                    "generator": "world:demonstrations",
                    "generator_kwargs": {"num_rows": 100, "seed": 2, "held_out": True},
                },
                "method": method,
                **METHODS[method],
                "max_steps": arguments.steps,
            }
            runs[method].append(run(folder / f"{method}{repeat}.json", recipe))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "steps": arguments.steps,
        "rows_per_step": COMMON["train_batch_size"],
        "methods": {method: {name: typical(name, done) for name in done[0]} for method, done in runs.items()},
    }


def typical(name: str, runs: list[dict[str, Any]]) -> Any:
    """The median of a number that varies from run to run; losses and counts do not."""
    return statistics.median(run[name] for run in runs) if name.startswith(("seconds", "mib")) else runs[0][name]


def run(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Run the SFT stage on a recipe in its own process; returns the result of `measure` there."""
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    paths = [str(ROOT), str(ROOT / "recipes" / "quickstart"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(path: Path) -> dict[str, Any]:
    """Run the SFT stage in this process; returns time, memory, losses and parameters."""
    from transformers import TrainerCallback

    from align.cli.check.memory import count_parameters
    from align.config.load import load_recipe
    from align.sft import train as sft

    found: dict[str, Any] = {"mib_before": peak()}
    train = sft.train
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            ends.append(time.process_time())

    def measured(trainer: Any, *rest: Any) -> Any:
        trainer.add_callback(Clock())
        logs = train(trainer, *rest)
        found["mib"] = peak()  # before the model is loaded again, to merge an adapter into it
        found["trained"] = count_parameters(trainer.model, trained=True)
        return logs

    sft.train = measured
    recipe = load_recipe("sft", str(path))
    results = sft.run(recipe)
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return {
        **found,
        "seconds_per_step": statistics.median(steps),
        "loss_before": results.metrics["eval_loss_before"],
        "loss": results.metrics["eval_loss"],
        "parameters": whole(recipe),
    }


def whole(recipe: Any) -> int:
    """Parameters of the model that training starts from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from align.cli.check.memory import count_parameters, skeleton

    config = AutoConfig.from_pretrained(recipe.model_name_or_path or recipe.output_dir)
    return count_parameters(skeleton(AutoModelForCausalLM, config))


def peak() -> float:
    """The peak resident set of this process, in MiB."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}"


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(found["methods"]))
    whole_model, unit = (found["methods"][first][name] for name in ("parameters", "seconds_per_step"))
    table = Table(
        title=f"{whole_model:,} parameters, {found['rows_per_step']} rows a step, {found['steps']} steps, "
        f"{found['machine']}, {found['threads'] or 'all'} threads, {found['date']}"
    )
    for column in ("method", "trained", "share", "peak MiB", "above libraries", f"time / {first}", "held-out loss"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, values in found["methods"].items():
        table.add_row(
            method,
            f"{values['trained']:,}",
            f"{values['trained'] / whole_model:.2%}",
            f"{values['mib']:.0f}",
            f"{values['mib'] - values['mib_before']:.0f}",
            f"{values['seconds_per_step'] / unit:.2f}",
            f"{values['loss_before']:.3f} to {values['loss']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
