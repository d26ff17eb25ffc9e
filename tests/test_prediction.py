"""Documents read by a sliding window, against transformers' own loss, an explicit loop, and distributions that are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kl3m_nb.corpus import Document
from kl3m_nb.evaluation import bootstrap_interval
from kl3m_nb.prediction import Prediction, beginning, evaluate_documents, sliding_windows

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
    shape = dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=CONTEXT, initializer_range=0.3)).eval()


DOCUMENTS = [
    Document("short", "rules", "Permit"),
    Document("long", "rules", "The holder of a permit shall keep it for five years and a day."),
    Document("stored", "clauses", "Law of Ohio.", tuple(b"Law of Ohio.")),
]


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 8, 8), (9, 8, 8), (10, 8, 8), (41, 8, 3), (41, 8, 8), (40, 8, 1), (1, 8, 4)]
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
    result = evaluate_documents(model, ByteTokenizer(), DOCUMENTS[:1], window=CONTEXT, stride=4, prefix=7)
    ids = torch.tensor([[7, *DOCUMENTS[0].text.encode()]])
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids).loss.item()
    assert result.documents.loss.item() == pytest.approx(own, abs=1e-5)


def test_the_beginning_of_a_document_is_one_of_its_own(model):
    for document in (DOCUMENTS[1], DOCUMENTS[2]):  # with its text, and with its tokens
        part = beginning(document, ByteTokenizer(), 5)
        assert part.identifier == document.identifier and part.text == document.text[:5]
        assert part.tokens.tolist() == list(document.text.encode()[:5])
        assert evaluate_documents(model, ByteTokenizer(), [part], CONTEXT, 4).documents.tokens.item() == 5
    assert beginning(DOCUMENTS[0], ByteTokenizer(), 99).text == "Permit"


@pytest.mark.parametrize("stride", [1, 5, CONTEXT])
def test_a_longer_document_equals_a_loop_over_its_tokens(model, stride):
    result = evaluate_documents(model, ByteTokenizer(), DOCUMENTS, window=CONTEXT, stride=stride, batch_tokens=40)
    ids = [256, *DOCUMENTS[1].text.encode()]
    losses, contexts, done = [], [], 1
    while done < len(ids):
        end = min(len(ids), CONTEXT + 1 if done == 1 else done + stride)
        start = max(0, end - 1 - CONTEXT)
        with torch.no_grad():
            logits = model(torch.tensor([ids[start : end - 1]])).logits[0].double().log_softmax(dim=-1)
        losses += [-logits[place - 1 - start, ids[place]].item() for place in range(done, end)]
        contexts += [place - start for place in range(done, end)]
        done = end
    assert result.documents.iloc[1].loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert max(contexts) == CONTEXT == result.positions["context"].max()
    assert result.positions["tokens"].sum() == result.calibration["tokens"].sum() == sum(result.documents["tokens"])
    only_long = evaluate_documents(model, ByteTokenizer(), DOCUMENTS[1:2], window=CONTEXT, stride=stride).positions
    expected = pd.DataFrame({"context": contexts, "loss": losses}).groupby("context")["loss"].mean()
    np.testing.assert_allclose(only_long["loss"], expected, atol=1e-5)
    np.testing.assert_array_equal(only_long["context"], expected.index)


def test_a_uniform_model_is_as_unsure_as_it_should_be(model):
    uniform = LlamaForCausalLM(model.config)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    summary = evaluate_documents(uniform, ByteTokenizer(), DOCUMENTS, window=8, stride=8).summary()
    assert [summary[name] for name in ("loss", "loss_low", "loss_high")] == pytest.approx([math.log(257)] * 3, abs=1e-5)
    assert (summary["bits_per_byte"], summary["entropy_bits"]) == pytest.approx((math.log2(257),) * 2, abs=1e-5)
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
        return [16 * first + second for first, second in zip(places[::2], places[1::2], strict=True)]

    def decode(self, tokens):
        return "".join(chr(ord("a") + place) for token in tokens for place in divmod(token, 16))


def test_bits_per_byte_compare_between_tokenizers_whoever_stored_the_tokens(model):
    """A model that knows nothing pays log₂ 257 bits a token, whatever the ids that a document stores."""
    uniform = LlamaForCausalLM(model.config)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    bytewise, pairwise = ByteTokenizer(), PairTokenizer()
    text = "lackofahandle"[:12]
    for stored in ((), tuple(text.encode()), tuple(pairwise.encode(text, False))):
        documents = [Document("d", "x", text, stored)]
        found = [evaluate_documents(uniform, of, documents, window=8, stride=8) for of in (bytewise, pairwise)]
        assert [result.documents["tokens"].sum() for result in found] == [12, 6]
        assert [result.documents["bytes"].sum() for result in found] == [12, 12]
        assert [result.bits_per_byte.mean for result in found] == pytest.approx([math.log2(257), math.log2(257) / 2])


def positions(rows) -> Prediction:
    frame = pd.DataFrame(rows, columns=["document", "context", "tokens", "loss"])
    return Prediction(pd.DataFrame(), frame, pd.DataFrame())


def test_every_token_of_context_counts_once():
    for place in (0, 1, 30, 4095):
        rows = [(0, context, 1, float(context == place + 1)) for context in range(1, 4097)]
        table = positions(rows).by_position()
        assert (table["loss"] > 0).sum() == 1 and table["tokens"].sum() == 4096
        assert (table["loss"] * table["tokens"]).sum() == pytest.approx(1.0)


def test_means_over_ranges_of_context_weigh_tokens_and_their_intervals_draw_documents():
    table = positions([(0, 1, 1, 4.0)]).by_position()
    assert table.iloc[0].to_dict() == {"context": 1.0, "tokens": 1, "loss": 4.0, "loss_low": 4.0, "loss_high": 4.0}
    far = positions([(0, context, 9 if context < 228 else 1, 1.0 if context < 228 else 11.0) for context in range(200, 256)])
    means = far.by_position()["loss"]
    assert 1.0 == means.iloc[0] < means.iloc[-1] == 11.0
    rows = [(document, context, 10, 1.0 + document) for document in range(3) for context in (5, 6)]
    table = positions(rows).by_position(ranges=1)
    documents = [1.0, 2.0, 3.0]
    expected = bootstrap_interval(documents, [20, 20, 20])
    assert tuple(table.loc[0, ["loss", "loss_low", "loss_high"]]) == pytest.approx(expected)
    assert table["loss_low"][0] == 1.0 and table["loss_high"][0] == 3.0


def prediction(rows, calibration=((0.5, 0.5, 10),)) -> Prediction:
    frame = pd.DataFrame(rows, columns=["identifier", "domain", "tokens", "bytes", "loss"])
    frame["bits_per_byte"] = frame.loss * frame.tokens / frame.bytes / math.log(2)
    return Prediction(
        frame.assign(entropy_bits=1.0), pd.DataFrame(), pd.DataFrame(calibration, columns=["confidence", "accuracy", "tokens"])
    )


def test_averages_weigh_tokens_and_bytes_not_documents():
    result = prediction([("a", "x", 30, 60, 1.0), ("b", "x", 10, 60, 5.0)])
    assert result.loss.mean == pytest.approx(2.0)
    assert (result.loss.low, result.loss.high) == (1.0, 5.0)
    assert result.bits_per_byte.mean == pytest.approx(80 / 120 / math.log(2))


def test_a_row_a_domain_the_largest_first():
    table = prediction([("a", "x", 10, 20, 1.0), ("b", "y", 30, 50, 2.0), ("c", "y", 10, 10, 4.0)]).by_domain()
    assert table["domain"].tolist() == ["y", "x"]
    assert table["documents"].tolist() == [2, 1] and table["tokens"].tolist() == [40, 10]
    assert table["loss"].tolist() == pytest.approx([2.5, 1.0])
    assert table["loss_low"].tolist() == pytest.approx([2.0, 1.0]) and table["loss_high"].tolist() == pytest.approx([4.0, 1.0])


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
