"""Rows of parquet files, from a row group on, in batches whose size is bounded by what they may
unpack to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kl3m_nb.data.files import naming, skip_remedy
from kl3m_nb.data.json_lines import changed
from kl3m_nb.data.sources import COLUMNS, listed_columns

_BATCH_ROWS = 256


_BATCH_BYTES = (
    2**28
)  # of text in a batch, at most, were each of its rows as long as all that is stored


# What is refused unread: a column of a row group that would unpack to so many bytes and so many
# times its size on disk.
_BOMB_BYTES, _BOMB_RATIO = 2**28, 500


def parquet_rows(
    path: Path, group: int, skip: int, note_columns: Callable[[Sequence[str]], None]
) -> Iterator[tuple[int, int, dict | UnicodeDecodeError]]:
    """(row group, rows of it read, row). A row group is read from its beginning, its first `skip`
    rows are not unpacked.

    A row with a text that is not UTF-8 is the error instead. `note_columns` is told the file's
    columns. Raises ValueError naming the file when it is damaged, has neither `tokens` nor `text`,
    or has no such place.
    """
    with naming(path), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        note_columns(names)
        columns = [name for name in names if name in COLUMNS]
        if "tokens" not in columns and "text" not in columns:
            raise ValueError(
                f"{path} cannot be used: `tokens` or `text` is needed, {listed_columns(names)} are"
                f" its columns; {skip_remedy(path)}."
            )
        if skip and (
            group >= file.num_row_groups or skip > file.metadata.row_group(group).num_rows
        ):
            raise changed(path)
        for number in range(group, file.num_row_groups):
            row = 0
            size = _batch_rows(file.metadata.row_group(number), columns, path)
            for batch in file.iter_batches(size, row_groups=[number], columns=columns):
                first = min(max(skip - row, 0), batch.num_rows) if number == group else 0
                for offset, values in enumerate(_unpacked(batch.slice(first))):
                    yield number, row + first + offset + 1, values
                row += batch.num_rows


def _batch_rows(group: pq.RowGroupMetaData, columns: Sequence[str], path: Path) -> int:
    """How many rows of a row group are unpacked at a time, at most 256.

    A text that many rows share is stored once and unpacked for each; how long it is is not known
    before. Raises ValueError for a column that unpacks to too much.
    """
    longest_text = 1
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema.split(".")[0] not in columns:
            continue
        is_text = chunk.physical_type == "BYTE_ARRAY"
        unpacked = (
            chunk.total_uncompressed_size
            if is_text
            else max(chunk.total_uncompressed_size, 4 * chunk.num_values)
        )
        if unpacked > max(_BOMB_BYTES, _BOMB_RATIO * chunk.total_compressed_size):
            raise ValueError(
                f"{path} is refused: {chunk.total_compressed_size:,} bytes of its column"
                f" {chunk.path_in_schema!r} unpack to {unpacked:,}, more than {_BOMB_RATIO} times"
                f" as many; {skip_remedy(path)}."
            )
        longest_text = max(longest_text, unpacked if is_text else 1)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // longest_text))


def _unpacked(batch: pa.RecordBatch) -> Iterator[dict | UnicodeDecodeError]:
    """The rows of a batch, token lists as views of one array: unpacking them one by one would be 50
    times slower.
    """
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    lists = columns.pop("tokens", None)
    plain = _plain_rows(pa.RecordBatch.from_pydict(columns)) if columns else [{}] * len(batch)
    if lists is None:
        yield from plain
        return
    is_list = pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)
    if not is_list or not pa.types.is_primitive(lists.type.value_type) or lists.values.null_count:
        token_lists = lists.to_pylist()
    else:
        values, bounds = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
        token_lists = (values[first:last] for first, last in itertools.pairwise(bounds))
    for row, tokens in zip(plain, token_lists, strict=True):
        yield row if isinstance(row, UnicodeDecodeError) else {**row, "tokens": tokens}


def _plain_rows(batch: pa.RecordBatch) -> list[dict | UnicodeDecodeError]:
    """The rows of a batch, one by one where a text is not UTF-8, which parquet does not see to."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [error]
        return [row for number in range(len(batch)) for row in _plain_rows(batch.slice(number, 1))]
