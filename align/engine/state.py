"""The training state by parameter name: float32 weights and their optimizer states, in safetensors.

    sums = save_state(folder, module, optimizer, world, note)   # on every rank
    note = load_state(folder, module, optimizer)                # on every rank; of any other number of them

`module` is the model itself (in no wrapper of DeepSpeed's, torch's or accelerate's, so that names agree), `optimizer`
torch's own or one that `deepspeed.initialize` returned (not accelerate's wrapper: take its `.optimizer`). A state saved
at any ZeRO stage, or without DeepSpeed, is loaded at any other; in the layout that it was saved in, training goes on
to the bit. Only trained parameters and buffers are saved: frozen ones are loaded from the model's folder. `note` is
anything JSON (a scheduler's `state_dict()`, counters). `sums` goes to `align.runs.checkpoint.mark_complete`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.compat.deepspeed import copy_stepped_weights, full_shape, splits_state, stepped_parts
from align.engine.distributed import World
from align.engine.mixed_precision import copy_masters
from align.engine.optimizer import trained_parameters
from align.engine.parts import Number, Part, SavedParts, write_parts
from align.errors import UserError

WEIGHT, BUFFER = "weight", "buffer"
OTHER = "other"  # what an optimizer keeps of a weight in another shape, such as Adafactor's means over rows and columns
OF = " of "  # in the name of such a tensor
CHANGING = ("lr", "initial_lr", "step")  # what training changes in an optimizer's parameter groups
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of a DeepSpeed engine


def save_state(
    folder: Path,
    module: nn.Module,
    optimizer: Any,
    world: World,
    note: Any = None,
    masters: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> dict[str, list[int]]:
    """Write the state of training; each rank writes, sums and syncs a file of its own. Every rank must call it.

    Args:
        masters: weight of the model -> the float32 one that a plain optimizer steps instead.

    Returns:
        size and CRC-32 of each file that this rank wrote, by its name in `folder`.
    """
    base = _base(optimizer)
    replicated = not splits_state(optimizer)
    parts = {}
    for name, held in _local_parts(module, optimizer, masters).items():
        values, numbers, others = _kept(base, held)
        own = {kind: value.detach().reshape(-1)[held.offset : held.offset + held.count] for kind, value in values}
        parts[name] = Part(held.shape, held.start, own, numbers, replicated)
        for key, value in others.items():
            parts[f"{key}{OF}{name}"] = Part(tuple(value.shape), 0, {OTHER: value}, replicated=True)
    for name, buffer in _buffers(module).items():
        parts[name] = Part(tuple(buffer.shape), 0, {BUFFER: buffer}, replicated=True)
    groups = [{key: group[key] for key in CHANGING if key in group} for group in base.param_groups]
    return write_parts(folder, parts, world, {"optimizer": type(base).__name__, "groups": groups, "note": note})


@torch.no_grad()
def load_state(
    folder: Path,
    module: nn.Module,
    optimizer: Any,
    masters: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> Any:
    """Restore what `save_state` wrote, in this layout or another; returns its `note`. Every rank must call it.

    Raises:
        UserError: the files are damaged, or hold the state of another model or optimizer.
    """
    saved, base = SavedParts(folder), _base(optimizer)
    everything, buffers = _local_parts(module, optimizer, masters), _buffers(module)
    with saved.readable():
        _check(saved, module, base)
        for held in everything.values():
            base.state.pop(held.stepped, None)
        for name, held in everything.items():
            for kind in saved.kinds(name) if held.count else ():
                values = saved.read(name, kind, held.start, held.count)
                target = held.stepped if kind == WEIGHT else _moment(base, held.stepped, kind, values.dtype)
                if held.count == target.numel():
                    target.copy_(values.view(target.shape))
                else:  # of a flat tensor
                    target[held.offset : held.offset + held.count] = values
            for key, number in saved.numbers[name].items():
                _raise_number(base, held.stepped, key, number)
        for other in filter(_is_other, saved.shapes):
            key, name = other.split(OF)
            shape, stepped = saved.shapes[other], everything[name].stepped
            values = saved.read(other, OTHER, 0, math.prod(shape)).view(shape)
            base.state[stepped][key] = values.to(stepped.device)
        for name, buffer in buffers.items():
            buffer.copy_(saved.read(name, BUFFER, 0, buffer.numel()).view(buffer.shape))
        for group, kept in zip(base.param_groups, saved.note["groups"], strict=True):
            group.update({key: 0 + value for key, value in dict(kept).items() if key in CHANGING})
        note = saved.note["note"]
    copy_masters((masters or {}).items())
    copy_stepped_weights(optimizer)
    return note


def counters(engine: Any) -> dict[str, int]:
    """The counters of a DeepSpeed engine, for a `note`."""
    return {name: getattr(engine, name) for name in COUNTERS}


def restore_counters(engine: Any, note: Mapping[str, Any] | None) -> None:
    """Set what a DeepSpeed engine counts; a run without DeepSpeed has counted nothing."""
    for name in COUNTERS:
        setattr(engine, name, int((note or {}).get(name, getattr(engine, name))))


@dataclass(frozen=True, slots=True)
class _LocalPart:
    """The part of a parameter that this rank steps: `count` elements from `start` on, `offset` in what is stepped."""

    shape: tuple[int, ...]  # of the whole parameter
    stepped: Tensor  # the key of the optimizer's state
    offset: int
    start: int
    count: int


def _local_parts(
    module: nn.Module, optimizer: Any, masters: Mapping[nn.Parameter, nn.Parameter] | None
) -> dict[str, _LocalPart]:
    trained = {name: parameter for name, parameter in trained_parameters(module) if full_shape(parameter).numel()}
    parts = stepped_parts(optimizer, trained.values())
    if parts is None:
        whole = {name: (masters or {}).get(parameter, parameter) for name, parameter in trained.items()}
        return {name: _LocalPart(tuple(weight.shape), weight, 0, 0, weight.numel()) for name, weight in whole.items()}
    return {name: _LocalPart(tuple(full_shape(p)), *parts[p]) for name, p in trained.items() if p in parts}


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer in DeepSpeed's wrapper."""
    base: torch.optim.Optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    return base


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    persistent = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent and buffer.numel()}


