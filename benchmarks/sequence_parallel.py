"""What sequence parallelism saves and costs beside data parallelism: memory of activations and seconds by length, as JSON.

    python benchmarks/sequence_parallel.py --lengths 512 1024 2048 4096 8192 --json results.json

A small Llama on `--ranks` processes of this machine (gloo, one thread each), forward and backward, gradients summed over the
processes. `data`: each process has a row of its own; `sequence`: each has a part of one row, so that as many rows take as
many passes. Of the largest process:

kept_mib          what autograd keeps from the forward for the backward pass, weights left out, each storage once
peak_mib          how far the memory of the process rises in a pass (`VmHWM`, set back before each)
seconds_per_row   of all processes together, median of the passes after the first
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe
from programs import ROOT, free_port, report
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT))
from align.engine.distributed import World
from align.engine.sequence_parallel import ULYSSES, SequenceGroup

VOCABULARY, HEAD = 1024, 64
MODES = ("data", "sequence")
MIB = 2**20


def main() -> None:
    arguments = parse()
    results = mp.Manager().dict()
    mp.spawn(work, (arguments, free_port(), results), nprocs=arguments.ranks)
    rows = []
    for mode, length in itertools.product(MODES, arguments.lengths):
        found = [results[rank][mode, length] for rank in range(arguments.ranks)]
        worst = {name: max(each[name] for each in found) for name in found[0]}
        seconds = worst.pop("seconds") / (arguments.ranks if mode == "data" else 1)
        rows.append({"mode": mode, "length": length, "seconds_per_row": round(seconds, 3), **worst})
    report({"machine": describe(torch.device("cpu")), **vars(arguments), "rows": rows}, arguments.json)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="passes whose median is taken")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json")
    return parser.parse_args(words)


def work(rank: int, arguments: argparse.Namespace, port: int, results: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=arguments.ranks)
    group = SequenceGroup(World(rank, arguments.ranks, torch.device("cpu")), arguments.ranks)
    model, found = small_llama(arguments), {}
    for length, mode in itertools.product(arguments.lengths, MODES):
        model.set_attn_implementation(ULYSSES if mode == "sequence" else "sdpa")
        found[mode, length] = measure(model, length, arguments.rounds, group if mode == "sequence" else None)
    results[rank] = found
    dist.destroy_process_group()


def small_llama(arguments: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=arguments.width, intermediate_size=4 * arguments.width,
            num_hidden_layers=arguments.layers, num_attention_heads=arguments.width // HEAD,
            num_key_value_heads=arguments.width // HEAD, max_position_embeddings=max(arguments.lengths),
        )
    )  # fmt: skip


def measure(model: LlamaForCausalLM, length: int, rounds: int, group: SequenceGroup | None) -> dict[str, float]:
    """Seconds of a pass over a row of this length, or over this process's part of it, and MiB of memory."""
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
    labels = torch.cat([ids[:, 1:], torch.tensor([[-100]])], dim=1)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds, peaks = [], []
    for _ in range(1 + rounds):
        kept.clear()
        model.zero_grad(set_to_none=False)
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else it would use again what earlier passes have left
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        dist.barrier()
        start = time.perf_counter()
        inputs = {"input_ids": ids} if group is None else group.inputs(ids, None)
        own = labels if group is None else group.part(labels, -100)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(**inputs, use_cache=False).logits
            loss = cross_entropy(logits[0], own[0], reduction="sum") / (length - 1)
        loss.backward()
        del logits, loss
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
        seconds.append(time.perf_counter() - start)
        peaks.append(status("VmHWM") - before)
    return {
        "seconds": statistics.median(seconds[1:]),
        "kept_mib": round(sum(kept.values()) / MIB, 1),
        "peak_mib": round(max(peaks) / MIB, 1),
    }


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


if __name__ == "__main__":
    main()
