"""What a causal language model gives every single token, the held-out loss that follows, and intervals for averages.

The LM head is applied to a few tokens at a time, so the logits of a whole batch (5.4 GB in bfloat16 for 5 × 4096 tokens and
131,072 entries) never exist. Where a family does more than that to get its logits, they are its own, a row of the batch at a
time. The figure is plain cross-entropy: no label smoothing, no entropy term, no router loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kl3m_nb.logits import before_head, head_is_all

LOGITS_AT_ONCE = 2**22  # 16 MiB in float32, near a CPU's cache: a fifth faster there than 128 MiB
TOKENS_AT_ONCE = 256  # at least so many, however large the vocabulary: fewer would reload the head's weight too often


@dataclass(frozen=True)
class HeldOut:
    """How well a model predicts a fixed set of windows; tensors are float64 on the CPU."""

    loss: float  # nats per token, mean over all labels
    tokens: int  # labels that were predicted, N × seq_len
    entropy_bits: float  # mean entropy of the predictive distribution, in bits
    loss_by_position: Tensor  # [seq_len]: mean over windows at a position; entry t has t + 1 tokens of context
    loss_per_window: Tensor  # [N]: mean over positions of a window

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class TokenScores(NamedTuple):
    """What a model made of each label; tensors of one shape."""

    loss: Tensor  # cross-entropy, −ln p(label), nats
    entropy: Tensor  # of the predictive distribution, nats
    confidence: Tensor  # probability of the likeliest token
    correct: Tensor  # 1 where the likeliest token is the label, else 0


class Interval(NamedTuple):
    """A weighted mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts `model` in evaluation mode and gives every submodule its own mode back afterwards."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, windows: Tensor, batch_windows: int = 8, autocast: torch.dtype | None = None
) -> HeldOut:
    """Loss of `model` on `windows`, each token after the first of a window predicted from those before it.

    `model` is a transformers causal LM; docs/families.md has the families that are tested. `windows` is int64 of shape
    [N, seq_len + 1], e.g. [64, 4097], on any device; `batch_windows` of them go through the model at a time. `autocast` is the
    dtype of the matrix products, e.g. torch.bfloat16; without it they run in the weights' own dtype. Cross-entropy and entropy
    are taken in float32 and averaged in float64. Gradients, train or evaluation mode and the random state of the caller are left
    as they are. A diverged model gives NaN or infinity, not an error.

    Raises ValueError for windows of another shape or dtype, or none at all, and for a model that sees what it is to predict.
    """
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"held_out_loss was given windows of shape {list(windows.shape)} and dtype {windows.dtype}; "
            "it takes int64 token ids of shape [N, seq_len + 1] with N and seq_len at least 1."
        )
    if batch_windows < 1:
        raise ValueError(f"batch_windows is {batch_windows}; it must be at least 1.")
    device = model.device
    precision = torch.autocast(device.type, dtype=autocast) if autocast is not None else contextlib.nullcontext()
    losses, entropies = [], []
    with evaluation_mode(model), precision:
        for batch in windows.split(batch_windows):
            batch = batch.to(device)
            scores = _label_scores(model, batch, torch.ones_like(batch[:, 1:], dtype=torch.bool))
            losses.append(scores.loss.view_as(batch[:, 1:]).double().cpu())
            entropies.append(scores.entropy.double().cpu())
    losses = torch.cat(losses)
    return HeldOut(
        loss=losses.mean().item(),
        tokens=losses.numel(),
        entropy_bits=torch.cat(entropies).mean().item() / math.log(2),
        loss_by_position=losses.mean(dim=0),
        loss_per_window=losses.mean(dim=1),
    )


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    predicted: Sequence[int] | None = None,
    batch_tokens: int = 8192,
    autocast: torch.dtype | None = None,
) -> list[TokenScores]:
    """Scores of the last `predicted[i]` tokens of each sequence of ids, or without `predicted` of all tokens but the first.

    Each result holds tensors [predicted[i]], float64 on the CPU, in the order of `sequences`. Sequences of like length share a
    batch of at most `batch_tokens` tokens (one sequence may be longer), padded on the right, where a causal model does not see
    it. `model` and `autocast` are as in `held_out_loss`. Raises ValueError for a sequence that has fewer tokens before the
    predicted ones than one, or nothing to predict.
    """
    predicted = [len(sequence) - 1 for sequence in sequences] if predicted is None else list(predicted)
    for sequence, number in zip(sequences, predicted, strict=True):
        if not 1 <= number < len(sequence):
            raise ValueError(
                f"score_sequences was asked for {number} tokens of a sequence of {len(sequence)}; "
                "it predicts at least 1 and needs at least 1 before them."
            )
    precision = torch.autocast(model.device.type, dtype=autocast) if autocast is not None else contextlib.nullcontext()
    results: list[TokenScores] = [None] * len(sequences)
    with evaluation_mode(model), precision:
        for batch in _batches_of_like_length(sequences, batch_tokens):
            width = max(len(sequences[index]) for index in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.int64)
            wanted = torch.zeros(len(batch), width - 1, dtype=torch.bool)
            for row, index in enumerate(batch):
                length = len(sequences[index])
                ids[row, :length] = torch.tensor(sequences[index])
                wanted[row, length - 1 - predicted[index] : length - 1] = True
            ids, wanted = ids.to(model.device), wanted.to(model.device)
            scores = _label_scores(model, ids, wanted)
            parts = (part.double().cpu().split([predicted[index] for index in batch]) for part in scores)
            for index, *of_sequence in zip(batch, *parts, strict=True):
                results[index] = TokenScores(*of_sequence)
    return results


