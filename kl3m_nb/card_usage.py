"""The calls that the family's cards print of transformers' pipeline: how its models are meant to be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CardUsage:
    """The call of `pipeline("text-generation", …)` that a model card prints: its prompts and its arguments."""

    prompts: tuple[str, ...]
    arguments: Mapping[str, object]


# kl3m-002 card, "Getting Started": "Governing Law." needs the newline, without which the card's own sample does not begin a line.
CARD_USAGE = {
    "kl3m-002-520m": CardUsage(
        ("Under this", "Governing Law.\n"),
        {"do_sample": True, "temperature": 0.5, "num_return_sequences": 3, "max_new_tokens": 32},
    ),
    "kl3m-007-500m": CardUsage(
        ("The United States Constitution establishes",),
        {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 100},
    ),
}


def card_of(mixture: bool) -> str:
    """The card whose advice holds for a model: kl3m-002 for the family's mixtures of experts, kl3m-007 for its Llamas."""
    return "kl3m-002-520m" if mixture else "kl3m-007-500m"


def usage_of(card: str) -> CardUsage:
    """What the card named `card` prints. Raises ValueError for a card that prints no call."""
    if card not in CARD_USAGE:
        raise ValueError(f"There is no usage of the card {card!r}; choose one of {', '.join(CARD_USAGE)}.")
    return CARD_USAGE[card]
