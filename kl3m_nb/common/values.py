"""Values as people write them, in a shell or in a YAML file: both are read in the same way.

YAML 1.1 reads 0500 as 320, 1:30 as 90, `on` as true and 1e-4 as text. So a file's values are taken
as they are written, and the type that is wanted decides what they mean.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Hashable
from pathlib import Path

import yaml

from kl3m_nb.common.files import read_plain
from kl3m_nb.common.paths import find

MAXIMUM_BYTES = 2**20  # of a parameter file


KINDS = ("int", "float", "str", "bool", "list")


def cast(kind: str, value: object) -> int | float | str | bool | list[str]:
    """`value` as a `kind` of `KINDS`; a list holds texts.

    Raises ValueError where that would change what was meant; its message is empty, or a hint in
    brackets for the end of a sentence.
    """
    if type(value).__name__ == kind == "str" or (kind == "bool" and isinstance(value, bool)):
        return value
    if kind == "list":
        return listed(value)
    if kind == "bool" and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if (
        kind in ("int", "float")
        and isinstance(value, (int, float, str))
        and not isinstance(value, bool)
    ):
        return _number(kind, value)
    raise ValueError


def _number(kind: str, value: float | str) -> int | float:
    """`value`, a number or the text of one, as int or float."""
    text = str(value).strip()
    if re.fullmatch(r"[+-]?0[0-9_]+", text):  # octal to YAML 1.1 and C, decimal to others
        raise ValueError(" (write it without the leading 0)")
    if kind == "int" and re.fullmatch(r"[+-]?[0-9_]+", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        raise ValueError from None
    if not math.isfinite(number) or (kind == "int" and not number.is_integer()):
        raise ValueError
    return int(number) if kind == "int" else number


def listed(value: str | list) -> list[str]:
    """The texts of a list, or those in one text: between commas or blanks, in quotes where they
    hold one themselves.

    A text that is the path of something, such as one with blanks in it, is taken as it stands.
    Raises ValueError as `cast` for anything else, and for a quote that is not closed.
    """
    if not isinstance(value, str):
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ValueError
        return value
    if value.strip() and os.path.exists(find(value)):
        return [value]
    words = shlex.shlex(value, posix=True)
    words.whitespace += ","
    words.whitespace_split, words.commenters = True, ""
    try:
        return list(words)
    except ValueError:
        raise ValueError(" (a quote in it is not closed)") from None


def check_bounds(minimum: float, maximum: float = math.inf, /, **given: float) -> None:
    """Raises ValueError for the first of the values `given` by name that is not from `minimum` to
    `maximum`, both included, or not finite.
    """
    for name, value in given.items():
        if not minimum <= value <= maximum or value == math.inf:
            upper = f" and at most {maximum}" if maximum < math.inf else " and finite"
            raise ValueError(f"{name} is {value!r}; it must be at least {minimum}{upper}.")


def read_mapping(path: Path) -> dict[str, object]:
    """The `name: value` lines of a YAML file, each value a text, a list, a mapping, or None where
    nothing stands.

    Raises ValueError for a file that is not there, is no valid YAML, holds anything else, or one
    name twice.
    """
    if not path.is_file():
        raise ValueError(
            f"There is no parameter file {path}; give a YAML file of name: value lines."
        )
    try:
        values = yaml.load(read_plain(path, MAXIMUM_BYTES).decode("utf-8"), Loader=_AsWritten)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep; give name: value lines.") from error
    except _NamedTwice as error:
        raise ValueError(f"{path} {error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text; save it as UTF-8, with name: value lines."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} is not valid YAML ({' '.join(str(error).split())}); give name: value lines."
        ) from error
    except ValueError as error:  # no regular file, or a long one
        raise ValueError(f"{path} cannot be read ({error}); give name: value lines.") from error
    if values in (None, {}):
        raise ValueError(f"{path} is empty; give name: value lines.")
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; give name: value lines.")
    return values


class _NamedTwice(Exception):
    """A mapping has two values for one name."""


class _AsWritten(yaml.BaseLoader):
    """Reads every scalar as the text that stands there, and refuses a name that stands twice: YAML
    takes the last.
    """

    def construct_scalar(self, node: yaml.Node) -> str | None:
        text = super().construct_scalar(node)
        return None if node.style is None and text.lower() in ("", "~", "null") else text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise _NamedTwice(
                    f"names {key} a second time in line {key_node.start_mark.line + 1}; leave one"
                    " of the two"
                )
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep=deep)
