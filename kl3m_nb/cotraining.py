"""Instruction pairs as training samples, for streams that mix them with raw text (kl3m-002, "hybrid NTP and SFT cotraining").

A pair is `<|start|><|instruction|>…</|instruction|>…<|end|>`; tokenizers of the family's first generation have no instruction
tokens, there `<|sep|>` stands between instruction and response (inferred: the card gives no template).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from kl3m_nb.instructions import InstructionPair
from kl3m_nb.special_ids import end_id, start_id

log = logging.getLogger(__name__)

OPENING, CLOSING, SEPARATOR = "<|instruction|>", "</|instruction|>", "<|sep|>"


@dataclass(frozen=True)
class Sample:
    """Tokens of one sequence, int32 [length]; those before `trained_from` are read, not predicted."""

    tokens: np.ndarray
    trained_from: int = 0


def instruction_prompt(instruction: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before the response to `instruction`, as text; the special tokens in it are matched when it is tokenized.

    Raises ValueError when the tokenizer has no tokens to mark an instruction with, or none for the beginning of a text.
    """
    start_id(tokenizer)
    if _has(tokenizer, OPENING) and _has(tokenizer, CLOSING):
        return f"{tokenizer.bos_token}{OPENING}{instruction}{CLOSING}"
    if not _has(tokenizer, SEPARATOR):
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path} has neither {OPENING} and {CLOSING} nor {SEPARATOR}, which "
            "mark an instruction; set p_sft to 0, or use another tokenizer."
        )
    return f"{tokenizer.bos_token}{instruction}{SEPARATOR}"


def _has(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)


def pair_sample(pair: InstructionPair, tokenizer: PreTrainedTokenizerBase, loss: str) -> Sample:
    """The sequence of one pair. `loss` is "response" (the response and `<|end|>` are trained on) or "all"."""
    prompt = tokenizer.encode(instruction_prompt(pair.instruction, tokenizer), add_special_tokens=False)
    response = tokenizer.encode(pair.response, add_special_tokens=False)
    tokens = np.array([*prompt, *response, end_id(tokenizer)], dtype=np.int32)
    return Sample(tokens, len(prompt) if loss == "response" else 0)


class PairSamples:
    """Instruction samples without end, in a fresh order every pass."""

    def __init__(
        self, pairs: Sequence[InstructionPair], tokenizer: PreTrainedTokenizerBase, most_tokens: int, loss: str, seed: int
    ):
        """Pairs of more than `most_tokens` tokens cannot be used; how many is logged. Raises ValueError when none fits."""
        samples = [pair_sample(pair, tokenizer, loss) for pair in pairs]
        self._samples = [sample for sample in samples if sample.tokens.size <= most_tokens]
        self.left_out = len(samples) - len(self._samples)
        if not self._samples:
            raise ValueError(f"None of {len(pairs)} instruction pairs fits into {most_tokens} tokens; raise seq_len.")
        if self.left_out:
            log.warning("%s of %s instruction pairs are longer than %s tokens: not used", self.left_out, len(pairs), most_tokens)
        self._seed = seed
        self.given = 0  # over all passes: the whole state
        self._order: tuple[int, list[int]] = (-1, [])

    def next(self) -> Sample:
        done, place = divmod(self.given, len(self._samples))
        if self._order[0] != done:
            order = list(range(len(self._samples)))
            random.Random(self._seed * 1_000_003 + done).shuffle(order)
            self._order = (done, order)
        self.given += 1
        return self._samples[self._order[1][place]]
