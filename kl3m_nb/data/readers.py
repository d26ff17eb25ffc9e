"""Readers of documents: parquet, jsonl, compressed jsonl, hub data sets, lists in memory; each can
be resumed.

A reader's `position` is plain data, valid behind the document it gave last. Row groups of parquet
and lines of plain jsonl are sought; what must be read again says how long that takes. Rows that
cannot be used are counted in a `SourceReport` and said, never dropped in silence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from kl3m_nb.common import paths
from kl3m_nb.data.files import (
    check_signature,
    matching_files,
    mirror_files,
    names_in_source,
    naming,
    skip_remedy,
    suffix_of,
)
from kl3m_nb.data.json_lines import WrongFile, parse_line, read_lines
from kl3m_nb.data.parquet_rows import parquet_rows
from kl3m_nb.data.sources import (
    LONGEST_ROW,
    Document,
    Options,
    Part,
    SourceReport,
    listed_columns,
    log,
)

RETRY_SECONDS = (1.0, 4.0, 16.0)


_BAD_ROWS_IN_A_ROW = (
    100  # so many rows without one that can be used are the wrong data, not an accident
)


_HUB_ROWS_PER_SECOND = (
    20_000  # of some 4,000 tokens that the library skips on one core, the download not counted
)


_NO_TOKENS = np.empty(0, dtype=np.int32)


class ListReader:
    """Documents that are in memory, in the order given."""

    def __init__(self, documents: Sequence[Document], report: SourceReport):
        self.position = {"index": 0}
        self._documents, self._report = documents, report

    def __iter__(self) -> Iterator[Document]:
        while self.position["index"] < len(self._documents):
            self.position = {"index": self.position["index"] + 1}
            self._report.rows += 1
            yield self._documents[self.position["index"] - 1]


class _RowReader:
    """What readers of rows share: a row becomes a document, or is counted."""

    def __init__(self, name: str, wanted: Options, report: SourceReport):
        self._name, self._wanted, self._report = name, wanted, report
        self._bad_rows = self._bad_in_a_row = 0
        self._last_reason = ""  # why the last row that cannot be used cannot

    def _document(self, row: dict, default_identifier: str, remedy: str) -> Document | None:
        """The document of `row`; None when it is not wanted or not usable, which is then counted.

        Raises ValueError, with the `remedy`, after too many unusable rows in a row.
        """
        self._report.rows += 1
        columns = list(row)
        self._report.note_columns(self._name, columns)
        try:
            # Is it wanted?
            score, mime_type = _number(row.get("score")), row.get("mime_type")
            if (
                score is not None and not score <= self._wanted.score_max
            ):  # NaN is no good score either
                self._report.note("above_score")
                return None
            if (
                self._wanted.mime_types
                and mime_type is not None
                and mime_type not in self._wanted.mime_types
            ):
                self._report.note("other_mime_type")
                return None
            # Does it hold a text or tokens?
            tokens, text = _token_array(row.get("tokens")), _text(row.get("text"))
            if not (tokens.size or text):
                if "tokens" in row or "text" in row:
                    raise ValueError("its `tokens` and `text` are empty")
                raise ValueError(
                    f"`tokens` or `text` is needed, {listed_columns(columns)} are its columns"
                )
            if max(tokens.size, len(text)) > LONGEST_ROW:
                raise ValueError(f"its text or tokens are longer than {LONGEST_ROW:,}")
            # Can all its texts be encoded? Half a surrogate pair is taken by no tokenizer, hash or
            # file.
            document = Document(
                str(row.get("identifier") or default_identifier),
                str(row.get("dataset") or self._name),
                text,
                tokens,
            )
            for value in (document.identifier, document.dataset, text):
                if not value.isascii():
                    value.encode()
        except (ValueError, TypeError, OverflowError) as error:
            self._bad_row(default_identifier, str(error), remedy)
            return None
        self._bad_in_a_row = 0
        return document

    def _bad_row(self, identifier: str, reason: str, remedy: str) -> None:
        self._last_reason = f"{identifier}: {reason}"
        self._report.note("bad_rows", f"{self._name}: a row cannot be used, {self._last_reason}")
        self._bad_rows += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= _BAD_ROWS_IN_A_ROW:
            raise ValueError(
                f"{_BAD_ROWS_IN_A_ROW} rows of {self._name} in a row cannot be used, lastly"
                f" {self._last_reason}; {remedy}."
            )


class FilesReader(_RowReader):
    """All rows of parquet and jsonl files, file by file in the order of their names.

    `position` names the files, the open one and the place in it: row group and row for parquet,
    byte offset and row for jsonl.
    """

    def __init__(self, name: str, files: Sequence[Path], wanted: Options, report: SourceReport):
        super().__init__(name, wanted, report)
        self._files = list(files)
        self._names = names_in_source(name.partition(":")[2], self._files)
        self.position = self._at(0, 0, 0)

    def __iter__(self) -> Iterator[Document]:
        open_file, *open_place = self._place()
        rows_before = self._report.rows
        for number in range(open_file, len(self._files)):
            path = self._files[number]
            place = open_place if number == open_file else (0, 0)
            remedy, first_row = skip_remedy(path), self._report.rows
            bad_before, has_rows = self._bad_rows, any(place)
            is_parquet = suffix_of(path) == ".parquet"
            # The rows of one file, from the place where the run stopped in the first.
            for block, row, values in self._rows(path, *place):
                has_rows = True
                self.position = self._at(number, block, row)
                name = f"{path.name}#{block}.{row - 1}" if is_parquet else f"{path.name}#{row - 1}"
                if isinstance(values, dict):
                    document = self._document(values, name, remedy)
                    if document is not None:
                        yield document
                else:
                    self._report.rows += 1
                    self._bad_row(name, str(values), remedy)
            # What is said of a file that gave nothing, and of a source.
            if not has_rows:
                self._report.note("empty_files", f"{path} holds no row")
            rows = self._report.rows - first_row
            if 0 < rows == self._bad_rows - bad_before and not any(place):
                log.warning(
                    "None of the %s rows of %s can be used, lastly %s",
                    f"{rows:,}",
                    path,
                    self._last_reason,
                )
        if (
            self._bad_rows
            and self._bad_rows == self._report.rows - rows_before
            and not any(open_place)
        ):
            raise ValueError(f"No row of {self._name} can be used, lastly {self._last_reason}.")

    def _at(self, number: int, block: int, row: int) -> dict:
        return {
            "file": number,
            "name": self._files[number].name,
            "block": block,
            "row": row,
            "files": self._names,
        }

    def _place(self) -> tuple[int, int, int]:
        """(file, block, row) to go on at. Says what is lost where files are gone. Raises ValueError
        when there are new ones.
        """
        number, block, row = (self.position[key] for key in ("file", "block", "row"))
        before = self.position.get("files")
        if before is None:  # a state of an earlier version names the open file alone
            if number >= len(self._files) or self._files[number].name != self.position["name"]:
                raise ValueError(
                    f"The files of {self._name} are not those the run was reading:"
                    f" {self.position['name']} was number {number + 1}; put them back, or start a"
                    " new run."
                )
            return number, block, row
        # Which files are new or gone?
        known, present = set(before), set(self._names)
        if new := [name for name in self._names if name not in known]:
            raise ValueError(
                f"The files of {self._name} are not those the run was reading: {new[0]} is new;"
                " take it away, or start a new run."
            )
        gone = [name for name in before if name not in present]
        if (
            before[number] in present
            and (block or row)
            and not self._files[self._names.index(before[number])].stat().st_size
        ):
            gone.append(before[number])  # emptied, as a damaged file may be to go on without it
        if not gone:
            return number, block, row
        # The open file, or where that is gone the first that is left behind it.
        self._say_lost(gone, before)
        following = next((name for name in before[number:] if name in present), None)
        if following is None:
            return len(self._files), 0, 0
        return self._names.index(following), *(
            (block, row) if following == before[number] not in gone else (0, 0)
        )

    def _say_lost(self, gone: Sequence[str], before: Sequence[str]) -> None:
        number, block, row = (self.position[key] for key in ("file", "block", "row"))
        is_parquet = before[number].endswith(".parquet")
        for name in gone:
            self._report.lost_files += 1
            place = f"row group {block}, row {row}" if is_parquet else f"row {row}"
            if name == before[number] and (block or row):
                lost = f"its rows from {place} on are lost to this pass, all to later ones"
            else:
                is_behind = before.index(name) < number
                passes = "later passes" if is_behind else "this pass and later ones"
                lost = f"its rows are lost to {passes}"
            log.warning("%s: %s is gone since the run stopped; %s", self._name, name, lost)
        log.warning(
            "%s: the order of documents from here on, and the held-out documents, may differ from"
            " those of a run with %s.",
            self._name,
            "that file" if len(gone) == 1 else f"those {len(gone)} files",
        )

    def _rows(
        self, path: Path, block: int, row: int
    ) -> Iterator[tuple[int, int, dict | ValueError]]:
        """(block, row, values); for a row that cannot be read, the error instead of values."""
        with naming(path):
            if path.stat().st_size == 0:
                return iter(())
            check_signature(path)
        if suffix_of(path) == ".parquet":
            return parquet_rows(path, block, row, partial(self._report.note_columns, self._name))
        return _json_rows(path, block, row)


def _json_rows(path: Path, offset: int, row: int) -> Iterator[tuple[int, int, dict | ValueError]]:
    """(bytes read, rows read, row); bytes count the text, not its compressed form."""
    for row, (offset, line) in enumerate(read_lines(path, offset), row + 1):  # noqa: B020
        if line is None:
            yield offset, row, ValueError(f"it is longer than {LONGEST_ROW:,} bytes")
        elif not line.isspace():
            try:
                values = parse_line(line, path, is_first=row == 1)
            except WrongFile:
                raise
            except ValueError as error:
                values = error
            yield offset, row, values


class HubReader(_RowReader):
    """The train split of a data set on the Hugging Face Hub, streamed. What fails on the way is
    tried again with back-off.

    `position` is the library's own: whole shards are skipped, the shard that was open is read again
    up to the old place. Raises ConnectionError naming the source when it stays unreachable,
    ValueError when there is no such data set.
    """

    def __init__(self, name: str, wanted: Options, report: SourceReport):
        super().__init__(f"hub:{name}", wanted, report)
        self._repository = name
        self.position = {"rows": 0, "library": {}}

    def __iter__(self) -> Iterator[Document]:
        import datasets
        from huggingface_hub import constants
        from huggingface_hub.utils import (
            httpx,
        )  # the library it asks with, which is another in its second version

        failures = 0
        while True:
            try:
                stream = datasets.load_dataset(self._repository, split="train", streaming=True)
                if self.position["rows"]:
                    stream.load_state_dict(self.position["library"])
                    self._say_what_is_skipped()
                for row in stream:
                    failures = 0
                    self.position = {
                        "rows": self.position["rows"] + 1,
                        "library": stream.state_dict(),
                    }
                    document = self._document(
                        row,
                        f"{self._repository}#{self.position['rows'] - 1}",
                        "choose another data set",
                    )
                    if document is not None:
                        yield document
                return
            except FileNotFoundError as error:
                raise ValueError(
                    f"There is no data set {self._name} with a train split, or it is private:"
                    f" {error}"
                ) from error
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{self._name} cannot be read behind its row {self.position['rows']:,}"
                    f" ({error}); copy its sound files to a folder and name that, hub:FOLDER."
                ) from error
            except (OSError, httpx.TransportError) as error:
                if failures == len(RETRY_SECONDS) or constants.HF_HUB_OFFLINE:
                    raise ConnectionError(
                        f"{self._name} could not be reached in {failures + 1} attempts ({error});"
                        " check the network, or name a local copy, hub:FOLDER."
                    ) from error
                self._report.note(
                    "retries",
                    f"{self._name}: {error}; trying again in {RETRY_SECONDS[failures]:.0f} s",
                )
                time.sleep(RETRY_SECONDS[failures])
                failures += 1

    def _say_what_is_skipped(self) -> None:
        rows = _find(self.position["library"], "shard_example_idx")
        log.warning(
            "%s: continuing at row %s; %s rows of the open shard are read again, about %.0f s and"
            " their download",
            self._name,
            f"{self.position['rows']:,}",
            f"{rows:,}",
            rows / _HUB_ROWS_PER_SECOND,
        )


def open_rows(part: Part, report: SourceReport) -> FilesReader | HubReader:
    """The reader of a part that is made of rows: files, a mirror on disk, or the hub.

    Raises FileNotFoundError when no file matches, ValueError when one is of no known format or all
    are empty.
    """
    if part.kind == "files":
        return FilesReader(
            str(part), matching_files(part.name, part.options.skip), part.options, report
        )
    folder = paths.resolve(part.name)
    if folder.is_dir():
        return FilesReader(str(part), mirror_files(folder, part.options.skip), part.options, report)
    if part.options.skip:
        raise ValueError(
            f"The option skip of {part} names files, and a stream from the hub has none to name;"
            " leave it out."
        )
    return HubReader(part.name, part.options, report)


def _text(text) -> str:
    """A row's `text`; bytes are taken for UTF-8. Raises ValueError for anything else."""
    if text is None:
        return ""
    if isinstance(text, bytes):
        return text.decode()
    if not isinstance(text, str):
        raise ValueError(
            f"its `text` is a {type(text).__name__} and not a text; store one text a row, a list"
            " joined by line ends"
        )
    return text


