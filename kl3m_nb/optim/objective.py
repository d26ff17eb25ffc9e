"""The training objective on the head's logits, chunk by chunk: cross-entropy, label smoothing and
the two entropy terms.

With 131,072 tokens in the vocabulary the logits of a micro-batch are several GB and dwarf
everything else, so they never exist at once: each chunk of tokens goes through the head, its loss
and the gradient by the logits follow from one closed form, both products of that gradient are
taken, and the buffer is used again. Gradients are thus ready when the forward pass ends, and the
backward pass only hands them over. The formulas stand at `_ChunkedObjective`.

The mean of all logits of a token, which label smoothing needs, is linear in the hidden state: it
and its gradient come from the sum of the head's rows and cost nothing per chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kl3m_nb.profiles import ObjectiveSpec

IGNORE_INDEX = -100


_NATS_PER_BIT = math.log(2.0)


_CPU_LOGITS = (
    2**26
    # elements of a chunk's logits on a CPU, 256 MiB in float32: enough tokens for fast matrix
    # products
)


_CPU_CACHED_LOGITS = (
    2**19
    # elements that go through the element-wise work together on a CPU, small enough to stay in the
    # cache
)


_FUSED_PIECE = (
    2**10
)  # entries of a row of logits that compiled code sums at a time, few enough to stay in registers


_CPU_SUM_LENGTH = (
    2**12
    # entries of the vocabulary that one product sums over on a CPU; some BLAS kernels sum one after
    # the other
)


@dataclass(frozen=True)
class ObjectiveTerms:
    """The objective and its parts: 0-d tensors, summed over the valid labels of the call and
    divided by `num_valid`.

    So each field adds up over micro-batches and ranks when `num_valid` counts the whole optimizer
    step. Only `total` has a backward; it is the sum of `cross_entropy` and the three signed
    contributions after `entropy_bits`.
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
    """Objective of the logits `hidden @ weight.T` against `labels`, averaged over the valid labels,
    with its gradients.

    hidden: [..., hidden], for instance [5, 4096, 576], after the final norm. weight: [vocabulary,
    hidden]. labels: [...] int64, already shifted; -100 is ignored. num_valid: the valid labels of
    the whole optimizer step, over all micro-batches and ranks; those of this call when None. With
    no valid label every term and gradient is zero.

    Under autocast the products run in its precision, all reductions in float32, and the gradient of
    `weight` is accumulated in float32. Where gradients are disabled or neither input requires one,
    only the terms are computed. `spec.chunk_tokens` is the most tokens whose logits exist at one
    time; on a CPU fewer are taken when the vocabulary is large. `compiled` fuses the element-wise
    work with torch.compile: on a GPU it then reads the logits a few times instead of sixteen.

    With `spec.entropy_target_over` "batch" the mean entropy has to be known before the first
    gradient: the logits are computed twice, which is one matrix product more beside three. This is
    exact within a call. A micro-batch takes the mean over its own valid labels and weighs as many
    as they are, so the sum over micro-batches exceeds the term of the step by the target's weight
    times the variance of their means. For independent tokens that is their variance over the valid
    labels of a micro-batch.

    Raises ValueError for shapes or dtypes that do not fit together, and for float16 products, in
    which gradients underflow.
    """
    _check_inputs(hidden, weight, labels)
    hidden, labels = hidden.reshape(-1, hidden.size(-1)), labels.reshape(-1)
    valid = labels != IGNORE_INDEX
    if num_valid is None:
        num_valid = valid.sum()
    elif not isinstance(num_valid, Tensor):
        num_valid = torch.full((), num_valid, dtype=torch.int64, device=hidden.device)
    if (
        not hidden.is_cuda and not valid.all()
    ):  # on CUDA a count of the rows to keep would wait for the device
        hidden, labels, valid = hidden[valid], labels[valid], valid[valid]

    device_type = hidden.device.type
    product_dtype = (
        torch.get_autocast_dtype(device_type)
        if torch.is_autocast_enabled(device_type)
        else weight.dtype
    )
    if product_dtype == torch.float16:
        raise ValueError(
            "The products would run in float16, where gradients underflow; use bfloat16 or float32."
        )
    gradients = tuple(
        torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)
    )
    with torch.autocast(device_type, enabled=False):
        total, *parts = _ChunkedObjective.apply(
            hidden, weight, labels, valid, num_valid, spec, product_dtype, gradients, compiled
        )
    return ObjectiveTerms(total, *parts, num_valid=num_valid)


