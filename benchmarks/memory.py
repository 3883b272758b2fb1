"""Peak memory of SFT and PPO on one and two processes, at each ZeRO stage and offloaded, beside the plan of `align check`.

    python benchmarks/memory.py --json results.json
    python benchmarks/memory.py --stages ppo --ranks 2 --zero 3 offload --bf16

Each run takes two optimizer steps on a random model of some 25 million weights, in processes of its own on the CPU, where what
would be on the GPU and what is offloaded share one memory. Measured is the most that is allocated at once in a process (by
glibc's `mallinfo2`, read every two milliseconds) before the model is saved, and its largest resident memory (`VmHWM`), which has also what
has been freed and is kept. Of both, that of the same run with a model of a few thousand weights is taken off: libraries,
buffers of gloo. The models' files have another precision than the weights that stay, which are then allocated; in the same one
they are pages of the file, which processes share.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from countdown import make_tokenizer
from machine import describe
from programs import ROOT, free_port, peak_memory, report
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

sys.path.insert(0, str(ROOT))
from align.cli.check.engine_memory import Bytes
from align.cli.check.memory import activation_bytes, needs, recipe_layout
from align.cli.check.ppo import PPOCheck
from align.cli.check.sample_rows import Start
from align.cli.check.sft import SFTCheck
from align.config.base import StageRecipe
from align.config.load import load_recipe

VOCABULARY, POSITIONS = 512, 64
SIZES = {"whole": (512, 8, 1376), "base": (16, 1, 32)}  # hidden size, layers, intermediate size
ZERO = ("none", "0", "1", "2", "3", "offload")  # none: plain torch
PRELOADED = ["align.sft.train", "align.ppo.train", "align.runs.launch", "deepspeed", "trl", "transformers.integrations"]


def main() -> None:
    arguments = parse()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for stage in arguments.stages:
            write_inputs(folder, torch.float32 if arguments.bf16 and stage == "ppo" else torch.bfloat16)
            for ranks in arguments.ranks:
                base = None
                for zero in arguments.zero:
                    if zero == "none" and ranks > 1:
                        continue
                    whole, small = (write_recipe(folder, stage, size, ranks, zero, arguments.bf16) for size in SIZES)
                    if base is None:
                        base = measure(context, stage, small, ranks, folder)
                    found = measure(context, stage, whole, ranks, folder)
                    allocated, resident = (found[name] - base[name] for name in ("allocated", "resident"))
                    planned = plan(stage, whole, ranks)
                    rows.append(
                        {"stage": stage, "ranks": ranks, "zero": zero, "bf16": arguments.bf16}
                        | {"allocated_mib": allocated / 2**20, "resident_mib": resident / 2**20}
                        | {name: size / 2**20 for name, size in planned.items()}
                        | {"ratio": allocated / planned["plan_mib"]}
                    )
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report({"machine": describe(torch.device("cpu")), "arguments": vars(arguments), "rows": rows}, arguments.json)
    show(rows)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=["sft", "ppo"], default=["sft", "ppo"])
    parser.add_argument("--ranks", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    parser.add_argument("--zero", nargs="+", choices=ZERO, default=list(ZERO))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", help="write the results there instead of printing them")
    return parser.parse_args(words)


def write_inputs(folder: Path, dtype: torch.dtype) -> None:
    """Models of both sizes in this precision, and rows of a few tokens, so that activations are small beside the weights."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(VOCABULARY, POSITIONS)
    for size, (hidden, layers, intermediate) in SIZES.items():
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=intermediate, max_position_embeddings=POSITIONS, tie_word_embeddings=False, num_labels=1,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        for name, cls in (("lm", LlamaForCausalLM), ("scorer", LlamaForSequenceClassification)):
            path = folder / size / name
            cls(config).to(dtype).save_pretrained(path)
            tokenizer.save_pretrained(path)
    lines = [json.dumps({"prompt": f"w{5 + i} w{6 + i}", "completion": f" w{7 + i}"}) + "\n" for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{5 + i}"}) + "\n" for i in range(16)), encoding="utf-8")  # fmt: skip


def write_recipe(folder: Path, stage: str, size: str, ranks: int, zero: str, bf16: bool) -> Path:
    """A recipe of two optimizer steps, each of two microbatches of a row a process."""
    name = f"{stage}-{size}-{ranks}-{zero}"
    common = {"stage": stage, "output_dir": str(folder / f"out-{name}"), "bf16": bf16, "eval_fraction": 0.0}
    common |= {"per_device_train_batch_size": 1, "logging_steps": 1}
    if zero != "none":
        file = f"zero3_{zero}.json" if zero == "offload" else f"zero{zero}.json"
        path = ROOT / "recipes" / "deepspeed" / file
        if zero == "0":
            path = folder / "zero0.json"
            path.write_text(json.dumps({"zero_optimization": {"stage": 0}}), encoding="utf-8")
        common["deepspeed"] = str(path)
    if stage == "sft":
        keys = {"model_name_or_path": str(folder / size / "lm"), "train_dataset": str(folder / "rows.jsonl")}
        keys |= {"train_batch_size": 2 * ranks, "max_steps": 2, "max_length": 16}
    else:
        keys = {"sft_model_path": str(folder / size / "lm"), "reward_model_path": str(folder / size / "scorer")}
        keys |= {
            "train_dataset": str(folder / "prompts.jsonl"),
            "rollout_batch_size": 2 * ranks,
            "total_episodes": 4 * ranks,
        }
        keys |= {"minibatch_size": 2 * ranks, "num_ppo_epochs": 1, "response_length": 8, "max_prompt_length": 8}
        keys |= {"per_device_eval_batch_size": 1, "skip_self_checks": True}
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({**common, **keys}), encoding="utf-8")
    return recipe


