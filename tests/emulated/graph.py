"""A CUDA graph in Python: the operations of a step, run again on the tensors that they had then, whatever Python would do now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

# While a graph is captured, a GPU cannot tell Python a number, nor make a tensor whose size depends on one.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class Recorded(TorchDispatchMode):
    """Operations with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {each.device for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor) and each.dim()}
        if kwargs and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]))
        if func._schema.name in WAITING or len({device.type for device in devices}) > 1:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func._schema.name}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class EmulatedGraph:
    """A step, captured as by `cuda_graph`; a call replays it."""

    def __init__(self, step: Callable[[], Tensor]):
        step()
        with Recorded() as recorded:
            self.captured = step()
        self.calls = recorded.calls

    @torch.no_grad()
    def __call__(self) -> Tensor:
        now: dict[int, Tensor] = {}  # results of this replay, by those of the capture
        for func, args, kwargs, result in self.calls:
            args, kwargs = tree_map_only(Tensor, lambda each: now.get(id(each), each), (args, kwargs))
            again = func(*args, **kwargs)
            for then, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                now[id(then)] = new
        return now[id(self.captured)]
