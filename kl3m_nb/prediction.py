"""Prediction on whole documents: every token counted once, whatever the context, in units that compare between tokenizers.

A document longer than the window is read by a window that slides on by `stride` tokens; only what is new in it is predicted, so
every token but those of the first window has at least window − stride tokens of context. Averages carry intervals by document
bootstrap: tokens of one document are not independent. Texts of one family are not quite either, so the intervals are, if
anything, too narrow.
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

from kl3m_nb.corpus import Document
from kl3m_nb.document_stream import token_ids
from kl3m_nb.evaluation import Interval, bits_per_byte, bootstrap_interval, score_sequences
from kl3m_nb.profiles import ObjectiveSpec
from kl3m_nb.special_ids import border_id

ENTROPY_TARGET_BITS = ObjectiveSpec.entropy_target_bits
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Prediction:
    """How well one model predicts a set of documents.

    `documents` has a row per document: identifier, domain, tokens, bytes, loss (nats per token), entropy_bits, bits_per_byte.
    `positions` has a row per document and number of tokens of context: document (its row), context, tokens, loss. `calibration`
    has a row per bin of confidence that holds tokens: confidence and accuracy, both means over the bin, and tokens.
    """

    documents: pd.DataFrame
    positions: pd.DataFrame
    calibration: pd.DataFrame

    @property
    def loss(self) -> Interval:
        """Nats per token with a 95% interval."""
        return bootstrap_interval(self.documents["loss"], self.documents["tokens"])

    @property
    def bits_per_byte(self) -> Interval:
        """Bits per UTF-8 byte of text with a 95% interval."""
        return bootstrap_interval(self.documents["bits_per_byte"], self.documents["bytes"])

    @property
    def entropy_bits(self) -> float:
        """Mean entropy of the predictive distribution, bits per token."""
        return float(np.average(self.documents["entropy_bits"], weights=self.documents["tokens"]))

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al., arXiv:1706.04599): mean |accuracy − confidence| over bins, by their tokens."""
        gaps = (self.calibration["accuracy"] - self.calibration["confidence"]).abs()
        return float(np.average(gaps, weights=self.calibration["tokens"]))

    def summary(self) -> dict[str, float]:
        """The figures of one row of a table.

        `overconfidence_bits` is cross-entropy minus entropy: a model that is as unsure as its errors warrant has 0, one that is
        too sure of itself more.
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
            "entropy_bits": self.entropy_bits,
            "entropy_minus_target": self.entropy_bits - ENTROPY_TARGET_BITS,
            "overconfidence_bits": loss.mean / math.log(2) - self.entropy_bits,
            "accuracy": float(np.average(self.calibration["accuracy"], weights=self.calibration["tokens"])),
            "calibration_error": self.calibration_error,
        }

    def by_domain(self) -> pd.DataFrame:
        """A row per domain: documents, tokens, bytes, and loss and bits per byte with their 95% intervals.

        The domain with the most bytes of text comes first, so the order is that of every model on the same documents.
        """
        rows = []
        for domain, documents in self.documents.groupby("domain"):
            loss = bootstrap_interval(documents["loss"], documents["tokens"])
            per_byte = bootstrap_interval(documents["bits_per_byte"], documents["bytes"])
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
                }
            )
        return pd.DataFrame(rows).sort_values("bytes", ascending=False, kind="stable", ignore_index=True)

    def by_position(self, ranges: int = 13) -> pd.DataFrame:
        """What context is worth: a row per range of tokens of context, each about as much longer than the one before.

        `context` is the range's geometric centre, `tokens` how many were predicted in it, `loss` their mean in nats with its
        95% interval, `loss_low` to `loss_high`.
        """
        context = self.positions["context"]
        edges = np.unique(np.geomspace(context.min(), context.max() + 1, ranges + 1).round())
        rows = []
        for number, inside in self.positions.groupby(np.searchsorted(edges, context, side="right")):
            summed = inside.assign(loss=inside["loss"] * inside["tokens"]).groupby("document")[["tokens", "loss"]].sum()
            loss = bootstrap_interval(summed["loss"] / summed["tokens"], summed["tokens"])
            centre, tokens = math.sqrt(edges[number - 1] * (edges[number] - 1)), summed["tokens"].sum()
            rows.append({"context": centre, "tokens": tokens, "loss": loss.mean, "loss_low": loss.low, "loss_high": loss.high})
        return pd.DataFrame(rows)


def sliding_windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, predicted) of every window over `length` tokens: it is tokens start … end − 1, the last `predicted` are new.

    A window is at most `window` + 1 tokens, of which the model sees all but the last. Together the windows predict every
    token but the first exactly once; the last window ends with the last token.
    """
    done = 1
    while done < length:
        end = min(length, window + 1 if done == 1 else done + stride)
        yield max(0, end - window - 1), end, end - done
        done = end


def beginning(document: Document, tokenizer: PreTrainedTokenizerBase, most: int) -> Document:
    """The first `most` tokens of a document, or all of a shorter one, as a document that stores them with their text."""
    tokens = token_ids(document, tokenizer)[:most]
    return dataclasses.replace(document, text=tokenizer.decode(tokens), tokens=np.array(tokens, dtype=np.int32))


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

    The first token of a document is predicted from the token `prefix`, by default that of `border_id`; which stood there in a
    model's training is known to `runs.document_prefix`. The end of a document is not predicted. Its text is judged; ids it stores
    are used where they are this tokenizer's own (`token_ids`), so bits per byte of models with other tokenizers compare. A
    document's `dataset` is its domain. With `stride` equal to `window` the windows do not overlap, which is how lm-eval counts;
    half the window costs twice the time and gives every token more context.
    Raises ValueError for no documents or one without text, a window beyond the model's context, or a stride outside 1 … window.
    """
    if not documents:
        raise ValueError("evaluate_documents was given no documents; it takes one or more, such as unseen_documents gives.")
    context = model.config.max_position_embeddings
    if not 1 <= window <= context:
        raise ValueError(f"The window is {window} tokens; this model takes 1 to {context}.")
    if not 1 <= stride <= window:
        raise ValueError(f"The stride is {stride}; it must lie between 1 and the window of {window} tokens.")
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
    position = np.concatenate([np.arange(len(s) - n, len(s)) for s, n in zip(sequences, predicted, strict=True)])
    loss, entropy, confidence, correct = (torch.cat(values).numpy() for values in zip(*scores, strict=True))
    tokens = pd.DataFrame({"document": owner, "context": position, "loss": loss, "entropy_bits": entropy / math.log(2)})
    return Prediction(
        documents=_per_document(tokens, documents),
        positions=tokens.groupby(["document", "context"])["loss"].agg(tokens="size", loss="mean").reset_index(),
        calibration=_calibration(confidence, correct),
    )


def _per_document(tokens: pd.DataFrame, documents: Sequence[Document]) -> pd.DataFrame:
    by_owner = tokens.groupby("document")
    frame = pd.DataFrame(
        {
            "identifier": [document.identifier for document in documents],
            "domain": [document.dataset for document in documents],
            "tokens": by_owner.size(),
            "bytes": [len(document.text.encode()) for document in documents],
            "loss": by_owner["loss"].mean(),
            "entropy_bits": by_owner["entropy_bits"].mean(),
        }
    )
    frame["bits_per_byte"] = [bits_per_byte(row.loss, row.tokens, row.bytes) for row in frame.itertuples()]
    return frame


def _calibration(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    by_bin = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": correct}).groupby("bin")
    return by_bin.mean().assign(tokens=by_bin.size()).reset_index(drop=True)
