from __future__ import annotations

import json
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import get_session

from kl3m_nb.data import readers, sources
from kl3m_nb.data.instructions import load_pairs
from kl3m_nb.data.sources import SourceReport

ROWS = [
    {
        "identifier": f"d{i}",
        "dataset": "usc" if i % 3 else "cfr",
        "mime_type": "text/plain" if i % 4 else "text/html",
        "tokens": [5 + i % 90] * (1 + i % 13),
        "score": float(i % 20),
    }
    for i in range(150)
]


def write_family_parquet(path, rows, row_group_size=40):
    """A file in exactly the schema of the family's tokenized data sets."""
    schema = pa.schema(
        {
            "identifier": pa.string(),
            "dataset": pa.string(),
            "mime_type": pa.string(),
            "tokens": pa.list_(pa.int32()),
            "score": pa.float32(),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=row_group_size)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        write_family_parquet(path, rows)
        return
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=compression) as file:
        file.write(data)


@pytest.fixture(
    params=["files.parquet", "files.jsonl", "files.jsonl.gz", "files.jsonl.zst", "mirror", "hub"]
)
def source(request, tmp_path, monkeypatch):
    """The same 150 rows in two files, as every kind of source that has rows."""
    kind, _, suffix = request.param.partition(".")
    for number, rows in enumerate((ROWS[:70], ROWS[70:])):
        name = f"train-0000{number}.{suffix or 'parquet'}"
        write_rows(tmp_path / "data" / name, rows)
    if kind == "files":
        return f"files:{tmp_path}/data/*"
    if kind == "mirror":
        (tmp_path / "README.md").write_text("a data card")
        write_rows(
            tmp_path / "data" / "validation-00000.parquet",
            [{"identifier": "not for training", "tokens": [1]}],
        )
        return f"hub:{tmp_path}"
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **options: load_dataset(str(tmp_path), **options)
    )
    return "hub:owner/name"


def _open(source, options="score_max=100", report=None):
    (part,) = sources.parse_source(f"{source}({options})")
    return readers.open_rows(part, report or SourceReport())


def test_every_source_gives_all_rows_in_order(source):
    documents = list(_open(source))
    assert [document.identifier for document in documents] == [row["identifier"] for row in ROWS]
    assert [document.tokens.tolist() for document in documents] == [row["tokens"] for row in ROWS]
    assert {document.dataset for document in documents} == {"usc", "cfr"}


@pytest.mark.parametrize("stop", [1, 39, 40, 41, 69, 70, 71, 149, 150])
def test_every_source_continues_with_the_next_row(source, stop):
    reader = _open(source)
    rows = iter(reader)
    for _ in range(stop):
        next(rows)
    resumed = _open(source)
    resumed.position = json.loads(json.dumps(reader.position))
    assert [document.identifier for document in resumed] == [
        row["identifier"] for row in ROWS[stop:]
    ]


