"""Instruction → response pairs in the family's three uses.

The pairs lie in `data/instructions/`, one file a use, one JSON object a line.

A pair becomes `<|start|><|instruction|>…</|instruction|>…<|end|>`. Tokenizers of the family's first
generation have no instruction tokens; there `<|sep|>` stands between instruction and response
(inferred: the card gives no template).
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from kl3m_nb.common.paths import resolve
from kl3m_nb.data.special_ids import end_id, start_id

USES = ("regulation", "drafting", "extraction")


FOLDER = "data/instructions"


KEYS = {"id", "use", "instruction", "response"}


@dataclass(frozen=True)
class InstructionPair:
    """One request and its answer. `fields` are the keys the answer of an extraction must have; the
    other uses have none.
    """

    id: str
    use: str
    instruction: str
    response: str
    fields: tuple[str, ...] = ()


def load_pairs(use: str | None = None) -> list[InstructionPair]:
    """The shipped pairs of one use, or of all three, in the order of the files.

    Raises ValueError for a use that does not exist and for a line that is not a pair of its file's
    use.
    """
    if use is not None and use not in USES:
        raise ValueError(
            f"There is no use {use!r}; choose one of {', '.join(USES)}, or None for all."
        )
    return [pair for name in USES if use in (None, name) for pair in _read(name)]


def _read(use: str) -> Iterator[InstructionPair]:
    path = resolve(FOLDER) / f"{use}.jsonl"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        expected = KEYS | {"fields"} if use == "extraction" else KEYS
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path.name}, line {number} is not JSON ({error}); write one object a line."
            ) from error
        if not isinstance(row, dict) or set(row) != expected or row["use"] != use:
            raise ValueError(
                f"{path.name}, line {number} must be an object of use {use!r} with the keys"
                f" {sorted(expected)}."
            )
        yield InstructionPair(**row | {"fields": tuple(row.get("fields", ()))})


log = logging.getLogger(__name__)


OPENING, CLOSING, SEPARATOR = "<|instruction|>", "</|instruction|>", "<|sep|>"


@dataclass(frozen=True)
class TrainingSequence:
    """Tokens of one sequence, int32 [length]; those before `trained_from` are read,
    not predicted.
    """

    tokens: np.ndarray
    trained_from: int = 0


def instruction_prompt(instruction: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before the response to `instruction`, as text; the special tokens in it are
    matched when it is tokenized.

    Raises ValueError when the tokenizer has no tokens to mark an instruction with, or none for the
    beginning of a text.
    """
    start_id(tokenizer)
    if _has(tokenizer, OPENING) and _has(tokenizer, CLOSING):
        return f"{tokenizer.bos_token}{OPENING}{instruction}{CLOSING}"
    if not _has(tokenizer, SEPARATOR):
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path} has neither {OPENING} and {CLOSING} nor"
            f" {SEPARATOR}, which mark an instruction; set p_sft to 0, or use another tokenizer."
        )
    return f"{tokenizer.bos_token}{instruction}{SEPARATOR}"


def _has(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)


def pair_sample(
    pair: InstructionPair, tokenizer: PreTrainedTokenizerBase, loss: str
) -> TrainingSequence:
    """The sequence of one pair. `loss` is "response" (the response and `<|end|>` are trained on) or
    "all".
    """
    prompt = tokenizer.encode(
        instruction_prompt(pair.instruction, tokenizer), add_special_tokens=False
    )
    response = tokenizer.encode(pair.response, add_special_tokens=False)
    tokens = np.array([*prompt, *response, end_id(tokenizer)], dtype=np.int32)
    return TrainingSequence(tokens, len(prompt) if loss == "response" else 0)


class PairSamples:
    """Instruction samples without end, in a fresh order every pass."""

    def __init__(
        self,
        pairs: Sequence[InstructionPair],
        tokenizer: PreTrainedTokenizerBase,
        most_tokens: int,
        loss: str,
        seed: int,
    ):
        """Pairs of more than `most_tokens` tokens cannot be used; how many is logged. Raises
        ValueError when none fits.
        """
        samples = [pair_sample(pair, tokenizer, loss) for pair in pairs]
        self._samples = [sample for sample in samples if sample.tokens.size <= most_tokens]
        self.left_out = len(samples) - len(self._samples)
        if not self._samples:
            raise ValueError(
                f"None of {len(pairs)} instruction pairs fits into {most_tokens} tokens; raise"
                " seq_len."
            )
        if self.left_out:
            log.warning(
                "%s of %s instruction pairs are longer than %s tokens: not used",
                self.left_out,
                len(pairs),
                most_tokens,
            )
        self._seed = seed
        self.given = 0  # over all passes: the whole state
        self._order: tuple[int, list[int]] = (-1, [])

    def next(self) -> TrainingSequence:
        done, place = divmod(self.given, len(self._samples))
        if self._order[0] != done:
            order = list(range(len(self._samples)))
            random.Random(self._seed * 1_000_003 + done).shuffle(order)
            self._order = (done, order)
        self.given += 1
        return self._samples[self._order[1][place]]
