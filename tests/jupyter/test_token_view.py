"""Probabilities of the tokens of a sample against the model's own softmax, and a page that a text
cannot break.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl3m_nb.evaluation.generation import Sampling, generate
from kl3m_nb.jupyter.prompt_box import TokenChoice, choices_html, token_choices


@pytest.fixture(scope="module")
def loaded(trained_run):
    checkpoint = trained_run[1].checkpoint
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(
        checkpoint
    )


def test_probabilities_are_those_of_the_plain_softmax(loaded):
    model, tokenizer = loaded
    (sample,) = generate(model, tokenizer, ["Permission is"], Sampling(0.8, 0.9, 1.0, 8), seed=4)
    choices = token_choices(model, tokenizer, sample)
    drawn = [*sample.tokens, *sample.end_tokens]
    ids = torch.tensor([[*sample.prompt_tokens, *drawn]])
    with torch.no_grad():
        probabilities = model(ids).logits[0, len(sample.prompt_tokens) - 1 : -1].softmax(dim=-1)
    assert len(choices) == len(drawn)
    for choice, token, distribution in zip(choices, drawn, probabilities, strict=True):
        assert choice.probability == pytest.approx(distribution[token].item(), rel=1e-4)
        assert choice.rank == 1 + (distribution > distribution[token]).sum()
        assert choice.text == tokenizer.decode([token])
        assert [p for _, p in choice.alternatives] == pytest.approx(
            distribution.sort(descending=True).values[:5].tolist(), rel=1e-4
        )
        assert choice.alternatives[0][0] == tokenizer.decode([distribution.argmax().item()])


def test_a_text_cannot_break_the_page_and_its_figures_are_on_hover():
    page = choices_html("<b>", [TokenChoice('"><script>', 0.25, 3, ((" the", 0.5), ("<i>", 0.3)))])
    assert "<script>" not in page and "<i>" not in page
    assert "<b>&lt;b&gt;</b>" in page
    assert "25.00%, rank 3" in page and "50.0%" in page
    assert "rgba(0, 114, 178, 0.125)" in page, (
        "a tint of half the probability reads in light and dark pages"
    )
