"""A model's folder as Hugging Face lays it out: which files hold its weights, and what of ours
stands beside them.

Stacking, training and analysis all ask here, so they see the same model as transformers does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from kl3m_nb.common import paths
from kl3m_nb.common.files import read_json

STACK_RECORD = (  # what a stack was made of, beside it or beside a model that was trained from it
    "stack.json"
)


STACK_IDENTITY = (
    "source_sha256",
    "factor",
    "order",
    "noise",
    "seed",
)  # its entries that tell one stack from another


TRAINED_STEPS = (  # the entry of a stack.json that tells such a model from a fresh stack
    "trained_steps"
)


WEIGHT_ENDINGS = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
)  # of any format


STATE_FOLDER = "training_state"  # optimizer states, for resuming on this machine


SPECTRA_FOLDER = ".spectra"  # kept singular values


# with which the libraries load a model and its tokenizer, the card, the licence and our record
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    STACK_RECORD,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_local_experts",
    "num_experts_per_tok",
)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load from `folder`: model.safetensors, or else
    the shards its index names.

    Raises ValueError when there are none, the index is broken, or a shard is missing.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not folder.is_dir():
        raise ValueError(
            f"There is no {folder}; give a Hugging Face folder with safetensors weights or a"
            " .safetensors file."
        )
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise ValueError(
            f"The checkpoint {folder} holds {others[0]} and neither model.safetensors nor an index"
            " of .safetensors shards; it was not written to its end or is in another format, name"
            " another."
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(
            f"{index} has no weight_map that says where the weights are; give a finished"
            " checkpoint."
        )
    if outside := [
        name for name in places.values() if not isinstance(name, str) or not _lies_within(name)
    ]:
        raise ValueError(
            f"{index} names the shard {outside[0]!r}, which is no file of {folder}; give a"
            " checkpoint of one folder."
        )
    shards = [folder / name for name in sorted(set(places.values()))]
    if missing := [path.name for path in shards if not path.is_file()]:
        raise ValueError(
            f"The checkpoint {folder} lacks the .safetensors shard {missing[0]}; fetch it whole."
        )
    return shards


def _lies_within(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def model_files(folder: Path) -> list[Path]:
    """The files of a model in `folder`, told by their names; whatever else lies there does not
    belong to it.

    They are its weights, as `weight_files` gives them, with their index, and what the libraries
    read beside them. Raises ValueError as `weight_files` and `require_own` do.
    """
    found = [folder / name for name in _MODEL_FILES if (folder / name).is_file()]
    shards = weight_files(folder)
    found += (
        shards
        if shards == [folder / "model.safetensors"]
        else [*shards, folder / "model.safetensors.index.json"]
    )
    require_own(folder, found)
    return found


def require_own(folder: Path, files: Iterable[Path]) -> None:
    """Raises ValueError for a link that leads out of `folder`: what it points to would be copied,
    and published, along.

    A snapshot in the hub's cache consists of links within the cache, which are taken.
    """
    home = (folder.parent.parent if folder.parent.name == "snapshots" else folder).resolve()
    for path in files:
        if not path.resolve().is_relative_to(home):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, which is no file of the model; put the file"
                " itself there."
            )


def read_config(folder: Path) -> dict:
    """The config.json of a model's folder.

    Raises ValueError when it is no JSON object, a number that a decoder needs is none, it names
    other weights than `weight_files` does, or code of the hub to compute attention with.
    """
    config = read_json(folder / "config.json")
    for key in _COUNTS:
        if not isinstance(config.get(key, 0), int | None) or isinstance(config.get(key), bool):
            raise ValueError(
                f"{folder} has {key} {_shortened(config[key])} in config.json; it must be a whole"
                " number, correct it."
            )
    own = (
        "model.safetensors"
        if (folder / "model.safetensors").is_file()
        else "model.safetensors.index.json"
    )
    if config.get("transformers_weights", own) not in (None, own):
        raise ValueError(
            f"{folder} has transformers_weights {_shortened(config['transformers_weights'])} in"
            f" config.json, and {own} is what is read here; remove that entry, or put those weights"
            " in its place."
        )
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if key.endswith("attn_implementation") and "/" in str(value):
                raise ValueError(
                    f"{folder} has {key} {_shortened(value)} in config.json, code from the hub;"
                    " remove that entry."
                )
    return config


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_stack(folder: Path) -> dict:
    """The `stack.json` of a folder; empty when there is none. Raises ValueError for one that is
    broken.

    With `trained_steps` in it the folder holds a model that was trained from the stack, and not the
    stack itself.
    """
    path = folder / STACK_RECORD
    return read_json(path) if path.is_file() else {}


def stack_source(record: Mapping) -> Path | None:
    """The folder that the stack of this `stack.json` was made of; None when it is not here any
    more, or `record` is empty.
    """
    source = paths.recorded_place(record["source"]) if record else None
    return source.path if source and source.is_here else None


ModelOrCheckpoint = str | os.PathLike | torch.nn.Module
