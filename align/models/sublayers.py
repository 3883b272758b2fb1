"""The sub-layers of a transformer's layers, found by what is computed rather than by names.

A skip connection is a sum of hidden states and of something computed from them. What is added to them, a sub-layer's
output, comes from a module: attention's output projection, a feed-forward's second projection, a mixture of experts, or
a normalization after one of these. A small random model of the configuration is run once, and its sums are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from align.compat.transformers import model_class
from align.errors import UserError, reason
from align.models.small_model import small_config

VOCABULARY = 64
TOKENS = 7  # of the row that is run
ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
SCALE = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar, torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar)


def find_sublayers(config: PretrainedConfig, key: str, trust_remote_code: bool = False) -> list[list[str]]:
    """For each layer, in the order in which they run, the modules whose outputs are added to the hidden states.

    The last of a layer is its feed-forward. Names are those in the backbone (`AutoModel`); a layer that runs several times
    is named once.

    Args:
        key: of the recipe, for the error.

    Raises:
        UserError: not every layer has two sub-layers or more, or the model cannot be tried.
    """
    try:
        small = small_config(config, VOCABULARY, every_layer=True)
        small.use_cache = False
        with torch.random.fork_rng(devices=[]):
            model = small_backbone(small, trust_remote_code)
        trace = _Trace(model, small.get_text_config().hidden_size)
        ids = torch.arange(TOKENS)[None]
        with torch.inference_mode(), trace:
            model(input_ids=ids, **({"decoder_input_ids": ids} if small.is_encoder_decoder else {}))
    except Exception as error:  # an architecture that cannot be reduced, or takes other inputs
        why = f"its layers could not be found on a small random model: {reason(error)}"
    else:
        layers: dict[str, list[str]] = {layer: [] for layer in map(trace.layer_of, trace.weighted) if layer}
        for name in trace.order:
            if name in trace.added:
                layers[trace.layer_of(name)].append(name)
        least = min(map(len, layers.values()), default=0)
        if least > 1:
            return list(layers.values())
        found = "no layers" if not layers else f"{least or 'no'} sub-layer{'s' * (least == 0)} in some of its layers"
        why = f"{found}, where attention and a feed-forward are expected, one after the other (tried on a small random model)"
    raise UserError(f"{key}: bottleneck does not fit models of type {config.model_type}: {why}; use method: lora.")


def small_backbone(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """`AutoModel` of this configuration, whole also while ZeRO 3 shards what `from_config` makes."""
    cls = model_class(AutoModel, config)
    own_code = cls is None or "AutoModel" in (getattr(config, "auto_map", None) or {})
    model: Any = AutoModel.from_config(config, trust_remote_code=trust_remote_code) if own_code else cls(config)
    return model.eval()  # type: ignore[no-any-return]


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds skip connections while a model runs one row.

    Attributes:
        weighted: modules with weights of their own.
        order: modules inside layers, by their first output of hidden states.
        added: those of them whose outputs were added to hidden states that they were computed from.
    """

    def __init__(self, model: nn.Module, width: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.width = width
        self.order: dict[str, None] = {}
        self.added: set[str] = set()
        self._kept: list[Tensor] = []  # so that no address is used again
        self._streams: dict[
            tuple[int, int], int
        ] = {}  # hidden states -> bits of themselves, and of what they were added to
        self._sources: dict[tuple[int, int], int] = {}  # tensor -> bits of the hidden states that it was computed from
        self._origins: dict[
            tuple[int, int], tuple[str, ...]
        ] = {}  # hidden states -> the modules whose outputs they sum up
        self.weighted = [name for name, module in model.named_modules() if [*module.parameters(recurse=False)]]
        self._lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        for name, module in model.named_modules():
            if self.layer_of(name) not in ("", name):
                module.register_forward_hook(self._record(name))

    def layer_of(self, name: str) -> str:
        """The layer that holds a module: an element of the outermost list of modules; empty outside of lists."""
        parts = name.split(".")
        prefixes = [".".join(parts[: length + 1]) for length in range(len(parts))]
        return next(
            (inner for outer, inner in pairwise(prefixes) if outer in self._lists and inner not in self._lists), ""
        )

    def _record(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            if isinstance(first, Tensor) and self._is_hidden(first):
                known = self._origins.get(_key(first), ())
                if len(known) != 1 and all(each.startswith(f"{name}.") for each in known):  # as of several experts
                    self._origins[_key(first)] = (name,)
                    self.order.setdefault(name)

        return hook

    def _is_hidden(self, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and tensor.shape[-1] == self.width and tensor.numel() == TOKENS * self.width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        outputs = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        self._kept += [*inputs, *outputs]
        hidden = [each for each in inputs if self._is_hidden(each)]
        read = 0
        for each in inputs:
            read |= self._streams.get(_key(each), 0) | self._sources.get(_key(each), 0)
        for each in outputs:
            key = _key(each)
            if func in ADD and len(hidden) == 2:
                self._add(key, _key(hidden[0]), _key(hidden[1]), read)
            elif any(key == _key(given) for given in inputs):  # a view, or changed in place
                self._sources[key] = self._sources.get(key, 0) | read & ~self._streams.get(key, 0)
            elif len(hidden) == 1 and (func is torch.ops.aten.clone.default or (func in SCALE and _is_scalar(args[1]))):
                same = _key(hidden[0])
                self._streams[key], self._sources[key] = self._streams.get(same, 0), self._sources.get(same, 0)
                self._origins[key] = self._origins.get(same, ())
            else:
                self._sources[key] = read
                if self._is_hidden(each):
                    self._streams[key] = 1 << len(self._kept)
        return output

    def _add(self, total: tuple[int, int], a: tuple[int, int], b: tuple[int, int], read: int) -> None:
        origins = self._origins.get(a, ()) + self._origins.get(b, ())
        streams = 1 << len(self._kept)
        for skip, branch in ((a, b), (b, a)):
            if self._streams.get(skip, 0) & self._sources.get(branch, 0):
                self.added.update(self._origins.get(branch, ()))
                streams |= self._streams[skip]
                origins = ()
        self._streams[total], self._sources[total] = streams, read
        self._origins[total] = origins


def _key(tensor: Tensor) -> tuple[int, int]:
    """The same for a tensor and for its views of all of it."""
    return tensor.data_ptr(), tensor.numel()


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1
