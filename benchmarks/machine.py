"""The limits of this machine, and the work that a PPO step requires."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def best(call: Callable[[], Any], device: torch.device, seconds: float = 1.0) -> float:
    """Shortest time of a call in seconds, after a warm-up."""

    def timed() -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    end = time.perf_counter() + seconds
    timed()
    times = [timed() for _ in range(3)]
    while time.perf_counter() < end:
        times.append(timed())
    return min(times)


def rates(device: torch.device) -> dict[str, float]:
    """Matmul rates in GFLOP/s for a square and for the fastest of a transformer's shapes, and memory bandwidth in GB/s."""
    found: dict[str, float] = {}
    size = 2048 if device.type == "cpu" else 8192
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        shapes = ((size, size, size), (2048, 320, 864), (2048, 640, 1728))
        found[f"{name}_gflops"] = max(
            2e-9 * m * k * n / best(_product(m, k, n, dtype, device), device) for m, k, n in shapes
        )
    source = torch.ones(2**27 if device.type == "cpu" else 2**30, device=device)
    target = torch.empty_like(source)
    found["memory_gbytes"] = 2e-9 * source.nbytes / best(lambda: target.copy_(source), device)
    return found


def _product(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    rows = torch.randn(m, k, dtype=dtype, device=device)
    weight = torch.randn(n, k, dtype=dtype, device=device)
    return lambda: torch.nn.functional.linear(rows, weight)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def step_flops(shape: Sequence[int], prompts: Sequence[int], responses: Sequence[int], epochs: int) -> dict[str, float]:
    """Floating-point operations that one PPO step requires, by phase, without padding or recomputation.

    Every token passes the matrices once per forward pass (2 operations a weight), the head only where a response token
    is predicted, and looks at every token before it; a training pass costs three forward passes. The policy's old
    log-probabilities come from sampling, so three models score.

    Args:
        shape: hidden size, layers, heads, intermediate size, vocabulary.
        prompts, responses: tokens of each row.
    """
    hidden, layers, _, intermediate, vocabulary = shape
    body = 2 * layers * (4 * hidden**2 + 3 * hidden * intermediate)
    head = 2 * hidden * vocabulary

    def attention(first: int, last: int) -> float:  # of the tokens from the first to before the last
        return 4 * layers * hidden * (last * (last + 1) - first * (first + 1)) / 2

    rows = list(zip(prompts, responses, strict=True))
    forward = sum(body * (p + r) + attention(0, p + r) for p, r in rows)
    heads = head * sum(responses)
    return {
        "generate": sum(body * (p + r - 1) + attention(0, p + r - 1) for p, r in rows) + heads,
        "score": 3 * forward + heads,
        "update": 3 * epochs * (2 * forward + heads),
    }


def decode_bytes(shape: Sequence[int], responses: Sequence[int], bytes_each: int) -> float:
    """Bytes of weights that sampling must read: all weights once per token of the longest response."""
    hidden, layers, _, intermediate, vocabulary = shape
    return bytes_each * max(responses) * (layers * (4 * hidden**2 + 3 * hidden * intermediate) + hidden * vocabulary)
