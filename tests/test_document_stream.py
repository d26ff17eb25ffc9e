from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from test_readers import write_family_parquet, write_rows

from kl3m_nb import corpus, packing
from kl3m_nb.document_stream import DocumentStream, held_out_documents
from kl3m_nb.profiles import DataSpec


class Letters:
    """A tokenizer of one token per character; 0 ends a document."""

    eos_token_id = 0

    def __len__(self):
        return 1000

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def _rows(name, count, length):
    return [{"identifier": f"{name}{i}", "tokens": [1 + (i * 7 + k * k) % 900 for k in range(length)]} for i in range(count)]


def _spec(source, **changes):
    return DataSpec(source=source, **{"seq_len": 9, "shuffle_buffer": 4, "held_out_windows": 1, **changes})


def test_a_mixture_keeps_its_shares_of_tokens(tmp_path):
    write_family_parquet(tmp_path / "long.parquet", _rows("long", 50, 90))
    write_rows(tmp_path / "short.jsonl", _rows("short", 50, 7))
    stream = DocumentStream(_spec(f"3*files:{tmp_path}/*.parquet + 1*files:{tmp_path}/*.jsonl"), Letters())
    for _ in range(600):
        stream.next()
    long, short = (part["tokens"] for part in stream.state_dict()["parts"])
    assert long / (long + short) == pytest.approx(0.75, abs=91 / (long + short))
    assert stream.epoch >= 1


def test_what_the_options_leave_out_is_counted(tmp_path):
    rows = [dict(row, score=float(i % 4), mime_type="a/b" if i % 5 else "c/d") for i, row in enumerate(_rows("d", 200, 20))]
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
    write_rows(tmp_path / "a.jsonl", [{"identifier": f"d{i}", "tokens": [5000 + i]} for i in range(300)])
    with pytest.raises(ValueError, match="the tokenizer ends at 999"):
        DocumentStream(_spec(f"files:{tmp_path}/*.jsonl"), Letters()).next()


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    write_rows(tmp_path / "a.jsonl", [dict(row, score=50.0) for row in _rows("d", 20, 5)])
    with pytest.raises(ValueError, match="20 above the score"):
        DocumentStream(_spec(f"files:{tmp_path}/*.jsonl"), Letters()).next()


def test_training_documents_like_a_held_out_one_are_left_out(tmp_path):
    rows = [{"identifier": f"d{i}", "text": " ".join(f"w{i}x{k}" for k in range(40))} for i in range(120)]
    held_out = next(row for row in rows if corpus.is_held_out(corpus.Document(row["identifier"], "", "")))
    copies = [name for name in (f"copy{i}" for i in range(99)) if not corpus.is_held_out(corpus.Document(name, "", ""))][:2]
    rows.append({"identifier": copies[0], "text": "Preface. " + held_out["text"].upper() + " Some more words."})
    rows.append({"identifier": copies[1], "text": " ".join(held_out["text"].split()[:10]) + " and then" + " other words" * 30})
    write_rows(tmp_path / "a.jsonl", rows)
    spec = _spec(f"files:{tmp_path}/*.jsonl", held_out_windows=100)
    assert held_out["text"] in {document.text for _, document in held_out_documents(spec)}
    stream = DocumentStream(spec, Letters())
    while stream.epoch < 2:
        text = "".join(map(chr, stream.next()))
        assert "Preface" not in text
    assert stream.report.near_held_out >= 2
    leak = corpus.measure_leak(spec.source)
    assert 0 < leak < 1


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

    monkeypatch.setattr("kl3m_nb.document_stream.read_tokenizer", {"o/shifted": Shifted()}.get)
    write_rows(tmp_path / "a.jsonl", [{"identifier": f"d{i}", "tokens": [900 + ord("a"), 900 + ord("~")]} for i in range(300)])
    source = f"files:{tmp_path}/*.jsonl"
    with pytest.raises(ValueError, match="tokenizer=NAME"):
        DocumentStream(_spec(source), Letters()).next()
    stream = DocumentStream(_spec(f"{source}(tokenizer=o/shifted)"), Letters())
    assert "".join(map(chr, stream.next())) == "a~"
    windows = packing.held_out_windows(_spec(f"{source}(tokenizer=o/shifted)", seq_len=2), Letters())
    assert set(windows.flatten().tolist()) == {ord("a"), ord("~"), 0}


def test_the_state_survives_a_checkpoint_and_says_what_was_left_out(tmp_path):
    write_rows(tmp_path / "a.jsonl", [*_rows("d", 60, 5), {"nothing": 1}])
    stream = packing.PackedStream(_spec(f"files:{tmp_path}/*.jsonl"), Letters())
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
