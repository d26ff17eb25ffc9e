from __future__ import annotations

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kl3m_nb.data import parquet_rows, readers, sources
from kl3m_nb.data.sources import SourceReport


def read(folder, report=None):
    (part,) = sources.parse_source(f"files:{folder}/*")
    return list(readers.open_rows(part, report or SourceReport()))


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip"])
@pytest.mark.parametrize("where", ["page", "beginning", "footer", "cut"])
def test_damage_anywhere_names_the_file(tmp_path, compression, where):
    random = np.random.default_rng(0)
    texts = ["".join(map(chr, random.integers(32, 127, 3000))) for _ in range(300)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts}),
        path,
        row_group_size=100,
        use_dictionary=False,
        compression=compression,
        write_page_checksum=False,
    )
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    at = {
        "page": chunk.data_page_offset + chunk.total_compressed_size // 2,
        "beginning": chunk.data_page_offset,
        "footer": len(content) - 100,
        "cut": len(content) // 2,
    }[where]
    content[at : at + 64] = bytes(byte ^ 255 for byte in content[at : at + 64])
    path.write_bytes(bytes(content[:at] if where == "cut" else content))
    with pytest.raises(ValueError, match=r"/a\.parquet .*damaged.*skip=a\.parquet"):
        read(tmp_path)


def test_a_foreign_file_among_good_ones_is_named_and_the_others_are_not_blamed(tmp_path):
    for number in range(3):
        pq.write_table(pa.table({"text": [f"text {number}"] * 9}), tmp_path / f"{number}.parquet")
    pq.write_table(pa.table({"prompt": ["a"], "answer": ["b"]}), tmp_path / "1.parquet")
    with pytest.raises(
        ValueError,
        match=r"/1\.parquet cannot be used.* prompt, answer are its columns.*skip=1\.parquet",
    ) as error:
        read(tmp_path)
    assert "No row" not in str(error.value)


def test_a_text_that_is_not_utf_8_costs_its_row(tmp_path):
    raw = [f"text {n}".encode() for n in range(300)]
    raw[70] = b"Geb\xfchr"
    as_text = pa.Array.from_buffers(pa.string(), 300, pa.array(raw).buffers())
    pq.write_table(pa.table({"text": as_text}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array(raw)}), tmp_path / "b.parquet")  # binary
    report = SourceReport()
    texts = [text.decode() for number, text in enumerate(raw) if number != 70]
    assert [document.text for document in read(tmp_path, report)] == texts + texts
    assert (report.rows, report.bad_rows) == (600, 2)


def _shared(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))


@pytest.mark.parametrize(
    "column",
    [
        {"text": _shared("a" * 30_000_000, 1000)},
        {"text": pa.array(["a" * 1_000_000] * 30)},
        {"tokens": pa.array([np.full(9_000_000, 7, np.int32)], pa.list_(pa.int32()))},
    ],
    ids=["a shared text", "texts alike", "tokens alike"],
)
def test_a_few_kilobytes_that_become_gigabytes_are_refused_unread(tmp_path, monkeypatch, column):
    monkeypatch.setattr(parquet_rows, "_BOMB_BYTES", 2**24)
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table(column),
        path,
        compression="zstd",
        use_dictionary=[*column] == ["tokens"] or len(*column.values()) == 1000,
    )
    assert path.stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match=r"/a\.parquet is refused.*skip=a\.parquet"):
        read(tmp_path)
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_a_text_that_many_rows_share_is_unpacked_for_a_few_at_a_time(tmp_path, monkeypatch):
    """One text of a megabyte, which no compression makes smaller, stands in 300 rows."""
    monkeypatch.setattr(parquet_rows, "_BATCH_BYTES", 2**22)
    text = np.random.default_rng(0).integers(32, 127, 1_000_000, dtype=np.uint8).tobytes().decode()
    pq.write_table(pa.table({"text": _shared(text, 300)}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 3_000_000
    (part,) = sources.parse_source(f"files:{tmp_path}/*")
    tracemalloc.start()
    assert sum(document.text == text for document in readers.open_rows(part, SourceReport())) == 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000


def test_batches_are_as_large_as_may_be_and_change_no_row(tmp_path, monkeypatch):
    rows = [
        {"identifier": f"d{n}", "text": f"{n} " * (n % 50 + 1), "tokens": [n, n + 1]}
        for n in range(700)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=300)
    whole = read(tmp_path)
    sizes = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, batch_size, **options):
        sizes.append(batch_size)
        return original(self, batch_size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    assert read(tmp_path) == whole and sizes == [256, 256, 256]
    monkeypatch.setattr(parquet_rows, "_BATCH_BYTES", 2**17)
    assert read(tmp_path) == whole and all(1 < size < 256 for size in sizes[3:])
