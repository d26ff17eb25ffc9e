"""config.json and tokenizer_config.json as transformers 4.57 reads them too, beside what
transformers 5 writes.

Version 4 knows no `rope_parameters`, and would take the base of the rotary embedding from its
family's default without a word; it knows no tokenizer class of version 5, and names added special
tokens otherwise. Version 5 reads the older names as its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

OLDEST = "4.57.0"  # the oldest transformers that models written here are promised to load in


_OWN_CLASS, _SHARED_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def older_config(config: Mapping) -> dict:
    """A config.json with `rope_theta`, and `rope_scaling` where positions are scaled, beside
    `rope_parameters`.

    Parameters by type of layer are left alone: version 4 has names of its own for them in every
    family.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return dict(config)
    older = dict(config, rope_theta=rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return older


def older_tokenizer_config(config: Mapping) -> dict:
    """A tokenizer_config.json with the tokenizer class and the name of added special tokens that
    both versions know.
    """
    older = dict(config)
    if older.get("tokenizer_class") == _OWN_CLASS:
        older["tokenizer_class"] = _SHARED_CLASS
    if isinstance(older.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older


REWRITTEN: dict[str, Callable[[Mapping], dict]] = {
    "config.json": older_config,
    "tokenizer_config.json": older_tokenizer_config,
}


def older_file(path: Path) -> bytes:
    """The content of a file of `REWRITTEN`, as both versions read it."""
    return (
        json.dumps(REWRITTEN[path.name](json.loads(path.read_bytes())), indent=2) + "\n"
    ).encode()


def rewrite_for_older(folder: Path) -> None:
    """Writes those of the files `REWRITTEN` that `folder` holds as both versions read them."""
    for name in REWRITTEN:
        if (path := folder / name).is_file():
            path.write_bytes(older_file(path))
