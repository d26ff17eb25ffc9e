"""Growing in depth: a deeper checkpoint made from a shallower one's blocks (G_stack,
arXiv:2405.15319).

Cyclic stacking makes target block i a copy of source block i mod L; embedding, final norm and head
are copied once, nothing is rescaled. Copies go as bytes from file to file, one tensor at a time: no
model in memory, exact in any dtype. The operators that the paper compares it with are here too.
What they draw at random follows from a seed and the tensor's name, so every one of them can be
verified tensor by tensor.

A source is a decoder that holds its embedding, its final norm and all of its blocks, which are of
one kind. Where a family's config.json sets one layer apart from another, the stack's config.json
writes it down for every layer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from kl3m_nb.common import paths
from kl3m_nb.common.files import sha256, written_whole
from kl3m_nb.common.text import table_html
from kl3m_nb.model.decoder import check_checkpoint
from kl3m_nb.model.folder import (
    STACK_IDENTITY,
    STACK_RECORD,
    TRAINED_STEPS,
    WEIGHT_ENDINGS,
    read_stack,
    require_own,
    weight_files,
)
from kl3m_nb.model.loading import REFUSALS, check_loads, empty_model, reason, with_defaults
from kl3m_nb.model.older_readers import older_config, rewrite_for_older
from kl3m_nb.model.roles import (
    BLOCK_NAME,
    BLOCKS,
    EMBEDDING_NAME,
    LM_HEAD_NAME,
    block_name,
    is_buffer,
    reads_residual,
    residual_writer,
)
from kl3m_nb.model.stored_tensors import DTYPES, LONGEST_HEADER, PIECE, StoredTensor, read_headers

ORDERS = ("cyclic", "interpolated", "zero_initialised", "random")


NEW_BLOCK = -1  # the "source" of a block that is drawn at random


_NOT_COPIED = (*WEIGHT_ENDINGS, STACK_RECORD, "README.md")


# bytes at most that name dtype, shape and place of a tensor in a file's header, beside its own name
_HEADER_ENTRY = 100


@dataclass(frozen=True)
class StackSummary:
    """What `stack_checkpoint` made; written beside the weights as `stack.json`.

    `block_sources[i]` is the source of target block i, -1 when it was drawn at random.
    `source_sha256` is by file.
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
    """For each target block the source block it is made from, or -1 for one that is drawn at
    random.

    * `cyclic`: 0 1 2 0 1 2.
    * `interpolated`: 0 0 1 1 2 2.
    * `zero_initialised`: as cyclic, and every block after the first L adds nothing at first (o_proj
      = down_proj = 0), so the target computes what the source does.
    * `random`: 0 1 2, then blocks as a fresh model has them.

    Raises ValueError for another order or a factor below 1.
    """
    _check_factor(factor)
    check_order(order)
    blocks = range(factor * source_layers)
    if order == "interpolated":
        return tuple(block // factor for block in blocks)
    if order == "random":
        return tuple(block if block < source_layers else NEW_BLOCK for block in blocks)
    return tuple(block % source_layers for block in blocks)


def _check_factor(factor: int) -> None:
    if factor < 1:
        raise ValueError(
            f"factor {factor} cannot grow a model; it is the number of copies of each block, at"
            " least 1."
        )


def check_order(order: str, noise: float = 0.0) -> None:
    """Raises ValueError for an order that there is not, and for noise that is no share or that the
    order does not take.
    """
    if not 0.0 <= noise < 1.0 or (noise and order not in ("cyclic", "interpolated")):
        raise ValueError(
            f"noise {noise} with the order {order!r}: it is a share from 0 to below 1, for cyclic"
            " or interpolated."
        )
    if order not in ORDERS:
        raise ValueError(f"The order {order!r} is not known; choose one of {', '.join(ORDERS)}.")


def stack_checkpoint(
    source: str | Path,
    target: str | Path,
    factor: int = 4,
    order: str = "cyclic",
    noise: float = 0.0,
    seed: int = 0,
) -> StackSummary:
    """Writes to `target` a checkpoint folder with `factor` times the layers of the one in `source`.

    source: a Hugging Face folder of a decoder whose blocks are `model.layers.N.` (Llama, Mistral,
        Qwen, Mixtral and their like), its weights in one safetensors file or several. Everything
        else in it that is no weight is copied along.
    order: see `block_order`. noise: the share a of noise in every matrix of every copied block, W ←
        (1 - a)·W + a·ε, with ε normal and of W's own standard deviation (inferred: no scale is
        given); for the orders cyclic and interpolated.
    seed: of the noise and of random blocks.

    The target appears whole or not at all. A target that already holds this very stack is left as
    it is; one that holds anything else is refused. Raises ValueError when the source is no such
    checkpoint, the arguments do not fit together or the stack would be larger than the target's
    disk has room for.
    """
    source, target = paths.checkpoint_place(source).path, paths.resolve(target)
    _check_factor(factor)
    check_order(order, noise)
    config = check_checkpoint(source)
    files = weight_files(source)
    tensors = read_headers(files)
    block_count(source, config, tensors)
    check_loads(source)
    exists = target.exists()
    if not exists:
        _require_room(target, tensors, factor)
    hashes, asked = _hashes(files), (factor, order, noise, seed)
    if exists:
        _require_same_stack(target, hashes, asked)
    plan, summary = _laid_out(source, target, config, tensors, hashes, asked)
    if exists:
        return summary
    grown = grown_config(config, summary.block_sources)
    check_blocks(source, config, grown, summary.block_sources)
    along = [
        path for path in source.iterdir() if path.is_file() and not path.name.endswith(_NOT_COPIED)
    ]
    require_own(source, along)
    with written_whole(target) as temporary:
        for path in along:
            shutil.copy(path, temporary / path.name)
        (temporary / "config.json").write_text(json.dumps(grown, indent=2) + "\n")
        rewrite_for_older(temporary)
        _write_tensors(temporary / "model.safetensors", plan)
        (temporary / STACK_RECORD).write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def verify_stack(source: str | Path, target: str | Path) -> int:
    """Compares a stack with what its `stack.json` says it is, every tensor of it byte by byte, and
    returns how many those are.

    The `stack.json` must be the one that stacking `source` writes (folders may have been moved),
    and so must `config.json`.

    Raises ValueError naming the first thing that differs, for a tensor that transformers would draw
    at random or leave out, or for a source that cannot be stacked, a target that is no stack, is
    damaged or was trained since.
    """
    source, target = paths.checkpoint_place(source).path, paths.resolve(target)
    made = read_stack(target)
    if not made:
        raise ValueError(
            f"{target} holds no {STACK_RECORD}, so it is no stack; name the folder that stacking"
            " wrote."
        )
    if steps := made.get(TRAINED_STEPS):
        raise ValueError(
            f"{target} was trained for {steps:,} steps since it was stacked; name the folder that"
            " stacking wrote."
        )
    config, found_config = check_checkpoint(source), check_checkpoint(target)
    files = weight_files(source)
    tensors, found = read_headers(files), read_headers(weight_files(target))
    layers = block_count(source, config, tensors)
    asked = _asked(made, target, layers)
    plan, summary = _laid_out(source, target, config, tensors, _hashes(files), asked)
    remedy = f"remove {target} and stack again."
    for key, value in asdict(summary).items():
        if key not in ("source", "target") and made[key] != (
            list(value) if isinstance(value, tuple) else value
        ):
            raise ValueError(
                f"The {STACK_RECORD} of {target} has another {key} than this stack of {source};"
                f" {remedy}"
            )
    wanted_config = grown_config(config, summary.block_sources)
    for key in wanted_config | found_config:
        if wanted_config.get(key) != found_config.get(key):
            raise ValueError(
                f"{target} has another {key} in config.json than this stack of {source}; {remedy}"
            )
    check_blocks(source, config, found_config, summary.block_sources)
    check_loads(target)
    names = {tensor.name for tensor in plan}
    if names != found.keys():
        raise ValueError(
            f"{target} lacks or adds the tensors {sorted(names ^ found.keys())[:3]}; {remedy}"
        )
    for tensor in plan:
        stored, wanted = found[tensor.name], tensor.source
        same = (wanted.dtype, wanted.shape) == (stored.dtype, stored.shape)
        # a copy is compared piece by piece: a vocabulary matrix twice in memory would be the most
        # that verifying takes
        if not same or any(a != b for a, b in zip(tensor.pieces(), stored.pieces(), strict=True)):
            raise ValueError(
                f"{tensor.name} in {target} is not what {source} gives in the order"
                f" {summary.order}; {remedy}"
            )
    return len(plan)


def _asked(made: dict, target: Path, layers: int) -> tuple[int, str, float, int]:
    """Factor, order, noise and seed of a `stack.json`; ValueError when it is not one that stacking
    so many layers writes.
    """
    broken = f"The {STACK_RECORD} of {target} is not as stacking wrote it"
    if missing := [field.name for field in fields(StackSummary) if field.name not in made]:
        raise ValueError(f"{broken}: it has no {missing[0]}; remove {target} and stack again.")
    kinds = {"factor": int, "order": str, "noise": (int, float), "seed": int, "block_sources": list}
    if wrong := [key for key, kind in kinds.items() if not isinstance(made[key], kind)]:
        raise ValueError(
            f"{broken}: its {wrong[0]} is {made[wrong[0]]!r}; remove {target} and stack again."
        )
    if made["factor"] < 1 or made["factor"] * layers != len(
        made["block_sources"]
    ):  # before so many blocks are laid out
        raise ValueError(
            f"{broken}: factor {made['factor']} of {layers} layers is not"
            f" {len(made['block_sources'])} blocks; remove {target} and stack again."
        )
    try:
        check_order(made["order"], made["noise"])
    except ValueError as error:
        raise ValueError(
            f"{broken} ({str(error).rstrip('.')}); remove {target} and stack again."
        ) from error
    return made["factor"], made["order"], made["noise"], made["seed"]


def _laid_out(
    source: Path,
    target: Path,
    config: dict,
    tensors: dict[str, StoredTensor],
    hashes: dict[str, str],
    asked: tuple[int, str, float, int],
) -> tuple[list[_TargetTensor], StackSummary]:
    """The stack of a source with these tensors and hashes that has the factor, order, noise and
    seed of `asked`.
    """
    factor, order, noise, seed = asked
    layers = config["num_hidden_layers"]
    if order == "zero_initialised":
        _require_writers(source, tensors)
    blocks = block_order(layers, factor, order)
    plan = _plan(tensors, blocks, order, noise, seed, config.get("initializer_range", 0.02))
    summary = StackSummary(
        source=_shown(source),
        source_sha256=hashes,
        target=_shown(target),
        factor=factor,
        order=order,
        noise=noise,
        seed=seed,
        source_layers=layers,
        target_layers=len(blocks),
        block_sources=blocks,
        parameters=_parameters(plan, config),
    )
    return plan, summary


def _require_writers(source: Path, tensors: dict[str, StoredTensor]) -> None:
    """Refuses blocks of which it is not known what they write into the residual stream, and through
    which matrices.
    """
    matrices = [
        name for name, tensor in tensors.items() if BLOCK_NAME.match(name) and len(tensor.shape) > 1
    ]
    writers = {*map(residual_writer, matrices)}
    unknown = [name for name in matrices if not residual_writer(name) and not reads_residual(name)]
    if unknown or not {"o_proj", "down_proj"} <= writers:
        what = f"{unknown[0]} in its blocks" if unknown else "no o_proj and down_proj in its blocks"
        raise ValueError(
            f"{source} has {what}, and zeros make only Llama-like blocks add nothing; choose"
            " another order."
        )


def _parameters(plan: list[_TargetTensor], config: dict) -> int:
    """The numbers that the model of these tensors has: without old files' buffers and a second copy
    of a tied embedding.
    """
    stored = {tensor.name: tensor.source for tensor in plan if not is_buffer(tensor.name)}
    embedding, head = stored.get(EMBEDDING_NAME), stored.get(LM_HEAD_NAME)
    if (
        embedding
        and head
        and with_defaults(config).get("tie_word_embeddings")
        and embedding.holds_the_same(head)
    ):
        del stored[LM_HEAD_NAME]  # transformers ties no head that differs
    return sum(tensor.elements for tensor in stored.values())


def _hashes(files: list[Path]) -> dict[str, str]:
    return {path.name: sha256(path) for path in files}


@dataclass(frozen=True)
class _TargetTensor:
    """A tensor of the target: a copy of `source`, or made by `recipe` (zero | noise | fresh) in its
    shape and dtype.
    """

    name: str
    source: StoredTensor
    recipe: str
    amount: float  # share of noise, or standard deviation of fresh matrices
    seed: int

    def pieces(self) -> Iterator[bytes]:
        if self.recipe == "copy":
            yield from self.source.pieces()
            return
        content = memoryview(self._made().contiguous().view(torch.uint8).numpy()).cast("B")
        for done in range(0, self.source.size, PIECE):
            yield bytes(content[done : done + PIECE])

    def _made(self) -> torch.Tensor:
        dtype = DTYPES[self.source.dtype]
        if self.recipe == "zero":
            return torch.zeros(self.source.shape, dtype=dtype)
        if (
            self.recipe == "fresh" and len(self.source.shape) < 2
        ):  # as transformers initialises norms and biases
            return torch.full(
                self.source.shape, 0.0 if self.name.endswith("bias") else 1.0, dtype=dtype
            )
        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.randn(self.source.shape, generator=generator)
        if self.recipe == "fresh":
            return (self.amount * drawn).to(dtype)
        weight = self.source.load().float()
        return weight.lerp(weight.std() * drawn, self.amount).to(dtype)


def _plan(
    tensors: dict[str, StoredTensor],
    blocks: tuple[int, ...],
    order: str,
    noise: float,
    seed: int,
    scale: float,
) -> list[_TargetTensor]:
    """Every tensor of the target and how it is made; those outside the blocks are copied."""
    by_block: dict[int, list[tuple[str, StoredTensor]]] = {}
    plan = []
    for name, tensor in tensors.items():
        if match := BLOCK_NAME.match(name):
            by_block.setdefault(int(match[1]), []).append((name[match.end() :], tensor))
        else:
            plan.append(_TargetTensor(name, tensor, "copy", 0.0, seed))
    for target, source in enumerate(blocks):
        for rest, tensor in by_block[max(source, 0)]:  # a new block takes its shapes from the first
            recipe, amount = "copy", 0.0
            if source == NEW_BLOCK:
                recipe, amount = "fresh", scale
            elif order == "zero_initialised" and target >= len(by_block) and residual_writer(rest):
                recipe = "zero"
            elif noise and len(tensor.shape) >= 2:
                recipe, amount = "noise", noise
            plan.append(_TargetTensor(block_name(target, rest), tensor, recipe, amount, seed))
    return plan


def _write_tensors(path: Path, plan: list[_TargetTensor]) -> None:
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for tensor in plan:
        end = position + tensor.source.size
        header[tensor.name] = {
            "dtype": tensor.source.dtype,
            "shape": list(tensor.source.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    with open(path, "wb") as output:
        output.write(struct.pack("<Q", len(text)) + text)
        for tensor in plan:
            output.writelines(tensor.pieces())
        output.flush()
        os.fsync(output.fileno())


def _require_room(target: Path, tensors: dict[str, StoredTensor], factor: int) -> None:
    copies = {name: factor if BLOCK_NAME.match(name) else 1 for name in tensors}
    needed = sum(copies[name] * tensor.size for name, tensor in tensors.items())
    free = shutil.disk_usage(
        next(folder for folder in (target, *target.parents) if folder.exists())
    ).free
    if needed > free:
        raise ValueError(
            f"factor {factor} makes a checkpoint of {needed / 1e9:,.1f} GB and the disk of {target}"
            f" has {free / 1e9:,.1f} GB left; choose a smaller factor or make room."
        )
    if sum(copies[name] * (len(name) + _HEADER_ENTRY) for name in tensors) > LONGEST_HEADER:
        raise ValueError(
            f"factor {factor} makes {sum(copies.values()):,} tensors, more than a safetensors file"
            " can name; choose a smaller factor."
        )


def _require_same_stack(
    target: Path, hashes: dict[str, str], asked: tuple[int, str, float, int]
) -> None:
    made = read_stack(target)
    same = all(
        made.get(key) == value for key, value in zip(STACK_IDENTITY, (hashes, *asked), strict=True)
    )
    if not same or made.get(TRAINED_STEPS):
        raise ValueError(
            f"{target} already holds something else than this stack; remove it or choose another"
            " target."
        )


def _shown(path: Path) -> str:
    """`path` relative to the project where it lies inside, so that records hold on
    another machine.
    """
    root = paths.project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def block_count(source: Path, config: dict, tensors: Mapping[str, StoredTensor]) -> int:
    """The number of blocks of the checkpoint in `source`, whose config.json and tensors are given.

    Raises ValueError when these are not a decoder's that can be stacked.
    """
    found = {int(match[1]) for name in tensors if (match := BLOCK_NAME.match(name))}
    if not found:
        raise ValueError(
            f"{source} is a {config.get('model_type', 'model')} with tensors like"
            f" {min(tensors, default='none')}; only a decoder whose blocks are named"
            " model.layers.N. can be stacked, such as Llama, Mistral, Qwen or Mixtral."
        )
    if "num_hidden_layers" not in config:
        raise ValueError(
            f"{source} is a {config.get('model_type', 'model')} with no num_hidden_layers in"
            " config.json; only a decoder whose depth stands there can be stacked, such as Llama,"
            " Mistral, Qwen or Mixtral."
        )
    layers = config["num_hidden_layers"]
    if type(layers) is not int:
        raise ValueError(
            f"{source} has num_hidden_layers {layers!r} in config.json; it must be a whole number,"
            " correct it."
        )
    if found != set(range(layers)):
        raise ValueError(
            f"{source} names {layers} layers in config.json and holds the blocks {_ranges(found)}"
            " as model.layers.N.; a decoder checkpoint that holds all of its blocks is needed."
        )
    for key in PER_BLOCK:
        if (settings := config.get(key)) and (
            not isinstance(settings, list) or len(settings) < layers
        ):
            raise ValueError(
                f"{source} has no list of {layers} {key}, one for each layer, in config.json;"
                " correct it."
            )
    if config.get("quantization_config"):
        raise ValueError(
            f"{source} has a quantization_config in config.json; stack the original of a quantised"
            " model."
        )
    if foreign := sorted({tensor.dtype for tensor in tensors.values()} - DTYPES.keys()):
        raise ValueError(
            f"{source} holds tensors of the type {foreign[0]}, and only floating-point ones are"
            " stacked; of a quantised model stack the original."
        )
    blocks: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in tensors.items():
        if match := BLOCK_NAME.match(name):
            blocks.setdefault(match[1], set()).add((name[match.end() :], tensor.shape))
    if len(set(map(frozenset, blocks.values()))) > 1:
        raise ValueError(
            f"The blocks of {source} are not of one kind (names or shapes differ); stacking needs"
            " blocks that are."
        )
    return layers


def _ranges(blocks: set[int]) -> str:
    return (
        f"{min(blocks)}-{max(blocks)}"
        if len(blocks) == max(blocks) - min(blocks) + 1
        else f"{sorted(blocks)[:8]}…"
    )


# Lists of some families with an entry for each block, ...
PER_BLOCK = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "indexer_types",
    "layer_rope_theta",
)


_BLOCK_NUMBERS = (
    "moe_layers",
    "mlp_only_layers",
    "full_attn_idxs",
)  # ... lists of the blocks that are of one kind ...


_LAST_BLOCK = ("moe_layer_end_index",)  # ... and the number of the last block that is


_PLAIN = (
    bool,
    int,
    float,
    str,
    tuple,
    list,
    type(None),
)  # attributes of a module that can be compared


def grown_config(config: dict, blocks: tuple[int, ...]) -> dict:
    """`config` with as many layers as `blocks` has, each set up as the layer of `config` that
    `blocks` names, or -1 as the first.

    What sets one layer apart from another, a sliding window say, is written down where the family's
    defaults for the new depth would choose other layers. It is as older versions of transformers
    read it, too.
    """
    sources = [max(block, 0) for block in blocks]
    grown = dict(config, num_hidden_layers=len(blocks))
    now = with_defaults(config)
    later = with_defaults(
        {
            key: value
            for key, value in grown.items()
            if key not in (*PER_BLOCK, *_BLOCK_NUMBERS, *_LAST_BLOCK)
        }
    )

    def write(key: str, repeated: object) -> None:
        if key in config or repeated != later.get(key):
            grown[key] = repeated

    for key in PER_BLOCK:
        if settings := config.get(key) or now.get(key):
            write(key, [settings[source] for source in sources])
    for key in _BLOCK_NUMBERS:
        if isinstance(numbers := config.get(key) or now.get(key), list) and numbers:
            write(key, [target for target, source in enumerate(sources) if source in numbers])
    for key in _LAST_BLOCK:
        if (config.get(key) or now.get(key)) == config["num_hidden_layers"] - 1:
            write(key, len(blocks) - 1)
    return older_config(grown)


def check_blocks(source: Path, config: dict, grown: dict, blocks: tuple[int, ...]) -> None:
    """Raises ValueError when transformers sets up a block of `grown` in another way than the block
    of `config` it is made from.

    The modules of both models are compared, and their numbers and names: a window, whether
    positions are rotated, which blocks hold experts. What is a block's own number may differ.
    `source` is the folder that the sentence names.
    """
    try:
        small, large = (empty_model(settings).get_submodule(BLOCKS) for settings in (config, grown))
    except REFUSALS as error:
        raise ValueError(
            f"transformers cannot build the stack of {source} ({reason(error)}); give another"
            " model."
        ) from error
    for target, block in enumerate(blocks):
        number = max(block, 0)
        ours, theirs = _described(small[number]), _described(large[target])
        for key in ours | theirs:
            a, b = ours.get(key), theirs.get(key)
            if a != b and (a, b) != (number, target):
                raise ValueError(
                    f"{source} is a {config.get('model_type')}, and such a model of {len(blocks)}"
                    f" layers has {key} {b} in layer {target} where the copied layer {number} has"
                    f" {a}; give a model whose layers do not differ by number."
                )


def _described(block: nn.Module) -> dict[str, object]:
    """The class of every module of a block and its plain attributes, by the module's name in the
    block.
    """
    described: dict[str, object] = {}
    for name, module in block.named_modules():
        described[name or "block"] = type(module).__name__
        prefix = f"{name}." if name else ""
        described |= {
            prefix + key: value
            for key, value in vars(module).items()
            if key[0] != "_" and isinstance(value, _PLAIN)
        }
    return described
