"""Lines of JSON files, compressed or not: sought or read again up to a place, bounded in length, in
one encoding for the file.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from kl3m_nb.data.files import COMPRESSIONS, naming, skip_remedy, suffix_of
from kl3m_nb.data.sources import LONGEST_ROW, log

MOST_PASSED_OVER = (
    2**30
    # bytes without a row, in one stretch, after which a file is refused: a few kB may unpack to
    # petabytes
)


_COST_OF_A_LINE = 64  # a blank line takes as long as so many bytes of a long one


_CHUNK = 2**20


def read_lines(path: Path, offset: int) -> Iterator[tuple[int, bytes | None]]:
    """(bytes read, line) from byte `offset` of the text on; None for a line longer than
    `LONGEST_ROW`, which is passed over.

    Raises ValueError naming the file: when it is damaged, when no line ends at `offset`, when its
    first bytes tell that it is no UTF-8 text or holds no lines of JSON, and when it has
    `MOST_PASSED_OVER` bytes of nothing but long or blank lines.
    """
    with naming(path), _open_text(path) as file:
        if offset:
            _seek(file, offset, path)
        else:
            _check_beginning(file, path)
        passed_over = 0
        while line := file.readline(LONGEST_ROW + 1):
            if is_long := len(line) > LONGEST_ROW:
                piece = line
                while piece and not piece.endswith(b"\n") and passed_over <= MOST_PASSED_OVER:
                    passed_over, offset = passed_over + len(piece), offset + len(piece)
                    piece = file.readline(_CHUNK)
                line = piece
            offset += len(line)
            passed_over = (
                passed_over + max(len(line), _COST_OF_A_LINE) if is_long or line.isspace() else 0
            )
            if passed_over > MOST_PASSED_OVER:
                raise ValueError(
                    f"{path} has blank or too long lines beyond the limit of {MOST_PASSED_OVER:,}"
                    f" bytes, a blank line counted as {_COST_OF_A_LINE}; {skip_remedy(path)}."
                )
            yield offset, None if is_long else line


def parse_line(line: bytes, path: Path, is_first: bool) -> dict:
    """The JSON object of a line.

    Raises ValueError with the reason when it is none; naming the file, as `WrongFile`, when it is
    the file that is at fault.
    """
    try:
        text = (line.removeprefix(codecs.BOM_UTF8) if is_first else line).decode()
        values = json.loads(text)
    except UnicodeDecodeError as error:
        if not _is_utf8_but_for_a_few_lines(path):
            raise WrongFile(
                f"{path} is not UTF-8 text; convert it, `iconv -f LATIN1 -t UTF-8` if it is"
                f" Latin-1, or {skip_remedy(path)}."
            ) from error
        raise ValueError(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except json.JSONDecodeError as error:
        if is_first and error.msg == "Extra data" and text[: error.pos].endswith("\r"):
            raise WrongFile(
                f"{path} ends its lines with a carriage return alone; convert it, `tr '\\r' '\\n'`,"
                f" or {skip_remedy(path)}."
            ) from error
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


class WrongFile(ValueError):
    """Not one row but the whole file cannot be used; the message names it."""


def _open_text(path: Path) -> io.BufferedReader:
    compression = COMPRESSIONS[suffix_of(path)]
    return (
        io.BufferedReader(pa.input_stream(str(path), compression=compression), 2**18)
        if compression
        else open(path, "rb")
    )


def _check_beginning(file: io.BufferedReader, path: Path) -> None:
    """Raises WrongFile for other encodings of Unicode, with a mark or without, and for one JSON
    value over many lines.
    """
    beginning = file.peek(_CHUNK)[:4096]
    encoding = json.detect_encoding(beginning)
    start = (
        beginning[: len(beginning) // 4 * 4]
        .decode(encoding, errors="replace")
        .lstrip("\ufeff\0 \t\r\n")[:1]
    )
    if encoding not in ("utf-8", "utf-8-sig") and start in ("{", "["):  # else a damaged first row
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        raise WrongFile(
            f"{path} is {name} and not UTF-8 text; convert it, `iconv -f {name} -t UTF-8`, or"
            f" {skip_remedy(path)}."
        )
    if re.match(rb"\s*(\[\s*\{|[\[{]\s*?\n)", beginning.removeprefix(codecs.BOM_UTF8)):
        raise WrongFile(
            f"{path} is a JSON array, or an object over several lines, and not one object a line;"
            " convert it, `jq -c '.[]'` for an array and `jq -c .` for objects, or"
            f" {skip_remedy(path)}."
        )


def _seek(file: io.BufferedReader, offset: int, path: Path) -> None:
    """Goes to byte `offset` of the text. Raises ValueError when no line ends there."""
    if COMPRESSIONS[suffix_of(path)]:
        _read_again(file, offset - 1, str(path))
    else:
        file.seek(offset - 1)
    last = file.read(1)
    if not (last == b"\n" or (last and not file.peek(1))):  # a last row may lack its line end
        raise changed(path)


def _read_again(file: io.BufferedReader, size: int, name: str) -> None:
    """Reads and forgets `size` bytes of a stream that cannot seek; says once how long that takes,
    from the speed so far.
    """
    began, done, said = time.monotonic(), 0, False
    while done < size:
        done += len(file.read(min(_CHUNK, size - done))) or size
        seconds = time.monotonic() - began
        if seconds > 1 and not said:
            said = True
            log.warning(
                "%s cannot be sought: reading up to the old place takes another %.0f s",
                name,
                seconds * (size / done - 1),
            )


def changed(path: Path) -> ValueError:
    """What is raised when the place that a run stopped at is not in the file."""
    return ValueError(
        f"{path} is not the file that the run was reading: no row ends where it stopped; put that"
        f" back, or {skip_remedy(path)}."
    )


def _is_utf8_but_for_a_few_lines(path: Path) -> bool:
    """Whether a file in which a line is not UTF-8 is UTF-8 otherwise: a damaged row is passed over,
    another encoding is not.

    Another encoding is one in which the lines that are not UTF-8 are more than one, more than one
    in a thousand, and more than the lines that need UTF-8 and are; or all lines. The first
    `MOST_PASSED_OVER` bytes decide.
    """
    lines = valid = invalid = 0
    with _open_text(path) as file:
        left = MOST_PASSED_OVER
        while left > 0 and (line := file.readline(LONGEST_ROW)):
            left -= len(line)
            lines += 1
            if not line.isascii():
                try:
                    line.decode()
                    valid += 1
                except UnicodeDecodeError:
                    invalid += 1
    return invalid < lines and invalid <= max(1, valid, lines // 1000)