def measure(context: Any, stage: str, recipe: Path, ranks: int, folder: Path) -> dict[str, int]:
    """The largest peaks of the run's processes, in bytes."""
    port = free_port()
    results = [folder / f"{recipe.stem}-{rank}.peak" for rank in range(ranks)]
    processes = []
    for rank, result in enumerate(results):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            context.Process(target=train, args=(stage, str(recipe), place if ranks > 1 else {}, str(result)))
        )
        processes[-1].start()
    for process in processes:
        process.join()
    if not all(result.exists() for result in results):
        sys.exit(f"{recipe.name} failed:\n{Path(f'{results[0]}.log').read_text()[-3000:]}")
    peaks = [json.loads(result.read_text()) for result in results]
    return {name: max(each[name] for each in peaks) for name in peaks[0]}


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


class Allocated(threading.Thread):
    """Watches what this process has allocated."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.read = ctypes.CDLL(None).mallinfo2
        self.read.restype = Mallinfo

    def run(self) -> None:
        while True:
            now = self.read()
            self.peak = max(self.peak, now.uordblks + now.hblkhd)
            time.sleep(0.002)


def train(stage: str, recipe: str, place: dict[str, Any], result: str) -> None:
    """Run the stage in this process up to where it would save its model, and write the peaks of its memory."""
    log = os.open(f"{result}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({name: str(value) for name, value in place.items()})
    from align.ppo import train as ppo
    from align.sft import train as sft

    allocated = Allocated()

    def end(*_: Any, **__: Any) -> None:
        peaks = {"allocated": allocated.peak, "resident": peak_memory(os.getpid())}
        Path(result).write_text(json.dumps(peaks), encoding="utf-8")
        os._exit(0)

    sft.save_trained = ppo.save_outputs = end  # type: ignore[attr-defined]
    allocated.start()
    (sft if stage == "sft" else ppo).run(load_recipe(stage, recipe))


def plan(stage: str, path: Path, ranks: int) -> dict[str, float]:
    """What `align check` counts, in bytes: on the GPU and on the host, activations included."""
    recipe = load_recipe(stage, str(path))
    checked = SFTCheck() if stage == "sft" else PPOCheck()
    config = LlamaConfig.from_pretrained(path.parent / "whole" / "lm")
    others = {} if stage == "sft" else dict.fromkeys(["value", "reward"], config)
    total = planned(recipe, checked, Start(config, make_tokenizer(VOCABULARY, POSITIONS), others=others), ranks)
    activations = activation_bytes(config, 1, 16, recipe.bf16, False, True)
    return {
        "plan_mib": total.gpu_peak + total.host + activations,
        "gpu_mib": total.gpu_peak + activations,
        "host_mib": total.host,
    }


def planned(recipe: StageRecipe, checked: SFTCheck | PPOCheck, start: Start, ranks: int) -> Bytes:
    """What `align check` counts for the models of a recipe on a process."""
    sizes = [
        needs(recipe, model, recipe_layout(recipe, model.name, ranks, start.config.hidden_size))
        for model in checked.footprints(recipe, start)
    ]
    return sum(sizes, Bytes())


def show(rows: list[dict[str, Any]]) -> None:
    columns = ["stage", "processes", "ZeRO", "allocated, MiB", "plan, MiB", "allocated / plan", "resident, MiB"]
    table = Table(*columns, title="Peak memory a process")
    for row in rows:
        sizes = (
            f"{row['allocated_mib']:.0f}",
            f"{row['plan_mib']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['resident_mib']:.0f}",
        )
        table.add_row(row["stage"], str(row["ranks"]), row["zero"], *sizes)
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
