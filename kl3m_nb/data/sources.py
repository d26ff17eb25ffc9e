"""What a source line says, what a document is, and the count of all that could not be used.

A source is one line: `package:licensedcode-data`, `files:GLOB`, `hub:OWNER/NAME` (or `hub:FOLDER`,
a mirror of such a data set on disk). Options stand behind the name, several sources are mixed by
weight: `0.7*hub:OWNER/NAME(score_max=8, mime_types=text/plain|text/html) +
0.3*files:texts/*.jsonl(min_tokens=64, skip=bad.jsonl)`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

log = logging.getLogger(__name__)


PACKAGE = "licensedcode-data"


COLUMNS = ("identifier", "dataset", "mime_type", "tokens", "text", "score")  # the family's schema


LONGEST_ROW = (
    2**25
)  # bytes of a line, characters of a text, ids of tokens; Python may take 47 bytes for one of JSON


_NAMED_COLUMNS = 20  # of a row, in a sentence; a row may have as many as it has words


_KEPT_COLUMNS = 100


_NO_TOKENS = np.empty(0, dtype=np.int32)


_PART = re.compile(r"\s*(?:([0-9.]+)\s*\*\s*)?(package|files|hub):([^\s(].*?)(?:\(([^()]*)\))?\s*")


_NEXT_PART = re.compile(r"\s\+\s(?=\s*(?:[0-9.]+\s*\*\s*)?(?:package|files|hub):)")


@dataclass(frozen=True)
class Document:
    """One record in the family's schema; `tokens`, int32 [length], is empty when the source stores
    text.
    """

    identifier: str
    dataset: str
    text: str
    tokens: np.ndarray = field(default_factory=lambda: _NO_TOKENS, compare=False)
    # documents of one family never stand on both sides of the held-out split; empty: the identifier
    family: str = ""


@dataclass(frozen=True)
class Options:
    """Which rows of a source are wanted, and how they are read. A row without a score or mime type
    passes the filter on it.
    """

    score_max: float = 10.0  # lower is better; the family keeps documents up to 10
    mime_types: tuple[str, ...] = ()  # empty: all
    min_tokens: int = 0  # shorter documents are neither trained nor judged on
    # the one stored tokens were made with, when it is not the run's: they are decoded and tokenized
    # anew
    tokenizer: str = ""
    skip: tuple[str, ...] = ()  # globs of files that are left out, by name or whole path


@dataclass(frozen=True)
class Part:
    """One source of a mixture and the share of the tokens it is to give; shares are relative to
    each other.
    """

    kind: str
    name: str
    weight: float = 1.0
    options: Options = Options()

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass
class SourceReport:
    """What became of everything a stream has read, all passes together."""

    rows: int = 0  # rows read, good or bad
    bad_rows: int = 0  # no JSON, neither text nor tokens, ids that the tokenizer does not have
    above_score: int = 0
    other_mime_type: int = 0
    too_short: int = 0
    held_out: int = 0  # belong to the held-out part
    near_held_out: int = 0  # too like a held-out document to be trained on
    empty_files: int = 0
    lost_files: int = 0  # were there when a run stopped and no more when it went on
    retries: int = 0
    unknown_columns: list[str] = field(default_factory=list)

    def note(self, counter: str, what: str = "") -> None:
        """Adds one to `counter`; with `what` it is also logged, the 1st, 10th, 100th … time."""
        count = getattr(self, counter) + 1
        setattr(self, counter, count)
        if what and 10 ** round(math.log10(count)) == count:
            log.warning("%s (%s: %s)", what, counter.replace("_", " "), f"{count:,}")

    def note_columns(self, name: str, columns: Sequence[str]) -> None:
        """Keeps and logs columns that are not of the family's schema, each once."""
        room = _KEPT_COLUMNS - len(
            self.unknown_columns
        )  # keys may be data, and other ones in every row
        unknown = [
            column
            for column in columns
            if column not in COLUMNS and column not in self.unknown_columns
        ][:room]
        if unknown:
            self.unknown_columns += unknown
            log.warning("%s has columns that are not used: %s", name, listed_columns(unknown))

    def state_dict(self) -> dict:
        """Plain numbers and names."""
        return {**vars(self), "unknown_columns": list(self.unknown_columns)}

    def load_state_dict(self, state: dict) -> None:
        """Takes over the counts of `state`."""
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)


def parse_source(source: str) -> tuple[Part, ...]:
    """The parts of a source line. Raises ValueError with one sentence when a part is not of a known
    form.
    """
    return tuple(_parse_part(text) for text in _NEXT_PART.split(source))


def listed_columns(columns: Sequence[str]) -> str:
    """The names of some columns for a sentence, the first twenty, long ones cut."""
    names = ", ".join(f"{column:.40}" for column in columns[:_NAMED_COLUMNS])
    return (
        f"{names} and {len(columns) - _NAMED_COLUMNS:,} more"
        if len(columns) > _NAMED_COLUMNS
        else names or "none"
    )


def _parse_part(text: str) -> Part:
    match = _PART.fullmatch(text)
    weight = _number(match[1] or "1") if match else math.nan
    if match is None or not 0 < weight < math.inf:
        raise ValueError(
            f"The source {text.strip()!r} is not known; use package:{PACKAGE}, files:GLOB or"
            " hub:OWNER/NAME, or several with positive weights: 0.7*hub:OWNER/NAME +"
            " 0.3*files:GLOB."
        )
    _, kind, name, options = match.groups()
    if kind == "package" and name != PACKAGE:
        raise ValueError(
            f"The package {name!r} is not a known corpus; the embedded one is package:{PACKAGE}."
        )
    chosen = _parse_options(options, text.strip()) if options is not None else Options()
    if kind == "package" and chosen.skip:
        raise ValueError(
            f"The option skip of {text.strip()!r} names files, and a package has none to name;"
            " leave it out."
        )
    return Part(kind, name, weight, chosen)


def _parse_options(text: str, source: str) -> Options:
    values: dict = {}
    for entry in text.split(","):
        name, _, value = (piece.strip() for piece in entry.partition("="))
        if name == "score_max":
            values[name] = _number(value)
        elif name == "min_tokens":
            values[name] = int(value) if value.isdecimal() else math.nan
        elif name in ("mime_types", "skip"):
            values[name] = tuple(piece.strip() for piece in value.split("|"))
        elif name == "tokenizer":
            values[name] = value
        if name not in values or values[name] != values[name] or not value:
            known = ", ".join(option.name for option in dataclasses.fields(Options))
            raise ValueError(
                f"The option {entry.strip()!r} of {source!r} is not understood; the options are"
                f" {known}, for example (score_max=8, mime_types=text/plain|text/html,"
                " min_tokens=64). A name that ends in brackets itself needs options behind it,"
                " such as (min_tokens=0)."
            )
    return Options(**values)


def _number(text: str) -> float:
    """`text` as a number; NaN when it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
