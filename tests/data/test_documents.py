from __future__ import annotations

import dataclasses
import io
import itertools
import re

import numpy as np
import pytest
import torch

from kl3m_nb.data import corpus, sources
from kl3m_nb.data.documents import (
    DocumentStream,
    held_out_documents,
    time,
    token_ids,
    unseen_documents,
)
from kl3m_nb.data.windows import PackedStream, document_table, held_out_windows
from kl3m_nb.profiles import DataSpec
from tests.data.test_readers import write_family_parquet, write_rows


class Letters:
    """A tokenizer of one token per character; 0 ends a document."""

    eos_token_id = 0

    def __len__(self):
        return 1000

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def _rows(name, count, length):
    return [
        {"identifier": f"{name}{i}", "tokens": [1 + (i * 7 + k * k) % 900 for k in range(length)]}
        for i in range(count)
    ]


def _spec(source, **changes):
    return DataSpec(
        source=source, **{"seq_len": 9, "shuffle_buffer": 4, "held_out_windows": 1, **changes}
    )


def test_a_mixture_keeps_its_shares_of_tokens(tmp_path):
    write_family_parquet(tmp_path / "long.parquet", _rows("long", 50, 90))
    write_rows(tmp_path / "short.jsonl", _rows("short", 50, 7))
    spec = _spec(f"3*files:{tmp_path}/*.parquet + 1*files:{tmp_path}/*.jsonl")
    stream = DocumentStream(spec, Letters())
    lengths = [stream.next().size for _ in range(2000)]
    assert set(lengths) == {90, 7} and stream.epoch >= 1
    laid_out = sum(lengths) + len(
        lengths
    )  # in a window each document is followed by the token that ends it
    late = (1 + spec.shuffle_buffer) * 91  # a document of surplus, and what waits in the buffer
    assert 91 * lengths.count(90) / laid_out == pytest.approx(0.75, abs=late / laid_out)


def test_a_shuffle_buffer_that_takes_long_to_fill_is_told_of_and_nothing_after_it(
    tmp_path, monkeypatch, caplog
):
    write_rows(tmp_path / "a.jsonl", _rows("d", 50, 20))
    clock = itertools.count(0.0, 4.0)  # seconds that pass from one look at the clock to the next
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = DocumentStream(_spec(f"files:{tmp_path}/*.jsonl", shuffle_buffer=10), Letters())
    for _ in range(20):
        stream.next()
    told = [re.search(r"holds (\d+) of 10 documents", message) for message in caplog.messages]
    assert [int(message[1]) for message in told if message] == [3, 6, 9]


def test_what_the_options_leave_out_is_counted(tmp_path):
    rows = [
        dict(row, score=float(i % 4), mime_type="a/b" if i % 5 else "c/d")
        for i, row in enumerate(_rows("d", 200, 20))
    ]
    rows[3]["tokens"], rows[7]["tokens"] = [5, 1000], [5, 6]
    write_rows(tmp_path / "a.jsonl", rows)
    source = f"files:{tmp_path}/*.jsonl(score_max=3, mime_types=a/b|e/f, min_tokens=10)"
    stream = DocumentStream(_spec(source), Letters())
    kept = [stream.next() for _ in range(60)]
    report = stream.report
    assert all(len(tokens) == 20 for tokens in kept)
    assert (report.bad_rows, report.too_short) == (1, 1)
    assert report.rows == 64 + 2 + report.other_mime_type + report.held_out + report.near_held_out


def test_token_ids_of_another_tokenizer_are_refused(tmp_path):
    write_rows(
        tmp_path / "a.jsonl", [{"identifier": f"d{i}", "tokens": [5000 + i]} for i in range(300)]
    )
    with pytest.raises(ValueError, match="the tokenizer ends at 999"):
        DocumentStream(_spec(f"files:{tmp_path}/*.jsonl"), Letters()).next()


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    write_rows(tmp_path / "a.jsonl", [dict(row, score=50.0) for row in _rows("d", 20, 5)])
    with pytest.raises(ValueError, match="20 above the score"):
        DocumentStream(_spec(f"files:{tmp_path}/*.jsonl"), Letters()).next()


