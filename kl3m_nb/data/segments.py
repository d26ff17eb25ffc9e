"""Segments of documents for kl3m-002: never two documents in one sequence, cut at paragraphs or
sentences, padded at random.

The card says "document-aware segmentation", "randomized padding" and "hybrid NTP and SFT
cotraining"; what is done here is read from these words. A long document is cut at the last
paragraph border in the second half of the context, else at the last sentence border there, else
where the context ends. The beginning-of-text and end-of-text tokens stand at the document's own
borders only. The free room is split at random between left and right; padding is masked in
attention and has no label. As rotary positions are relative, where a segment lies changes neither
loss nor gradient by more than rounding, 1e-6: the card's words are followed, and nothing is learned
from it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kl3m_nb.data.instructions import PairSamples, TrainingSequence, load_pairs
from kl3m_nb.data.special_ids import end_id, padding_id, start_id
from kl3m_nb.data.windows import Batch, BatchStream
from kl3m_nb.profiles import DataSpec

_BYTE_LEVEL_SPACES = str.maketrans({"Ġ": " ", "Ċ": "\n", "ĉ": "\t", "č": "\r"})


class TextBorders:
    """Where paragraphs and sentences end in a row of tokens, by the tokens' own text: nothing is
    decoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        texts = [(name or "").translate(_BYTE_LEVEL_SPACES) for name in names]
        trailing = [text[len(text.rstrip()) :] for text in texts]
        self._newlines = np.array([spaces.count("\n") for spaces in trailing])
        self._blank = np.array([bool(text) and not text.strip() for text in texts])
        self._leading = np.array([text[:1].isspace() for text in texts])
        self._stops = np.array(
            [re.search(r"[.;!?][\"'”’)\]]*\s*$", text) is not None for text in texts]
        )

    def paragraphs(self, tokens: np.ndarray) -> np.ndarray:
        """Sorted positions i, int64, such that an empty line stands before token i; `tokens` is
        int32 [length].
        """
        newlines, blank = self._newlines[tokens], self._blank[tokens]
        # An empty line may be several tokens (newline, indentation, newline): count back to the
        # last that is not blank.
        last_word = np.maximum.accumulate(np.where(blank, 0, np.arange(tokens.size)))
        total = np.cumsum(newlines)
        since = total - total[last_word] + newlines[last_word]
        return np.flatnonzero((since[:-1] >= 2) & ~blank[1:]) + 1

    def sentences(self, tokens: np.ndarray) -> np.ndarray:
        """Sorted positions i, int64, such that a sentence or clause ends before token i, which
        begins with a blank.
        """
        return np.flatnonzero(self._stops[tokens[:-1]] & self._leading[tokens[1:]]) + 1


def segments(
    tokens: np.ndarray, borders: TextBorders, most: int, start_id: int, end_id: int
) -> Iterator[np.ndarray]:
    """The segments of one document, int32 [at most `most`] each; without the two marks they are the
    document, laid end to end.
    """
    kinds = (borders.paragraphs(tokens), borders.sentences(tokens))
    begin = 0
    while True:
        opening = [start_id] if begin == 0 else []
        room = most - len(opening)
        if tokens.size - begin < room:
            yield np.concatenate([opening, tokens[begin:], [end_id]]).astype(np.int32)
            return
        # one token stays for the last segment: `<|end|>` alone would be a row without a label
        cut = _last_border(kinds, begin + room // 2, min(begin + room, tokens.size - 1))
        yield np.concatenate([opening, tokens[begin:cut]]).astype(np.int32)
        begin = cut


def _last_border(kinds: tuple[np.ndarray, ...], lowest: int, highest: int) -> int:
    """The last border in lowest < border <= highest of the first kind that has one there, else
    `highest`.
    """
    for borders in kinds:
        place = np.searchsorted(borders, highest, side="right") - 1
        if place >= 0 and borders[place] > lowest:
            return int(borders[place])
    return highest


class SegmentedStream(BatchStream):
    """Endless padded segments, with instruction pairs between them at `spec.p_sft`. Resumes to the
    segment.
    """

    def __init__(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase):
        """Raises ValueError, beside what `BatchStream` does, when the tokenizer lacks a begin- or
        end-of-text token.
        """
        self._marks, self._padding = (start_id(tokenizer), end_id(tokenizer)), padding_id(tokenizer)
        super().__init__(spec, tokenizer)
        self._borders = TextBorders(tokenizer)
        self._random = random.Random(f"segments {spec.seed}")
        self._waiting: list[np.ndarray] = []  # segments of the document at hand
        most = spec.seq_len + 1
        self._pairs = (
            PairSamples(load_pairs(), tokenizer, most, spec.sft_loss, spec.seed)
            if spec.p_sft
            else None
        )

    def take(self, windows: int) -> Batch:
        """The next `windows` samples."""
        shape = (windows, self.spec.seq_len)
        input_ids = np.full(shape, self._padding, dtype=np.int64)
        labels = np.full(shape, -100, dtype=np.int64)
        mask = np.zeros(shape, dtype=bool)
        for row in range(windows):
            sample = self._next_sample()
            length = sample.tokens.size - 1
            left = self._random.randint(0, self.spec.seq_len - length)
            place = slice(left, left + length)
            input_ids[row, place], labels[row, place], mask[row, place] = (
                sample.tokens[:-1],
                sample.tokens[1:],
                True,
            )
            labels[row, left : left + max(sample.trained_from - 1, 0)] = -100
        return Batch(*map(torch.from_numpy, (input_ids, labels, mask)))

    def state_dict(self) -> dict:
        """Place in the source, segments not yet given, generators; cheap enough for every step."""
        return {
            "documents": self._documents.state_dict(),
            "waiting": [torch.from_numpy(tokens) for tokens in self._waiting],
            "random": self._random.getstate(),
            "pairs_given": self._pairs.given if self._pairs else 0,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state` was taken."""
        self._documents.load_state_dict(state["documents"])
        self._waiting = [tokens.numpy() for tokens in state["waiting"]]
        self._random.setstate(state["random"])
        if self._pairs:
            self._pairs.given = state["pairs_given"]

    def _next_sample(self) -> TrainingSequence:
        if self._pairs and self._random.random() < self.spec.p_sft:
            return self._pairs.next()
        if not self._waiting:
            self._waiting = list(
                segments(self._documents.next(), self._borders, self.spec.seq_len + 1, *self._marks)
            )
        tokens, self._waiting = self._waiting[0], self._waiting[1:]
        return TrainingSequence(tokens)
