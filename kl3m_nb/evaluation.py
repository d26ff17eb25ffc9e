"""Prediction: the held-out loss of a causal language model, its profile over the context, and intervals for averages.

The LM head is applied to a few tokens at a time, so the logits of a whole batch (5.4 GB in bfloat16 for 5 × 4096 tokens and
131,072 entries) never exist. The figure is plain cross-entropy: no label smoothing, no entropy term, no router loss.
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

    `model` is a transformers causal LM whose logits are its output embedding applied to its body's last hidden state (Llama,
    Mixtral and their like). `windows` is int64 of shape [N, seq_len + 1], e.g. [64, 4097], on any device; `batch_windows` of them
    go through the model at a time. `autocast` is the dtype of the matrix products, e.g. torch.bfloat16; without it they run in
    the weights' own dtype. Cross-entropy and entropy are taken in float32 and averaged in float64. Gradients, train or evaluation
    mode and the random state of the caller are left as they are. A diverged model gives NaN or infinity, not an error.

    Raises ValueError for windows of another shape or dtype, or none at all.
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
            hidden = model.base_model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
            loss, entropy = loss_and_entropy(hidden, model.get_output_embeddings(), batch[:, 1:])
            losses.append(loss.double().cpu())
            entropies.append(entropy.double().cpu())
    losses = torch.cat(losses)
    return HeldOut(
        loss=losses.mean().item(),
        tokens=losses.numel(),
        entropy_bits=torch.cat(entropies).mean().item() / math.log(2),
        loss_by_position=losses.mean(dim=0),
        loss_per_window=losses.mean(dim=1),
    )


def loss_and_entropy(hidden: Tensor, lm_head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and predictive entropy of every label, both in nats, float32, in the shape of `labels`.

    `hidden` [batch, seq_len, width], e.g. [8, 4096, 576], is what `lm_head` turns into logits; `labels` is int64
    [batch, seq_len].
    """
    flat_hidden, flat_labels = hidden.flatten(0, 1), labels.flatten()
    chunk = max(TOKENS_AT_ONCE, LOGITS_AT_ONCE // lm_head.weight.shape[0])
    losses, entropies = [], []
    for hidden_part, label_part in zip(flat_hidden.split(chunk), flat_labels.split(chunk), strict=True):
        log_probabilities = lm_head(hidden_part).float().log_softmax(dim=-1)
        losses.append(F.nll_loss(log_probabilities, label_part, reduction="none"))
        entropies.append(-torch.linalg.vecdot(log_probabilities.exp(), log_probabilities))
    return torch.cat(losses).view(labels.shape), torch.cat(entropies).view(labels.shape)


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
    rng = np.random.default_rng(seed)
    weighted = values * weights
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(values.size, size=values.size)
        means[i] = weighted[drawn].sum() / weights[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(weighted.sum() / weights.sum()), low=float(low), high=float(high))
