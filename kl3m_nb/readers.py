"""Readers of documents: parquet, jsonl, compressed jsonl, hub data sets, lists in memory; each can be resumed.

A reader's `position` is plain data, valid behind the document it gave last. Row groups of parquet and lines of plain jsonl are
sought; what must be read again says how long that takes. Rows that cannot be used are counted in a `SourceReport` and said, never
dropped in silence.
"""

from __future__ import annotations

import glob
import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kl3m_nb import paths
from kl3m_nb.sources import COLUMNS, Document, Options, Part, SourceReport, log

RETRY_SECONDS = (1.0, 4.0, 16.0)
_COMPRESSIONS = {".jsonl": "", ".json": "", ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
_SUFFIXES = (".parquet", *_COMPRESSIONS)
_BAD_ROWS_IN_A_ROW = 100  # so many rows without one that can be used are the wrong data, not an accident
_BATCH_ROWS = 256
_HUB_ROWS_PER_SECOND = 20_000  # of some 4,000 tokens that the library skips on one core, the download not counted
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
        self._last_columns: list[str] = []
        self._not_utf8: Path | None = None  # the file of the last row that could not be used, when that was why

    def _document(self, row: dict, default_identifier: str) -> Document | None:
        """The document of `row`; None when it is not wanted or not usable, which is then counted.

        Raises ValueError after too many unusable rows in a row.
        """
        self._report.rows += 1
        self._last_columns = list(row)
        self._report.note_columns(self._name, self._last_columns)
        try:
            score, mime_type = row.get("score"), row.get("mime_type")
            if score is not None and not score <= self._wanted.score_max:  # NaN is no good score either
                self._report.note("above_score")
                return None
            if self._wanted.mime_types and mime_type is not None and mime_type not in self._wanted.mime_types:
                self._report.note("other_mime_type")
                return None
            tokens, text = _token_array(row.get("tokens")), row.get("text") or ""
            if not isinstance(text, str) or not (tokens.size or text):
                raise ValueError("it has neither `tokens` nor `text`")
            if not text.isascii():
                text.encode()  # half a surrogate pair is no text that a tokenizer takes
        except (ValueError, TypeError, OverflowError) as error:
            self._not_utf8 = None
            self._bad_row(f"row {default_identifier} cannot be used: {error}")
            return None
        self._bad_in_a_row = 0
        identifier = str(row.get("identifier") or default_identifier)
        return Document(identifier, str(row.get("dataset") or self._name), text, tokens)

    def _bad_row(self, what: str) -> None:
        self._report.note("bad_rows", f"{self._name}: {what}")
        self._bad_rows += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= _BAD_ROWS_IN_A_ROW:
            self._refuse()

    def _refuse(self) -> None:
        if self._not_utf8:
            raise ValueError(f"No row of {self._name} can be used: {self._not_utf8} is not UTF-8 text; convert it to UTF-8.")
        columns = ", ".join(self._last_columns) or "none that could be read"
        raise ValueError(f"No row of {self._name} can be used: {columns} are its columns, `tokens` or `text` is needed.")


class FilesReader(_RowReader):
    """All rows of parquet and jsonl files, file by file in the order of their names.

    `position` names the file and the place in it: row group and row for parquet, byte offset and row for jsonl.
    """

    def __init__(self, name: str, files: Sequence[Path], wanted: Options, report: SourceReport):
        super().__init__(name, wanted, report)
        self._files = list(files)
        self.position = {"file": 0, "name": self._files[0].name, "block": 0, "row": 0}

    def __iter__(self) -> Iterator[Document]:
        start = self.position
        if start["file"] >= len(self._files) or self._files[start["file"]].name != start["name"]:
            raise ValueError(
                f"The files of {self._name} are not those the run was reading: {start['name']} was number {start['file'] + 1}; "
                "put them back, or start a new run."
            )
        rows_before = self._report.rows
        for number in range(start["file"], len(self._files)):
            path = self._files[number]
            place = (start["block"], start["row"]) if number == start["file"] else (0, 0)
            is_parquet, has_rows = _suffix(path) == ".parquet", place != (0, 0)
            for block, row, values in self._rows(path, *place):
                has_rows = True
                self.position = {"file": number, "name": path.name, "block": block, "row": row}
                name = f"{path.name}#{block}.{row - 1}" if is_parquet else f"{path.name}#{row - 1}"
                document = None if values is None else self._document(values, name)
                if document is not None:
                    yield document
            if not has_rows:
                self._report.note("empty_files", f"{path} holds no row")
        if self._bad_rows and self._bad_rows == self._report.rows - rows_before and not start["row"]:
            self._refuse()

    def _rows(self, path: Path, block: int, row: int) -> Iterator[tuple[int, int, dict | None]]:
        if path.stat().st_size == 0:
            return iter(())
        return (self._parquet_rows if _suffix(path) == ".parquet" else self._json_rows)(path, block, row)

    def _parquet_rows(self, path: Path, group: int, skip: int) -> Iterator[tuple[int, int, dict]]:
        """(row group, rows of it read, row). A row group is read from its beginning, its first `skip` rows are not unpacked."""
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                self._report.note_columns(self._name, names)
                columns = [name for name in names if name in COLUMNS]
                if "tokens" not in columns and "text" not in columns:
                    self._last_columns = names
                    self._refuse()
                if skip and (group >= file.num_row_groups or skip > file.metadata.row_group(group).num_rows):
                    raise _changed(path)
                for number in range(group, file.num_row_groups):
                    row = 0
                    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[number], columns=columns):
                        first = min(max(skip - row, 0), batch.num_rows) if number == group else 0
                        for offset, values in enumerate(_batch_rows(batch.slice(first))):
                            yield number, row + first + offset + 1, values
                        row += batch.num_rows
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is damaged or no parquet file ({error}); replace it or take it out of the glob.") from error

    def _json_rows(self, path: Path, offset: int, row: int) -> Iterator[tuple[int, int, dict | None]]:
        """(bytes read, rows read, row); bytes count the text, not its compressed form. A row that is no JSON object is None."""
        compression = _COMPRESSIONS[_suffix(path)]
        with _open_bytes(path, compression) as file:
            if offset and compression:
                _read_again(file, offset - 1, str(path))
            elif offset:
                file.seek(offset - 1)
            last = file.read(1) if offset else b""
            if offset and not (last == b"\n" or (last and not file.peek(1))):  # a last row may lack its line end
                raise _changed(path)
            while line := _read_line(file, path):
                offset, row = offset + len(line), row + 1
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                    if not isinstance(values, dict):
                        raise ValueError("it is no JSON object")
                except ValueError as error:
                    values = None
                    self._not_utf8 = path if isinstance(error, UnicodeDecodeError) else None
                    self._report.rows += 1
                    self._bad_row(f"row {path.name}#{row - 1} cannot be used: {error}")
                yield offset, row, values


