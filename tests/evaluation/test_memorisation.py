"""Memorisation of models whose memory is planted: of what a stream gave, of a phrase that all
documents have, of nothing.
"""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kl3m_nb.common.intervals import difference_interval
from kl3m_nb.data.documents import DocumentStream
from kl3m_nb.data.loader import Reading, open_stream
from kl3m_nb.evaluation.memorisation import (
    NotMeasurable,
    copying,
    cut_passages,
    given_and_not,
    memorisation_gap,
    shared_shingles,
    verbatim_continuation,
)
from kl3m_nb.profiles import DataSpec
from tests.data.test_readers import write_rows


class Numbers:
    """A tokenizer of 64 ids, of which the first three are marks."""

    eos_token_id, bos_token_id, pad_token_id = 0, 1, 2

    def __len__(self):
        return 64

    def convert_ids_to_tokens(self, ids):
        return [chr(number) for number in ids]


class Endless(Numbers):
    eos_token_id = bos_token_id = pad_token_id = None


PHRASE = list(range(3, 33))  # what documents copy from each other
ASKED = dict(seed=3, prefix_lengths=(4, 8), continuation=12)


def texts(count, seed=0, length=40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 64) for _ in range(length)] for _ in range(count)]


def data_of(folder, documents, **changes) -> DataSpec:
    write_rows(
        folder / "a.jsonl",
        [{"identifier": f"d{i}", "tokens": tokens} for i, tokens in enumerate(documents)],
    )
    return DataSpec(
        source=f"files:{folder}/a.jsonl",
        **{"seq_len": 40, "shuffle_buffer": 4, "held_out_windows": 1, **changes},
    )


def read(data, windows):
    """(what a run of `data` had read after some windows, these windows)."""
    stream = open_stream(data, Numbers())
    batch = stream.take(windows)
    return Reading(data, windows, stream.state_dict()), batch


def first_pass(data) -> list[tuple[int, ...]]:
    """The documents of the first pass in the stream's order, read another way."""
    stream = DocumentStream(data, Numbers())
    documents = []
    while stream.epoch == 0:
        documents.append(tuple(stream.next().tolist()))
    return documents


def model_of(windows=None, steps=120) -> LlamaForCausalLM:
    """A small model, overfitted on windows where there are some."""
    torch.manual_seed(1)
    shape = dict(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    no_end = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**shape, **no_end, max_position_embeddings=64))
    if windows is not None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=windows, labels=windows).loss.backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("packing", ["dense", "segments"])
def test_what_the_stream_gave_and_what_it_gives_next_are_told_apart(tmp_path, packing):
    data = data_of(tmp_path, texts(200, length=38), packing=packing)
    order = first_pass(data)
    reading, _ = read(data, 60)
    given, not_given = (
        {tuple(document.tolist()) for document in documents}
        for documents in given_and_not([reading], Numbers())
    )
    whole = [document for document in order if document in given]
    assert 55 <= len(whole) <= 64 and whole == order[: len(whole)]
    assert len(not_given) > 50 and not given & not_given
    assert not any(document[:20] == other[:20] for document in given for other in not_given), (
        "a part of a document is given"
    )
    assert len(not_given & {*order}) >= len(not_given) - 1  # the last one may be cut off


def test_what_an_earlier_run_was_given_is_not_text_that_was_not_given(tmp_path):
    data = data_of(tmp_path, texts(200))
    of_source = dataclasses.replace(data, seed=8)
    (newest, _), (earlier, _) = read(data, 40), read(of_source, 60)
    alone = given_and_not([newest], Numbers())
    both = given_and_not([newest, earlier], Numbers())
    by_earlier = {document.tobytes() for document in given_and_not([earlier], Numbers())[0]}
    assert {document.tobytes() for document in both[1]} == {
        document.tobytes() for document in alone[1]
    } - by_earlier
    assert len(both[1]) < len(alone[1]) and len(both[0]) > len(alone[0])


def test_a_run_that_has_begun_its_second_pass_has_nothing_to_compare_with(tmp_path):
    data = data_of(tmp_path, texts(60))
    with pytest.raises(NotMeasurable, match="second pass"):
        copying(model_of(), Numbers(), [read(data, 80)[0]], **ASKED)


def test_a_run_too_long_to_be_read_again_cannot_be_told_from(tmp_path):
    newest, earlier = (read(data_of(tmp_path, texts(60)), windows)[0] for windows in (5, 12))
    with pytest.raises(NotMeasurable, match="had read 12 windows; 10 can be read again"):
        given_and_not([newest, earlier], Numbers(), most_windows=10)


def test_too_few_documents_are_said(tmp_path):
    data = data_of(tmp_path, texts(60))
    with pytest.raises(NotMeasurable, match="not measurable here: 3 documents"):
        copying(model_of(), Numbers(), [read(data, 3)[0]], **ASKED)


def test_shared_runs_of_twelve_tokens_are_found_by_a_plain_search():
    documents = [
        np.array(tokens, dtype=np.int32)
        for tokens in [*texts(3), PHRASE[:20] + texts(1, 5)[0], [*range(40, 60), *PHRASE]]
    ]
    runs = [
        [tuple(document[start : start + 12]) for start in range(len(document) - 11)]
        for document in documents
    ]
    expected = [
        [any(run in other for other in runs if other is not own) for run in own] for own in runs
    ]
    assert [shared.tolist() for shared in shared_shingles(documents)] == expected and sum(
        map(sum, expected)
    ) == 18


