"""Documents read by a sliding window, against transformers' own loss, an explicit loop, and distributions that are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kl3m_nb.corpus import Document
from kl3m_nb.prediction import Prediction, evaluate_documents, sliding_windows

CONTEXT = 16


class ByteTokenizer:
    """A token a byte; `<|end|>` is 256."""

    eos_token_id = 256

    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(4)
    shape = dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=CONTEXT, initializer_range=0.3)).eval()


DOCUMENTS = [
    Document("short", "rules", "Permit"),
    Document("long", "rules", "The holder of a permit shall keep it for five years and a day."),
    Document("stored", "clauses", "", tuple(b"Law of Ohio.")),
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
        text = DOCUMENTS[index].text.encode() or bytes(DOCUMENTS[index].tokens)
        ids = torch.tensor([[256, *text]])
        with torch.no_grad():
            own = model(input_ids=ids, labels=ids).loss.item()
        row = result.documents.iloc[index]
        assert row.loss == pytest.approx(own, abs=1e-5)
        assert (row.tokens, row.bytes) == (len(text), len(text))
        assert row.bits_per_byte == pytest.approx(own / math.log(2), abs=1e-5)


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
    assert max(contexts) == CONTEXT == result.by_position["context"].max()
    assert result.by_position["tokens"].sum() == result.calibration["tokens"].sum() == sum(result.documents["tokens"])
    only_long = evaluate_documents(model, ByteTokenizer(), DOCUMENTS[1:2], window=CONTEXT, stride=stride).by_position
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
        (dict(documents=[Document("empty", "x", "")]), "'empty' has no tokens"),
    ],
)
def test_impossible_evaluations_are_refused(model, changes, message):
    settings = {"documents": DOCUMENTS, "window": 8, "stride": 4} | changes
    with pytest.raises(ValueError, match=message):
        evaluate_documents(model, ByteTokenizer(), **settings)
