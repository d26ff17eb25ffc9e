from __future__ import annotations

import json
import os
import socket

import pytest

from kl3m_nb.data import files, readers, sources
from kl3m_nb.data.files import matching_files, may_go_on_with, mirror_files
from kl3m_nb.data.sources import SourceReport
from tests.data.test_readers import ROWS, write_rows


def _write(folder, *names):
    for name in names:
        write_rows(folder / name, [{"identifier": name, "text": name}])


def _identifiers(source, position=None, report=None):
    (part,) = sources.parse_source(source)
    reader = readers.open_rows(part, report or SourceReport())
    if position is not None:
        reader.position = json.loads(json.dumps(position))
    return [document.identifier for document in reader]


@pytest.mark.parametrize(
    "links", [{"l1": "."}, {"l1": ".", "l2": "."}, {"in/up": "..", "in/self": "../in"}]
)
def test_links_to_a_folder_above_are_followed_once(tmp_path, links):
    _write(tmp_path, "a.jsonl", "in/b.jsonl", "in/deep/c.jsonl")
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    expected = ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [path.name for path in matching_files(f"{tmp_path}/**/*.jsonl")] == expected
    assert [path.name for path in matching_files(f"{tmp_path}/**/**/*.jsonl")] == expected
    assert [path.name for path in mirror_files(tmp_path)] == expected


def test_two_stars_match_as_they_do_in_glob_where_there_is_no_link(tmp_path):
    names = [
        "a.jsonl",
        "x/b.jsonl",
        "x/y/c.jsonl",
        "x/y/z/d.jsonl",
        "x/.hidden/e.jsonl",
        "w/y/f.jsonl",
        ".g.jsonl",
    ]
    _write(tmp_path, *names)
    for pattern in (
        "**/*.jsonl",
        "**/y/*.jsonl",
        "x/**/*.jsonl",
        "*/**/?.jsonl",
        "**/y/**/*.jsonl",
        "**",
        "x/**",
    ):
        expected = files.glob.glob(f"{tmp_path}/{pattern}", recursive=True)
        assert [str(path) for path in matching_files(f"{tmp_path}/{pattern}")] == sorted(
            filter(os.path.isfile, {*expected})
        )


def test_a_folder_and_a_file_behind_links_are_read_once(tmp_path, caplog):
    _write(tmp_path, "elsewhere/a.jsonl", "data/b.jsonl")
    (tmp_path / "data/first").symlink_to("../elsewhere")
    (tmp_path / "data/second").symlink_to("../elsewhere")
    (tmp_path / "data/c.jsonl").symlink_to("b.jsonl")
    assert _identifiers(f"files:{tmp_path}/data/**/*.jsonl") == [
        "data/b.jsonl",
        "elsewhere/a.jsonl",
    ]
    assert "3 names lead to 2 files" in caplog.text


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "broken"])
def test_what_is_no_regular_file_is_named_and_not_opened(tmp_path, kind):
    _write(tmp_path, "a.jsonl")
    odd = tmp_path / "odd.jsonl"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as open_socket:
            open_socket.bind(str(odd))
    else:
        odd.symlink_to("/dev/zero" if kind == "device" else "gone.jsonl")
    for source in (f"files:{tmp_path}/*", f"files:{odd}", f"hub:{tmp_path}"):
        with pytest.raises(ValueError, match=r"odd\.jsonl is .* only regular files"):
            _identifiers(source)
    assert _identifiers(f"files:{tmp_path}/*(skip=odd.jsonl)") == ["a.jsonl"]


def test_brackets_plus_and_blanks_stand_in_names_too(tmp_path):
    for folder in ("[2024] cases", "a + b", "copy (1)"):
        _write(tmp_path, f"{folder}/x.jsonl")
        assert _identifiers(f"files:{tmp_path}/{folder}/*.jsonl") == [f"{folder}/x.jsonl"]
        assert _identifiers(f"hub:{tmp_path}/{folder}(min_tokens=0)") == [f"{folder}/x.jsonl"]
    mixed = f"2*files:{tmp_path}/a + b/*.jsonl + files:{tmp_path}/[[]2024] cases/*.jsonl"
    assert [part.name for part in sources.parse_source(mixed)] == [
        f"{tmp_path}/a + b/*.jsonl",
        f"{tmp_path}/[[]2024] cases/*.jsonl",
    ]
    _write(tmp_path, "p1.jsonl", "p2.jsonl")
    assert _identifiers(f"files:{tmp_path}/p[12].jsonl") == ["p1.jsonl", "p2.jsonl"]
    _write(tmp_path, "p[12].jsonl")
    with pytest.raises(ValueError, match="brackets"):
        _identifiers(f"files:{tmp_path}/p[12].jsonl")


@pytest.mark.parametrize("pattern", ["texts", "tex*"])
def test_a_folder_in_place_of_files_is_told_of(tmp_path, pattern):
    _write(tmp_path, "texts/a.jsonl")
    with pytest.raises(FileNotFoundError, match="folder"):
        matching_files(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize(
    ("name", "beginning", "cause"),
    [
        ("a.jsonl", b"\x1f\x8b\x08", r"\.jsonl\.gz"),
        ("a.jsonl.gz", b'{"text": 1}', "damaged"),
        ("a.jsonl", b"PAR1", r"\.parquet"),
        ("a.parquet", b"\x28\xb5\x2f\xfd", r"\.jsonl\.zst"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "git lfs pull",
        ),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "git lfs pull",
        ),
    ],
)
def test_a_file_of_another_kind_than_its_name_says_is_told_of(tmp_path, name, beginning, cause):
    (tmp_path / name).write_bytes(beginning)
    with pytest.raises(ValueError, match=rf"/{name} .*{cause}"):
        _identifiers(f"files:{tmp_path}/*")


