"""Sharded tensors in safetensors files, one file per rank, which any number of ranks can read.

A file holds, of every tensor, the elements that its rank holds, flattened. Where they begin in the whole tensor, and
its shape, is JSON in the file's header.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from align.config.json_file import parse_json
from align.engine.distributed import World
from align.errors import BadFile, UserError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Number = int | float
WHOLE = "value"  # the kind of `write_replicated`


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of a tensor, flattened, that this rank holds: `start` and the following.

    Attributes:
        shape: of the whole tensor.
        values: what is kept of each element, by name (a weight, its moments in Adam); one length for all.
        numbers: what is kept of the whole tensor, by name (its steps).
        replicated: every rank holds the whole tensor.
    """

    shape: tuple[int, ...]
    start: int
    values: Mapping[str, Tensor]
    numbers: Mapping[str, Number] = field(default_factory=dict)
    replicated: bool = False


def write_parts(folder: Path, parts: Mapping[str, Part], world: World, note: Any = None) -> dict[str, list[int]]:
    """Write this rank's parts, and its share of the replicated ones, to the disk. Every rank must call it.

    One value at a time is copied to the CPU.

    Args:
        note: anything JSON; the reader gets rank 0's.

    Returns:
        size and CRC-32 of each file written by this rank, by its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, part in parts.items():
        start, values = part.start, {kind: value.detach().reshape(-1) for kind, value in part.values.items()}
        if part.replicated:
            size = math.prod(part.shape)
            start = size * world.rank // world.size
            end = size * (world.rank + 1) // world.size
            values = {kind: value[start:end] for kind, value in values.items()}
        described[name] = {
            "shape": list(part.shape),
            "start": start,
            "kinds": list(values),
            "numbers": dict(part.numbers),
        }
        tensors |= {f"{kind}.{name}": value for kind, value in values.items() if len(value)}
    about = {"ranks": world.size, "parts": described, "note": note if world.is_main else None}
    path = folder / file_name(world.rank)
    return {path.name: write_file(path, tensors, json.dumps(about))}


def write_replicated(folder: Path, tensors: Mapping[str, Tensor], world: World) -> dict[str, list[int]]:
    """Write tensors that every rank holds whole, each rank its share, which `SavedParts.whole` reads; see `write_parts`."""
    parts = {name: Part(tuple(each.shape), 0, {WHOLE: each}, replicated=True) for name, each in tensors.items()}
    return write_parts(folder, parts, world)


def file_name(rank: int) -> str:
    return f"rank-{rank:05}.safetensors"


def write_file(path: Path, tensors: Mapping[str, Tensor], about: str) -> list[int]:
    size = crc = 0
    with open(path, "wb") as file:
        for block in _blocks(tensors, about):
            file.write(block)
            size, crc = size + len(block), zlib.crc32(block, crc)  # summed now, since reading it again takes time
        file.flush()
        os.fsync(file.fileno())
    return [size, crc]


def _blocks(tensors: Mapping[str, Tensor], about: str) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file; its library would first copy all tensors to the CPU."""
    header: dict[str, Any] = {"__metadata__": {"align": about}}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little") + encoded
    for tensor in tensors.values():
        yield tensor.cpu().contiguous().view(torch.uint8).numpy().data


class SavedParts:
    """The tensors that `write_parts` wrote in a folder, by any number of ranks. Only safetensors and JSON are read.

    Attributes:
        shapes: of each whole tensor, by name.
        numbers: by the tensor's name and their own.
        note: what rank 0 gave.

    Raises:
        UserError: a file is missing, damaged, or no such file; so do the methods.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.numbers: dict[str, dict[str, Number]] = {}
        self._pieces: dict[str, dict[str, list[tuple[int, int, Any]]]] = {}  # name -> kind -> begin, end, open file
        with self.readable():
            first = self._open(0)
            self.note: Any = first["note"]
            for rank in range(1, int(first["ranks"])):
                self._open(rank)
            for name, kinds in self._pieces.items():
                for kind, pieces in kinds.items():
                    pieces.sort(key=lambda piece: piece[:2])
                    reached = 0
                    for begin, end, _ in pieces:
                        if begin <= reached:
                            reached = max(reached, end)
                    if reached != math.prod(self.shapes[name]):
                        raise ValueError(f"{kind} of {name} has a gap")

    def kinds(self, name: str) -> list[str]:
        """Names of the values that are kept of a tensor's elements."""
        return list(self._pieces.get(name, {}))

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """Values of the tensor's elements from `start` on, [count] on the CPU."""
        values: list[Tensor] = []
        reached = start
        with self.readable():
            for begin, end, file in self._pieces[name][kind]:
                until = min(end, start + count)
                if begin <= reached < until:
                    values.append(file.get_slice(f"{kind}.{name}")[reached - begin : until - begin])
                    reached = until
            return torch.cat(values)

    def whole(self, name: str) -> Tensor:
        """A tensor of `write_replicated`, on the CPU."""
        shape = self.shapes[name]
        return self.read(name, WHOLE, 0, math.prod(shape)).view(shape)

    def _open(self, rank: int) -> dict[str, Any]:
        file: Any = safe_open(self.folder / file_name(rank), framework="pt")
        about: dict[str, Any] = parse_json(file.metadata()["align"].encode(), self.folder / file_name(rank))
        for name, part in about["parts"].items():
            shape = tuple(int(size) for size in part["shape"])
            if self.shapes.setdefault(name, shape) != shape:
                raise ValueError(f"{name} has two shapes")
            self.numbers.setdefault(name, {}).update({key: 0 + value for key, value in part["numbers"].items()})
            for kind in part["kinds"]:
                self._pieces.setdefault(name, {}).setdefault(kind, [])
        keys = file.keys()
        for key in keys:
            kind, name = key.split(".", 1)
            begin = int(about["parts"][name]["start"])
            (length,) = file.get_slice(key).get_shape()
            self._pieces[name][kind].append((begin, begin + length, file))
        return about

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Inside, any failure means that the files are odd, and becomes a `UserError`."""
        try:
            yield
        except (
            BadFile,
            OSError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
        ) as error:
            raise UserError(
                f"{self.folder}: cannot be read as a saved state ({type(error).__name__}: {error}); "
                "delete this checkpoint to go on from the one before it."
            ) from error
