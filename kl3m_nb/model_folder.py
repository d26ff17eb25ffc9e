"""A model's folder as Hugging Face lays it out: which files hold its weights, and what of ours stands beside them.

Whoever reads weights asks here, so that stacking, training and analysis see the same model as transformers does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from kl3m_nb import paths
from kl3m_nb.progress import naming

STACK_RECORD = "stack.json"  # what a stack was made of, beside it or beside a model that was trained from it
STACK_IDENTITY = ("source_sha256", "factor", "order", "noise", "seed")  # its entries that tell one stack from another
TRAINED_STEPS = "trained_steps"  # the entry of a stack.json that tells such a model from a fresh stack
WEIGHT_ENDINGS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")  # of any format
STATE_FOLDER = "training_state"  # optimizer states, for resuming on this machine
SPECTRA_FOLDER = ".spectra"  # kept singular values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load from `folder`: model.safetensors, or else the shards its index names.

    Raises ValueError when there are none, the index is broken, or a shard is missing.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not folder.is_dir():
        raise ValueError(f"There is no {folder}; give a Hugging Face folder with safetensors weights or a .safetensors file.")
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise ValueError(
            f"The checkpoint {folder} holds {others[0]} and neither model.safetensors nor an index of .safetensors shards; "
            "it was not written to its end or is in another format, name another."
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map that says where the weights are; give a finished checkpoint.")
    shards = [folder / name for name in sorted(set(places.values()))]
    if missing := [path.name for path in shards if not path.is_file()]:
        raise ValueError(f"The checkpoint {folder} lacks the .safetensors shard {missing[0]}; fetch it whole.")
    return shards


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError when it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a finished checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; give a finished checkpoint.")
    return content


def read_stack(folder: Path) -> dict:
    """The `stack.json` of a folder; empty when there is none. Raises ValueError for one that is broken.

    With `trained_steps` in it the folder holds a model that was trained from the stack, and not the stack itself.
    """
    path = folder / STACK_RECORD
    return read_json(path) if path.is_file() else {}


def stack_source(record: Mapping) -> Path | None:
    """The folder that the stack of this `stack.json` was made of; None when it is not here any more, or `record` is empty."""
    source = paths.resolve(record["source"]) if record else None
    return source if source and source.is_dir() else None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` when the block ends and is removed when the block fails.

    It has the mode of any new folder, where mkdtemp's could be read by its owner alone. Raises OSError when `folder` is there
    already and holds something.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
    temporary.mkdir()
    try:
        with naming(folder):
            yield temporary
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