def test_a_source_of_which_all_is_too_short_or_like_the_held_out_ends_with_an_error(tmp_path):
    words = " ".join(f"w{k}" for k in range(12))
    write_rows(
        tmp_path / "a.jsonl",
        [*_rows("d", 60, 5), *({"identifier": f"t{i}", "text": words} for i in range(60))],
    )
    stream = DocumentStream(
        _spec(f"files:{tmp_path}/*.jsonl(min_tokens=6)", held_out_windows=100), Letters()
    )
    with pytest.raises(ValueError, match="no training documents") as error:
        stream.next()
    report = stream.report
    assert report.too_short > 40 and report.near_held_out > 40
    assert f"{report.too_short} below min_tokens" in str(error.value)
    assert f"{report.near_held_out} like a held-out one" in str(error.value)


def test_a_mixture_names_the_part_that_gives_nothing(tmp_path):
    write_rows(tmp_path / "long.jsonl", _rows("long", 50, 20))
    write_rows(tmp_path / "short.jsonl", _rows("short", 50, 4))
    stream = DocumentStream(
        _spec(f"files:{tmp_path}/long.jsonl + files:{tmp_path}/short.jsonl(min_tokens=5)"),
        Letters(),
    )
    with pytest.raises(ValueError, match=r"short.jsonl' has no training documents"):
        for _ in range(10):
            stream.next()


def _by_side(rows):
    """`rows` of the training side and of the held-out side."""
    sides = ([], [])
    for row in rows:
        sides[corpus.is_held_out(sources.Document(row["identifier"], "", ""))].append(row)
    return sides


def test_held_out_rows_that_cannot_be_used_are_left_out_as_training_rows_are(tmp_path, caplog):
    rows = _rows("d", 400, 20)
    training, held_out = _by_side(rows)
    held_out[0]["tokens"], held_out[1]["tokens"] = [5, 1000], [5, 6]
    write_rows(tmp_path / "a.jsonl", rows)
    spec = _spec(f"files:{tmp_path}/*.jsonl(min_tokens=10)", held_out_windows=50)
    windows = held_out_windows(spec, Letters())
    laid_out = [token for row in held_out[2:] for token in [*row["tokens"], 0]]
    assert len(windows) == 50 and set(map(tuple, windows.tolist())) <= {
        tuple(laid_out[start : start + 10]) for start in range(0, len(laid_out), 10)
    }
    assert "ends at 999" in caplog.text
    table = document_table(spec, Letters())
    assert table.part.value_counts().to_dict() == {
        "training": len(training),
        "held out": len(held_out) - 2,
    }


def test_held_out_rows_of_another_tokenizer_are_refused(tmp_path):
    write_rows(
        tmp_path / "a.jsonl", [{"identifier": f"d{i}", "tokens": [5000]} for i in range(2000)]
    )
    with pytest.raises(ValueError, match="the tokenizer ends at 999"):
        held_out_windows(_spec(f"files:{tmp_path}/*.jsonl"), Letters())