def _number(score) -> float | None:
    """A row's `score`, also one that is written as text. Raises ValueError or TypeError for
    anything else.
    """
    if score is None or isinstance(score, int | float):
        return score
    try:
        return float(score)
    except (ValueError, TypeError):
        raise ValueError(f"its `score` is {score!r:.60} and not a number") from None


def _token_array(tokens) -> np.ndarray:
    """A row's `tokens`, int32 [length]; whole numbers that are stored as text or with a decimal
    point are cast.

    Raises ValueError for anything else, OverflowError for numbers beyond all bounds.
    """
    if isinstance(tokens, str):
        tokens = tokens.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    array = np.asarray(() if tokens is None else tokens)
    if array.size == 0:
        return _NO_TOKENS
    if array.dtype.kind in "Uf":
        array = _whole_numbers(array)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**31:
        raise ValueError("its `tokens` are not a list of token ids")
    return array.astype(np.int32, copy=False)


def _whole_numbers(array: np.ndarray) -> np.ndarray:
    """`array` as int64 where its texts or floats are whole numbers that lose nothing by it; else as
    it is.
    """
    is_whole = (
        np.char.isdecimal(array)
        if array.dtype.kind == "U"
        else (array == np.floor(array)) & (array < 2**31)
    )
    return array.astype(np.int64) if is_whole.all() else array


def _find(state: dict, key: str) -> int:
    """The number `key` of the library's nested state; 0 where it has none."""
    if key in state:
        return state[key]
    return max(
        (_find(value, key) for value in state.values() if isinstance(value, dict)), default=0
    )
