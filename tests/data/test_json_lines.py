from __future__ import annotations

import json
import subprocess
import tracemalloc

import pyarrow as pa
import pytest

from kl3m_nb.data import json_lines, readers, sources
from kl3m_nb.data.sources import SourceReport
from tests.data.test_readers import ROWS, write_rows

TEXTS = [f"§ {n} Das Gesetz über Gebühren — 日本国憲法 ਊ" for n in range(50)]
LINES = "".join(
    json.dumps({"identifier": f"d{n}", "text": text}, ensure_ascii=False) + "\n"
    for n, text in enumerate(TEXTS)
)


def read(folder, report=None, position=None, options="score_max=100"):
    (part,) = sources.parse_source(f"files:{folder}/*({options})")
    reader = readers.open_rows(part, report or SourceReport())
    reader.position = position or reader.position
    return list(reader)


def compressed(data: bytes, suffix: str) -> bytes:
    if not suffix:
        return data
    return pa.compress(data, codec={"gz": "gzip", "zst": "zstd"}[suffix], asbytes=True)


@pytest.mark.parametrize("suffix", ["", "gz", "zst"])
@pytest.mark.parametrize(
    "encoding",
    ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8", "utf-8-sig", "latin-1"],
)
def test_the_encoding_is_the_files_and_no_row_is_read_in_another(tmp_path, encoding, suffix):
    name = f"a.jsonl{'.' * bool(suffix)}{suffix}"
    text = (
        LINES.encode(encoding, errors="replace")
        if encoding == "latin-1"
        else LINES.encode(encoding)
    )
    (tmp_path / name).write_bytes(compressed(text, suffix))
    if encoding.startswith("utf-8"):
        assert [document.text for document in read(tmp_path)] == TEXTS
        return
    report, name_for_iconv = (
        SourceReport(),
        encoding.upper().replace("-LE", "LE").replace("-BE", "BE").replace("IN-", "IN"),
    )
    with pytest.raises(ValueError, match=rf"{name} is .*not UTF-8 text.*iconv -f {name_for_iconv}"):
        read(tmp_path, report)
    assert report.rows == 0


def test_latin_1_is_told_from_a_damaged_row_by_the_whole_file(tmp_path):
    plain = [json.dumps({"identifier": f"p{n}", "text": f"plain {n}"}).encode() for n in range(100)]
    damaged = b'{"identifier": "x", "text": "\xe9"}'
    for lines, bad in (
        ([*plain, damaged], 1),
        ([damaged, *plain], 1),
        ([damaged, damaged, *plain], None),  # two in a hundred: another encoding
        ([damaged, damaged, *LINES.encode().splitlines()], 2),  # what needs UTF-8 is UTF-8
        ([*LINES.encode().splitlines()[:3], *[damaged] * 4, *plain], None),
    ):
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        report = SourceReport()
        if bad is None:
            with pytest.raises(ValueError, match=r"a\.jsonl is not UTF-8 text"):
                read(tmp_path, report)
        else:
            assert len(read(tmp_path, report)) == len(lines) - bad
            assert report.bad_rows == bad


@pytest.mark.parametrize("place", [0, 1, 60])
@pytest.mark.parametrize(
    "bad",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"text": "x", "m": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '{"identifier": "\\ud800", "text": "hello"}',
        '{"dataset": "\\udc80", "text": "hello"}',
        '{"text": "hello \\udfff"}',
        '{"text": "x", "score": ' + "9" * 5000 + "}",
        '{"text": "x", "tokens": [1e400]}',
        '{"tokens": [1, [2]]}',
        '{"tokens": "1 2 x"}',
        '{"tokens": {"0": 1}}',
        '{"text": ["a", "b"]}',
        '{"text": "x", "score": "good"}',
        '{"text": "x", "score": [1]}',
        "\x00",
        "not json",
    ],
    ids=lambda bad: ascii(bad[:24]),
)
def test_one_bad_row_is_counted_and_named_and_ends_nothing(tmp_path, caplog, bad, place):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:place], bad, *lines[place:]]) + "\n")
    report = SourceReport()
    assert [document.identifier for document in read(tmp_path, report)] == [
        row["identifier"] for row in ROWS
    ]
    assert (report.rows, report.bad_rows) == (len(ROWS) + 1, 1)
    assert f"a.jsonl#{place}" in caplog.text


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_row_longer_than_the_limit_is_counted_and_not_held(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(json_lines, "LONGEST_ROW", 2**16)
    rows = ROWS[:80]
    long_row = {"identifier": "long", "text": "x" * 30_000_000}
    write_rows(tmp_path / f"a.{suffix}", [*rows[:40], long_row, *rows[40:]])
    report = SourceReport()
    tracemalloc.start()
    found = read(tmp_path, report)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.identifier for document in found] == [row["identifier"] for row in rows]
    assert (report.rows, report.bad_rows) == (81, 1)
    assert peak < 8_000_000