def _kept(
    base: torch.optim.Optimizer, held: _LocalPart
) -> tuple[list[tuple[str, Tensor]], dict[str, Number], dict[str, Tensor]]:
    """What is kept of a tensor that the optimizer steps: values by element, numbers, and tensors of other shapes."""
    stepped = held.stepped
    values, numbers, others = [(WEIGHT, stepped)], {}, {}
    for key, value in base.state.get(stepped, {}).items():
        if isinstance(value, Tensor) and value.shape == stepped.shape and key != "step":
            values.append((key, value))
        elif isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
            numbers[key] = value.item() if isinstance(value, Tensor) else value
        elif isinstance(value, Tensor) and held.shape == stepped.shape:
            others[key] = value
        elif value is not None:  # of a tensor made of several weights, or of a part of one
            raise UserError(
                f"{type(base).__name__} keeps a {key} that cannot be saved; leave optimizer out of the DeepSpeed file."
            )
    return values, numbers, others


def _is_other(name: str) -> bool:
    """Whether a saved tensor is neither a parameter nor a buffer."""
    return OF in name


def _moment(base: torch.optim.Optimizer, stepped: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    state = base.state[stepped]
    if kind not in state:
        state[kind] = torch.zeros_like(stepped, dtype=dtype)
    moment: Tensor = state[kind]
    return moment


def _raise_number(base: torch.optim.Optimizer, stepped: Tensor, key: str, number: Number) -> None:
    """Set a number of a stepped tensor; of parameters that are stepped as one, the greatest counts."""
    state = base.state[stepped]
    number = max(number, type(number)(state.get(key, number)))
    if isinstance(number, float):  # torch's optimizers count in float32, fused ones on the device
        fused = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
        state[key] = torch.tensor(number, device=stepped.device if fused else "cpu")
    else:
        state[key] = number


def _check(saved: SavedParts, module: nn.Module, base: torch.optim.Optimizer) -> None:
    """Check that a saved state fits.

    Raises:
        UserError: it does not.
    """
    mine = {name: tuple(full_shape(parameter)) for name, parameter in trained_parameters(module)}
    mine |= {name: tuple(buffer.shape) for name, buffer in _buffers(module).items()}
    mine = {name: shape for name, shape in mine.items() if math.prod(shape)}
    theirs = {name: shape for name, shape in saved.shapes.items() if not _is_other(name)}
    different = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"{saved.folder}: holds the state of another model: {name} has shape {theirs.get(name)} there and "
            f"{mine.get(name)} in this run ({len(different)} such); delete the output folder to start over."
        )
    kind, groups = saved.note["optimizer"], len(saved.note["groups"])
    if (kind, groups) != (type(base).__name__, len(base.param_groups)):
        raise UserError(
            f"{saved.folder}: holds the state of {kind} with {groups} parameter groups, and this run has "
            f"{type(base).__name__} with {len(base.param_groups)}; delete the output folder to start over."
        )
