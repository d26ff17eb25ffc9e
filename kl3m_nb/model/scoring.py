"""What a causal language model gives every single token, and the held-out loss that follows.

The LM head is applied to a few tokens at a time, so the logits of a whole batch (5.4 GB in bfloat16
for 5 × 4096 tokens and 131,072 entries) never exist. Where a family does more than that to get its
logits, they are its own, a row of the batch at a time. The figure is plain cross-entropy: no label
smoothing, no entropy term, no router loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kl3m_nb.model.logits import before_head, head_is_all

LOGITS_AT_ONCE = 2**22  # 16 MiB in float32, near a CPU's cache: a fifth faster there than 128 MiB


# at least so many, however large the vocabulary: fewer would reload the head's weight too often
TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class HeldOut:
    """How well a model predicts a fixed set of windows; tensors are float64 on the CPU."""

    loss: float  # nats per token, mean over all labels
    tokens: int  # labels that were predicted, N × seq_len
    entropy_bits: float  # mean entropy of the predictive distribution, in bits
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
    model: PreTrainedModel,
    windows: Tensor,
    batch_windows: int = 8,
    autocast: torch.dtype | None = None,
) -> HeldOut:
    """Loss of `model` on `windows`, each token after the first of a window predicted from those
    before it.

    `model` is a transformers causal LM of any family; docs/families.md lists those that are tested.
    `windows` is int64 of shape [N, seq_len + 1], e.g. [64, 4097], on any device; `batch_windows` of
    them go through the model at a time. `autocast` is the dtype of the matrix products below the LM
    head, e.g. torch.bfloat16; without it they run in the weights' own dtype. Logits, cross-entropy
    and entropy are float32 in any case (`head_logits`), averages float64. Gradients, train or
    evaluation mode and the random state of the caller are left as they are. A diverged model gives
    NaN or infinity, not an error.

    Raises ValueError for windows of another shape or dtype, longer than the model's context, or
    none at all, and for a model that sees what it is to predict.
    """
    if (
        windows.ndim != 2
        or windows.dtype != torch.int64
        or windows.shape[0] < 1
        or windows.shape[1] < 2
    ):
        raise ValueError(
            f"held_out_loss was given windows of shape {list(windows.shape)} and dtype"
            f" {windows.dtype}; it takes int64 token ids of shape [N, seq_len + 1] with N and"
            " seq_len at least 1."
        )
    context = getattr(model.config, "max_position_embeddings", None) or 0
    if windows.shape[1] - 1 > context > 0:  # XLNet's -1 says that there is no bound
        raise ValueError(
            f"The windows have {windows.shape[1] - 1} tokens to read; this model takes at most"
            f" {context}, lower seq_len."
        )
    if batch_windows < 1:
        raise ValueError(f"batch_windows is {batch_windows}; it must be at least 1.")
    device = model.device
    precision = (
        torch.autocast(device.type, dtype=autocast)
        if autocast is not None
        else contextlib.nullcontext()
    )
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
    """Scores of the last `predicted[i]` tokens of each sequence of ids, or without `predicted` of
    all tokens but the first.

    Each result holds tensors [predicted[i]], float64 on the CPU, in the order of `sequences`.
    Sequences of like length share a batch of at most `batch_tokens` tokens (one sequence may be
    longer), padded on the right, where a causal model does not see it. `model` and `autocast` are
    as in `held_out_loss`. Raises ValueError for a sequence that has fewer tokens before the
    predicted ones than one, or nothing to predict.
    """
    predicted = (
        [len(sequence) - 1 for sequence in sequences] if predicted is None else list(predicted)
    )
    for sequence, number in zip(sequences, predicted, strict=True):
        if not 1 <= number < len(sequence):
            raise ValueError(
                f"score_sequences was asked for {number} tokens of a sequence of {len(sequence)}; "
                "it predicts at least 1 and needs at least 1 before them."
            )
    precision = (
        torch.autocast(model.device.type, dtype=autocast)
        if autocast is not None
        else contextlib.nullcontext()
    )
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
            parts = (
                part.double().cpu().split([predicted[index] for index in batch]) for part in scores
            )
            for index, *of_sequence in zip(batch, *parts, strict=True):
                results[index] = TokenScores(*of_sequence)
    return results


def _batches_of_like_length(
    sequences: Sequence[Sequence[int]], batch_tokens: int
) -> Iterator[list[int]]:
    """Indices of `sequences`, longest first, so that a batch too large for the memory fails at
    once.
    """
    batch: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index])):
        if batch and len(sequences[batch[0]]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _label_scores(model: PreTrainedModel, ids: Tensor, wanted: Tensor) -> TokenScores:
    """Scores of the labels ids[:, 1:] that are `wanted`, [wanted]; ids [batch, seq_len + 1], wanted
    bool [batch, seq_len].
    """
    rows = (
        len(ids) if head_is_all(model) else 1
    )  # else all logits of a row exist at once, and no more than that
    parts = []
    for some_ids, some_wanted in zip(ids.split(rows), wanted.split(rows), strict=True):
        states, head = before_head(model, some_ids[:, :-1])
        parts.append(token_scores(states[some_wanted], head, some_ids[:, 1:][some_wanted]))
    return _joined(parts)


def _joined(parts: Sequence[TokenScores]) -> TokenScores:
    return TokenScores(*(torch.cat(values) for values in zip(*parts, strict=True)))


def token_scores(hidden: Tensor, lm_head: nn.Module, labels: Tensor) -> TokenScores:
    """Scores of every label, [tokens], float32 (float64 for float64 weights).

    `hidden` [tokens, width], e.g. [4096, 576], is what `lm_head` turns into logits; `labels` is
    int64 [tokens].
    """
    vocabulary = getattr(
        lm_head, "out_features", hidden.shape[-1]
    )  # what goes through no head has its width already
    chunk = max(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
    parts = []
    with torch.autocast(
        hidden.device.type, enabled=False
    ):  # it would take the products of the entropy in bfloat16 too
        for hidden_part, label_part in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            log_probabilities = head_logits(hidden_part, lm_head).log_softmax(dim=-1)
            best = log_probabilities.max(dim=-1)
            parts.append(
                TokenScores(
                    loss=F.nll_loss(log_probabilities, label_part, reduction="none"),
                    entropy=-torch.linalg.vecdot(log_probabilities.exp(), log_probabilities),
                    confidence=best.values.exp(),
                    correct=(best.indices == label_part).to(log_probabilities.dtype),
                )
            )
    return _joined(parts)


def head_logits(hidden: Tensor, lm_head: nn.Module) -> Tensor:
    """What `lm_head`, as `before_head` gives it, makes of hidden [..., width], in float32 (float64
    for float64 weights).

    The product runs in that dtype under autocast too, and with all its digits where TF32 is
    allowed: in bfloat16 a logit of 20 is rounded to a multiple of an eighth.
    """
    if isinstance(lm_head, nn.Identity):  # these are logits already
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    dtype = torch.promote_types(lm_head.weight.dtype, torch.float32)
    weight, bias = (
        None if tensor is None else tensor.to(dtype) for tensor in (lm_head.weight, lm_head.bias)
    )
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), weight, bias)
    finally:
        torch.set_float32_matmul_precision(allowed)


def bits_per_byte(loss_nats: float, tokens: int, num_bytes: int) -> float:
    """Loss in bits per UTF-8 byte of the text that `tokens` tokens stand for; comparable between
    tokenizers.
    """
    if num_bytes < 1:
        raise ValueError(f"bits_per_byte was given {num_bytes} bytes of text; it needs at least 1.")
    return loss_nats * tokens / (math.log(2) * num_bytes)
