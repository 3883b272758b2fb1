"""The decoding loop on responses of geometric length: batch after batch, with prompts that take the places of ended rows, and with
CUDA graphs as well.

    python benchmarks/decoding.py --json results.json
    python benchmarks/decoding.py --sizes 0.5B --bf16 --rows 512 --batch 128 --mean 256      # on a GPU

All sample the same tokens, but for rounding. Rounds alternate between them; seconds are medians. A token ends its response with the same
probability everywhere, so that lengths are geometric, cut at four times their mean.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from countdown import EOS, PAD, SIZES, config, make_tokenizer
from machine import describe
from programs import report
from torch import Tensor
from transformers import LlamaForCausalLM

from align.data.collate import chunks, pad_left
from align.generation import generate
from align.generation.captured import Captured, cuda_graph
from align.generation.ending import Ending
from align.generation.sampling import uniforms


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    generate.REFILL = arguments.refill
    results: dict[str, Any] = {"machine": describe(device), "arguments": vars(arguments)}
    for size in arguments.sizes:
        results[size] = measure(arguments, size, device)
    report(results, arguments.json)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1M", "10M"], choices=list(SIZES))
    parser.add_argument("--rows", type=int, default=64, help="responses")
    parser.add_argument("--batch", type=int, default=16, help="responses that are decoded at once")
    parser.add_argument("--mean", type=int, default=32, help="mean length before the cut, in tokens")
    parser.add_argument("--prompt_lengths", type=int, nargs=2, default=[16, 64])
    parser.add_argument(
        "--refill", type=int, default=generate.REFILL, help="prompts are taken once 1/N of the batch is free"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", help="write the results there instead of printing them")
    return parser.parse_args(words)


@torch.no_grad()
def measure(arguments: argparse.Namespace, size: str, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    longest, length = max(arguments.prompt_lengths), 4 * arguments.mean
    settings = config(size, longest + length)
    model = LlamaForCausalLM(settings).to(device, torch.bfloat16 if arguments.bf16 else torch.float32).eval()
    passes = []

    def end_at_random(_: Any, __: Any, output: Any) -> None:
        passes.append(1)
        logits = output.logits[:, -1]
        logits[:, EOS] = -torch.inf
        logits[:, EOS] = logits.logsumexp(dim=-1) - math.log(arguments.mean - 1)

    model.register_forward_hook(end_at_random)
    least, most = arguments.prompt_lengths
    prompts = [
        torch.randint(3, settings.vocab_size, (least + i * 37 % (most - least + 1),)).tolist()
        for i in range(arguments.rows)
    ]
    ids, mask = (each.to(device) for each in pad_left(prompts, PAD))
    noise = uniforms(0, "benchmark", range(arguments.rows), length).to(device)
    ending = Ending(make_tokenizer(settings.vocab_size, longest + length))

    def decode(part: slice, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        return generate.generate(model, ids[part], mask[part], noise[part], 1.0, ending, **settings)

    ways: dict[str, Any] = {
        "batches": lambda: [decode(part) for part in chunks(arguments.rows, arguments.batch)],
        "refilled": lambda: [decode(slice(None), batch_size=arguments.batch)],
    }
    if device.type == "cuda":
        ways["captured"] = lambda: [decode(slice(None), batch_size=arguments.batch, capture=cuda_graph)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    for number in range(arguments.rounds + 1):  # the first is a warm-up
        for name, way in ways.items():
            passes.clear()
            began = time.perf_counter()
            decoded = way()
            tokens = sum(int(real.sum()) for _, real, _ in decoded)  # waits for a GPU
            if number:
                seconds[name].append(time.perf_counter() - began)
            found[name] = {"tokens": tokens, "passes": len(passes)}  # without replays, which call no hook
    for name in ways:
        found[name]["seconds"] = statistics.median(seconds[name])
        found[name]["tokens_per_second"] = found[name]["tokens"] / found[name]["seconds"]
    found["ratio"] = {name: found["batches"]["seconds"] / found[name]["seconds"] for name in ways}
    found["ratio"]["passes"] = found["batches"]["passes"] / found["refilled"]["passes"]
    found["graphs_work"] = Captured.works
    return found


if __name__ == "__main__":
    main()