def activation_penalty(
    residual: Tensor, labels: Tensor, coefficient: float, num_valid: int | Tensor | None = None
) -> Tensor:
    """`coefficient` times the mean of h² over valid tokens and hidden units, as a float32 0-d
    tensor (float64 for float64).

    residual: [..., hidden], the residual stream *before* the final norm, for instance [5, 4096,
    576]; after the norm the term would be constant. labels, num_valid: as in `chunked_objective`.
    Raises ValueError when the shapes differ.
    """
    if residual.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}; a residual {tuple(residual.shape)} needs"
            " its first dimensions."
        )
    valid = labels != IGNORE_INDEX
    if num_valid is None:
        num_valid = valid.sum()
    per_token = residual.to(_accumulation_dtype(residual.dtype)).square().mean(-1)
    return coefficient * torch.where(valid, per_token, 0.0).sum() / _at_least_one(num_valid)


class _ChunkedObjective(torch.autograd.Function):
    """Terms and gradients of the objective in one pass over chunks of tokens.

    Per token, with z = W·h, p = softmax(z), E = Σ pz, H = lse(z) - E in nats, u = ln 2 and V the
    size of the vocabulary:

        L = lse(z) - (1-ε)·z_y - ε·mean(z) - b·H/u + w·(H/u - H*)²
        ∂L/∂z = p·(1 - c·(z - E)) - (1-ε)·e_y - ε/V,   c = (2w·(H/u - H*) - b)/u

    The middle term and the last are taken apart from the first, which `_softmax_terms_` computes.
    With the target over the batch the last term of L is w·(H̄/u - H*)² and H in c is H̄, the mean
    over the valid tokens of the call: c is the same for all.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, labels, valid, num_valid, spec, product_dtype, gradients, compiled
    ):
        """hidden [n, hidden], weight [V, hidden], labels and valid [n]; `gradients`: whether by
        hidden and by weight.
        """
        tokens, vocabulary = hidden.size(0), weight.size(0)
        dtype = _accumulation_dtype(weight.dtype)
        smoothing = spec.label_smoothing
        scale = valid / _at_least_one(num_valid).to(dtype)  # weight of each token in every mean
        labels = torch.where(valid, labels, 0)
        head = weight.to(product_dtype)
        states = hidden.to(product_dtype)
        weight_sum = weight.sum(0, dtype=dtype)
        mean_logit = (hidden.to(dtype) @ weight_sum) / vocabulary
        hidden_grad = torch.empty_like(hidden) if gradients[0] else None
        # Filled by the first chunk: zeros would have to be written and read.
        weight_grad = (
            (torch.empty_like if tokens else torch.zeros_like)(weight, dtype=dtype)
            if gradients[1]
            else None
        )

        chunk, block = _chunk_and_block(
            tokens, vocabulary, spec.chunk_tokens, hidden.device, compiled
        )
        room = math.ceil(tokens / chunk) * chunk  # for chunks that are all whole
        cross_entropy, entropy_bits, label_grad, label_logit = torch.empty(
            4, room, dtype=dtype, device=hidden.device
        )
        scale_with_room = F.pad(scale, (0, room - tokens))
        logits_buffer = torch.empty(chunk, vocabulary, dtype=dtype, device=hidden.device)
        # The gradient takes the place of the logits where the products have their precision.
        grad_buffer = (
            logits_buffer
            if product_dtype == dtype
            else torch.empty_like(logits_buffer, dtype=product_dtype)
        )
        if compiled:
            softmax_terms_ = _compiled_softmax_terms()
        else:
            softmax_terms_ = functools.partial(
                _softmax_terms_, work=torch.empty_like(logits_buffer[:block])
            )
        mean_bits = None
        if spec.entropy_target_over == "batch":
            for start in range(0, tokens, chunk):
                rows = slice(start, min(start + chunk, tokens))
                _product(states[rows], head.t(), logits_buffer[: rows.stop - start])
                computed = slice(start, start + chunk) if compiled else rows
                logits = logits_buffer[: computed.stop - start]
                # The label's logit is not known yet: only the entropy, which does not depend on it,
                # is taken.
                _, entropy_bits[computed], _ = softmax_terms_(
                    logits, label_logit[computed], scale_with_room[computed], spec, None, None
                )
            mean_bits = torch.where(valid, entropy_bits[:tokens], 0.0).sum() / _at_least_one(
                valid.sum()
            )
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            count, label = rows.stop - start, labels[rows, None]
            _product(states[rows], head.t(), logits_buffer[:count])
            label_logit[rows] = logits_buffer[:count].gather(1, label).squeeze(1)
            # Compiled code gets whole chunks, so that it is compiled once; what stands behind the
            # last token is not used.
            computed = slice(start, start + chunk) if compiled else rows
            logits = logits_buffer[: computed.stop - start]
            gradient = (
                logits if grad_buffer is logits_buffer else grad_buffer[: computed.stop - start]
            )
            cross_entropy[computed], entropy_bits[computed], label_grad[computed] = softmax_terms_(
                logits,
                label_logit[computed],
                scale_with_room[computed],
                spec,
                mean_bits,
                gradient if any(gradients) else None,
            )
            if any(gradients):
                logits_grad = grad_buffer[:count]
                of_label = (label_grad[rows] + (smoothing - 1.0) * scale[rows]).unsqueeze(1)
                if hidden_grad is not None:
                    # The label's entry is larger than all others together: apart from their long
                    # sum, it costs them no digits.
                    logits_grad.scatter_(1, label, 0.0)
                    hidden_grad[rows] = (
                        _product_in_pieces(logits_grad, head, dtype)
                        + of_label * weight[labels[rows]]
                    )
                if weight_grad is not None:
                    logits_grad.scatter_(1, label, of_label.to(product_dtype))
                    (_product if start == 0 else _add_product)(
                        logits_grad.t(), states[rows], weight_grad
                    )

        cross_entropy, entropy_bits, label_logit = (
            cross_entropy[:tokens],
            entropy_bits[:tokens],
            label_logit[:tokens],
        )
        if hidden_grad is not None:
            hidden_grad -= (smoothing / vocabulary * scale).unsqueeze(1) * weight_sum
        if weight_grad is not None:
            weight_grad -= smoothing / vocabulary * (scale @ hidden.to(dtype))
        ctx.gradients = (hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))

        distance = entropy_bits - spec.entropy_target_bits
        if mean_bits is not None:
            distance = (mean_bits - spec.entropy_target_bits).expand_as(entropy_bits)
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
                "The objective's gradients were handed over already; call the objective again"
                " before a second backward."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if (
            total_grad.is_cuda or total_grad != 1.0
        ):  # on CUDA the comparison would wait for the device
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(total_grad)
        return *gradients, *[None] * 7


def _softmax_terms_(
    logits: Tensor,
    label_logit: Tensor,
    scale: Tensor,
    spec: ObjectiveSpec,
    mean_bits: Tensor | None,
    gradient: Tensor | None,
    work: Tensor,
) -> Tensor:
    """Cross-entropy (nats), entropy (bits) and the label's entry of scale·p·(1 - c·(z - E)): [3,
    tokens].

    With a `gradient`, like `logits` or `logits` itself, all entries of the latter are written
    there. logits: [tokens, vocabulary], spoilt in any case. label_logit, scale: [tokens].
    mean_bits: of the batch, 0-d, where the entropy target is over that. work: like some rows of
    `logits`, so many go at once.
    """
    terms = torch.empty(3, len(logits), dtype=logits.dtype, device=logits.device)
    for start in range(0, len(logits), len(work)):
        rows = slice(start, min(start + len(work), len(logits)))
        z = logits[rows]
        largest = z.amax(-1)
        z.sub_(largest.unsqueeze(1))
        exponentials = torch.exp(z, out=work[: rows.stop - start])
        # `sum` adds pairwise. torch.softmax does not, and loses two digits at 131,072 entries.
        total = exponentials.sum(-1)
        expected = torch.linalg.vecdot(exponentials, z) / total
        entropy_bits, slope, offset = _gradient_of(total, expected, scale[rows], spec, mean_bits)
        if gradient is not None:
            z.mul_(slope.unsqueeze(1)).add_(offset.unsqueeze(1)).mul_(exponentials)
            if gradient is not logits:
                gradient[rows] = z
        terms[:, rows] = _terms_of(label_logit[rows] - largest, total, entropy_bits, slope, offset)
    return terms


def _fused_softmax_terms_(
    logits: Tensor,
    label_logit: Tensor,
    scale: Tensor,
    spec: ObjectiveSpec,
    mean_bits: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """`_softmax_terms_` for torch.compile, which makes two passes over the logits of it: sums by
    piece, then the gradient.

    A row is too long to stay on the chip between its maximum and its sums, a piece of it is not.
    The pieces are joined as in online softmax (Milakov and Gimelshein, arXiv:1805.02867), with the
    sum of exp(z)·z as well.
    """
    pieces = logits.unflatten(-1, (-1, _piece_length(logits.size(-1))))
    largest_of_piece = pieces.amax(-1)  # [tokens, pieces]
    shifted = pieces - largest_of_piece.unsqueeze(-1)
    exponentials = shifted.exp()
    totals, weighted = exponentials.sum(-1), (exponentials * shifted).sum(-1)
    largest = largest_of_piece.amax(-1, keepdim=True)
    distance = largest_of_piece - largest
    factor = distance.exp()
    total = (factor * totals).sum(-1)
    expected = (factor * (weighted + distance * totals)).sum(-1) / total
    entropy_bits, slope, offset = _gradient_of(total, expected, scale, spec, mean_bits)
    if gradient is not None:
        z = logits - largest
        gradient.copy_((slope.unsqueeze(1) * z + offset.unsqueeze(1)) * z.exp())
    return _terms_of(label_logit - largest.squeeze(-1), total, entropy_bits, slope, offset)


def _gradient_of(
    total: Tensor, expected: Tensor, scale: Tensor, spec: ObjectiveSpec, mean_bits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy in bits, and a and b of the gradient (a·z + b)·exp(z) by the logits z, from Σ exp(z)
    and E; all [tokens].

    mean_bits: as in `_softmax_terms_`.
    """
    entropy_bits = (total.log() - expected) / _NATS_PER_BIT
    distance = (entropy_bits if mean_bits is None else mean_bits) - spec.entropy_target_bits
    pull = (2.0 * spec.entropy_target_weight * distance - spec.entropy_bonus) / _NATS_PER_BIT
    share = scale / total
    return entropy_bits, -pull * share, (1.0 + pull * expected) * share


