"""A sample with the probability of every token: darker where the model was surer, numbers and alternatives on hover.

The probabilities are the model's plain ones (temperature 1, nothing cut off), whatever the sampling that drew the tokens.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.evaluation import evaluation_mode, head_logits
from kl3m_nb.generation import Sample
from kl3m_nb.logits import before_head

ALTERNATIVES = 5


@dataclass(frozen=True)
class TokenChoice:
    """One token of a continuation: its text, probability and rank (1 is the likeliest), and the likeliest tokens in its place."""

    text: str
    probability: float
    rank: int
    alternatives: tuple[tuple[str, float], ...]  # text and probability, the likeliest first


@torch.no_grad()
def token_choices(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[TokenChoice]:
    """What `model` gave each token of `sample`, the end-of-text token included where it was written."""
    drawn = [*sample.tokens, *sample.end_tokens]
    ids = torch.tensor([[*sample.prompt_tokens, *drawn]], device=model.device)
    with evaluation_mode(model):
        states, head = before_head(model, ids[:, :-1])
        probabilities = head_logits(states[0, -len(drawn) :], head).softmax(dim=-1).cpu()
    choices = []
    for token, distribution in zip(drawn, probabilities, strict=True):
        best = distribution.topk(ALTERNATIVES)
        choices.append(
            TokenChoice(
                text=tokenizer.decode([token]),
                probability=distribution[token].item(),
                rank=1 + int((distribution > distribution[token]).sum()),
                alternatives=tuple(zip(map(tokenizer.decode, best.indices[:, None].tolist()), best.values.tolist(), strict=True)),
            )
        )
    return choices


def choices_html(prompt: str, choices: Sequence[TokenChoice]) -> str:
    """The prompt in bold, then every token on a tint as strong as its probability, its figures as its tooltip."""
    spans = "".join(
        f'<span title="{html.escape(_tooltip(choice))}" style="background: rgba(0, 114, 178, {0.5 * choice.probability:.3f})">'
        f"{html.escape(choice.text)}</span>"
        for choice in choices
    )
    return f'<div style="white-space: pre-wrap; text-align: left; line-height: 1.6"><b>{html.escape(prompt)}</b>{spans}</div>'


def _tooltip(choice: TokenChoice) -> str:
    others = "\n".join(f"{probability:6.1%}  {text!r}" for text, probability in choice.alternatives)
    return f"{choice.text!r}: {choice.probability:.2%}, rank {choice.rank:,}\n{others}"
