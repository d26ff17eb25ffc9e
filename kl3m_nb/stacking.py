"""Growing in depth: a deeper checkpoint whose blocks are copies of a shallower one's (G_stack, arXiv:2405.15319).

Cyclic stacking makes target block i a copy of source block i mod L; embedding, final norm and head are copied once, nothing
is rescaled. Tensors are copied as bytes from file to file, one at a time: no torch, no model in memory, exact in any dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from kl3m_nb import paths
from kl3m_nb.display import table_html
from kl3m_nb.models import check_checkpoint

_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")
_COPY_CHUNK = 16 * 2**20
_NOT_COPIED = (".safetensors", ".safetensors.index.json")
ORDERS = ("cyclic", "interpolated")


@dataclass(frozen=True)
class StackSummary:
    """What `stack_checkpoint` made; written beside the weights as `stack.json`. `block_sources[i]` is target block i's source."""

    source: str
    source_sha256: str
    target: str
    factor: int
    order: str
    source_layers: int
    target_layers: int
    block_sources: tuple[int, ...]
    parameters: int

    def _repr_html_(self) -> str:
        return table_html(self.table())

    def table(self) -> dict[str, str]:
        """The summary in words, for display."""
        return {
            "from": f"{self.source} ({self.source_layers} layers)",
            "to": f"{self.target} ({self.target_layers} layers)",
            "order": f"{self.order}, {self.factor} copies of each block",
            "parameters": f"{self.parameters:,}",
        }


def block_order(source_layers: int, factor: int, order: str = "cyclic") -> tuple[int, ...]:
    """For each target block the source block it copies: cyclic 0 1 2 0 1 2, interpolated 0 0 1 1 2 2.

    Raises ValueError for an unknown order or a factor below 1.
    """
    if factor < 1:
        raise ValueError(f"factor {factor} cannot grow a model; it is the number of copies of each block, at least 1.")
    if order == "cyclic":
        return tuple(block % source_layers for block in range(factor * source_layers))
    if order == "interpolated":
        return tuple(block // factor for block in range(factor * source_layers))
    raise ValueError(f"The order {order!r} is not known; choose one of {', '.join(ORDERS)}.")


def stack_checkpoint(source: str | Path, target: str | Path, factor: int = 4, order: str = "cyclic") -> StackSummary:
    """Writes to `target` a checkpoint folder with `factor` times the layers of the one in `source`.

    The target appears whole or not at all. A target that already holds this very stack is left as it is; one that holds
    anything else is refused. Raises ValueError when the source is no decoder checkpoint with `model.layers.N.` blocks.
    """
    source, target = paths.resolve(source), paths.resolve(target)
    config = check_checkpoint(source)
    tensors = _read_headers(source)
    found = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
    layers = config.get("num_hidden_layers", 0)
    if not layers or found != set(range(layers)):
        raise ValueError(
            f"{source} names {layers} layers in config.json and holds the blocks {_ranges(found)} as model.layers.N.; "
            "a decoder checkpoint that holds all of its blocks is needed."
        )
    blocks = block_order(layers, factor, order)
    plan = _target_tensors(tensors, blocks)
    summary = StackSummary(
        source=_shown(source),
        source_sha256=_hash_files(sorted({tensor.path for tensor in tensors.values()})),
        target=_shown(target),
        factor=factor,
        order=order,
        source_layers=layers,
        target_layers=len(blocks),
        block_sources=blocks,
        parameters=sum(tensor.elements for tensor in plan.values()),
    )
    if target.exists():
        _require_same_stack(target, summary)
        return summary
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".stacking-"))
    try:
        for path in source.iterdir():
            if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name not in ("stack.json", "README.md"):
                shutil.copy(path, temporary / path.name)
        (temporary / "config.json").write_text(json.dumps(_target_config(config, blocks), indent=2) + "\n")
        _write_tensors(temporary / "model.safetensors", plan)
        (temporary / "stack.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def verify_stack(source: str | Path, target: str | Path) -> int:
    """Compares every tensor of a stack with its source, byte by byte, and returns how many were compared.

    Raises ValueError naming the first tensor that differs.
    """
    source, target = paths.resolve(source), paths.resolve(target)
    blocks = json.loads((target / "stack.json").read_text())["block_sources"]
    wanted, found = _target_tensors(_read_headers(source), tuple(blocks)), _read_headers(target)
    if wanted.keys() != found.keys():
        raise ValueError(f"{target} lacks or adds the tensors {sorted(wanted.keys() ^ found.keys())[:3]}; stack it again.")
    for name, tensor in wanted.items():
        if (tensor.dtype, tensor.shape) != (found[name].dtype, found[name].shape) or tensor.read() != found[name].read():
            raise ValueError(f"{name} in {target} is no copy of its tensor in {source}; stack it again.")
    return len(wanted)


@dataclass(frozen=True)
class _StoredTensor:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    size: int  # in bytes

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def _read_headers(folder: Path) -> dict[str, _StoredTensor]:
    """Every tensor of every .safetensors file: an 8-byte little-endian length, a JSON header, then the bytes."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = _StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return tensors


def _target_tensors(tensors: dict[str, _StoredTensor], blocks: tuple[int, ...]) -> dict[str, _StoredTensor]:
    targets: dict[int, list[int]] = {}
    for target, source in enumerate(blocks):
        targets.setdefault(source, []).append(target)
    plan = {}
    for name, tensor in tensors.items():
        match = _BLOCK.match(name)
        if not match:
            plan[name] = tensor
            continue
        for block in targets[int(match[1])]:
            plan[f"model.layers.{block}.{name[match.end() :]}"] = tensor
    return plan


def _write_tensors(path: Path, plan: dict[str, _StoredTensor]) -> None:
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in plan.items():
        header[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, position + tensor.size],
        }  # fmt: skip
        position += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    with open(path, "wb") as output:
        output.write(struct.pack("<Q", len(text)) + text)
        for tensor in plan.values():
            with open(tensor.path, "rb") as file:
                file.seek(tensor.start)
                left = tensor.size
                while left:
                    chunk = file.read(min(left, _COPY_CHUNK))
                    output.write(chunk)
                    left -= len(chunk)
        output.flush()
        os.fsync(output.fileno())


def _target_config(config: dict, blocks: tuple[int, ...]) -> dict:
    grown = dict(config, num_hidden_layers=len(blocks))
    if config.get("layer_types"):  # some families name the attention of each block
        grown["layer_types"] = [config["layer_types"][block] for block in blocks]
    return grown


def _require_same_stack(target: Path, summary: StackSummary) -> None:
    record = target / "stack.json"
    made = json.loads(record.read_text()) if record.is_file() else {}
    for key in ("source_sha256", "factor", "order"):
        if made.get(key) != getattr(summary, key):
            raise ValueError(f"{target} already holds something else than this stack; remove it or choose another target.")


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(_COPY_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _shown(path: Path) -> str:
    """`path` relative to the project where it lies inside, so that records hold on another machine."""
    root = paths.project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _ranges(blocks: set[int]) -> str:
    if not blocks:
        return "none"
    return f"{min(blocks)}-{max(blocks)}" if len(blocks) == max(blocks) - min(blocks) + 1 else f"{sorted(blocks)[:8]}…"
