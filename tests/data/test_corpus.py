from __future__ import annotations

import json
import re

import pytest

from kl3m_nb.data import corpus

PACKAGE = "package:licensedcode-data"


def test_families_never_stand_on_both_sides_of_the_split():
    training, held_out = (corpus.preview(PACKAGE, held_out=side) for side in (False, True))
    assert not {corpus.family(document) for document in training} & {
        corpus.family(document) for document in held_out
    }
    assert 0.02 < len(held_out) / (len(training) + len(held_out)) < 0.10


def test_held_out_texts_share_little_with_the_training_texts():
    training, held_out = (corpus.preview(PACKAGE, held_out=side) for side in (False, True))
    known = set().union(*(_blocks(document.text) for document in training))
    shared = [
        (len(blocks & known), len(blocks))
        for blocks in (_blocks(document.text) for document in held_out)
    ]
    assert len(held_out) == 43 and all(common <= 0.3 * total for common, total in shared)
    leak = sum(common for common, _ in shared) / sum(total for _, total in shared)
    assert leak < 0.08 and corpus.measure_leak(PACKAGE) == pytest.approx(leak)


def _blocks(text):
    words = re.findall(r"\w+", text.casefold())
    return set(zip(*(words[offset:] for offset in range(8)), strict=False))


def test_all_gnu_licences_are_one_family():
    training = corpus.preview(PACKAGE, held_out=False)
    assert {"gpl-2.0", "lgpl-2.1", "agpl-3.0"} <= {document.identifier for document in training}


def test_the_package_gives_distinct_english_texts_with_a_category():
    documents = corpus.preview(PACKAGE, held_out=False)
    assert len(documents) > 1200
    assert (
        len({document.text for document in documents})
        == len({document.identifier for document in documents})
        == len(documents)
    )
    assert all(document.text.strip() and document.dataset for document in documents)
    apache = next(document for document in documents if document.identifier == "apache-2.0")
    assert "Apache License" in apache.text and "key:" not in apache.text


def test_files_keep_the_familys_columns(tmp_path):
    rows = [{"identifier": f"d{i}", "dataset": "usc", "text": f"Section {i}."} for i in range(40)]
    (tmp_path / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"files:{tmp_path}/*.jsonl"
    found = corpus.preview(source, held_out=False) + corpus.preview(source, held_out=True)
    assert sorted(document.text for document in found) == sorted(row["text"] for row in rows)


def test_rows_with_tokens_keep_them(tmp_path):
    (tmp_path / "part.jsonl").write_text(
        json.dumps({"identifier": "x", "tokens": [5, 6, 7], "score": 0.5}) + "\n"
    )
    source = f"files:{tmp_path}/*.jsonl"
    (document,) = corpus.preview(source, held_out=False) + corpus.preview(source, held_out=True)
    assert document.tokens.tolist() == [5, 6, 7]


def test_a_glob_without_files_and_rows_without_text_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file matches"):
        corpus.preview(f"files:{tmp_path}/*.parquet", held_out=False)
    (tmp_path / "odd.jsonl").write_text('{"words": "no"}\n')
    with pytest.raises(ValueError, match="words"):
        corpus.preview(f"files:{tmp_path}/*.jsonl", held_out=False)
