"""How much memory an engine takes, by arithmetic: on the GPU, and what is offloaded in the memory of the host.

Bytes per parameter that trains by AdamW on one process:

    float32    4 weight   4 gradient    8 optimizer (two moments)                                                     16
    bfloat16   2 weight   4 gradient   12 optimizer (float32 master weight and two moments)                           18

A frozen parameter has its weight only. ZeRO 1 divides the optimizer states by the number of processes N, ZeRO 2 the gradients
too, ZeRO 3 the weights too, also of frozen models (Rajbhandari et al. 2020, arXiv 1910.02054, section 5). DeepSpeed 0.19 holds
more than that paper counts: from ZeRO 1 on a float32 copy of this process's part of the weights also where they are float32;
this process's gradients a second time while it steps (at ZeRO 1 in bfloat16 all gradients too, as measured); and buckets of
`reduce_bucket_size` gradients, two with `overlap_comm`. At ZeRO 1 and 2 it gathers weights after a step, in place of the
gradients, at most `allgather_bucket_size` of them. At ZeRO 3 it gathers them for each pass, when there are no gradients of a
step: at most `stage3_max_live_parameters` of them, and `stage3_prefetch_bucket_size` as they arrive, before they are put
together. All this passes: models take turns with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.config.deepspeed_file import read_deepspeed_file
from align.engine.deepspeed_config import automatic_sizes

BUCKET = 5e8  # elements: DeepSpeed's default for both kinds
LIVE = 1e9  # elements that ZeRO 3 keeps gathered: its default for stage3_max_live_parameters
PREFETCH = 5e7  # elements that it gathers at once: its default for stage3_prefetch_bucket_size


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is spread over processes.

    Attributes:
        stage: of ZeRO; None is plain torch.
        reduced, gathered: elements of the buckets of gradients (of all of them), and of weights at ZeRO 1 and 2.
        live, prefetch: elements that are gathered at ZeRO 3, and at once.
        offloads_weights, offloads_optimizer: to the host.
    """

    stage: int | None = None
    processes: int = 1
    reduced: float = 0
    gathered: float = BUCKET
    live: float = LIVE
    prefetch: float = PREFETCH
    offloads_weights: bool = False
    offloads_optimizer: bool = False

    @classmethod
    def from_file(cls, path: str | None, processes: int, hidden_size: int) -> Layout:
        """The layout of a model of this width by a DeepSpeed file; without one, ZeRO 0 on several processes."""
        if path is None:
            return cls(0, processes) if processes > 1 else cls()
        zero = read_deepspeed_file(path).get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        sizes = automatic_sizes(hidden_size)
        bucket = _size(zero, "reduce_bucket_size", BUCKET, sizes)
        double = stage in (1, 2) and bool(zero.get("overlap_comm", False))
        contiguous = zero.get("contiguous_gradients", True) is not False
        return cls(
            stage,
            processes,
            bucket * (1 + double) if stage and contiguous else 0,
            _size(zero, "allgather_bucket_size", BUCKET),
            _size(zero, "stage3_max_live_parameters", LIVE),
            _size(zero, "stage3_prefetch_bucket_size", PREFETCH, sizes),
            _offloads(zero, "offload_param"),
            _offloads(zero, "offload_optimizer"),
        )


def ready_layout(stage: int, processes: int, hidden_size: int) -> Layout:
    """That of the files in recipes/deepspeed, whose buckets are "auto"; on one process stage 0 is plain torch."""
    if stage == 0:
        return Layout(0, processes) if processes > 1 else Layout()
    sizes = automatic_sizes(hidden_size)
    reduced = sizes["reduce_bucket_size"] * (2 if stage < 3 else 1)
    return Layout(stage, processes, reduced, prefetch=sizes["stage3_prefetch_bucket_size"])


@dataclass(frozen=True, slots=True)
class Bytes:
    """Memory of a process: what stays on its GPU and on its host, and what passes on its GPU, of one model at a time."""

    gpu: float = 0.0
    host: float = 0.0
    passing: float = 0.0

    @property
    def gpu_peak(self) -> float:
        return self.gpu + self.passing

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.gpu + other.gpu, self.host + other.host, max(self.passing, other.passing))


def engine_bytes(parameters: int, trained: int, layout: Layout, bf16: bool, moments: int = 8) -> Bytes:
    """Memory per process for a model's weights, gradients, optimizer states and buckets; see above.

    Args:
        moments: bytes per trained parameter that the optimizer keeps beside float32 weights.
    """
    width, zero, n = 2 if bf16 else 4, layout.stage or 0, layout.processes
    weights = parameters * width / (n if zero >= 3 else 1)
    masters = 4 * trained if bf16 or zero else 0
    gradients = 4 * trained / (n if zero >= 2 else 1)
    stepped = 4 * trained / n if zero else 0.0
    if layout.stage == 0 and bf16:  # sums beside the gradients that DeepSpeed reads, which it copies to step
        gradients, stepped = 6 * trained, 4 * trained
    optimizer = (masters + moments * trained) / (n if zero else 1)
    passing = 0.0 if layout.offloads_optimizer else stepped
    if zero == 1 and bf16:
        passing += 4 * trained  # all gradients once more while they are added over processes
    if trained and layout.stage == 0:
        passing += 4 * min(trained, BUCKET)  # gradients in a row, to be added over processes
    buckets = layout.reduced * (2 if bf16 and zero >= 2 else 4) if trained and zero else 0.0
    if trained and zero in (1, 2):  # gathered once the gradients are gone
        passing = max(passing, min(trained, layout.gathered) * width - gradients) + buckets
    if zero >= 3 and (n > 1 or layout.offloads_weights):
        gathered = min(parameters, layout.live) + min(parameters, layout.prefetch)
        passing = max(passing, gathered * width + buckets)
    with_optimizer = optimizer + stepped + (gradients if zero >= 2 else 0)
    offloaded = weights * layout.offloads_weights + with_optimizer * layout.offloads_optimizer
    staying = weights + gradients + optimizer + stepped * layout.offloads_optimizer
    return Bytes(staying - offloaded, offloaded, passing)


def _size(zero: Mapping[str, Any], name: str, default: float, automatic: Mapping[str, float] = {}) -> float:
    size = zero.get(name, default)
    return automatic.get(name, default) if size == "auto" else float(size)


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    section: Mapping[str, Any] = zero.get(name) or {}
    return str(section.get("device", "none")) != "none"
