"""Recital on models whose memory is known: one that knows the alphabet, one that was overfitted, passages cut by hand."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from test_readers import write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from kl3m_nb.corpus import Document, is_held_out
from kl3m_nb.memorisation import copying, held_out_passages, recital, recital_gap, trained_passages
from kl3m_nb.profiles import DataSpec
from kl3m_nb.streams import open_stream


class Letters:
    """A token a character."""

    def encode(self, text, add_special_tokens):
        return [ord(letter) for letter in text]


def documents(lengths) -> list[Document]:
    return [Document(f"{number}", "x", "".join(map(chr, range(length)))) for number, length in enumerate(lengths)]


def test_a_passage_a_document_of_the_length_asked_for():
    passages = held_out_passages(documents([30, 5, 12, 10, 9]), Letters(), length=10, count=9, seed=1)
    assert len(passages) == 3
    for passage in passages:
        assert passage == list(range(passage[0], passage[0] + 10))
    assert len(held_out_passages(documents([30] * 8), Letters(), 10, count=4, seed=1)) == 4


def test_passages_are_drawn_by_the_seed():
    drawn = [held_out_passages(documents([200] * 20), Letters(), 10, 5, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_texts_are_tokenized_and_short_ones_refused():
    assert held_out_passages([Document("a", "x", "abcd")], Letters(), 4, 1, 0) == [list(b"abcd")]
    with pytest.raises(ValueError, match="No text has 5 tokens, the longest has 4"):
        held_out_passages([Document("a", "x", "abcd")], Letters(), 5, 1, 0)


class Ended(Letters):
    eos_token_id, bos_token_id, pad_token_id = 0, 1, 2

    def __len__(self):
        return 1000

    def convert_ids_to_tokens(self, ids):
        return [chr(number) for number in ids]


class Endless(Letters):
    eos_token_id = bos_token_id = pad_token_id = None


@pytest.mark.parametrize("packing", ["dense", "segments"])
def test_training_passages_are_cut_from_what_the_run_has_seen(tmp_path, packing):
    """Every document has a letter of its own that says which it is; the run saw the first 40 windows only."""
    rows = [{"identifier": f"d{i}", "tokens": [100 + i] * 31} for i in range(500)]
    write_rows(tmp_path / "a.jsonl", rows)
    data = DataSpec(source=f"files:{tmp_path}/a.jsonl", seq_len=47, shuffle_buffer=4, held_out_windows=1, packing=packing)
    batch = open_stream(data, Ended()).take(40)
    seen = [tuple(row.tolist()) for row in batch.labels]
    passages = trained_passages(data, Ended(), windows=40, length=12, count=200, seed=3)
    assert 40 <= len(passages) <= 80
    for passage in passages:
        assert 0 not in passage and -100 not in passage
        assert any(tuple(passage) == row[start : start + 12] for row in seen for start in range(36))
    assert max(map(max, passages)) < 180, "a document that was never read"
    fewer = trained_passages(data, Ended(), windows=40, length=12, count=200, seed=3, most_windows=5)
    assert len(fewer) < len(passages) / 4
    assert trained_passages(data, Ended(), 40, 12, 200, 3) == passages != trained_passages(data, Ended(), 40, 12, 200, 4)
    with pytest.raises(ValueError, match="the longest has"):
        trained_passages(data, Ended(), windows=40, length=45, count=2, seed=3)


@pytest.fixture(scope="module")
def overfitted():
    """A small model trained on six random passages until it recites them."""
    torch.manual_seed(1)
    shape = dict(vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    no_end = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**shape, **no_end, max_position_embeddings=64))
    passages = torch.randint(0, 64, (6, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(input_ids=passages, labels=passages).loss.backward()
        optimizer.step()
    return model, passages.tolist()


def test_what_was_learned_by_heart_is_recited_and_what_was_not_is_not(overfitted):
    model, seen = overfitted
    unseen = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(7)).tolist()
    of_seen, of_unseen = (recital(model, Endless(), passages, [4, 8], continuation=16) for passages in (seen, unseen))
    assert of_seen[of_seen.prefix == 8].identical.mean() > 0.9 > 0.2 > of_unseen.identical.mean()
    gap = recital_gap(of_seen, of_unseen).set_index("prefix").loc[8]
    assert gap.gap_low > 0.5
    assert gap.longest_training == 16 and gap.longest_held_out < 6


def test_copying_is_the_gap_between_what_the_stream_gave_and_what_was_held_out(overfitted, tmp_path):
    """The stream gives the six passages again and again; the held-out documents are letters in a row."""
    model, seen = overfitted
    names = [f"d{number}" for number in range(100)]
    held_out = [name for name in names if is_held_out(Document(name, "x", ""))]
    known = [{"identifier": name, "tokens": passage} for name, passage in zip(sorted({*names} - {*held_out}), seen, strict=False)]
    other = [{"identifier": name, "tokens": [*range(1 + number, 60)]} for number, name in enumerate(held_out)]
    write_rows(tmp_path / "a.jsonl", known + other)
    data = DataSpec(source=f"files:{tmp_path}/a.jsonl", seq_len=79, shuffle_buffer=4, held_out_windows=1)
    asked = dict(seed=3, prefix_lengths=(2, 4), continuation=12, count=12)
    gap = copying(model, Ended(), data, 20, documents([40] * 9), **asked)
    assert list(gap.prefix) == [2, 4]
    assert gap.gap_low.iloc[1] > 0.4 and gap.training.iloc[1] > 0.6
    assert copying(model, Ended(), data, 20, documents([40] * 9), **asked).equals(gap)


def test_every_prefix_is_judged_on_the_same_tokens_against_a_greedy_loop(overfitted):
    model, seen = overfitted
    table = recital(model, Endless(), seen, [2, 8], continuation=16, batch_size=4)
    for row in table.itertuples():
        passage = seen[row.passage]
        ids = passage[8 - row.prefix : 8]
        for _ in range(16):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        same = [written == true for written, true in zip(ids[row.prefix :], passage[8:], strict=True)]
        assert row.identical == sum(same) / 16
        assert row.recited == (same.index(False) if False in same else 16)


def test_a_text_that_was_ended_is_not_recited_further(overfitted):
    model, seen = overfitted
    before = recital(model, Endless(), seen[:1], [8], continuation=16).recited.item()
    tokenizer = Ended()
    tokenizer.eos_token_id = seen[0][12]  # the fifth token of the continuation
    after = recital(model, tokenizer, seen[:1], [8], continuation=16)
    assert before == 16
    assert after.recited.item() == 5 and after.identical.item() == 5 / 16


def test_gap_by_hand():
    training = pd.DataFrame({"prefix": 5, "identical": [0.5, 0.7], "recited": [2, 9]})
    held_out = pd.DataFrame({"prefix": 5, "identical": [0.1, 0.1, 0.1], "recited": [0, 1, 0]})
    row = recital_gap(training, held_out).iloc[0]
    assert (row.training, row.held_out, row.gap) == pytest.approx((0.6, 0.1, 0.5))
    assert (row.gap_low, row.gap_high) == pytest.approx((0.4, 0.6))
    assert (row.longest_training, row.longest_held_out) == (9, 1)


def test_passages_of_another_length_are_refused(overfitted):
    with pytest.raises(ValueError, match="exactly 24 tokens"):
        recital(overfitted[0], Ended(), [[1] * 23], [8], continuation=16)