class HubReader(_RowReader):
    """The train split of a data set on the Hugging Face Hub, streamed. What fails on the way is tried again with back-off.

    `position` is the library's own: whole shards are skipped, the shard that was open is read again up to the old place.
    Raises ConnectionError naming the source when it stays unreachable, ValueError when there is no such data set.
    """

    def __init__(self, name: str, wanted: Options, report: SourceReport):
        super().__init__(f"hub:{name}", wanted, report)
        self._repository = name
        self.position = {"rows": 0, "library": {}}

    def __iter__(self) -> Iterator[Document]:
        import datasets
        from huggingface_hub import constants
        from huggingface_hub.utils import httpx  # the library it asks with, which is another in its second version

        failures = 0
        while True:
            try:
                stream = datasets.load_dataset(self._repository, split="train", streaming=True)
                if self.position["rows"]:
                    stream.load_state_dict(self.position["library"])
                    self._say_what_is_skipped()
                for row in stream:
                    failures = 0
                    self.position = {"rows": self.position["rows"] + 1, "library": stream.state_dict()}
                    document = self._document(row, f"{self._repository}#{self.position['rows'] - 1}")
                    if document is not None:
                        yield document
                return
            except FileNotFoundError as error:
                raise ValueError(f"There is no data set {self._name} with a train split, or it is private: {error}") from error
            except (OSError, httpx.TransportError) as error:
                if failures == len(RETRY_SECONDS) or constants.HF_HUB_OFFLINE:
                    raise ConnectionError(
                        f"{self._name} could not be reached in {failures + 1} attempts ({error}); check the network, "
                        "or name a local copy, hub:FOLDER."
                    ) from error
                self._report.note("retries", f"{self._name}: {error}; trying again in {RETRY_SECONDS[failures]:.0f} s")
                time.sleep(RETRY_SECONDS[failures])
                failures += 1

    def _say_what_is_skipped(self) -> None:
        rows = _find(self.position["library"], "shard_example_idx")
        log.warning(
            "%s: continuing at row %s; %s rows of the open shard are read again, about %.0f s and their download",
            self._name, f"{self.position['rows']:,}", f"{rows:,}", rows / _HUB_ROWS_PER_SECOND,
        )  # fmt: skip


