"""Tensors as they lie in safetensors files: found by the files' headers, read piece by piece as
bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kl3m_nb.common.files import naming

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


PIECE = 16 * 2**20


LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses a longer one


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `dtype` is the format's own name, a key of `DTYPES` for floats that
    torch computes with.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    size: int  # in bytes

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()

    def pieces(self) -> Iterator[bytes]:
        """Its bytes in order, at most `PIECE` at once."""
        with naming(self.path), open(self.path, "rb") as file:
            file.seek(self.start)
            for done in range(0, self.size, PIECE):
                yield file.read(min(self.size - done, PIECE))

    def holds_the_same(self, other: StoredTensor) -> bool:
        """Whether dtype, shape and bytes are equal."""
        same = (self.dtype, self.shape) == (other.dtype, other.shape)
        return same and all(
            mine == theirs for mine, theirs in zip(self.pieces(), other.pieces(), strict=True)
        )

    def load(self) -> torch.Tensor:
        """The tensor itself."""
        return torch.frombuffer(bytearray(b"".join(self.pieces())), dtype=DTYPES[self.dtype]).view(
            self.shape
        )


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """Every tensor of whole safetensors files: an 8-byte little-endian length, a JSON header, then
    the bytes.
    """
    tensors = {}
    for path in files:
        with naming(path), open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = StoredTensor(
                    path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start
                )
    return tensors