def _terms_of(
    label_logit: Tensor, total: Tensor, entropy_bits: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """What `_softmax_terms_` returns, from the label's logit z relative to the largest; all
    [tokens].
    """
    return torch.stack(
        [
            total.log() - label_logit,
            entropy_bits,
            (slope * label_logit + offset) * label_logit.exp(),
        ]
    )


def _piece_length(vocabulary: int) -> int:
    """Entries of a row that are summed together: at most 1,024 where the vocabulary is divisible by
    128, else all.
    """
    piece = math.gcd(vocabulary, _FUSED_PIECE)
    return piece if piece >= 128 else vocabulary


@functools.cache
def _compiled_softmax_terms() -> Callable[..., Tensor]:
    return torch.compile(_fused_softmax_terms_, dynamic=False)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, from a lower precision straight into `out`'s where the device can do
    that.
    """
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(left @ right)


def _product_in_pieces(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; on a CPU the long inner sum is taken in pieces, which at least
    halves the rounding error.
    """
    if left.is_cuda:
        return (left @ right).to(dtype)
    pieces = zip(left.split(_CPU_SUM_LENGTH, dim=1), right.split(_CPU_SUM_LENGTH), strict=True)
    return sum((a @ b).to(dtype) for a, b in pieces)


def _add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out += left @ right, accumulated in `out`'s precision."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        out.add_(left @ right)


def _chunk_and_block(
    tokens: int, vocabulary: int, most_tokens: int, device: torch.device, compiled: bool
) -> tuple[int, int]:
    """Tokens whose logits exist at one time, and tokens whose logits go through the element-wise
    work at one time.

    On a CPU ignored labels are left out and `tokens` changes from call to call; the size of a
    compiled chunk does not follow it.
    """
    if device.type != "cpu":
        chunk = max(1, min(most_tokens, tokens))
        return chunk, chunk
    largest = max(1, min(most_tokens, _CPU_LOGITS // vocabulary))
    chunk = largest if compiled else max(1, min(largest, tokens))
    return chunk, max(1, min(chunk, _CPU_CACHED_LOGITS // vocabulary))


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _at_least_one(num_valid: int | Tensor) -> int | Tensor:
    return num_valid.clamp(min=1) if isinstance(num_valid, Tensor) else max(num_valid, 1)


def _check_inputs(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.size(-1) != weight.size(-1):
        raise ValueError(
            f"hidden has the shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; they"
            " must be [..., hidden] and [vocabulary, hidden]."
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be int64 of shape"
            f" {tuple(hidden.shape[:-1])}."
        )
