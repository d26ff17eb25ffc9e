from __future__ import annotations

import pytest

from kl3m_nb.data import instructions, tokenizer
from kl3m_nb.data.instructions import load_pairs
from tests.data.test_tokenizer import TEXTS


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train_tokenizer(TEXTS, 800)


def test_the_template_marks_the_instruction_and_trains_on_the_response(trained):
    pair = load_pairs()[0]
    sample = instructions.pair_sample(pair, trained, "response")
    text = trained.decode(sample.tokens)
    assert (
        text == f"<|start|><|instruction|>{pair.instruction}</|instruction|>{pair.response}<|end|>"
    )
    assert trained.decode(sample.tokens[sample.trained_from :]) == f"{pair.response}<|end|>"
    assert instructions.pair_sample(pair, trained, "all").trained_from == 0


def test_a_tokenizer_without_instruction_tokens_gets_a_separator(trained, monkeypatch):
    known = trained.convert_tokens_to_ids
    monkeypatch.setattr(
        trained,
        "convert_tokens_to_ids",
        lambda token: 3 if "instruction" in token else known(token),
    )
    pair = load_pairs()[0]
    sample = instructions.pair_sample(pair, trained, "response")
    assert (
        trained.decode(sample.tokens) == f"<|start|>{pair.instruction}<|sep|>{pair.response}<|end|>"
    )


def test_pairs_come_once_a_pass_in_changing_order_and_long_ones_are_said(trained, caplog):
    pairs = load_pairs()
    samples = instructions.PairSamples(pairs, trained, 400, "response", seed=3)
    usable = len(pairs) - samples.left_out
    assert (
        0 < samples.left_out < len(pairs)
        and f"{samples.left_out} of {len(pairs)} instruction pairs" in caplog.text
    )
    passes = [[tuple(samples.next().tokens.tolist()) for _ in range(usable)] for _ in range(2)]
    assert (
        len(set(passes[0])) == usable
        and set(passes[0]) == set(passes[1])
        and passes[0] != passes[1]
    )
    assert max(map(len, passes[0])) <= 400
    with pytest.raises(ValueError, match="raise seq_len"):
        instructions.PairSamples(pairs, trained, 10, "response", seed=3)