def test_a_position_in_parquet_reads_no_row_group_before_it(tmp_path, monkeypatch):
    write_family_parquet(tmp_path / "a.parquet", ROWS, row_group_size=10)
    asked = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, *arguments, row_groups, **options):
        asked.extend(row_groups)
        return original(self, *arguments, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    reader = _open(f"files:{tmp_path}/*.parquet")
    reader.position = {"file": 0, "name": "a.parquet", "block": 12, "row": 4}
    assert next(iter(reader)).identifier == "d124"
    assert asked == [12]


def test_rows_are_chosen_by_score_and_mime_type(source):
    report = SourceReport()
    found = list(_open(source, "score_max=10, mime_types=text/plain|text/csv", report))
    expected = [row for row in ROWS if row["score"] <= 10 and row["mime_type"] == "text/plain"]
    assert [document.identifier for document in found] == [row["identifier"] for row in expected]
    assert report.rows == 150 and report.above_score == sum(row["score"] > 10 for row in ROWS)
    assert report.above_score + report.other_mime_type + len(expected) == 150


def test_our_own_texts_in_the_familys_schema_come_back(tmp_path):
    pairs = load_pairs("regulation")
    rows = [
        {
            "identifier": pair.id,
            "dataset": pair.use,
            "mime_type": "text/plain",
            "tokens": list(pair.response.encode()),
            "score": 1.5,
        }
        for pair in pairs
    ]
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    write_family_parquet(path, rows)
    assert (
        pq.read_schema(path).to_string()
        == "identifier: string\ndataset: string\nmime_type: string\n"
        "tokens: list<element: int32>\n  child 0, element: int32\nscore: float"
    )
    found = list(_open(f"hub:{tmp_path}"))
    assert [bytes(document.tokens.tolist()).decode() for document in found] == [
        pair.response for pair in pairs
    ]


def test_what_cannot_be_used_is_counted_and_said(tmp_path, caplog):
    lines = [
        '{"text": "one", "colour": "red"}',
        "not json",
        "[1, 2]",
        "{}",
        "",
        '{"text": 7}',
        '{"tokens": [1.5]}',
        '{"tokens": [-1]}',
        '{"text": "half a pair \\ud800"}',
        '{"tokens": [5, 6], "score": null}',
        '{"text": "nan", "score": NaN}',
        '{"text": "no number", "score": "good"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("")
    report = SourceReport()
    with caplog.at_level(logging.WARNING):
        documents = list(_open(f"files:{tmp_path}/*.jsonl", report=report))
    assert [document.identifier for document in documents] == ["a.jsonl#0", "a.jsonl#9"]
    assert (report.rows, report.bad_rows, report.above_score, report.empty_files) == (11, 8, 1, 1)
    assert report.unknown_columns == ["colour"]
    assert all(words in caplog.text for words in ("a.jsonl#1", "colour", "b.jsonl holds no row"))


def test_a_file_that_gives_no_row_is_an_empty_file_in_every_format(tmp_path, caplog):
    write_family_parquet(tmp_path / "a.parquet", [])
    write_rows(tmp_path / "b.jsonl.gz", [])
    write_rows(tmp_path / "c.jsonl.zst", [])
    (tmp_path / "d.jsonl").write_text("\n \n\n")
    (tmp_path / "e.jsonl.gz").write_bytes(b"")
    write_rows(tmp_path / "f.jsonl", [{"text": "one"}])
    report = SourceReport()
    reader = _open(f"files:{tmp_path}/*", report=report)
    assert [document.text for document in reader] == ["one"]
    assert (report.rows, report.empty_files) == (1, 5)
    assert "a.parquet holds no row" in caplog.text
    again = SourceReport()
    resumed = _open(f"files:{tmp_path}/*", report=again)
    resumed.position = reader.position  # behind the last row: the file is at its end, not empty
    assert list(resumed) == [] and again.empty_files == 0


def test_parquet_with_nulls_and_other_widths_is_read(tmp_path):
    tokens = pa.array([[1, None], None, [3, 4], []], type=pa.large_list(pa.int64()))
    pq.write_table(
        pa.table({"tokens": tokens, "text": ["a", "b", None, None]}), tmp_path / "a.parquet"
    )
    report = SourceReport()
    documents = list(_open(f"files:{tmp_path}/*.parquet", report=report))
    assert [(document.text, document.tokens.tolist()) for document in documents] == [
        ("b", []),
        ("", [3, 4]),
    ]
    assert report.bad_rows == 2 and documents[1].tokens.dtype == np.int32


def test_the_wrong_data_is_refused_early(tmp_path):
    (tmp_path / "words.jsonl").write_text('{"words": "no"}\n' * 101)
    with pytest.raises(ValueError, match="words are its columns"):
        list(_open(f"files:{tmp_path}/*.jsonl"))
    pq.write_table(pa.table({"words": ["no"]}), tmp_path / "words.parquet")
    with pytest.raises(ValueError, match="words are its columns"):
        list(_open(f"files:{tmp_path}/*.parquet"))
    (tmp_path / "text.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="damaged or no parquet"):
        list(_open(f"files:{tmp_path}/text.parquet"))
    with pytest.raises(ValueError, match="no known format"):
        (tmp_path / "a.csv").write_text("text\n")
        _open(f"files:{tmp_path}/*.csv")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_is_cut_off_is_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    write_rows(path, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"a.jsonl.{suffix} is cut off"):
        list(_open(f"files:{path}"))


def test_other_files_than_before_are_not_resumed(tmp_path):
    write_rows(tmp_path / "b.jsonl", ROWS)
    reader = _open(f"files:{tmp_path}/*.jsonl")
    next(iter(reader))
    write_rows(tmp_path / "a.jsonl", ROWS)
    resumed = _open(f"files:{tmp_path}/*.jsonl")
    resumed.position = reader.position
    with pytest.raises(ValueError, match="not those the run was reading"):
        next(iter(resumed))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("change", ["shorter", "shifted"])
def test_a_file_that_has_changed_since_is_not_resumed(tmp_path, suffix, change):
    path = tmp_path / f"a.{suffix}"
    write_rows(path, ROWS)
    reader = _open(f"files:{path}")
    for _, _ in zip(range(100), reader, strict=False):
        pass
    write_rows(
        path, ROWS[:60] if change == "shorter" or suffix == "parquet" else [{"tokens": [7]}, *ROWS]
    )
    resumed = _open(f"files:{path}")
    resumed.position = reader.position
    with pytest.raises(ValueError, match=f"a.{suffix} is not the file that the run was reading"):
        next(iter(resumed))


def test_a_last_row_without_a_line_end_can_be_resumed_behind(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, ROWS)
    path.write_bytes(path.read_bytes().rstrip())
    reader = _open(f"files:{path}")
    assert len(list(reader)) == len(ROWS)
    resumed = _open(f"files:{path}")
    resumed.position = reader.position
    assert list(resumed) == []


def test_slow_skipping_says_how_long_it_takes(tmp_path, monkeypatch, caplog):
    write_rows(tmp_path / "a.jsonl.gz", ROWS)
    reader = _open(f"files:{tmp_path}/*.gz")
    rows = iter(reader)
    for _ in range(100):
        next(rows)
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(readers.time, "monotonic", lambda: next(clock))
    resumed = _open(f"files:{tmp_path}/*.gz")
    resumed.position = reader.position
    with caplog.at_level(logging.WARNING):
        assert next(iter(resumed)).identifier == "d100"
    assert "cannot be sought" in caplog.text


class _Flaky:
    """A hub stream that breaks off after `good` rows, each time it is opened, `failures` times."""

    def __init__(self, failures, good, error):
        self.failures, self.good, self.error, self.opened = failures, good, error, 0

    def load(self, name, split, streaming):
        assert split == "train" and streaming
        self.opened += 1
        stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3)
        outer, original = self, stream.__iter__

        class Broken(type(stream)):
            def __iter__(self):
                for number, row in enumerate(original()):
                    if outer.failures and number == outer.good:
                        outer.failures -= 1
                        raise outer.error
                    yield row

        stream.__class__ = Broken
        return stream


def _refused() -> Exception:
    """What the hub's own library makes of a server that is not there; it is no OSError."""
    try:
        get_session().get("http://127.0.0.1:1")
    except Exception as error:
        return error


@pytest.mark.parametrize("error", [lambda: ConnectionError("the line went dead"), _refused])
def test_a_hub_that_fails_is_tried_again_with_growing_pauses(monkeypatch, caplog, error):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    flaky, pauses = _Flaky(failures=2, good=60, error=error()), []
    monkeypatch.setattr(datasets, "load_dataset", flaky.load)
    monkeypatch.setattr(readers.time, "sleep", pauses.append)
    report = SourceReport()
    assert [document.identifier for document in _open("hub:o/n", report=report)] == [
        row["identifier"] for row in ROWS
    ]
    assert flaky.opened == 3 and report.retries == 2 and pauses == [1.0, 1.0]
    assert str(flaky.error) in caplog.text
    flaky.failures, flaky.good = 99, 0
    with pytest.raises(ConnectionError, match="hub:o/n could not be reached in 4 attempts"):
        list(_open("hub:o/n"))
    assert pauses[2:] == [1.0, 4.0, 16.0]


def test_an_unreachable_hub_and_an_unknown_data_set_are_named(monkeypatch):
    with pytest.raises(ConnectionError, match="hub:nobody/nothing could not be reached"):
        list(_open("hub:nobody/nothing"))

    def missing(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(ValueError, match="There is no data set hub:o/n"):
        list(_open("hub:o/n"))


@pytest.mark.parametrize("rows", [1, 300])
def test_a_file_in_another_encoding_is_named(tmp_path, rows):
    (tmp_path / "old.jsonl").write_text('{"text": "§ 1 Geschäft"}\n' * rows, encoding="latin-1")
    with pytest.raises(ValueError, match=r"/old\.jsonl is not UTF-8 text"):
        list(_open(f"files:{tmp_path}/*.jsonl"))


def test_a_glob_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"/texts/\*\.jsonl'; .* project's root \S+ and not from the shell's folder",
    ):
        _open("files:texts/*.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_scores_and_tokens_of_other_types_are_cast_where_nothing_is_lost(tmp_path, suffix):
    expected = [5, 0, 131_071, 2**31 - 1]
    stored = (
        list(map(str, expected)),
        str(expected),
        " ".join(map(str, expected)),
        list(map(float, expected)),
    )
    for number, tokens in enumerate(stored):
        rows = [
            {"identifier": str(score), "tokens": tokens, "score": str(score)}
            for score in (3.5, 12, "nan")
        ]
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
        else:
            write_rows(tmp_path / f"{number}.jsonl", rows)
    report = SourceReport()
    found = list(_open(f"files:{tmp_path}/*", "score_max=10", report))
    assert [document.identifier for document in found] == ["3.5"] * 4
    assert all(
        document.tokens.dtype == np.int32 and document.tokens.tolist() == expected
        for document in found
    )
    assert (report.above_score, report.bad_rows) == (8, 0)


@pytest.mark.parametrize(
    "tokens",
    [
        [5.5],
        [float("nan")],
        [-1.0],
        [2.0**31],
        ["x"],
        ["-1"],
        ["1.0"],
        "5 -1",
        [[1]],
        [True],
        {"a": 1},
    ],
)
def test_tokens_that_would_lose_something_are_bad(tmp_path, tokens):
    write_rows(
        tmp_path / "a.jsonl",
        [{"identifier": "bad", "tokens": tokens}, {"identifier": "good", "tokens": [1]}],
    )
    report = SourceReport()
    assert [document.identifier for document in _open(f"files:{tmp_path}/*", report=report)] == [
        "good"
    ]
    assert report.bad_rows == 1


@pytest.mark.parametrize("rows", [30, 130])
def test_a_foreign_file_of_lines_among_good_ones_is_named(tmp_path, caplog, rows):
    write_rows(tmp_path / "a.jsonl", ROWS)
    write_rows(tmp_path / "b.jsonl", [{"prompt": f"p{n}", "answer": "x"} for n in range(rows)])
    write_rows(tmp_path / "c.jsonl", ROWS)
    if rows < 100:
        assert len(list(_open(f"files:{tmp_path}/*"))) == 2 * len(ROWS)
        assert f"None of the {rows} rows of {tmp_path}/b.jsonl" in caplog.text
        return
    with pytest.raises(
        ValueError, match=r"b\.jsonl#99: .*prompt, answer are its columns.*skip=b\.jsonl"
    ) as error:
        list(_open(f"files:{tmp_path}/*"))
    assert "No row" not in str(error.value)


def test_text_that_is_a_list_is_told_of_and_is_the_only_cause_named(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": ["one", "two"]}] * 20)
    with pytest.raises(ValueError, match=r"a\.jsonl#19: its `text` is a list") as error:
        list(_open(f"files:{tmp_path}/*"))
    assert "columns" not in str(error.value)


def test_a_text_or_token_list_longer_than_the_limit_is_a_bad_row_of_any_source(source, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_ROW", 10)
    report = SourceReport()
    expected = [row["identifier"] for row in ROWS if len(row["tokens"]) <= 10]
    assert [document.identifier for document in _open(source, report=report)] == expected
    assert report.bad_rows == len(ROWS) - len(expected)


def test_keys_that_are_data_are_not_all_kept(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "x", f"key {n}": n} for n in range(5000)])
    report = SourceReport()
    assert len(list(_open(f"files:{tmp_path}/*", report=report))) == 5000
    assert len(report.unknown_columns) == 100


def test_damage_on_the_hub_names_the_data_set(monkeypatch):
    flaky = _Flaky(failures=1, good=60, error=pa.ArrowInvalid("Couldn't deserialize thrift"))
    monkeypatch.setattr(datasets, "load_dataset", flaky.load)
    with pytest.raises(ValueError, match=r"hub:o/n cannot be read behind its row 60 .*thrift"):
        list(_open("hub:o/n"))