def open_rows(part: Part, report: SourceReport) -> FilesReader | HubReader:
    """The reader of a part that is made of rows: files, a mirror on disk, or the hub.

    Raises FileNotFoundError when no file matches, ValueError when one is of no known format or all are empty.
    """
    if part.kind == "files":
        return FilesReader(str(part), matching_files(part.name), part.options, report)
    folder = paths.resolve(part.name)
    if folder.is_dir():
        return FilesReader(str(part), mirror_files(folder), part.options, report)
    return HubReader(part.name, part.options, report)


def matching_files(pattern: str) -> list[Path]:
    """The files of a glob below the project's root, sorted. Raises FileNotFoundError when there is none."""
    files = sorted(path for path in map(Path, glob.glob(str(paths.resolve(pattern)), recursive=True)) if path.is_file())
    if not files:
        raise FileNotFoundError(
            f"No file matches {str(paths.resolve(pattern))!r}; check the glob, which is taken from the project's root "
            f"{paths.project_root()} and not from the shell's folder."
        )
    for path in files:
        _suffix(path)
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"Every file that matches {pattern!r} is empty; name files with rows.")
    return files


def mirror_files(folder: Path) -> list[Path]:
    """The files of the train split in a folder laid out like a hub data set: those with `train` in their path, if any has."""
    suffixes = tuple(suffix for suffix in _SUFFIXES if suffix != ".json")  # *.json beside the data is metadata
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(suffixes))
    files = [path for path in files if "train" in str(path.relative_to(folder))] or files
    if not files:
        raise FileNotFoundError(f"The mirror {folder} holds no parquet or jsonl file; copy the data set's files there.")
    return files


def _token_array(tokens) -> np.ndarray:
    array = np.asarray(() if tokens is None else tokens)
    if array.size == 0:
        return _NO_TOKENS
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**31:
        raise ValueError("its `tokens` are not a list of token ids")
    return array.astype(np.int32, copy=False)


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict]:
    """The rows of a batch, token lists as views of one array: unpacking them one by one would be 50 times slower."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    lists = columns.pop("tokens", None)
    plain = pa.RecordBatch.from_pydict(columns).to_pylist() if columns else [{}] * len(batch)
    if lists is None:
        yield from plain
        return
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)) or lists.values.null_count:
        yield from ({**row, "tokens": tokens} for row, tokens in zip(plain, lists.to_pylist(), strict=True))
        return
    values, bounds = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    for number, row in enumerate(plain):
        yield {**row, "tokens": values[bounds[number] : bounds[number + 1]]}


def _suffix(path: Path) -> str:
    suffix = "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path} is of no known format; files end in {', '.join(_SUFFIXES)}.")
    return suffix


def _open_bytes(path: Path, compression: str) -> io.BufferedReader:
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), 2**18) if compression else open(path, "rb")


def _read_line(file: io.BufferedReader, path: Path) -> bytes:
    try:
        return file.readline()
    except OSError as error:
        raise ValueError(f"{path} is cut off or damaged ({error}); replace it or take it out of the glob.") from error


def _read_again(file: io.BufferedReader, size: int, name: str) -> None:
    """Reads and forgets `size` bytes of a stream that cannot seek; says once how long that takes, from the speed so far."""
    began, done, said = time.monotonic(), 0, False
    while done < size:
        done += len(file.read(min(2**20, size - done))) or size
        seconds = time.monotonic() - began
        if seconds > 1 and not said:
            said = True
            log.warning(
                "%s cannot be sought: reading up to the old place takes another %.0f s", name, seconds * (size / done - 1)
            )


def _changed(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not the file that the run was reading: no row ends where it stopped; put that back, or start a new run."
    )


def _find(state: dict, key: str) -> int:
    """The number `key` of the library's nested state; 0 where it has none."""
    if key in state:
        return state[key]
    return max((_find(value, key) for value in state.values() if isinstance(value, dict)), default=0)
