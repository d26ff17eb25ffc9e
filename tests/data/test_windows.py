from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kl3m_nb.data import corpus, sources
from kl3m_nb.data.documents import DocumentStream
from kl3m_nb.data.windows import (
    Batch,
    PackedStream,
    document_table,
    held_out_windows,
    pack,
    rank_share,
    restarting_positions,
    sampled_windows,
)
from kl3m_nb.model import decoder
from kl3m_nb.profiles import DataSpec
from tests.conftest import small_profile
from tests.data.test_documents import Letters, saved_and_loaded
from tests.data.test_readers import write_rows


@given(st.lists(st.lists(st.integers(2, 99), max_size=30), max_size=30), st.integers(1, 12))
def test_windows_laid_end_to_end_are_the_documents(documents, window):
    windows = list(pack([[*document, 1] for document in documents], window))
    stream = [token for document in documents for token in [*document, 1]]
    assert all(len(item) == window for item in windows)
    laid_out = [token for item in windows for token in item]
    assert laid_out == stream[: len(laid_out)]
    assert len(stream) - len(laid_out) < window


@pytest.fixture
def spec(tmp_path):
    rows = [{"identifier": f"d{i}", "text": chr(200 + i) * (1 + i % 7)} for i in range(300)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(
        source=f"files:{tmp_path}/*.jsonl",
        tokenizer="",
        seq_len=9,
        shuffle_buffer=5,
        held_out_windows=1,
    )


def test_every_document_comes_once_an_epoch_and_ends_with_eos(spec):
    stream = PackedStream(spec, Letters())
    documents = corpus.preview(spec.source, held_out=False)
    total = sum(len(document.text) + 1 for document in documents)
    laid_out = stream.next_batch(3 * total // 10 + 1).flatten().tolist()
    whole = "".join(map(chr, laid_out)).split("\x00")
    # with a buffer of 5, the first documents out are among the first in; after three epochs every
    # one has come 2 to 4 times
    counts = {document.text: whole.count(document.text) for document in documents}
    assert set(counts.values()) <= {2, 3, 4}
    assert set(whole[:-1]) <= set(counts)


def test_a_resumed_stream_continues_with_the_next_token(spec):
    whole, interrupted = PackedStream(spec, Letters()), PackedStream(spec, Letters())
    expected = [whole.next_batch(3) for _ in range(60)]
    for batch in expected[:23]:
        assert (interrupted.next_batch(3) == batch).all()
    state = saved_and_loaded(interrupted.state_dict())
    resumed = PackedStream(spec, Letters())
    resumed.load_state_dict(state)
    for batch in expected[23:]:
        assert (resumed.next_batch(3) == batch).all()
    assert resumed.epoch >= 1


def test_the_package_comes_in_another_order_every_epoch_and_seed():
    source = "package:licensedcode-data"
    streams = [
        PackedStream(DataSpec(source=source, seq_len=32, seed=seed), Letters())
        for seed in (1, 1, 2)
    ]
    first, same, other = (stream.next_batch(20) for stream in streams)
    assert (first == same).all() and not (first == other).all()


def test_held_out_windows_are_fixed_and_hold_no_training_text(spec):
    letters = {
        letter
        for document in corpus.preview(spec.source, held_out=False)
        for letter in document.text
    }
    windows = held_out_windows(spec, Letters())
    assert (windows == held_out_windows(spec, Letters())).all()
    assert not letters & set(map(chr, windows.flatten().tolist()))


def test_held_out_windows_are_spread_evenly_over_the_whole_held_out_text(tmp_path):
    rows = [
        {"identifier": f"d{i}", "text": "".join(map(chr, range(5000 + 19 * i, 5019 + 19 * i)))}
        for i in range(400)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec(source=f"files:{tmp_path}/*.jsonl", seq_len=9, held_out_windows=7)
    text = "\x00".join(
        document.text for document in corpus.iterate_documents(spec.source, held_out=True)
    )
    windows = held_out_windows(spec, Letters()).tolist()
    places = [text.index("".join(map(chr, window)).rstrip("\x00")) // 10 for window in windows]
    steps = {after - before for before, after in itertools.pairwise(places)}
    assert places[0] == 0 and places[-1] == 13, (
        "the held-out documents in use fill twice the windows"
    )
    assert steps == {2, 3}


def test_sampled_windows_are_spread_and_know_the_family_most_of_their_tokens_are_of():
    spec = DataSpec(source="package:licensedcode-data", seq_len=255, held_out_windows=40)
    everything = held_out_windows(spec, Letters()).tolist()
    windows, families = sampled_windows(spec, Letters(), 9)
    assert [everything.index(window) for window in windows.tolist()] == [
        0,
        5,
        10,
        15,
        20,
        24,
        29,
        34,
        39,
    ]
    texts = {document: document.text for document in corpus.preview(spec.source, held_out=True)}
    for window, family in zip(windows.tolist(), families, strict=True):
        longest = max("".join(map(chr, window)).split("\x00"), key=len)
        assert family in {
            corpus.family(document) for document, text in texts.items() if longest in text
        }
    assert len(set(families)) > 4
    assert sampled_windows(spec, Letters(), 99)[0].tolist() == everything


def test_held_out_windows_are_those_of_the_files_as_they_are_now(tmp_path):
    spec, tokenizer = (
        DataSpec(source=f"files:{tmp_path}/*.jsonl", seq_len=7, held_out_windows=2),
        Letters(),
    )
    seen = []
    for first in (1, 500):
        rows = [{"identifier": f"d{i}", "tokens": [first + i % 400] * 9} for i in range(200)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        seen.append(held_out_windows(spec, tokenizer))
    assert seen[0].shape == seen[1].shape and not torch.equal(seen[0], seen[1])


def test_the_table_of_documents_has_every_one_with_its_part_domain_and_length(spec):
    table = document_table(spec, Letters())
    assert len(table) == 300 and set(table.domain) == {spec.source}
    for name, held_out in (("training", False), ("held out", True)):
        lengths = [
            len(document.text) for document in corpus.iterate_documents(spec.source, held_out)
        ]
        assert list(table.tokens[table.part == name]) == lengths
    assert (document_table(spec, Letters(), most=5).part == "training").sum() == 5


def test_positions_begin_anew_behind_every_end():
    tokens = torch.tensor([[5, 6, 1, 7, 1, 1, 8, 9], [1, 5, 6, 7, 8, 9, 5, 6]])
    assert restarting_positions(tokens, 1).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1],
        [0, 0, 1, 2, 3, 4, 5, 6],
    ]


def test_borders_say_what_a_batch_holds_and_all_of_it_is_contiguous(spec):
    """Of a view, which is not contiguous, a GPU's copy cannot be queued: the host waits."""
    held = {}
    for borders in ("ignored", "mask"):
        batch = PackedStream(dataclasses.replace(spec, document_borders=borders), Letters()).take(2)
        held[borders] = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
        assert all(
            tensor.is_contiguous() and tensor.shape == (2, 9) for tensor in held[borders].values()
        )
    assert set(held["ignored"]) == {"input_ids", "labels"}
    assert set(held["mask"]) == {"input_ids", "labels", "position_ids", "document_ids"}
    documents, tokens = held["mask"]["document_ids"], held["mask"]["input_ids"]
    assert torch.equal(documents.diff(dim=1), (tokens[:, :-1] == 0).long())


def test_a_source_without_held_out_text_says_that_it_takes_more_documents(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"identifier": "d0", "tokens": [1] * 50}))
    with pytest.raises(
        ValueError, match="do not fill a window of 8 tokens; give more documents or lower seq_len"
    ):
        held_out_windows(
            DataSpec(source=f"files:{tmp_path}/*.jsonl", seq_len=7, held_out_windows=2), Letters()
        )


@pytest.mark.parametrize("experts", [0, 4])
def test_a_document_mask_hides_the_documents_before(spec, experts):
    """A document in a window against the same document alone."""
    torch.manual_seed(0)
    model = decoder.build_model(
        small_profile(
            experts=experts, active_experts=experts // 2, sliding_window=4 if experts else 0
        )
    )
    batches = {
        borders: (
            PackedStream(
                dataclasses.replace(spec, seq_len=31, document_borders=borders), Letters()
            ).take(2)
        )
        for borders in ("ignored", "mask")
    }
    first = batches["ignored"].input_ids
    assert torch.equal(first, batches["mask"].input_ids)
    outputs = {}
    for borders, batch in batches.items():
        tokens = batch.input_ids % 500
        outputs[borders] = decoder.forward_body(
            model, tokens, None, batch.position_ids, batch.document_ids
        ).hidden
    for row in range(2):
        ends = (first[row] == 0).nonzero().flatten().tolist()
        begin, end = ends[-2] + 1, ends[-1] + 1
        alone = decoder.forward_body(model, first[row : row + 1, begin:end] % 500).hidden[0]
        assert torch.allclose(outputs["mask"][row, begin:end], alone, atol=1e-5)
        assert not torch.allclose(outputs["ignored"][row, begin:end], alone, atol=1e-3)

    batch = batches["mask"]
    distances = batch.position_ids[:, :, None] - batch.position_ids[:, None, :]
    seen = (batch.document_ids[:, :, None] == batch.document_ids[:, None, :]).tril()
    places = torch.arange(31)
    assert torch.equal(distances[seen], (places[:, None] - places).expand_as(seen)[seen]), (
        "as far as they stand apart"
    )


def test_flash_attention_is_refused_where_it_would_mix_documents(spec):
    model = decoder.build_model(small_profile())
    model.config._attn_implementation = "flash_attention_2"
    batch = PackedStream(dataclasses.replace(spec, document_borders="mask"), Letters()).take(2)
    with pytest.raises(ValueError, match="micro_batch 1"):
        decoder.forward_body(model, batch.input_ids, None, batch.position_ids, batch.document_ids)


def test_too_few_held_out_documents_and_an_empty_source_are_refused(spec, tmp_path):
    with pytest.raises(ValueError, match="lower held_out_windows"):
        held_out_windows(DataSpec(source=spec.source, seq_len=9, held_out_windows=500), Letters())
    (tmp_path / "texts.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        PackedStream(spec, Letters()).next_batch(1)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8))
def test_the_shares_of_all_ranks_are_the_step_without_overlap(micro_batch, accumulation, ranks):
    windows = torch.arange(micro_batch * accumulation * 2).view(-1, 2)
    step = Batch(windows, windows + 1)
    if len(windows) % ranks:
        with pytest.raises(ValueError, match="cannot be shared evenly"):
            rank_share(step, micro_batch, 0, ranks)
        return
    shares = [rank_share(step, micro_batch, rank, ranks) for rank in range(ranks)]
    rows = [row for share in shares for batch in share for row in batch.input_ids.tolist()]
    assert sorted(rows) == windows.tolist()
    assert len({sum(len(batch.labels) for batch in share) for share in shares}) == 1
    assert all(batch.input_ids.is_contiguous() for share in shares for batch in share)
    assert all(
        torch.equal(batch.labels, batch.input_ids + 1) for share in shares for batch in share
    )
    if accumulation % ranks == 0:  # then micro-batches are the same for any number of ranks
        micro_batches = {
            tuple(map(tuple, batch.input_ids.tolist())) for share in shares for batch in share
        }
        assert micro_batches == {
            tuple(map(tuple, batch.tolist())) for batch in windows.split(micro_batch)
        }


@pytest.mark.parametrize("identifiers", [1, 3])
def test_rows_that_share_their_identifiers_are_the_cause_that_is_named(tmp_path, identifiers):
    sides = [
        [
            name
            for name in map(str, range(99))
            if corpus.is_held_out(sources.Document(name, "", "")) == side
        ]
        for side in (0, 1)
    ]
    for names in (side[:identifiers] for side in sides):
        write_rows(
            tmp_path / "a.jsonl",
            [{"identifier": names[n % len(names)], "text": f"text {n}"} for n in range(300)],
        )
        spec = DataSpec(source=f"files:{tmp_path}/*.jsonl", seq_len=9, held_out_windows=1)
        with pytest.raises(
            ValueError, match=rf"300 rows .* only {identifiers} identifier.* such as '{names[0]}'"
        ):
            held_out_windows(spec, Letters())
            DocumentStream(spec, Letters()).next()