def _batches_of_like_length(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of `sequences`, longest first, so that a batch too large for the memory fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index])):
        if batch and len(sequences[batch[0]]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _label_scores(model: PreTrainedModel, ids: Tensor, wanted: Tensor) -> TokenScores:
    """Scores of the labels ids[:, 1:] that are `wanted`, [wanted]; ids [batch, seq_len + 1], wanted bool [batch, seq_len]."""
    rows = len(ids) if head_is_all(model) else 1  # else all logits of a row exist at once, and no more than that
    parts = []
    for some_ids, some_wanted in zip(ids.split(rows), wanted.split(rows), strict=True):
        states, head = before_head(model, some_ids[:, :-1])
        parts.append(token_scores(states[some_wanted], head, some_ids[:, 1:][some_wanted]))
    return _joined(parts)


def _joined(parts: Sequence[TokenScores]) -> TokenScores:
    return TokenScores(*(torch.cat(values) for values in zip(*parts, strict=True)))


def token_scores(hidden: Tensor, lm_head: nn.Module, labels: Tensor) -> TokenScores:
    """Scores of every label, float32 [tokens].

    `hidden` [tokens, width], e.g. [4096, 576], is what `lm_head` turns into logits; `labels` is int64 [tokens].
    """
    vocabulary = getattr(lm_head, "out_features", hidden.shape[-1])  # what goes through no head has its width already
    chunk = max(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
    parts = []
    for hidden_part, label_part in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        log_probabilities = lm_head(hidden_part).float().log_softmax(dim=-1)
        best = log_probabilities.max(dim=-1)
        parts.append(
            TokenScores(
                loss=F.nll_loss(log_probabilities, label_part, reduction="none"),
                entropy=-torch.linalg.vecdot(log_probabilities.exp(), log_probabilities),
                confidence=best.values.exp(),
                correct=(best.indices == label_part).float(),
            )
        )
    return _joined(parts)


def bits_per_byte(loss_nats: float, tokens: int, num_bytes: int) -> float:
    """Loss in bits per UTF-8 byte of the text that `tokens` tokens stand for; comparable between tokenizers."""
    if num_bytes < 1:
        raise ValueError(f"bits_per_byte was given {num_bytes} bytes of text; it needs at least 1.")
    return loss_nats * tokens / (math.log(2) * num_bytes)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray | Tensor,
    weights: Sequence[float] | np.ndarray | Tensor | None = None,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 1000,
) -> Interval:
    """Percentile-bootstrap interval of the weighted mean Σ w v / Σ w, drawing whole units (documents, windows) with replacement.

    `values` and `weights` are one-dimensional and of one length, e.g. a document's mean loss and its tokens; without weights all
    units weigh the same. Paired differences of two models on the same units go in as `values`. One unit alone gives an interval
    of no width, which says nothing about certainty. Raises ValueError for empty or unequal input, a weight that is not positive,
    or a level outside 0 … 1.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or values.shape != weights.shape or values.size == 0:
        raise ValueError(
            f"bootstrap_interval was given values of shape {list(values.shape)} and weights of shape {list(weights.shape)}; "
            "it takes two one-dimensional sequences of the same length, at least 1."
        )
    if not (weights > 0).all():
        raise ValueError(f"bootstrap_interval was given a weight of {weights.min()}; every weight must be positive.")
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval is {level}; it must lie between 0 and 1.")
    weighted = values * weights
    drawn = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    means = weighted[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(weighted.sum() / weights.sum()), low=float(low), high=float(high))


def difference_interval(
    first: Sequence[float], second: Sequence[float], resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile-bootstrap interval of mean(first) − mean(second) for two unpaired samples, each resampled on its own.

    Raises ValueError for an empty sample.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not (first.size and second.size):
        raise ValueError(f"difference_interval was given {first.size} and {second.size} values; it needs at least 1 of each.")
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, (resamples, values.size)).mean(axis=1) for values in (first, second)]
    low, high = np.quantile(means[0] - means[1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(first.mean() - second.mean()), low=float(low), high=float(high))
