"""Prediction on whole documents: every token counted once, whatever the context, in units that
compare between tokenizers.

A document longer than the window is read by a window that slides on by `stride` tokens; only what
is new in it is predicted, so every token but those of the first window has at least window − stride
tokens of context. Averages carry intervals over document families (`intervals`): neither tokens of
one document nor texts of one family are independent. What context is worth is a measure of its own,
since tokens far into a document are other tokens than those at its beginning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.common.intervals import Interval, mean_interval
from kl3m_nb.data.corpus import family
from kl3m_nb.data.documents import token_ids
from kl3m_nb.data.sources import Document
from kl3m_nb.data.special_ids import border_id
from kl3m_nb.model.scoring import bits_per_byte, score_sequences
from kl3m_nb.profiles import ObjectiveSpec

ENTROPY_TARGET_BITS = ObjectiveSpec.entropy_target_bits


CALIBRATION_BINS = 15


FEWEST_FAMILIES = 5  # whose texts must be long enough for a length of context to be judged


@dataclass(frozen=True)
class Prediction:
    """How well one model predicts a set of documents.

    `documents` has a row per document: identifier, domain, family, tokens, bytes, loss (nats per
    token), entropy_bits, bits_per_byte. `calibration` has a row per bin of confidence that holds
    tokens: confidence and accuracy, both means over the bin, and tokens.
    """

    documents: pd.DataFrame
    calibration: pd.DataFrame

    @property
    def loss(self) -> Interval:
        """Nats per token with a 95% interval."""
        return _interval(self.documents, "loss", "tokens")

    @property
    def bits_per_byte(self) -> Interval:
        """Bits per UTF-8 byte of text with a 95% interval."""
        return _interval(self.documents, "bits_per_byte", "bytes")

    @property
    def entropy_bits(self) -> float:
        """Mean entropy of the predictive distribution, bits per token."""
        return float(np.average(self.documents["entropy_bits"], weights=self.documents["tokens"]))

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al., arXiv:1706.04599): mean |accuracy − confidence|
        over bins, by their tokens.
        """
        gaps = (self.calibration["accuracy"] - self.calibration["confidence"]).abs()
        return float(np.average(gaps, weights=self.calibration["tokens"]))

    def summary(self) -> dict[str, float]:
        """The figures of one row of a table.

        `effective` is the number of families of equal size that would say as much as these
        documents on the bits per byte. `overconfidence_bits` is cross-entropy minus entropy: a
        model that is as unsure as its errors warrant has 0, one that is too sure of itself more.
        """
        loss, per_byte = self.loss, self.bits_per_byte
        return {
            "documents": len(self.documents),
            "tokens": int(self.documents["tokens"].sum()),
            "loss": loss.mean,
            "loss_low": loss.low,
            "loss_high": loss.high,
            "perplexity": math.exp(loss.mean) if loss.mean < 700 else math.inf,
            "bits_per_byte": per_byte.mean,
            "bits_per_byte_low": per_byte.low,
            "bits_per_byte_high": per_byte.high,
            "effective": per_byte.effective,
            "entropy_bits": self.entropy_bits,
            "entropy_minus_target": self.entropy_bits - ENTROPY_TARGET_BITS,
            "overconfidence_bits": loss.mean / math.log(2) - self.entropy_bits,
            "accuracy": float(
                np.average(self.calibration["accuracy"], weights=self.calibration["tokens"])
            ),
            "calibration_error": self.calibration_error,
        }

    def by_domain(self) -> pd.DataFrame:
        """A row per domain: documents, tokens, bytes, loss and bits per byte with their 95%
        intervals, `effective` families.

        A domain of one family has no interval: its bounds are NaN. The domain with the most bytes
        of text comes first, so the order is that of every model on the same documents.
        """
        rows = []
        for domain, documents in self.documents.groupby("domain"):
            loss = _interval(documents, "loss", "tokens")
            per_byte = _interval(documents, "bits_per_byte", "bytes")
            rows.append(
                {
                    "domain": domain,
                    "documents": len(documents),
                    "tokens": int(documents["tokens"].sum()),
                    "bytes": int(documents["bytes"].sum()),
                    "loss": loss.mean,
                    "loss_low": loss.low,
                    "loss_high": loss.high,
                    "bits_per_byte": per_byte.mean,
                    "bits_per_byte_low": per_byte.low,
                    "bits_per_byte_high": per_byte.high,
                    "effective": per_byte.effective,
                }
            )
        return pd.DataFrame(rows).sort_values(
            "bytes", ascending=False, kind="stable", ignore_index=True
        )