def test_no_passage_has_a_run_that_stands_in_another_document():
    """Each document is a phrase that all have between two parts of its own."""
    documents = [
        np.array([*own[:30], *PHRASE, *own[30:]], dtype=np.int32) for own in texts(50, length=60)
    ]
    passages = cut_passages(documents, shared_shingles(documents), 20, 40, random.Random(0))
    assert len(passages) == 40
    phrase = "".join(map(chr, PHRASE))
    for passage in passages:
        text = "".join(map(chr, passage))
        assert sum(text in "".join(map(chr, document)) for document in documents) == 1
        assert not any(phrase[start : start + 12] in text for start in range(19))
    short = [document[:19] for document in documents]
    assert cut_passages(short, shared_shingles(short), 20, 40, random.Random(0)) == []


def test_passages_are_drawn_by_the_seed():
    documents = [np.array(tokens, dtype=np.int32) for tokens in texts(30)]
    drawn = [
        cut_passages(documents, shared_shingles(documents), 20, 9, random.Random(seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 9


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """(what a run had read, the windows that it had been given): documents with a phrase that all
    have.
    """
    folder = tmp_path_factory.mktemp("texts")
    documents = [[*own[:30], *PHRASE, *own[30:]] for own in texts(120, length=60)]
    reading, batch = read(data_of(folder, documents, seq_len=50), 24)
    return reading, torch.cat([batch.input_ids[:, :1], batch.labels], dim=1)


def test_a_model_overfitted_on_what_the_stream_gave_shows_the_gap(streamed):
    reading, windows = streamed
    model = model_of(
        windows.unfold(1, 20, 10).flatten(0, 1)
    )  # from many places, as passages begin anywhere
    gap = copying(model, Numbers(), [reading], **ASKED)
    assert list(gap.prefix) == [4, 8]
    assert gap.gap_low.iloc[1] > 0.1 and (gap.not_given_high < 0.2).all()
    assert gap.longest_given.iloc[1] == 12 and (
        gap[["given_documents", "not_given_documents"]] >= 10
    ).all(axis=None)
    assert copying(model, Numbers(), [reading], **ASKED).equals(gap)


def test_a_model_that_was_given_none_of_the_text_shows_no_gap(streamed):
    """One is untrained, the other knows by heart the phrase that all documents have, and other
    text.
    """
    reading, _ = streamed
    others = torch.tensor([[*own[:5], *PHRASE, *own[5:]] for own in texts(24, seed=9, length=11)])
    for model in (model_of(), model_of(others)):
        gap = copying(model, Numbers(), [reading], **ASKED)
        assert (gap.gap_low <= 0).all() and (gap.gap_high >= 0).all()
        assert (gap.gap_high - gap.gap_low < 0.15).all(), "the interval is too wide to say anything"


@pytest.fixture(scope="module")
def overfitted():
    """A small model trained on six random passages until it continues them verbatim."""
    passages = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(1))
    return model_of(passages), passages.tolist()


def test_what_was_learned_by_heart_is_continued_and_what_was_not_is_not(overfitted):
    model, seen = overfitted
    unseen = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(7)).tolist()
    of_seen, of_unseen = (
        verbatim_continuation(model, Endless(), passages, [4, 8], continuation=16)
        for passages in (seen, unseen)
    )
    assert of_seen[of_seen.prefix == 8].identical.mean() > 0.9 > 0.2 > of_unseen.identical.mean()
    gap = memorisation_gap(of_seen, of_unseen).set_index("prefix").loc[8]
    assert gap.gap_low > 0.5
    assert gap.longest_given == 16 and gap.longest_not_given < 6


def test_every_prefix_is_judged_on_the_same_tokens_against_a_greedy_loop(overfitted):
    model, seen = overfitted
    table = verbatim_continuation(model, Endless(), seen, [2, 8], continuation=16, batch_size=4)
    for row in table.itertuples():
        passage = seen[row.passage]
        ids = passage[8 - row.prefix : 8]
        for _ in range(16):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        same = [
            written == true for written, true in zip(ids[row.prefix :], passage[8:], strict=True)
        ]
        assert row.identical == sum(same) / 16
        assert row.verbatim == (same.index(False) if False in same else 16)


def test_a_text_that_was_ended_is_not_continued_further(overfitted):
    model, seen = overfitted
    before = verbatim_continuation(model, Endless(), seen[:1], [8], continuation=16).verbatim.item()
    tokenizer = Numbers()
    tokenizer.eos_token_id = seen[0][12]  # the fifth token of the continuation
    after = verbatim_continuation(model, tokenizer, seen[:1], [8], continuation=16)
    assert before == 16
    assert after.verbatim.item() == 5 and after.identical.item() == 5 / 16


def test_gap_by_hand():
    given = pd.DataFrame({"prefix": 5, "identical": [0.5, 0.7], "verbatim": [2, 9]})
    not_given = pd.DataFrame({"prefix": 5, "identical": [0.1, 0.1, 0.1], "verbatim": [0, 1, 0]})
    row = memorisation_gap(given, not_given).iloc[0]
    assert (row.given, row.not_given, row.gap) == pytest.approx((0.6, 0.1, 0.5))
    assert (row.gap_low, row.gap_high) == pytest.approx(
        difference_interval([0.5, 0.7], [0.1] * 3)[1:3]
    )
    assert (row.longest_given, row.longest_not_given) == (9, 1)
    assert (row.given_documents, row.not_given_documents) == (2, 3)


def test_passages_of_another_length_are_refused(overfitted, streamed):
    with pytest.raises(ValueError, match="exactly 24 tokens"):
        verbatim_continuation(overfitted[0], Endless(), [[1] * 23], [8], continuation=16)
    with pytest.raises(ValueError, match="at least 12"):
        copying(overfitted[0], Numbers(), [streamed[0]], seed=0, prefix_lengths=[3], continuation=4)