def test_skip_leaves_out_by_name_and_by_path_and_refuses_what_it_does_not_find(tmp_path):
    _write(tmp_path, "a/1.jsonl", "a/2.jsonl", "b/2.jsonl", "a/no.csv")
    source = f"files:{tmp_path}/*/*"
    assert _identifiers(f"{source}(skip=*.csv|1.jsonl, min_tokens=0)") == ["a/2.jsonl", "b/2.jsonl"]
    assert _identifiers(f"{source}(skip=*.csv|*/a/2.jsonl)") == ["a/1.jsonl", "b/2.jsonl"]
    assert _identifiers(f"hub:{tmp_path}(skip=2.jsonl)") == ["a/1.jsonl"]
    with pytest.raises(ValueError, match=r"skip=3\.jsonl"):
        _identifiers(f"{source}(skip=*.csv|3.jsonl)")
    with pytest.raises(ValueError, match="no file"):
        _identifiers(f"{source}(skip=*)")
    for nameless in ("package:licensedcode-data(skip=a)", "hub:o/n(skip=a)"):
        with pytest.raises(ValueError, match="skip"):
            _identifiers(nameless)


FILES = ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")


@pytest.mark.parametrize("how", ["moved", "skipped"])
@pytest.mark.parametrize("gone", ["a", "b", "c", "d", "ab", "bc", "cd", "abd"])
@pytest.mark.parametrize(
    "stop", [40, 55, 80]
)  # rows read: at the end of a, inside b, at the end of b
def test_a_run_goes_on_without_files_that_are_gone_with_the_rows_that_are_left(
    tmp_path, caplog, how, gone, stop
):
    pieces = {name: ROWS[40 * number : 40 * number + 40] for number, name in enumerate(FILES)}
    for name, rows in pieces.items():
        write_rows(tmp_path / name, rows)
    source = f"files:{tmp_path}/*.jsonl"
    (part,) = sources.parse_source(f"{source}(score_max=100)")
    reader = readers.open_rows(part, SourceReport())
    for _, _ in zip(range(stop), reader, strict=False):
        pass
    names = [f"{letter}.jsonl" for letter in gone]
    if how == "moved":
        for name in names:
            (tmp_path / name).unlink()
    report = SourceReport()
    options = "(score_max=100)" if how == "moved" else f"(score_max=100, skip={'|'.join(names)})"
    found = _identifiers(source + options, reader.position, report)
    unread = {row["identifier"] for row in ROWS[stop:]}
    assert found == [
        row["identifier"]
        for name in FILES
        if name not in names
        for row in pieces[name]
        if row["identifier"] in unread
    ]
    assert report.lost_files == len(names)
    assert all(f"{tmp_path}/{name} is gone" in caplog.text for name in names)


def test_an_emptied_file_is_one_that_is_gone(tmp_path, caplog):
    write_rows(tmp_path / "a.jsonl", ROWS[:50])
    write_rows(tmp_path / "b.jsonl", ROWS[50:])
    (part,) = sources.parse_source(f"files:{tmp_path}/*(score_max=100)")
    reader = readers.open_rows(part, SourceReport())
    for _, _ in zip(range(20), reader, strict=False):
        pass
    (tmp_path / "a.jsonl").write_text("")
    found = _identifiers(f"files:{tmp_path}/*(score_max=100)", reader.position)
    assert found == [row["identifier"] for row in ROWS[50:]]
    assert "a.jsonl is gone since the run stopped; its rows from row 20 on" in caplog.text


def test_a_state_of_an_earlier_version_goes_on_in_the_same_files(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:50])
    write_rows(tmp_path / "b.jsonl", ROWS[50:])
    size = len("".join(json.dumps(row) + "\n" for row in ROWS[50:60]))
    position = {"file": 1, "name": "b.jsonl", "block": size, "row": 10}
    assert _identifiers(f"files:{tmp_path}/*(score_max=100)", position) == [
        row["identifier"] for row in ROWS[60:]
    ]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match="not those the run was reading"):
        _identifiers(f"files:{tmp_path}/*(score_max=100)", position)


def test_a_source_may_be_narrowed_and_nothing_else(tmp_path):
    _write(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl", "other/a.jsonl")
    begun = f"0.5*files:{tmp_path}/*.jsonl(min_tokens=3) + hub:o/n"
    for narrower in ("*.jsonl(min_tokens=3, skip=b.jsonl)", "[ac].jsonl(min_tokens=3)"):
        assert may_go_on_with(begun, f"0.5*files:{tmp_path}/{narrower} + hub:o/n")
    for other in (
        "*.jsonl(min_tokens=4)",
        "*.jsonl",
        "other/*.jsonl(min_tokens=3)",
        "**/*.jsonl(min_tokens=3)",
    ):
        assert not may_go_on_with(begun, f"0.5*files:{tmp_path}/{other} + hub:o/n")
    for other in (
        begun.replace("0.5", "0.6"),
        begun.replace("o/n", "o/m"),
        begun.split(" + ")[0],
        f"{begun} + hub:o/n",
    ):
        assert not may_go_on_with(begun, other)


def test_files_come_in_the_order_of_their_paths_folder_by_folder(tmp_path):
    """The order in which runs of earlier versions have read them, which is not that of the paths as
    text.
    """
    _write(tmp_path, "a/1.jsonl", "a-b/1.jsonl", "a.c/1.jsonl", "b.jsonl")
    expected = sorted(path for path in tmp_path.rglob("*.jsonl"))
    assert [*map(str, expected)] != sorted(map(str, expected))
    assert matching_files(f"{tmp_path}/**/*.jsonl") == mirror_files(tmp_path) == expected
