"""Near-duplicates by shingles: how much of one text stands in another, in runs of eight words.

Words are compared in any case and without punctuation. Token rows are compared by runs of twelve
ids, which is about eight words, so that nothing has to be decoded. What is shorter than one run has
no shingles and is like nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

SHINGLE_WORDS = 8


SHINGLE_TOKENS = 12


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def word_shingles(text: str) -> np.ndarray:
    """Hashes, uint64 [shingles], of all runs of eight words of `text`; comparable within one
    process.
    """
    words = re.findall(r"\w+", text.casefold())
    return _rolling(
        np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64),
        SHINGLE_WORDS,
    )


def token_shingles(tokens: np.ndarray) -> np.ndarray:
    """Hashes, uint64 [shingles], of all runs of twelve token ids; `tokens` is int32 [length]."""
    return _rolling(tokens.astype(np.uint64), SHINGLE_TOKENS)


def _rolling(values: np.ndarray, width: int) -> np.ndarray:
    count = max(values.size - width + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(width):
        hashes *= _FACTOR
        hashes += values[offset : offset + count]
    hashes ^= hashes >> np.uint64(29)
    return hashes


class ShingleIndex:
    """The shingles of a small set of documents, to hold many others against."""

    def __init__(self, documents: Sequence[np.ndarray]):
        """`documents` holds the shingles of each, uint64 [shingles]."""
        documents = [np.unique(shingles) for shingles in documents]
        everything = np.concatenate(documents) if documents else np.empty(0, dtype=np.uint64)
        self.sizes = np.array(
            [shingles.size for shingles in documents], dtype=np.int64
        )  # distinct shingles of each
        order = np.argsort(everything, kind="stable")
        self._owner = np.repeat(np.arange(len(documents)), self.sizes)[order]
        self._distinct, self._first, self._owners = np.unique(
            everything[order], return_index=True, return_counts=True
        )
        self._seen = np.zeros(self._distinct.size, dtype=bool)

    def likeness(self, shingles: np.ndarray) -> float:
        """0 … 1: the share of `shingles` that stand in the set, or the share of one document they
        cover, the larger.
        """
        places, known = self._known(shingles)
        if not known.any():
            return 0.0
        return max(float(known.mean()), float(self._shares(np.unique(places[known])).max()))

    def mark(self, shingles: np.ndarray) -> None:
        """Notes which of the set's shingles stand in `shingles`."""
        places, known = self._known(shingles)
        self._seen[places[known]] = True

    def marked_shares(self) -> np.ndarray:
        """For every document of the set, the share of its shingles that were marked, float64
        [documents].
        """
        return self._shares(np.flatnonzero(self._seen))

    def _known(self, shingles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each of `shingles` would stand among the distinct ones, and whether it does."""
        if not self._distinct.size:
            return np.zeros(shingles.size, dtype=np.int64), np.zeros(shingles.size, dtype=bool)
        places = np.minimum(np.searchsorted(self._distinct, shingles), self._distinct.size - 1)
        return places, self._distinct[places] == shingles

    def _shares(self, places: np.ndarray) -> np.ndarray:
        """The share of every document's shingles that are among the distinct ones at `places`;
        several may own one.
        """
        counts = self._owners[places]
        before = np.cumsum(counts) - counts
        entries = np.repeat(self._first[places] - before, counts) + np.arange(counts.sum())
        return np.bincount(self._owner[entries], minlength=self.sizes.size) / np.maximum(
            self.sizes, 1
        )


def leak_rate(held_out: Iterable[np.ndarray], training: Iterable[np.ndarray]) -> float:
    """Share of the held-out shingles that stand anywhere in the training texts, 0 … 1; both give
    the shingles of each document.

    Raises ValueError when there is nothing held out.
    """
    index = ShingleIndex(list(held_out))
    if not index.sizes.sum():
        raise ValueError(
            "leak_rate was given no held-out shingles; it needs at least one document of eight"
            " words."
        )
    for shingles in training:
        index.mark(shingles)
    return float((index.marked_shares() * index.sizes).sum() / index.sizes.sum())
