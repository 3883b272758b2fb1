"""How the cost of a PPO step scales with response length, batch size, model size, ranks and ZeRO stage.

    python benchmarks/scaling.py --json scaling.json --picture scaling.svg
    python benchmarks/scaling.py --sizes --ranks --zeros        # an axis without values is skipped

Each point is a measurement with `ppo.py`; along an axis one setting varies, and the others are those of the base point. All
prompts of a point have the same length, and so do all responses. Cost is seconds per response token over all ranks, reported
with the number of required operations (`machine.py`), both relative to the first point of the axis. Ranks share the threads,
so that all points use the same machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ppo
import torch
from countdown import COUNTS, SIZES
from machine import describe, rates, step_flops
from panels import Panel, draw
from programs import report, short
from rich.console import Console
from rich.table import Table

PHASES = ("generate", "score", "update", "total")
EXPECTED = "total, if as operations"


class Point(NamedTuple):
    """The settings of one measurement. ZeRO stage 0 is a run without a DeepSpeed file."""

    response_length: int
    batch: int
    size: str
    ranks: int
    zero: int


TITLES = {
    "response_length": "response length, tokens",
    "batch": "batch, responses an update",
    "size": "model size, millions of parameters",
    "ranks": "ranks, on the same cores",
    "zero": "ZeRO stage, on several ranks",
}
Axes = dict[str, list[Point]]


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    machine = rates(device)
    lines = axes(arguments)
    points = dict.fromkeys(point for line in lines.values() for point in line)
    measured = {point: measure(arguments, point, machine) for point in points}
    results: dict[str, Any] = {"machine": describe(device), "rates": machine, "arguments": vars(arguments), "axes": {}}
    for name, line in lines.items():
        work = [operations(arguments, point) for point in line]
        tokens = [point.batch * point.response_length for point in line]
        summary = summarise([measured[point]["seconds"] for point in line], work, tokens)
        memory = [measured[point]["peak_gib"] for point in line]
        results["axes"][name] = {
            "values": [getattr(point, name) for point in line],
            **summary,
            "peak_gib": memory,
            "points": [point._asdict() for point in line],
        }
        show(name, results["axes"][name])
    Path(arguments.picture).write_text(picture(results["axes"]), encoding="utf-8")
    report(results, arguments.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    axis = parser.add_argument_group("axes").add_argument
    axis("--response_lengths", type=int, nargs="*", default=[32, 64, 128, 256, 512, 1024], metavar="TOKENS")
    axis("--batches", type=int, nargs="*", default=[8, 16, 32, 64, 128], metavar="RESPONSES")
    axis("--sizes", nargs="*", default=["1M", "10M", "60M"], choices=list(SIZES))
    axis("--ranks", type=int, nargs="*", default=[1, 2])
    axis("--zeros", type=int, nargs="*", default=[0, 1, 2, 3], choices=[0, 1, 2, 3], help="ZeRO stages")
    base = parser.add_argument_group("base point").add_argument
    base("--response_length", type=int, default=64)
    base("--batch", type=int, default=16, help="responses an update; one optimizer step per epoch")
    base("--size", default="10M", choices=list(SIZES))
    base("--zero_ranks", type=int, default=2, help="ranks of the points along the axis of ZeRO stages")
    parser.add_argument("--prompt_length", type=int, default=16)
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences in a training pass")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--updates", type=int, default=3, help="of a process, the first of which is not counted")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all ranks together")
    parser.add_argument("--json", help="write the results there instead of printing them")
    parser.add_argument("--picture", default="scaling.svg", help="where to write the plot")
    arguments = parser.parse_args()
    if max([*arguments.response_lengths, arguments.response_length]) > COUNTS:
        parser.error(f"responses are at most {COUNTS} tokens long")
    return arguments


def axes(arguments: argparse.Namespace) -> Axes:
    """The points along each axis that has values."""
    base = Point(arguments.response_length, arguments.batch, arguments.size, 1, 0)
    found = {
        "response_length": [base._replace(response_length=length) for length in arguments.response_lengths],
        "batch": [base._replace(batch=batch) for batch in arguments.batches],
        "size": [base._replace(size=size) for size in arguments.sizes],
        "ranks": [base._replace(ranks=ranks) for ranks in arguments.ranks],
        "zero": [base._replace(ranks=arguments.zero_ranks, zero=zero) for zero in arguments.zeros],
    }
    return {name: line for name, line in found.items() if line}


def measure(arguments: argparse.Namespace, point: Point, machine: dict[str, float]) -> dict[str, Any]:
    """Measure this point with `ppo.py`: seconds of an update by phase, and peak memory."""
    settings: dict[str, list[Any]] = {
        "sizes": [point.size], "batch": [point.batch], "ranks": [point.ranks],
        "response_lengths": [point.response_length] * 2, "prompt_lengths": [arguments.prompt_length] * 2,
        **{name: [getattr(arguments, name)] for name in ("micro_batch", "epochs", "updates", "rounds", "threads")},
        **({"zero": [point.zero]} if point.zero else {}),
    }  # fmt: skip
    words = [f"{word}" for name, values in settings.items() for word in (f"--{name}", *values)]
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = ppo.measure(ppo.parse(words), point.size, Path(folder), machine)["align"]
    seconds = found["seconds"]
    print(f"{point}: {short(seconds['total'])} s an update", file=sys.stderr)
    tokens = seconds["tokens_per_second"] * seconds["total"]
    if abs(tokens / (point.batch * point.response_length) - 1) > 0.2:  # a mean of two rates is not that of their times
        sys.exit(f"{point}: the policy answered with some {tokens:.0f} tokens an update: other work than is counted")
    return found


def operations(arguments: argparse.Namespace, point: Point) -> dict[str, float]:
    """Floating-point operations of an update, by phase."""
    prompts, responses = [arguments.prompt_length] * point.batch, [point.response_length] * point.batch
    work = step_flops(SIZES[point.size], prompts, responses, arguments.epochs)
    return {**work, "total": sum(work.values())}


def summarise(
    seconds: Sequence[dict[str, float]], work: Sequence[dict[str, float]], tokens: Sequence[int]
) -> dict[str, Any]:
    """Cost per response token along an axis, by phase: in seconds, and relative to the first point.

    Args:
        seconds, work: of an update at each point, by phase.
        tokens: response tokens of an update at each point.
    """

    def each_token(costs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
        return {phase: [cost[phase] / n for cost, n in zip(costs, tokens, strict=True)] for phase in PHASES}

    def relative(costs: dict[str, list[float]]) -> dict[str, list[float]]:
        return {phase: [cost / line[0] for cost in line] for phase, line in costs.items()}

    times, flops = each_token(seconds), each_token(work)
    return {
        "seconds_per_token": times,
        "operations_per_token": flops,
        "relative_seconds": relative(times),
        "relative_operations": relative(flops),
        "spread": {phase: max(line) / min(line) - 1 for phase, line in times.items()},
    }


def picture(found: dict[str, Any]) -> str:
    """All axes as panels of milliseconds per response token by phase."""
    panels = []
    for name, axis in found.items():
        curves = {phase: [1e3 * second for second in line] for phase, line in axis["seconds_per_token"].items()}
        expected = {EXPECTED: [curves["total"][0] * growth for growth in axis["relative_operations"]["total"]]}
        values = axis["values"]
        if name == "size":
            values = [int(value.removesuffix("M")) for value in values]
        elif name == "zero":
            values = [str(value) for value in values]
        panels.append(Panel(TITLES[name], values, {**curves, **expected}))
    return draw(panels, "ms per response token", EXPECTED)


def show(name: str, axis: dict[str, Any]) -> None:
    table = Table("", *PHASES, "relative", "operations", "GiB", title=f"{TITLES[name]}: ms per response token, "
                  f"spread {axis['spread']['total']:.0%}")  # fmt: skip
    for index, value in enumerate(axis["values"]):
        costs = [1e3 * axis["seconds_per_token"][phase][index] for phase in PHASES]
        growth = [axis[key]["total"][index] for key in ("relative_seconds", "relative_operations")]
        table.add_row(str(value), *map(short, [*costs, *growth, axis["peak_gib"][index]]))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
