"""Documents read by a sliding window, against transformers' own loss, an explicit loop, and
distributions that are known.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kl3m_nb.common.intervals import mean_interval
from kl3m_nb.data.sources import Document
from kl3m_nb.evaluation.documents import (
    Prediction,
    beginning,
    evaluate_documents,
    sliding_windows,
    worth_of_context,
)

CONTEXT = 16


class ByteTokenizer:
    """A token a byte; `<|end|>` is 256."""

    eos_token_id = 256

    def __len__(self):
        return 257

    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(4)
    shape = dict(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(
        LlamaConfig(**shape, max_position_embeddings=CONTEXT, initializer_range=0.3)
    ).eval()


DOCUMENTS = [
    Document("short", "rules", "Permit"),
    Document("long", "rules", "The holder of a permit shall keep it for five years and a day."),
    Document("stored", "clauses", "Law of Ohio.", tuple(b"Law of Ohio.")),
]


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(2, 8, 8), (9, 8, 8), (10, 8, 8), (41, 8, 3), (41, 8, 8), (40, 8, 1), (1, 8, 4)],
)
def test_windows_predict_every_token_but_the_first_exactly_once(length, window, stride):
    predicted = []
    for start, end, new in sliding_windows(length, window, stride):
        assert 0 <= start < end - new and end - start <= window + 1
        if end - new > 1:  # not the first window: it starts as early as the window allows
            assert end - start == window + 1
        predicted += range(end - new, end)
    assert predicted == list(range(1, length))


def test_a_document_within_the_window_has_transformers_own_loss(model):
    result = evaluate_documents(model, ByteTokenizer(), DOCUMENTS, window=CONTEXT, stride=4)
    for index in (0, 2):
        text = DOCUMENTS[index].text.encode()
        ids = torch.tensor([[256, *text]])
        with torch.no_grad():
            own = model(input_ids=ids, labels=ids).loss.item()
        row = result.documents.iloc[index]
        assert row.loss == pytest.approx(own, abs=1e-5)
        assert (row.tokens, row.bytes) == (len(text), len(text))
        assert row.bits_per_byte == pytest.approx(own / math.log(2), abs=1e-5)


def test_a_document_is_predicted_from_the_prefix_that_is_given(model):
    result = evaluate_documents(
        model, ByteTokenizer(), DOCUMENTS[:1], window=CONTEXT, stride=4, prefix=7
    )
    ids = torch.tensor([[7, *DOCUMENTS[0].text.encode()]])
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids).loss.item()
    assert result.documents.loss.item() == pytest.approx(own, abs=1e-5)


def test_the_beginning_of_a_document_is_one_of_its_own(model):
    for document in (DOCUMENTS[1], DOCUMENTS[2]):  # with its text, and with its tokens
        part = beginning(document, ByteTokenizer(), 5)
        assert part.identifier == document.identifier and part.text == document.text[:5]
        assert part.tokens.tolist() == list(document.text.encode()[:5])
        assert (
            evaluate_documents(model, ByteTokenizer(), [part], CONTEXT, 4).documents.tokens.item()
            == 5
        )
    assert beginning(DOCUMENTS[0], ByteTokenizer(), 99).text == "Permit"


@pytest.mark.parametrize("stride", [1, 5, CONTEXT])
def test_a_longer_document_equals_a_loop_over_its_tokens(model, stride):
    result = evaluate_documents(
        model, ByteTokenizer(), DOCUMENTS, window=CONTEXT, stride=stride, batch_tokens=40
    )
    ids = [256, *DOCUMENTS[1].text.encode()]
    losses, done = [], 1
    while done < len(ids):
        end = min(len(ids), CONTEXT + 1 if done == 1 else done + stride)
        start = max(0, end - 1 - CONTEXT)
        with torch.no_grad():
            logits = (
                model(torch.tensor([ids[start : end - 1]])).logits[0].double().log_softmax(dim=-1)
            )
        losses += [-logits[place - 1 - start, ids[place]].item() for place in range(done, end)]
        done = end
    assert result.documents.iloc[1].loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.calibration["tokens"].sum() == sum(result.documents["tokens"])


def test_a_uniform_model_is_as_unsure_as_it_should_be(model):
    uniform = LlamaForCausalLM(model.config)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    summary = evaluate_documents(uniform, ByteTokenizer(), DOCUMENTS, window=8, stride=8).summary()
    assert [summary[name] for name in ("loss", "loss_low", "loss_high")] == pytest.approx(
        [math.log(257)] * 3, abs=1e-5
    )
    assert (summary["bits_per_byte"], summary["entropy_bits"]) == pytest.approx(
        (math.log2(257),) * 2, abs=1e-5
    )
    assert summary["entropy_minus_target"] == pytest.approx(math.log2(257) - 6.5, abs=1e-5)
    assert summary["overconfidence_bits"] == pytest.approx(0, abs=1e-5)
    assert summary["perplexity"] == pytest.approx(257, rel=1e-4)


class PairTokenizer:
    """A token for two letters a … p."""

    eos_token_id = 256

    def __len__(self):
        return 257

    def encode(self, text, add_special_tokens):
        places = [ord(letter) - ord("a") for letter in text]
        return [
            16 * first + second for first, second in zip(places[::2], places[1::2], strict=True)
        ]

    def decode(self, tokens):
        return "".join(chr(ord("a") + place) for token in tokens for place in divmod(token, 16))


def test_bits_per_byte_compare_between_tokenizers_whoever_stored_the_tokens(model):
    """A model that knows nothing pays log₂ 257 bits a token, whatever the ids that a document
    stores.
    """
    uniform = LlamaForCausalLM(model.config)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    bytewise, pairwise = ByteTokenizer(), PairTokenizer()
    text = "lackofahandle"[:12]
    for stored in ((), tuple(text.encode()), tuple(pairwise.encode(text, False))):
        documents = [Document("d", "x", text, stored)]
        found = [
            evaluate_documents(uniform, of, documents, window=8, stride=8)
            for of in (bytewise, pairwise)
        ]
        assert [result.documents["tokens"].sum() for result in found] == [12, 6]
        assert [result.documents["bytes"].sum() for result in found] == [12, 12]
        assert [result.bits_per_byte.mean for result in found] == pytest.approx(
            [math.log2(257), math.log2(257) / 2]
        )


class TestWorthOfContext:
    """Texts of 40 bytes: each of `CONTEXT` tokens of context and more, with `<|end|>` before it."""

    texts = tuple(
        Document(f"d{i}", "x", "".join(chr(97 + (i * n * n) % 23) for n in range(40)))
        for i in range(1, 7)
    )

    def test_the_same_tokens_are_predicted_from_what_is_left_of_their_context(self, model):
        table = worth_of_context(
            model, ByteTokenizer(), self.texts[:2], CONTEXT, per_family=3, batch_tokens=50
        )
        assert (
            table.context.tolist() == [1, 2, 4, 8, 16]
            and set(table.tokens) == {6}
            and set(table.effective) == {2}
        )
        losses = []
        for length in table.context:
            for document in self.texts[:2]:
                ids = [256, *document.text.encode()]
                for place in (16, 28, 40):
                    with torch.no_grad():
                        logits = (
                            model(torch.tensor([ids[place - length : place]]))
                            .logits[0, -1]
                            .double()
                            .log_softmax(dim=-1)
                        )
                    losses.append((length, document.identifier, -logits[ids[place]].item()))
        expected = pd.DataFrame(losses, columns=["context", "family", "loss"])
        np.testing.assert_allclose(table.loss, expected.groupby("context").loss.mean(), atol=1e-5)
        by_family = expected.groupby(["context", "family"]).loss.mean().unstack()
        for row, more in zip(
            table.itertuples(), (by_family - by_family.loc[16]).to_numpy(), strict=True
        ):
            expected = tuple(mean_interval(more))
            assert (row.more, row.more_low, row.more_high, row.effective) == pytest.approx(
                expected, abs=1e-4
            )

    def test_a_model_that_does_not_look_back_gains_nothing(self):
        """A model of no layers predicts from the last token alone: a unigram or bigram model."""
        config = LlamaConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=0,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
        )
        torch.manual_seed(5)
        blind = LlamaForCausalLM(config).eval()
        table = worth_of_context(blind, ByteTokenizer(), self.texts, CONTEXT, per_family=10)
        assert (
            table.loss.to_numpy() == pytest.approx([table.loss[0]] * 5, abs=1e-5)
            and table.loss.std() < 1e-5
        )
        assert table[["more", "more_low", "more_high"]].abs().max(axis=None) < 1e-4

    def test_the_longest_text_of_a_family_stands_for_it(self, model):
        kin = [
            dataclasses.replace(document, family=name)
            for document, name in zip(self.texts, "aabbcc", strict=True)
        ]
        kin[0] = dataclasses.replace(kin[0], text=kin[0].text[:30])
        table = worth_of_context(model, ByteTokenizer(), kin, CONTEXT, per_family=4)
        assert table.equals(
            worth_of_context(
                model, ByteTokenizer(), [kin[1], kin[2], kin[4]], CONTEXT, per_family=4
            )
        )
        assert set(table.effective) == {3}

    @pytest.mark.parametrize(("length", "longest"), [(40, 16), (13, 8), (8, 4), (4, 1), (1, 1)])
    def test_the_longest_context_is_one_that_the_texts_have(self, model, length, longest):
        short = [
            dataclasses.replace(document, text=document.text[:length])
            for document in self.texts[:3]
        ]
        table = worth_of_context(model, ByteTokenizer(), short, CONTEXT, per_family=4)
        assert table.context.max() == longest and table.more.iloc[-1] == 0

    def test_one_family_has_no_interval(self, model):
        table = worth_of_context(model, ByteTokenizer(), self.texts[:1], CONTEXT, per_family=4)
        assert table[["more_low", "more_high"]].isna().all(axis=None) and table.more.notna().all()

    @pytest.mark.parametrize("changes", [{"documents": []}, {"window": CONTEXT + 1}, {"window": 0}])
    def test_what_cannot_be_judged_is_refused(self, model, changes):
        with pytest.raises(ValueError, match="at least 1 document and a window of 1 to 16"):
            worth_of_context(
                model, ByteTokenizer(), **{"documents": self.texts, "window": 8, **changes}
            )


def prediction(rows, calibration=((0.5, 0.5, 10),)) -> Prediction:
    frame = pd.DataFrame(rows, columns=["identifier", "domain", "tokens", "bytes", "loss"])
    frame["bits_per_byte"] = frame.loss * frame.tokens / frame.bytes / math.log(2)
    frame = frame.assign(entropy_bits=1.0, family=frame.identifier)
    return Prediction(
        frame, pd.DataFrame(calibration, columns=["confidence", "accuracy", "tokens"])
    )


def test_averages_weigh_tokens_and_bytes_not_documents():
    result = prediction([("a", "x", 30, 60, 1.0), ("b", "x", 10, 60, 5.0)])
    assert result.loss.mean == pytest.approx(2.0)
    assert result.loss == pytest.approx(mean_interval([1.0, 5.0], [30, 10]))
    assert result.summary()["effective"] == pytest.approx(2), "of bytes, of which both have 60"
    kin = Prediction(result.documents.assign(family="kin"), result.calibration)
    assert (
        kin.summary()["effective"] == 1
        and math.isnan(kin.bits_per_byte.low)
        and kin.bits_per_byte.mean > 0
    )
    assert result.bits_per_byte.mean == pytest.approx(80 / 120 / math.log(2))


def test_a_row_a_domain_the_largest_first():
    table = prediction(
        [("a", "x", 10, 20, 1.0), ("b", "y", 30, 50, 2.0), ("c", "y", 10, 10, 4.0)]
    ).by_domain()
    assert table["domain"].tolist() == ["y", "x"]
    assert table["documents"].tolist() == [2, 1] and table["tokens"].tolist() == [40, 10]
    assert table["loss"].tolist() == pytest.approx([2.5, 1.0])
    low, high = mean_interval([2.0, 4.0], [30, 10])[1:3]
    assert table["loss_low"].tolist() == pytest.approx([low, math.nan], nan_ok=True)
    assert table["loss_high"].tolist() == pytest.approx([high, math.nan], nan_ok=True)
    assert table["effective"].tolist() == pytest.approx([60**2 / (50**2 + 10**2), 1])


def test_calibration_error_by_hand():
    # |0.5 - 0.9| for 30 tokens and |0.8 - 0.7| for 10: (0.4 · 30 + 0.1 · 10) / 40
    result = prediction([("a", "x", 40, 40, 1.0)], [(0.9, 0.5, 30), (0.7, 0.8, 10)])
    assert result.calibration_error == pytest.approx(0.325)
    assert result.summary()["accuracy"] == pytest.approx((0.5 * 30 + 0.8 * 10) / 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(window=CONTEXT + 1), "takes 1 to 16"),
        (dict(stride=0), "between 1 and the window"),
        (dict(stride=9), "between 1 and the window"),
        (dict(documents=[Document("empty", "x", "")]), "'empty' has no text"),
        (dict(documents=[]), "was given no documents; it takes one or more"),
    ],
)
def test_impossible_evaluations_are_refused(model, changes, message):
    settings = {"documents": DOCUMENTS, "window": 8, "stride": 4} | changes
    with pytest.raises(ValueError, match=message):
        evaluate_documents(model, ByteTokenizer(), **settings)
