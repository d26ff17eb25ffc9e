from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kl3m_nb import corpus, packing
from kl3m_nb.profiles import DataSpec


class _Letters:
    """A tokenizer of one token per character; 0 ends a document."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]


@given(st.lists(st.lists(st.integers(2, 99), max_size=30), max_size=30), st.integers(1, 12))
def test_windows_laid_end_to_end_are_the_documents(documents, window):
    windows = list(packing.pack([[*document, 1] for document in documents], window))
    stream = [token for document in documents for token in [*document, 1]]
    assert all(len(item) == window for item in windows)
    laid_out = [token for item in windows for token in item]
    assert laid_out == stream[: len(laid_out)]
    assert len(stream) - len(laid_out) < window


@pytest.fixture
def spec(tmp_path):
    rows = [{"identifier": f"d{i}", "text": chr(200 + i) * (1 + i % 7)} for i in range(300)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(source=f"files:{tmp_path}/*.jsonl", tokenizer="", seq_len=9, shuffle_buffer=5, held_out_windows=1)


def test_every_document_comes_once_an_epoch_and_ends_with_eos(spec):
    stream = packing.PackedStream(spec, _Letters())
    documents = corpus.preview(spec.source, held_out=False)
    total = sum(len(document.text) + 1 for document in documents)
    laid_out = stream.next_batch(3 * total // 10 + 1).flatten().tolist()
    whole = "".join(map(chr, laid_out)).split("\x00")
    # with a buffer of 5, the first documents out are among the first in; after three epochs every one has come 2 to 4 times
    counts = {document.text: whole.count(document.text) for document in documents}
    assert set(counts.values()) <= {2, 3, 4}
    assert set(whole[:-1]) <= set(counts)


def test_a_resumed_stream_continues_with_the_next_token(spec):
    whole, interrupted = packing.PackedStream(spec, _Letters()), packing.PackedStream(spec, _Letters())
    expected = [whole.next_batch(3) for _ in range(60)]
    for batch in expected[:23]:
        assert (interrupted.next_batch(3) == batch).all()
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = packing.PackedStream(spec, _Letters())
    resumed.load_state_dict(state)
    for batch in expected[23:]:
        assert (resumed.next_batch(3) == batch).all()
    assert resumed.epoch >= 1


def test_the_package_comes_in_another_order_every_epoch_and_seed():
    source = "package:licensedcode-data"
    streams = [packing.PackedStream(DataSpec(source=source, seq_len=32, seed=seed), _Letters()) for seed in (1, 1, 2)]
    first, same, other = (stream.next_batch(20) for stream in streams)
    assert (first == same).all() and not (first == other).all()


def test_held_out_windows_are_fixed_and_hold_no_training_text(spec):
    letters = {letter for document in corpus.preview(spec.source, held_out=False) for letter in document.text}
    windows = packing.held_out_windows(spec, _Letters())
    assert (windows == packing.held_out_windows(spec, _Letters())).all()
    assert not letters & set(map(chr, windows.flatten().tolist()))


def test_too_few_held_out_documents_and_an_empty_source_are_refused(spec, tmp_path):
    with pytest.raises(ValueError, match="lower held_out_windows"):
        packing.held_out_windows(DataSpec(source=spec.source, seq_len=9, held_out_windows=500), _Letters())
    (tmp_path / "texts.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        packing.PackedStream(spec, _Letters()).next_batch(1)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8))
def test_the_shares_of_all_ranks_are_the_step_without_overlap(micro_batch, accumulation, ranks):
    windows = torch.arange(micro_batch * accumulation * 3).view(-1, 3)
    if len(windows) % ranks:
        if accumulation % ranks:
            with pytest.raises(ValueError, match="cannot be shared evenly"):
                packing.rank_share(windows, micro_batch, 0, ranks)
        return
    shares = [packing.rank_share(windows, micro_batch, rank, ranks) for rank in range(ranks)]
    assert len({tuple(len(part) for part in share) for share in shares}) == 1, "all ranks go through the same shapes"
    assert max(len(part) for share in shares for part in share) <= micro_batch
    assert sorted(torch.cat([part for share in shares for part in share])[:, 0].tolist()) == windows[:, 0].tolist()
