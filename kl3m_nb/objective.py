"""The training objective on the head's logits, chunk by chunk: cross-entropy, label smoothing and the two entropy terms.

With 131,072 tokens in the vocabulary the logits of a micro-batch are several GB and dwarf everything else, so they never exist at
once: each chunk of tokens goes through the head, its loss and the gradient by the logits follow from one closed form, both
products of that gradient are taken, and the buffer is used again. Gradients are thus ready when the forward pass ends, and the
backward pass only hands them over. The formulas stand at `_ChunkedObjective`.

The mean of all logits of a token, which label smoothing needs, is linear in the hidden state: it and its gradient come from the
sum of the head's rows and cost nothing per chunk.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kl3m_nb.profiles import ObjectiveSpec

IGNORE_INDEX = -100
_NATS_PER_BIT = math.log(2.0)
_CPU_LOGITS = 2**26  # elements of a chunk's logits on a CPU, 256 MiB in float32: enough tokens for fast matrix products
_CPU_CACHED_LOGITS = 2**19  # elements that go through the element-wise work together on a CPU, small enough to stay in the cache
_CPU_SUM_LENGTH = 2**12  # entries of the vocabulary that one product sums over on a CPU


@dataclass(frozen=True)
class ObjectiveTerms:
    """The objective and its parts: 0-d tensors, summed over the valid labels of the call and divided by `num_valid`.

    So each field adds up over micro-batches and ranks when `num_valid` counts the whole optimizer step. Only `total` has a
    backward; it is the sum of `cross_entropy` and the three signed contributions after `entropy_bits`.
    """

    total: Tensor
    cross_entropy: Tensor  # plain, in nats
    entropy_bits: Tensor  # of the predicted distributions
    label_smoothing: Tensor
    entropy_bonus: Tensor
    entropy_target: Tensor
    num_valid: Tensor


def chunked_objective(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    spec: ObjectiveSpec,
    num_valid: int | Tensor | None = None,
    compiled: bool = False,
) -> ObjectiveTerms:
    """Objective of the logits `hidden @ weight.T` against `labels`, averaged over the valid labels, with its gradients.

    hidden: [..., hidden], for instance [5, 4096, 576], after the final norm. weight: [vocabulary, hidden]. labels: [...] int64,
    already shifted; -100 is ignored. num_valid: the valid labels of the whole optimizer step, over all micro-batches and ranks;
    those of this call when None. With no valid label every term and gradient is zero.

    Under autocast the products run in its precision, all reductions in float32, and the gradient of `weight` is accumulated in
    float32. Where gradients are disabled or neither input requires one, only the terms are computed. `spec.chunk_tokens` is the
    most tokens whose logits exist at one time; on a CPU fewer are taken when the vocabulary is large. `compiled` fuses the
    element-wise work with torch.compile: on a GPU it then reads the logits a few times instead of sixteen.

    Raises ValueError for shapes or dtypes that do not fit together, and for float16 products, in which gradients underflow.
    """
    _check_inputs(hidden, weight, labels)
    hidden, labels = hidden.reshape(-1, hidden.size(-1)), labels.reshape(-1)
    valid = labels != IGNORE_INDEX
    if num_valid is None:
        num_valid = valid.sum()
    elif not isinstance(num_valid, Tensor):
        num_valid = torch.full((), num_valid, dtype=torch.int64, device=hidden.device)
    if not hidden.is_cuda and not valid.all():  # on CUDA a count of the rows to keep would wait for the device
        hidden, labels, valid = hidden[valid], labels[valid], valid[valid]

    device_type = hidden.device.type
    product_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    if product_dtype == torch.float16:
        raise ValueError("The products would run in float16, where gradients underflow; use bfloat16 or float32.")
    gradients = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    with torch.autocast(device_type, enabled=False):
        total, *parts = _ChunkedObjective.apply(
            hidden, weight, labels, valid, num_valid, spec, product_dtype, gradients, compiled
        )
    return ObjectiveTerms(total, *parts, num_valid=num_valid)


def activation_penalty(residual: Tensor, labels: Tensor, coefficient: float, num_valid: int | Tensor | None = None) -> Tensor:
    """`coefficient` times the mean of h² over valid tokens and hidden units, as a float32 0-d tensor (float64 for float64).

    residual: [..., hidden], the residual stream *before* the final norm, for instance [5, 4096, 576]; after the norm the term
    would be constant. labels, num_valid: as in `chunked_objective`. Raises ValueError when the shapes differ.
    """
    if residual.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}; a residual {tuple(residual.shape)} needs its first dimensions."
        )
    valid = labels != IGNORE_INDEX
    if num_valid is None:
        num_valid = valid.sum()
    per_token = residual.to(_accumulation_dtype(residual.dtype)).square().mean(-1)
    return coefficient * torch.where(valid, per_token, 0.0).sum() / _at_least_one(num_valid)


class _ChunkedObjective(torch.autograd.Function):
    """Terms and gradients of the objective in one pass over chunks of tokens.

    Per token, with z = W·h, p = softmax(z), E = Σ pz, H = lse(z) - E in nats, u = ln 2 and V the size of the vocabulary:

        L = lse(z) - (1-ε)·z_y - ε·mean(z) - b·H/u + w·(H/u - H*)²
        ∂L/∂z = p·(1 - c·(z - E)) - (1-ε)·e_y - ε/V,   c = (2w·(H/u - H*) - b)/u

    The middle term and the last are taken apart from the first, which `_softmax_terms_` computes.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, valid, num_valid, spec, product_dtype, gradients, compiled):
        """hidden [n, hidden], weight [V, hidden], labels and valid [n]; `gradients`: whether by hidden and by weight."""
        tokens, vocabulary = hidden.size(0), weight.size(0)
        dtype = _accumulation_dtype(weight.dtype)
        smoothing = spec.label_smoothing
        scale = valid / _at_least_one(num_valid).to(dtype)  # weight of each token in every mean
        labels = torch.where(valid, labels, 0)
        head = weight.to(product_dtype)
        states = hidden.to(product_dtype)
        weight_sum = weight.sum(0, dtype=dtype)
        mean_logit = (hidden.to(dtype) @ weight_sum) / vocabulary
        cross_entropy, label_logit, entropy_bits = (torch.empty(tokens, dtype=dtype, device=hidden.device) for _ in range(3))
        hidden_grad = torch.empty_like(hidden) if gradients[0] else None
        weight_grad = torch.zeros_like(weight, dtype=dtype) if gradients[1] else None

        chunk, block = _chunk_and_block(tokens, vocabulary, spec.chunk_tokens, hidden.device)
        logits_buffer = torch.empty(chunk, vocabulary, dtype=dtype, device=hidden.device)
        work_buffer = None if compiled else torch.empty(block, vocabulary, dtype=dtype, device=hidden.device)
        softmax_terms_ = _compiled_softmax_terms() if compiled else _softmax_terms_
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            logits = logits_buffer[: rows.stop - start]
            _product(states[rows], head.t(), logits)
            label_logit[rows] = logits.gather(1, labels[rows, None]).squeeze(1)
            for first in range(start, rows.stop, block):
                part = slice(first, min(first + block, rows.stop))
                work = None if compiled else work_buffer[: part.stop - first]
                cross_entropy[part], entropy_bits[part] = softmax_terms_(
                    logits[first - start : part.stop - start], label_logit[part], scale[part], spec, any(gradients), work
                )
            if any(gradients):
                logits_grad = logits.to(product_dtype)
                label = labels[rows, None]
                label_grad = logits.gather(1, label) + (smoothing - 1.0) * scale[rows, None]
                if hidden_grad is not None:
                    # The label's entry is larger than all others together: apart from their long sum, it costs them no digits.
                    logits_grad.scatter_(1, label, 0.0)
                    hidden_grad[rows] = _product_in_pieces(logits_grad, head, dtype) + label_grad * weight[labels[rows]]
                if weight_grad is not None:
                    logits_grad.scatter_(1, label, label_grad.to(product_dtype))
                    _add_product_(weight_grad, logits_grad.t(), states[rows])

        if hidden_grad is not None:
            hidden_grad -= (smoothing / vocabulary * scale).unsqueeze(1) * weight_sum
        if weight_grad is not None:
            weight_grad -= smoothing / vocabulary * (scale @ hidden.to(dtype))
        ctx.gradients = (hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))

        distance = entropy_bits - spec.entropy_target_bits
        terms = torch.stack(
            [
                cross_entropy,
                entropy_bits,
                smoothing * (label_logit - mean_logit),
                -spec.entropy_bonus * entropy_bits,
                spec.entropy_target_weight * distance * distance,
            ]
        )
        cross_entropy, entropy_bits, *regularizers = (terms @ scale).unbind()
        total = cross_entropy + sum(regularizers)
        ctx.mark_non_differentiable(cross_entropy, entropy_bits, *regularizers)
        return total, cross_entropy, entropy_bits, *regularizers

    @staticmethod
    def backward(ctx, total_grad, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "The objective's gradients were handed over already; call the objective again before a second backward."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if total_grad.is_cuda or total_grad != 1.0:  # on CUDA the comparison would wait for the device
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(total_grad)
        return *gradients, *[None] * 7


def _softmax_terms_(
    logits: Tensor, label_logit: Tensor, scale: Tensor, spec: ObjectiveSpec, gradient: bool, work: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) and entropy (bits) per token; with `gradient`, `logits` becomes scale·p·(1 - c·(z - E)).

    logits: [tokens, vocabulary], spoilt in any case. label_logit, scale: [tokens]. work: a buffer like `logits`, or None.
    """
    largest = logits.amax(-1)
    logits.sub_(largest.unsqueeze(1))
    exponentials = torch.exp(logits, out=work)
    # `sum` adds pairwise. torch.softmax does not, and loses two digits at 131,072 entries.
    total = exponentials.sum(-1)
    expected = torch.linalg.vecdot(exponentials, logits) / total
    log_total = total.log()
    entropy_bits = (log_total - expected) / _NATS_PER_BIT
    if gradient:
        distance = entropy_bits - spec.entropy_target_bits
        pull = (2.0 * spec.entropy_target_weight * distance - spec.entropy_bonus) / _NATS_PER_BIT
        share = scale / total
        logits.mul_((-pull * share).unsqueeze(1)).add_(((1.0 + pull * expected) * share).unsqueeze(1)).mul_(exponentials)
    return largest - label_logit + log_total, entropy_bits


@functools.cache
def _compiled_softmax_terms():
    return torch.compile(_softmax_terms_, dynamic=False, fullgraph=True)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, from a lower precision straight into `out`'s where the device can do that."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(left @ right)


def _product_in_pieces(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; on a CPU the long inner sum is taken in pieces, which at least halves the rounding error."""
    if left.is_cuda:
        return (left @ right).to(dtype)
    pieces = zip(left.split(_CPU_SUM_LENGTH, dim=1), right.split(_CPU_SUM_LENGTH), strict=True)
    return sum((a @ b).to(dtype) for a, b in pieces)


def _add_product_(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target += left @ right, accumulated in `target`'s precision."""
    if left.dtype == target.dtype:
        target.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(target, left, right, out_dtype=target.dtype, out=target)
    else:
        target.add_(left @ right)


def _chunk_and_block(tokens: int, vocabulary: int, most_tokens: int, device: torch.device) -> tuple[int, int]:
    """Tokens whose logits exist at one time, and tokens whose logits go through the element-wise work at one time."""
    chunk = max(1, min(most_tokens, tokens))
    if device.type != "cpu":
        return chunk, chunk
    chunk = max(1, min(chunk, _CPU_LOGITS // vocabulary))
    return chunk, max(1, min(chunk, _CPU_CACHED_LOGITS // vocabulary))


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _at_least_one(num_valid: int | Tensor) -> int | Tensor:
    return num_valid.clamp(min=1) if isinstance(num_valid, Tensor) else max(num_valid, 1)


def _check_inputs(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.size(-1) != weight.size(-1):
        raise ValueError(
            f"hidden has the shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; they must be [..., hidden] and "
            "[vocabulary, hidden]."
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be int64 of shape {tuple(hidden.shape[:-1])}."
        )
