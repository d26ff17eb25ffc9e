"""Which checkpoints can be stacked: decoders that hold all of their blocks, which are of one kind and named model.layers.N."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from kl3m_nb.grown_config import PER_BLOCK
from kl3m_nb.stored_tensors import DTYPES, StoredTensor

BLOCK = re.compile(r"^model\.layers\.(\d+)\.")
EMBEDDING = "model.embed_tokens.weight"


def block_count(source: Path, config: dict, tensors: Mapping[str, StoredTensor]) -> int:
    """The number of blocks of the checkpoint in `source`, whose config.json and tensors are given.

    Raises ValueError when these are not a decoder's that can be stacked.
    """
    found = {int(match[1]) for name in tensors if (match := BLOCK.match(name))}
    if not found:
        raise ValueError(
            f"{source} is a {config.get('model_type', 'model')} with tensors like {min(tensors, default='none')}; "
            "only a decoder whose blocks are named model.layers.N. can be stacked, such as Llama, Mistral, Qwen or Mixtral."
        )
    if "num_hidden_layers" not in config:
        raise ValueError(
            f"{source} is a {config.get('model_type', 'model')} with no num_hidden_layers in config.json; only a decoder whose "
            "depth stands there can be stacked, such as Llama, Mistral, Qwen or Mixtral."
        )
    layers = config["num_hidden_layers"]
    if type(layers) is not int:
        raise ValueError(f"{source} has num_hidden_layers {layers!r} in config.json; it must be a whole number, correct it.")
    if found != set(range(layers)):
        raise ValueError(
            f"{source} names {layers} layers in config.json and holds the blocks {_ranges(found)} as model.layers.N.; "
            "a decoder checkpoint that holds all of its blocks is needed."
        )
    for key in PER_BLOCK:
        if (settings := config.get(key)) and (not isinstance(settings, list) or len(settings) < layers):
            raise ValueError(f"{source} has no list of {layers} {key}, one for each layer, in config.json; correct it.")
    if config.get("quantization_config"):
        raise ValueError(f"{source} has a quantization_config in config.json; stack the original of a quantised model.")
    if foreign := sorted({tensor.dtype for tensor in tensors.values()} - DTYPES.keys()):
        raise ValueError(
            f"{source} holds tensors of the type {foreign[0]}, and only floating-point ones are stacked; of a quantised model "
            "stack the original."
        )
    blocks: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in tensors.items():
        if match := BLOCK.match(name):
            blocks.setdefault(match[1], set()).add((name[match.end() :], tensor.shape))
    if len(set(map(frozenset, blocks.values()))) > 1:
        raise ValueError(f"The blocks of {source} are not of one kind (names or shapes differ); stacking needs blocks that are.")
    return layers


def _ranges(blocks: set[int]) -> str:
    return f"{min(blocks)}-{max(blocks)}" if len(blocks) == max(blocks) - min(blocks) + 1 else f"{sorted(blocks)[:8]}…"
