"""The tensors of a safetensors file by its header, and whether the file is whole.

The format: 8 bytes with the length of the header, the header in JSON, and the bytes of all tensors without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from align.config.text_file import check_regular
from align.errors import UserError

MAX_HEADER = 100_000_000  # bytes, as in the format's own reader
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
              "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip


TYPES = {*ITEM_BYTES, "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file, as the file's header describes it."""

    file: str
    dtype: str  # of the format, such as "BF16"
    shape: tuple[int, ...]


def read_header(path: Path, key: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; of the file, only its header is read.

    Raises:
        UserError: it is empty, cut, or another kind of file.
    """
    check_regular(path, key)
    again = "copy or download the file again."
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if size < 10 or length > min(size - 8, MAX_HEADER):
            damage = (
                f"is cut, it has {size} bytes" if size < 10 or length <= MAX_HEADER else "is not a safetensors file"
            )
            raise UserError(f"{key}: {path}: {damage if size else 'is empty'}; {again}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        spans = sorted((*map(int, entry["data_offsets"]), name) for name, entry in header.items())
        tensors = {
            name: StoredTensor(path.name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError(f"{key}: {path}: is not a safetensors file, or its header is damaged; {again}") from None
    end = 0
    for begin, stop, name in spans:
        item, shape = ITEM_BYTES.get(tensors[name].dtype), tensors[name].shape
        fits = item is None or stop - begin == item * math.prod(shape)
        if tensors[name].dtype not in TYPES:
            raise UserError(f"{key}: {path}: {name} has a type that the format does not know; {again}")
        if begin != end or stop < begin or not fits or min(shape, default=0) < 0:
            raise UserError(f"{key}: {path}: its header describes {name} wrongly; {again}")
        end = stop
    if size != 8 + length + end:
        damage = "is cut" if size < 8 + length + end else "has bytes after its last tensor"
        raise UserError(f"{key}: {path}: {damage}: {size:,} bytes instead of {8 + length + end:,}; {again}")
    return tensors