@pytest.mark.parametrize("stop", [39, 40, 41])
def test_a_run_goes_on_beside_a_long_row(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(json_lines, "LONGEST_ROW", 2**12)
    write_rows(
        tmp_path / "a.jsonl", [*ROWS[:40], {"text": "x" * 2**14}, {"tokens": ["y"]}, *ROWS[40:]]
    )
    (part,) = sources.parse_source(f"files:{tmp_path}/*(score_max=100)")
    reader = readers.open_rows(part, SourceReport())
    for _, _ in zip(range(stop), reader, strict=False):
        pass
    assert [document.identifier for document in read(tmp_path, position=reader.position)] == [
        row["identifier"] for row in ROWS[stop:]
    ]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize(
    "filling", [b"\n", b"x", b"x" * 2**21 + b"\n"], ids=["blank lines", "one line", "long lines"]
)
def test_what_unpacks_to_nothing_without_end_is_refused_by_name(
    tmp_path, monkeypatch, suffix, filling
):
    monkeypatch.setattr(json_lines, "MOST_PASSED_OVER", 2**24)
    monkeypatch.setattr(json_lines, "LONGEST_ROW", 2**20)
    whole = json.dumps(ROWS[0]).encode() + b"\n" + filling * (2**25 // len(filling))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(compressed(whole, suffix))
    assert path.stat().st_size < len(whole) / 500
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix} .*16,777,216 bytes"):
        read(tmp_path)


ARRAY = [{"identifier": f"d{n}", "text": f"text {n}"} for n in range(300)]


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (json.dumps(ARRAY), "jq"),
        ("[\n" + ",\n".join(map(json.dumps, ARRAY)) + "\n]\n", "jq"),
        (json.dumps(ARRAY, indent=1), "jq"),
        ("\ufeff" + json.dumps(ARRAY, indent=4), "jq"),
        ("\n".join(json.dumps(row, indent=2) for row in ARRAY), "jq"),
        ("\r".join(map(json.dumps, ARRAY)) + "\r", "tr"),
    ],
    ids=[
        "array",
        "array of lines",
        "pretty array",
        "pretty array with a mark",
        "pretty objects",
        "carriage returns",
    ],
)
def test_json_that_is_not_one_object_a_line_is_told_of_with_the_remedy(tmp_path, content, remedy):
    (tmp_path / "a.json").write_text(content, newline="")
    with pytest.raises(ValueError, match=rf"/a\.json .*`{remedy} .*skip=a\.json"):
        read(tmp_path)


def test_lines_that_end_as_in_windows_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes("".join(json.dumps(row) + "\r\n" for row in ROWS).encode())
    assert [document.identifier for document in read(tmp_path)] == [
        row["identifier"] for row in ROWS
    ]


def test_a_long_window_of_zstd_is_told_of(tmp_path):
    rows = "".join(json.dumps({"text": f"{n}" * 1000}) + "\n" for n in range(20_000)).encode()
    done = subprocess.run(
        ["zstd", "--long=31", "--ultra", "-c"], input=rows, capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("there is no zstd program here")
    (tmp_path / "a.jsonl.zst").write_bytes(done.stdout)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst .*zstd --long"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damage_is_named_while_a_place_is_sought_too(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    rows = [
        {"identifier": f"d{n}", "tokens": [(n * k * k) % 9999 for k in range(50)]}
        for n in range(9000)
    ]
    write_rows(path, rows)
    (part,) = sources.parse_source(f"files:{path}")
    reader = readers.open_rows(part, SourceReport())
    for _, _ in zip(range(8000), reader, strict=False):
        pass
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix} .*damaged.*skip=a\.jsonl\.{suffix}"):
        read(tmp_path, position=reader.position)
