"""The data type of saved weights: that of the model that training started from, or the one that the recipe names.

With it, the settings of that model that are others while a stage runs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from align.models.forward_settings import restore
from align.models.inspect_folder import CONFIG, INDEX, stored_tensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by their names in safetensors


def base_dtypes(path: str) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """The data type of most weights of the model in `path`, and that of each by name; of one on the hub, the first."""
    folder, tensors = stored_tensors(path, path)
    named = {name: DTYPES[tensor.dtype] for name, tensor in (tensors or {}).items() if tensor.dtype in DTYPES}
    if named:
        return Counter(named.values()).most_common(1)[0][0], named
    try:
        dtype = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype
    except (OSError, ValueError):  # gone, or code of its own
        dtype = None
    return dtype if dtype in DTYPES.values() else torch.float32, {}


def set_saved_dtype(folder: Path, base: str | None, save_dtype: str) -> str:
    """Convert the floating-point weights of a saved model, and restore its settings; returns the name of most weights' type.

    Args:
        base: the model that training started from; None for a random one.
        save_dtype: the recipe's, such as "bfloat16"; "auto" gives each weight that of its name in `base`.
    """
    if not (folder / CONFIG).is_file():  # an adapter alone
        return "float32"
    if save_dtype != "auto":
        most: torch.dtype = getattr(torch, save_dtype)
        named: dict[str, torch.dtype] = {}
    else:
        most, named = base_dtypes(base) if base is not None else (torch.float32, {})
    total = 0
    for file in sorted(folder.glob("model*.safetensors")):
        weights, changed = {}, False
        with safe_open(file, "pt") as stored:  # maps the file: only what is converted takes memory
            metadata = stored.metadata()
            for name in stored.keys():  # noqa: SIM118  # no mapping
                weight = stored.get_tensor(name)
                wanted = named.get(name, most) if weight.is_floating_point() else weight.dtype
                weights[name], changed = weight.to(wanted), changed or weight.dtype != wanted
            total += sum(weight.nbytes for weight in weights.values())
            if changed:
                save_file(weights, file.with_suffix(".new"), metadata)
        if changed:
            file.with_suffix(".new").rename(file)
    name = str(most).removeprefix("torch.")
    _update(folder / CONFIG, lambda config: config.update(dtype=name))
    if base is not None and (given := Path(stored_tensors(base, base)[0]) / CONFIG).is_file():
        settings = json.loads(given.read_text(encoding="utf-8"))
        _update(folder / CONFIG, lambda config: restore(config, settings))
    if (folder / INDEX).is_file():
        _update(folder / INDEX, lambda index: index["metadata"].update(total_size=total))
    return name


def _update(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
