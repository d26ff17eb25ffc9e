"""Growing in depth: a deeper checkpoint made from a shallower one's blocks (G_stack, arXiv:2405.15319).

Cyclic stacking makes target block i a copy of source block i mod L; embedding, final norm and head are copied once, nothing
is rescaled. Copies go as bytes from file to file, one tensor at a time: no model in memory, exact in any dtype. The operators
that the paper compares it with are here too. What they draw at random follows from a seed and the tensor's name, so every one
of them can be verified tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kl3m_nb import model_folder, paths
from kl3m_nb.display import table_html
from kl3m_nb.model_folder import STACK_IDENTITY, STACK_RECORD, TRAINED_STEPS, WEIGHT_ENDINGS, weight_files
from kl3m_nb.models import check_checkpoint

ORDERS = ("cyclic", "interpolated", "zero_initialised", "random")
NEW_BLOCK = -1  # the "source" of a block that is drawn at random

_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")
_COPY_CHUNK = 16 * 2**20
_NOT_COPIED = (*WEIGHT_ENDINGS, STACK_RECORD, "README.md")
# What writes into the residual stream; with these at zero a block passes its input on unchanged. w2 is Mixtral's down_proj.
_WRITES_RESIDUAL = re.compile(r"\.(o_proj|down_proj|w2)(\.(weight|bias))?$")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PER_BLOCK_SETTINGS = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists of some families' config.json


@dataclass(frozen=True)
class StackSummary:
    """What `stack_checkpoint` made; written beside the weights as `stack.json`.

    `block_sources[i]` is the source of target block i, -1 when it was drawn at random. `source_sha256` is by file.
    """

    source: str
    source_sha256: dict[str, str]
    target: str
    factor: int
    order: str
    noise: float
    seed: int
    source_layers: int
    target_layers: int
    block_sources: tuple[int, ...]
    parameters: int

    def _repr_html_(self) -> str:
        return table_html(self.table())

    def table(self) -> dict[str, str]:
        """The summary in words, for display."""
        noise = f", {self.noise:.0%} noise (seed {self.seed})" if self.noise else ""
        return {
            "from": f"{self.source} ({self.source_layers} layers)",
            "to": f"{self.target} ({self.target_layers} layers)",
            "order": f"{self.order}, {self.factor} times the blocks{noise}",
            "parameters": f"{self.parameters:,}",
        }


def block_order(source_layers: int, factor: int, order: str = "cyclic") -> tuple[int, ...]:
    """For each target block the source block it is made from, or -1 for one that is drawn at random.

    * `cyclic`: 0 1 2 0 1 2.
    * `interpolated`: 0 0 1 1 2 2.
    * `zero_initialised`: as cyclic, and every block after the first L adds nothing at first (o_proj = down_proj = 0), so the
      target computes what the source does.
    * `random`: 0 1 2, then blocks as a fresh model has them.

    Raises ValueError for another order or a factor below 1.
    """
    if factor < 1:
        raise ValueError(f"factor {factor} cannot grow a model; it is the number of copies of each block, at least 1.")
    check_order(order)
    blocks = range(factor * source_layers)
    if order == "interpolated":
        return tuple(block // factor for block in blocks)
    if order == "random":
        return tuple(block if block < source_layers else NEW_BLOCK for block in blocks)
    return tuple(block % source_layers for block in blocks)


def check_order(order: str, noise: float = 0.0) -> None:
    """Raises ValueError for an order that there is not, and for noise that is no share or that the order does not take."""
    if not 0.0 <= noise < 1.0 or (noise and order not in ("cyclic", "interpolated")):
        raise ValueError(f"noise {noise} with the order {order!r}: it is a share from 0 to below 1, for cyclic or interpolated.")
    if order not in ORDERS:
        raise ValueError(f"The order {order!r} is not known; choose one of {', '.join(ORDERS)}.")


def stack_checkpoint(
    source: str | Path, target: str | Path, factor: int = 4, order: str = "cyclic", noise: float = 0.0, seed: int = 0
) -> StackSummary:
    """Writes to `target` a checkpoint folder with `factor` times the layers of the one in `source`.

    source: a Hugging Face folder of a decoder whose blocks are `model.layers.N.` (Llama, Mistral, Qwen, Mixtral and their like),
        its weights in one safetensors file or several. Everything else in it that is no weight is copied along.
    order: see `block_order`. noise: the share a of noise in every matrix of every copied block, W ← (1 - a)·W + a·ε, with ε
        normal and of W's own standard deviation (inferred: no scale is given); for the orders cyclic and interpolated.
    seed: of the noise and of random blocks.

    The target appears whole or not at all. A target that already holds this very stack is left as it is; one that holds
    anything else is refused. Raises ValueError when the source is no such checkpoint or the arguments do not fit together.
    """
    source, target = paths.find(source), paths.resolve(target)
    check_order(order, noise)
    config = check_checkpoint(source)
    files = weight_files(source)
    tensors = _read_headers(files)
    layers = _block_count(source, config, tensors)
    blocks = block_order(layers, factor, order)
    scale = config.get("initializer_range", 0.02)
    plan = _plan(tensors, blocks, order, noise, seed, scale)
    summary = StackSummary(
        source=_shown(source),
        source_sha256={path.name: model_folder.sha256(path) for path in files},
        target=_shown(target),
        factor=factor,
        order=order,
        noise=noise,
        seed=seed,
        source_layers=layers,
        target_layers=len(blocks),
        block_sources=blocks,
        parameters=sum(tensor.source.elements for tensor in plan),
    )
    if target.exists():
        _require_same_stack(target, summary)
        return summary
    with model_folder.written_whole(target) as temporary:
        for path in source.iterdir():
            if path.is_file() and not path.name.endswith(_NOT_COPIED):
                shutil.copy(path, temporary / path.name)
        (temporary / "config.json").write_text(json.dumps(_target_config(config, blocks), indent=2) + "\n")
        _write_tensors(temporary / "model.safetensors", plan)
        (temporary / STACK_RECORD).write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def verify_stack(source: str | Path, target: str | Path) -> int:
    """Compares every tensor of a stack, byte by byte, with what its `stack.json` says it is, and returns how many.

    Raises ValueError naming the first tensor that differs, or for a target that is no stack or was trained since.
    """
    source, target = paths.find(source), paths.resolve(target)
    made = model_folder.read_stack(target)
    if not made:
        raise ValueError(f"{target} holds no {STACK_RECORD}, so it is no stack; name the folder that stacking wrote.")
    if steps := made.get(TRAINED_STEPS):
        raise ValueError(f"{target} was trained for {steps:,} steps since it was stacked; name the folder that stacking wrote.")
    tensors, found = _read_headers(weight_files(source)), _read_headers(weight_files(target))
    scale = json.loads((source / "config.json").read_text()).get("initializer_range", 0.02)
    plan = _plan(tensors, tuple(made["block_sources"]), made["order"], made["noise"], made["seed"], scale)
    names = {tensor.name for tensor in plan}
    if names != found.keys():
        raise ValueError(f"{target} lacks or adds the tensors {sorted(names ^ found.keys())[:3]}; stack it again.")
    for tensor in plan:
        stored, wanted = found[tensor.name], tensor.source
        same = (wanted.dtype, wanted.shape) == (stored.dtype, stored.shape)
        # a copy is compared piece by piece: a vocabulary matrix twice in memory would be the most that verifying takes
        if not same or any(a != b for a, b in zip(tensor.pieces(), stored.pieces(), strict=True)):
            raise ValueError(
                f"{tensor.name} in {target} is not what {source} gives in the order {made['order']}; stack it again."
            )
    return len(plan)


@dataclass(frozen=True)
class _StoredTensor:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    size: int  # in bytes

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def pieces(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            for done in range(0, self.size, _COPY_CHUNK):
                yield file.read(min(self.size - done, _COPY_CHUNK))

    def load(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(b"".join(self.pieces())), dtype=_DTYPES[self.dtype]).view(self.shape)


@dataclass(frozen=True)
class _TargetTensor:
    """A tensor of the target: a copy of `source`, or made by `recipe` (zero | noise | fresh) in its shape and dtype."""

    name: str
    source: _StoredTensor
    recipe: str
    amount: float  # share of noise, or standard deviation of fresh matrices
    seed: int

    def pieces(self) -> Iterator[bytes]:
        if self.recipe == "copy":
            yield from self.source.pieces()
            return
        content = memoryview(self._made().contiguous().view(torch.uint8).numpy()).cast("B")
        for done in range(0, self.source.size, _COPY_CHUNK):
            yield bytes(content[done : done + _COPY_CHUNK])

    def _made(self) -> torch.Tensor:
        dtype = _DTYPES[self.source.dtype]
        if self.recipe == "zero":
            return torch.zeros(self.source.shape, dtype=dtype)
        if self.recipe == "fresh" and len(self.source.shape) < 2:  # as transformers initialises norms and biases
            return torch.full(self.source.shape, 0.0 if self.name.endswith("bias") else 1.0, dtype=dtype)
        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.randn(self.source.shape, generator=generator)
        if self.recipe == "fresh":
            return (self.amount * drawn).to(dtype)
        weight = self.source.load().float()
        return weight.lerp(weight.std() * drawn, self.amount).to(dtype)


def _plan(
    tensors: dict[str, _StoredTensor], blocks: tuple[int, ...], order: str, noise: float, seed: int, scale: float
) -> list[_TargetTensor]:
    """Every tensor of the target and how it is made; those outside the blocks are copied."""
    by_block: dict[int, list[tuple[str, _StoredTensor]]] = {}
    plan = []
    for name, tensor in tensors.items():
        if match := _BLOCK.match(name):
            by_block.setdefault(int(match[1]), []).append((name[match.end() :], tensor))
        else:
            plan.append(_TargetTensor(name, tensor, "copy", 0.0, seed))
    for target, source in enumerate(blocks):
        for rest, tensor in by_block[max(source, 0)]:  # a new block takes its shapes from the first
            recipe, amount = "copy", 0.0
            if source == NEW_BLOCK:
                recipe, amount = "fresh", scale
            elif order == "zero_initialised" and target >= len(by_block) and _WRITES_RESIDUAL.search("." + rest):
                recipe = "zero"
            elif noise and len(tensor.shape) >= 2:
                recipe, amount = "noise", noise
            plan.append(_TargetTensor(f"model.layers.{target}.{rest}", tensor, recipe, amount, seed))
    return plan


def _block_count(source: Path, config: dict, tensors: dict[str, _StoredTensor]) -> int:
    """The number of blocks; ValueError when these are not the tensors of a decoder that can be stacked."""
    found = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
    if not found:
        raise ValueError(
            f"{source} is a {config.get('model_type', 'model')} with tensors like {min(tensors, default='none')}; "
            "only a decoder whose blocks are named model.layers.N. can be stacked, such as Llama, Mistral, Qwen or Mixtral."
        )
    layers = config.get("num_hidden_layers", 0)
    if found != set(range(layers)):
        raise ValueError(
            f"{source} names {layers} layers in config.json and holds the blocks {_ranges(found)} as model.layers.N.; "
            "a decoder checkpoint that holds all of its blocks is needed."
        )
    if foreign := sorted({tensor.dtype for tensor in tensors.values()} - _DTYPES.keys()):
        raise ValueError(f"{source} holds tensors of the type {foreign[0]}; stack the original of a quantised model.")
    kinds = {
        tuple(sorted((name.partition(f".{block}.")[2], tensor.shape) for name, tensor in tensors.items() if _in(name, block)))
        for block in found
    }
    if len(kinds) > 1:
        raise ValueError(f"The blocks of {source} are not of one kind (names or shapes differ); stacking needs blocks that are.")
    return layers


def _in(name: str, block: int) -> bool:
    return name.startswith(f"model.layers.{block}.")


def _read_headers(files: list[Path]) -> dict[str, _StoredTensor]:
    """Every tensor of safetensors files: an 8-byte little-endian length, a JSON header, then the bytes."""
    tensors = {}
    for path in files:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = _StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return tensors


def _write_tensors(path: Path, plan: list[_TargetTensor]) -> None:
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for tensor in plan:
        end = position + tensor.source.size
        header[tensor.name] = {
            "dtype": tensor.source.dtype, "shape": list(tensor.source.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    with open(path, "wb") as output:
        output.write(struct.pack("<Q", len(text)) + text)
        for tensor in plan:
            output.writelines(tensor.pieces())
        output.flush()
        os.fsync(output.fileno())


def _target_config(config: dict, blocks: tuple[int, ...]) -> dict:
    grown = dict(config, num_hidden_layers=len(blocks))
    for key in _PER_BLOCK_SETTINGS:
        if config.get(key):
            grown[key] = [config[key][max(block, 0)] for block in blocks]
    return grown


def _require_same_stack(target: Path, summary: StackSummary) -> None:
    made = model_folder.read_stack(target)
    same = all(made.get(key) == getattr(summary, key) for key in STACK_IDENTITY)
    if not same or made.get(TRAINED_STEPS):
        raise ValueError(f"{target} already holds something else than this stack; remove it or choose another target.")


def _shown(path: Path) -> str:
    """`path` relative to the project where it lies inside, so that records hold on another machine."""
    root = paths.project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _ranges(blocks: set[int]) -> str:
    if not blocks:
        return "none"
    return f"{min(blocks)}-{max(blocks)}" if len(blocks) == max(blocks) - min(blocks) + 1 else f"{sorted(blocks)[:8]}…"