def test_windows_and_stream_of_one_run_read_the_held_out_rows_once(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", _rows("d", 200, 20))
    passes, original = [], corpus.part_documents
    monkeypatch.setattr(
        corpus,
        "part_documents",
        lambda part, held_out: passes.append(held_out) or original(part, held_out),
    )
    spec, letters = _spec(f"files:{tmp_path}/*.jsonl"), Letters()
    held_out_windows(spec, letters)
    DocumentStream(spec, letters).next()
    assert passes == [True]


def test_texts_stored_as_tokens_are_read_by_models_of_any_tokenizer(tmp_path, monkeypatch):
    class Reader(Letters):
        def decode(self, tokens):
            return "".join(map(chr, tokens))

    class Capitals(Reader):
        """Another tokenizer: its ids are those of the letters, but each stands for the capital."""

        def decode(self, tokens):
            return super().decode(tokens).upper()

    rows = [{"identifier": f"d{i}", "tokens": [*map(ord, f"of {i} days")]} for i in range(200)]
    write_rows(tmp_path / "a.jsonl", rows)
    documents = unseen_documents(
        [(_spec(f"files:{tmp_path}/*.jsonl", held_out_windows=9), Reader())]
    )
    assert {document.text for document in documents} <= {
        f"of {i} days" for i in range(200)
    } and len(documents) > 9
    assert token_ids(documents[0], Reader()) == documents[0].tokens.tolist()
    rewritten = dataclasses.replace(
        documents[0], tokens=np.array([1, 2, 3])
    )  # another tokenizer's ids
    assert token_ids(rewritten, Reader()) == [*map(ord, documents[0].text)]
    monkeypatch.setattr("kl3m_nb.data.documents.read_tokenizer", {"o/capitals": Capitals()}.get)
    renamed = unseen_documents(
        [(_spec(f"files:{tmp_path}/*.jsonl(tokenizer=o/capitals)", held_out_windows=9), Reader())]
    )
    assert [document.text for document in renamed] == [
        document.text.upper() for document in documents
    ]
    with pytest.raises(ValueError, match="has no text"):
        token_ids(sources.Document("d", "", "", np.array([3, 4])), Reader())


def test_training_documents_like_a_held_out_one_are_left_out(tmp_path):
    rows = [
        {"identifier": f"d{i}", "text": " ".join(f"w{i}x{k}" for k in range(40))}
        for i in range(120)
    ]
    held_out = next(
        row for row in rows if corpus.is_held_out(sources.Document(row["identifier"], "", ""))
    )
    copies = [
        name
        for name in (f"copy{i}" for i in range(99))
        if not corpus.is_held_out(sources.Document(name, "", ""))
    ][:2]
    rows.append(
        {
            "identifier": copies[0],
            "text": "Preface. " + held_out["text"].upper() + " Some more words.",
        }
    )
    rows.append(
        {
            "identifier": copies[1],
            "text": " ".join(held_out["text"].split()[:10]) + " and then" + " other words" * 30,
        }
    )
    quotes = [
        name
        for name in (f"quote{i}" for i in range(99))
        if not corpus.is_held_out(sources.Document(name, "", ""))
    ][:4]
    for name, shared in zip(
        quotes, (9, 11, 17, 25), strict=True
    ):  # of the held-out text's 33 runs of eight words
        words = held_out["text"].split()[: shared + 7]
        rows.append(
            {
                "identifier": name,
                "text": " ".join(words) + f" shares {shared} runs" + " of its own" * 20,
            }
        )
    write_rows(tmp_path / "a.jsonl", rows)
    spec, letters = _spec(f"files:{tmp_path}/*.jsonl", held_out_windows=100), Letters()
    assert held_out["text"] in {document.text for document, _ in held_out_documents(spec, letters)}
    stream = DocumentStream(spec, letters)
    texts = set()
    while stream.epoch < 2:
        texts.add("".join(map(chr, stream.next())))
    assert not any("Preface" in text for text in texts)
    assert [
        shared
        for shared in (9, 11, 17, 25)
        if any(f" shares {shared} runs" in text for text in texts)
    ] == [9]
    assert stream.report.near_held_out >= 2
    leak = corpus.measure_leak(spec.source)
    assert 0 < leak < 1


def write_each_text_on_both_sides(path, count=120):
    """Rows of words, each text once under a held-out name and once under one that is trained on."""
    names = [f"d{i}" for i in range(30 * count)]
    sides = [
        [name for name in names if corpus.is_held_out(sources.Document(name, "", "")) == side]
        for side in (True, False)
    ]
    texts = [" ".join(f"w{i}x{k}" for k in range(30)) for i in range(count)]
    write_rows(
        path,
        [
            {"identifier": name, "text": text}
            for side in sides
            for name, text in zip(side, texts, strict=False)
        ],
    )


def test_no_document_is_judged_on_that_one_of_the_runs_was_trained_on(tmp_path):
    """The run that uses fewer held-out documents decides, in whichever place it stands."""
    write_each_text_on_both_sides(tmp_path / "a.jsonl")
    letters = Letters()
    specs = [
        _spec(f"files:{tmp_path}/*.jsonl", held_out_windows=windows, seed=windows)
        for windows in (100, 400, 200)
    ]
    trained_on = []
    for spec in specs:
        stream = DocumentStream(spec, letters)
        while stream.epoch < 1:
            trained_on.append("".join(map(chr, stream.next())))
    unseen = {document.text for document in unseen_documents([(spec, letters) for spec in specs])}
    assert unseen and not unseen & {*trained_on}
    assert unseen == {document.text for document, _ in held_out_documents(specs[0], letters)}
    assert unseen < {document.text for document in unseen_documents([(specs[1], letters)])}


def test_a_source_without_a_held_out_document_is_refused(tmp_path):
    write_rows(
        tmp_path / "a.jsonl",
        [
            row
            for row in _rows("d", 30, 5)
            if not corpus.is_held_out(sources.Document(**row, dataset="", text=""))
        ],
    )
    with pytest.raises(
        ValueError,
        match="has no held-out document that all of the runs use; give it more documents",
    ):
        unseen_documents([(_spec(f"files:{tmp_path}/*.jsonl"), Letters())])


def test_a_stream_is_not_resumed_with_other_parts(tmp_path):
    write_rows(tmp_path / "a.jsonl", _rows("d", 30, 5))
    spec = _spec(f"files:{tmp_path}/*.jsonl")
    state = DocumentStream(spec, Letters()).state_dict()
    other = dataclasses.replace(spec, source=f"{spec.source} + {spec.source}")
    with pytest.raises(ValueError, match="has 1 parts"):
        DocumentStream(other, Letters()).load_state_dict(state)


def test_rows_of_another_tokenizer_are_decoded_and_tokenized_anew(tmp_path, monkeypatch):
    class Shifted(Letters):
        """The tokenizer that wrote the rows: ids are 900 above the letters."""

        def decode(self, tokens):
            return "".join(chr(token - 900) for token in tokens)

    monkeypatch.setattr("kl3m_nb.data.documents.read_tokenizer", {"o/shifted": Shifted()}.get)
    write_rows(
        tmp_path / "a.jsonl",
        [{"identifier": f"d{i}", "tokens": [900 + ord("a"), 900 + ord("~")]} for i in range(300)],
    )
    source = f"files:{tmp_path}/*.jsonl"
    with pytest.raises(ValueError, match="tokenizer=NAME"):
        DocumentStream(_spec(source), Letters()).next()
    stream = DocumentStream(_spec(f"{source}(tokenizer=o/shifted)"), Letters())
    assert "".join(map(chr, stream.next())) == "a~"
    windows = held_out_windows(_spec(f"{source}(tokenizer=o/shifted)", seq_len=2), Letters())
    assert set(windows.flatten().tolist()) == {ord("a"), ord("~"), 0}


def test_the_state_survives_a_checkpoint_and_says_what_was_left_out(tmp_path):
    write_rows(tmp_path / "a.jsonl", [*_rows("d", 60, 5), {"nothing": 1}])
    stream = PackedStream(_spec(f"files:{tmp_path}/*.jsonl"), Letters())
    stream.next_batch(60)
    state = saved_and_loaded(stream.state_dict())
    assert state["documents"]["report"]["bad_rows"] == stream.report.bad_rows >= 1
    assert state["documents"]["report"]["unknown_columns"] == ["nothing"]


def saved_and_loaded(state):
    """`state` as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