def sliding_windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, predicted) of every window over `length` tokens: it is tokens start … end − 1,
    the last `predicted` are new.

    A window is at most `window` + 1 tokens, of which the model sees all but the last. Together the
    windows predict every token but the first exactly once; the last window ends with the last
    token.
    """
    done = 1
    while done < length:
        end = min(length, window + 1 if done == 1 else done + stride)
        yield max(0, end - window - 1), end, end - done
        done = end


def beginning(document: Document, tokenizer: PreTrainedTokenizerBase, most: int) -> Document:
    """The first `most` tokens of a document, or all of a shorter one, as a document that stores
    them with their text.
    """
    tokens = token_ids(document, tokenizer)[:most]
    return dataclasses.replace(
        document, text=tokenizer.decode(tokens), tokens=np.array(tokens, dtype=np.int32)
    )


def evaluate_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    window: int,
    stride: int,
    batch_tokens: int = 8192,
    autocast: torch.dtype | None = None,
    prefix: int | None = None,
) -> Prediction:
    """Scores of `model` on every token of `documents`, with at most `window` tokens of context.

    The first token of a document is predicted from the token `prefix`, by default that of
    `border_id`; which stood there in a model's training is known to `runs.document_prefix`. The end
    of a document is not predicted. Its text is judged; ids it stores are used where they are this
    tokenizer's own (`token_ids`), so bits per byte of models with other tokenizers compare. A
    document's `dataset` is its domain. With `stride` equal to `window` the windows do not overlap,
    which is how lm-eval counts; half the window costs twice the time and gives every token more
    context. Raises ValueError for no documents or one without text, a window beyond the model's
    context, or a stride outside 1 … window.
    """
    if not documents:
        raise ValueError(
            "evaluate_documents was given no documents; it takes one or more, such as"
            " unseen_documents gives."
        )
    context = model.config.max_position_embeddings
    if not 1 <= window <= context:
        raise ValueError(f"The window is {window} tokens; this model takes 1 to {context}.")
    if not 1 <= stride <= window:
        raise ValueError(
            f"The stride is {stride}; it must lie between 1 and the window of {window} tokens."
        )
    before = border_id(tokenizer) if prefix is None else prefix
    sequences, predicted, owners = [], [], []
    for number, document in enumerate(documents):
        tokens = [before, *token_ids(document, tokenizer)]
        for start, end, new in sliding_windows(len(tokens), window, stride):
            sequences.append(tokens[start:end])
            predicted.append(new)
            owners.append(number)
    scores = score_sequences(model, sequences, predicted, batch_tokens, autocast)
    owner = np.repeat(owners, predicted)
    loss, entropy, confidence, correct = (
        torch.cat(values).numpy() for values in zip(*scores, strict=True)
    )
    tokens = pd.DataFrame({"document": owner, "loss": loss, "entropy_bits": entropy / math.log(2)})
    return Prediction(
        documents=_per_document(tokens, documents), calibration=_calibration(confidence, correct)
    )


def worth_of_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    window: int,
    prefix: int | None = None,
    per_family: int = 16,
    batch_tokens: int = 8192,
) -> pd.DataFrame:
    """What context is worth: the same tokens predicted from the last 1, 2, 4 … tokens before them;
    a row per length of context.

    `context` is the length, `tokens` how many are predicted, `loss` their mean in nats. `more` is
    how much that is above the loss with the longest context, with its 95% interval over families,
    `more_low` to `more_high`, and their `effective` number. A model that does not look back has 0
    in every row. Each length is read on its own, so nothing from before the cut reaches the
    prediction through a deeper layer.

    Of each family the longest document gives `per_family` tokens, spread evenly over those that
    have the longest context before them, the document's `prefix` counted (see
    `evaluate_documents`). The longest context is the largest power of two up to `window` that the
    documents of `FEWEST_FAMILIES`, or of all where there are fewer, have so many tokens beyond;
    where none has, it is a single token. Raises ValueError for no documents, one without text, or a
    window below 1 or beyond the model's context.
    """
    if not documents or not 1 <= window <= model.config.max_position_embeddings:
        raise ValueError(
            f"worth_of_context was given {len(documents)} documents and a window of {window}"
            " tokens; it takes at least 1 document and a window of 1 to"
            f" {model.config.max_position_embeddings} tokens."
        )
    before = border_id(tokenizer) if prefix is None else prefix
    texts: dict[str, list[int]] = {}
    for document in documents:
        texts[family(document)] = max(
            texts.get(family(document), []), [before, *token_ids(document, tokenizer)], key=len
        )

    # Which tokens: those of the families whose text is long enough for the longest context that
    # several of them have.
    def with_context(length: int) -> list[str]:
        return [
            name for name, text in texts.items() if length == 1 or len(text) - length >= per_family
        ]

    enough = min(FEWEST_FAMILIES, len(texts))
    lengths = [
        2**power for power in range(window.bit_length()) if len(with_context(2**power)) >= enough
    ]
    chosen = [
        (name, place)
        for name in with_context(lengths[-1])
        for place in np.unique(
            np.linspace(lengths[-1], len(texts[name]) - 1, per_family).round().astype(int)
        )
    ]
    families = [name for name, _ in chosen]

    # Each length of context on its own, and how much its loss is above that of the longest.
    losses = []
    for length in lengths:
        sequences = [texts[name][place - length : place + 1] for name, place in chosen]
        scores = score_sequences(model, sequences, [1] * len(sequences), batch_tokens)
        losses.append(torch.cat([score.loss for score in scores]).numpy())
    rows = []
    for length, loss in zip(lengths, losses, strict=True):
        more = mean_interval(loss - losses[-1], families=families)
        row = {"context": length, "tokens": len(loss), "loss": loss.mean(), "more": more.mean}
        rows.append(
            row | {"more_low": more.low, "more_high": more.high, "effective": more.effective}
        )
    return pd.DataFrame(rows)


def _interval(documents: pd.DataFrame, figure: str, weight: str) -> Interval:
    return mean_interval(documents[figure], documents[weight], documents["family"])


def _per_document(tokens: pd.DataFrame, documents: Sequence[Document]) -> pd.DataFrame:
    by_owner = tokens.groupby("document")
    frame = pd.DataFrame(
        {
            "identifier": [document.identifier for document in documents],
            "domain": [document.dataset for document in documents],
            "family": [family(document) for document in documents],
            "tokens": by_owner.size(),
            "bytes": [len(document.text.encode()) for document in documents],
            "loss": by_owner["loss"].mean(),
            "entropy_bits": by_owner["entropy_bits"].mean(),
        }
    )
    frame["bits_per_byte"] = [
        bits_per_byte(row.loss, row.tokens, row.bytes) for row in frame.itertuples()
    ]
    return frame


def _calibration(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    by_bin = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": correct}).groupby(
        "bin"
    )
    return by_bin.mean().assign(tokens=by_bin.size()).reset_index(drop=True)
