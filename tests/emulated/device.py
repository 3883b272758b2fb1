"""A device in Python, in place of a GPU: CPU arithmetic behind tensors that say that they are elsewhere.

It refuses what CUDA refuses (tensors of two devices in one operation), and counts what is slow there: operations that Python
dispatches, kernels among them (a view launches none), and synchronizations, in which Python waits for the device.

The backend is torch's PrivateUse1, which cannot be taken back: use it in a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "emulated"
ROOT = str(Path(__file__).parents[2])
# Operations whose result's size or value Python has to know.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero", "aten::bincount",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave.Tensor",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
COPYING = {"aten::copy_", "aten::_to_copy"}
WITHOUT_KERNEL = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided",
                  "aten::new_empty_strided", "aten::lift_fresh", "aten::_local_scalar_dense"}  # fmt: skip
HOST_NUMBERS = {"aten::_fused_adamw_"}  # kernels that take numbers on the CPU beside their tensors


class Counts:
    """What the device was asked for since the last `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self, phase: Callable[[], str] = str) -> None:
        """Start again from 0.

        Args:
            phase: what the process is doing, for `phases`.
        """
        self.phase = phase
        self.phases: dict[str, dict[str, int]] = {}
        self.waits: Counter[str] = Counter()  # synchronizations by their cause and place
        self.kernels: Counter[str] = Counter()  # by name

    def add(self, what: str) -> None:
        counts = self.phases.setdefault(self.phase(), {"operations": 0, "kernels": 0, "synchronizations": 0})
        counts[what] += 1

    def wait(self, cause: str) -> None:
        self.add("synchronizations")
        self.waits[f"{cause} at {_place()}"] += 1

    def taken(self) -> dict[str, int]:
        """The counts of all phases together."""
        names = ("operations", "kernels", "synchronizations")
        return {name: sum(counts[name] for counts in self.phases.values()) for name in names}


def _place() -> str:
    """The line of the package in which an operation was called, and that of a library under it."""
    frame: Any = sys._getframe(2)
    library = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(f"{ROOT}/align/") or name.startswith(f"{ROOT}/reward_models/"):
            return f"{name.removeprefix(ROOT + '/')}:{frame.f_lineno}{library}"
        if not library and "/torch/" not in name and "/tests/emulated/" not in name:
            library = f" ({Path(name).name}:{frame.f_lineno})"
        frame = frame.f_back
    return f"?{library}"


COUNTS = Counts()


class DeviceTensor(Tensor):
    """A tensor on the emulated device; `inner` holds its numbers on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0), requires_grad=requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], tree_map_only(list, _index, args[1], lambda each: isinstance(each, list)), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():  # results keep their own class
            return func(*args, **(kwargs or {}))

    def tolist(self) -> Any:
        COUNTS.wait("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    def storage(self) -> Any:
        return self.inner.storage()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **kwargs})

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner})"


def _index(rows: list[Any]) -> Tensor:
    COUNTS.wait("index by a list")
    return torch.tensor(rows) if rows else torch.zeros(0, dtype=torch.int64)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """One kernel, as on a GPU, where torch would take a dozen operations on a backend that it does not know."""
    assert not dropout_p
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attended: Tensor = attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return attended


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation: refuse it, count it, compute it on the CPU, and wrap its results."""
    name, target = func._schema.name, kwargs.get("device")
    if name in ("aten::pin_memory", "aten::_pin_memory"):
        return args[0]
    flat = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    ours = [each for each in flat if isinstance(each, DeviceTensor)]
    if not ours and not _is_ours(target):
        return func(*args, **kwargs)
    others = [each for each in flat if not isinstance(each, DeviceTensor) and each.dim() > 0]
    _refuse_mixes(name, args, ours, others)
    _count(func, name, args, kwargs)
    args_inside, kwargs_inside = tree_map_only(DeviceTensor, lambda each: each.inner, (args, kwargs))
    if _is_ours(target):
        kwargs_inside = {**kwargs_inside, "device": torch.device("cpu")}
    kwargs_inside.pop("pin_memory", None)
    result = func(*args_inside, **kwargs_inside)
    if name == "aten::_local_scalar_dense" or (
        name == "aten::_to_copy" and target is not None and not _is_ours(target)
    ):
        return result
    if name == "aten::copy_" and not isinstance(args[0], DeviceTensor):
        return args[0]
    known = {id(each.inner): each for each in ours}  # what is written in place stays the same tensor
    return tree_map_only(Tensor, lambda each: known[id(each)] if id(each) in known else DeviceTensor(each), result)


def _refuse_mixes(name: str, args: Any, ours: list[DeviceTensor], others: list[Tensor]) -> None:
    if not ours or not others or name in COPYING | HOST_NUMBERS:
        return
    if name in INDEXING and isinstance(args[0], DeviceTensor) and not any(args[0] is each for each in others):
        return  # torch copies the indices
    raise RuntimeError(
        f"Expected all tensors to be on the same device, found {NAME}:0 and cpu, in {name} at {_place()}"
    )


def _count(func: Any, name: str, args: Any, kwargs: Any) -> None:
    COUNTS.add("operations")
    if not func.is_view and name not in WITHOUT_KERNEL:
        COUNTS.add("kernels")
        COUNTS.kernels[name] += 1
    if name in WAITING or func.name() in WAITING:
        COUNTS.wait(name.removeprefix("aten::"))
    elif name in INDEXING and any(
        isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
    ):
        COUNTS.wait("index by a mask")
    elif name in COPYING:
        copied = args[1] if name == "aten::copy_" else args[0]
        target = args[0].device if name == "aten::copy_" else kwargs.get("device") or copied.device
        asynchronous = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        if isinstance(copied, DeviceTensor) and not _is_ours(target):
            COUNTS.wait("copy to the CPU")
        elif not isinstance(copied, DeviceTensor) and copied.dim() and not asynchronous:
            COUNTS.wait("copy from the CPU")


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """`torch.emulated`, as `torch.cuda`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Mode(TorchDispatchMode):
    """Catches what makes tensors on the device, which has no argument on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def emulated_device() -> Iterator[torch.device]:
    """The device, for the rest of the process; inside, tensors and modules can be made on it and moved there."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    device = torch.device(NAME, 0)
    _device_constructors()  # remembers torch's own functions
    plain_tensor, plain_to = torch.tensor, nn.Module.to

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if _is_ours(device):
            COUNTS.wait("copy from the CPU")
            return DeviceTensor(plain_tensor(*args, **kwargs))
        return plain_tensor(*args, device=device, **kwargs)

    def to(module: nn.Module, target: Any = None, *args: Any, **kwargs: Any) -> nn.Module:
        if isinstance(target, torch.dtype) or not _is_ours(target):
            return plain_to(module, target, *args, **kwargs)
        moved: dict[int, nn.Parameter] = {}  # tied weights stay one
        for each in module.modules():
            for name, weight in each._parameters.items():
                if weight is not None and not isinstance(weight.data, DeviceTensor):
                    if id(weight) not in moved:
                        moved[id(weight)] = nn.Parameter(DeviceTensor(weight.detach().clone()), weight.requires_grad)
                    each._parameters[name] = moved[id(weight)]
            for name, buffer in each._buffers.items():
                if buffer is not None and not isinstance(buffer, DeviceTensor):
                    each._buffers[name] = DeviceTensor(buffer.detach().clone())
        return module

    torch.tensor, nn.Module.to = tensor, to  # type: ignore[assignment, method-assign]
    try:
        with _Mode():
            yield device
    finally:
        torch.tensor, nn.Module.to = plain_tensor, plain_to  # type: ignore[assignment, method-assign]
