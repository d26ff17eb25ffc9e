"""The loss of a micro-batch, and how strongly each of its terms acts.

The loss is the head's objective, the penalty on the residual stream and, of a mixture, the router's
loss. A term's value says little of its influence: the activation norm may be small and steep, the
entropy target large and flat. `term_pulls` takes each term's gradient at the residual stream before
the final norm, the last place that all terms share.
"""

from __future__ import annotations

import dataclasses

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kl3m_nb.data.windows import Batch
from kl3m_nb.model import decoder
from kl3m_nb.model.decoder import forward_body
from kl3m_nb.optim.objective import activation_penalty, chunked_objective
from kl3m_nb.profiles import ObjectiveSpec, Profile


def training_loss(
    model: PreTrainedModel,
    batch: Batch,
    valid_tokens: int,
    routed_tokens: int,
    profile: Profile,
    recompute: bool,
    compiled: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss to go backward from, and its terms by the names they are logged under, 0-d and
    without a backward.

    All are sums over the valid labels of `batch` divided by `valid_tokens`, those of the whole
    optimizer step, so they add up over micro-batches and ranks. The router's loss is a mean over
    the tokens of `batch` that are routed, padding left out, and weighs as their share of
    `routed_tokens`, those of the step. "expert_counts" [layers, experts] is no term and adds up as
    well. recompute: blocks are computed again in the backward pass. compiled: the objective's
    element-wise work is.
    """
    spec, labels = profile.objective, batch.labels
    body = decoder.forward_body(
        model,
        batch.input_ids,
        batch.attention_mask,
        batch.position_ids,
        batch.document_ids,
        recompute,
    )
    head = model.get_output_embeddings().weight
    terms = chunked_objective(
        body.hidden, head, labels, spec, num_valid=valid_tokens, compiled=compiled
    )
    activation = activation_penalty(body.residual, labels, spec.activation_norm, valid_tokens)
    routed = labels.numel() if batch.attention_mask is None else batch.attention_mask.sum()
    router = profile.model.router_aux_loss * body.router_loss * (routed / routed_tokens)
    total = terms.total + activation + router
    values = {
        "loss": total.detach(),
        "cross_entropy": terms.cross_entropy,
        "entropy_bits": terms.entropy_bits,
        "label_smoothing": terms.label_smoothing,
        "entropy_bonus": terms.entropy_bonus,
        "entropy_target": terms.entropy_target,
        "activation_norm": activation.detach(),
        "expert_counts": body.expert_counts,
    }
    return total, {**values, "router_loss": router.detach()} if profile.model.experts else values


_WEIGHTS = {
    "label_smoothing": "label_smoothing",
    "entropy_bonus": "entropy_bonus",
    "entropy_target": "entropy_target_weight",
}


TARGET_OFFSET, TARGET_SPREAD = "entropy_target: offset", "entropy_target: spread"


def entropy_target_parts(train: pd.DataFrame, spec: ObjectiveSpec) -> pd.DataFrame:
    """The entropy target's value at each logged step, in nats, as `offset` and `spread`, which add
    up to it.

    (H - H*)² averaged over tokens is (mean H - H*)², the offset, and the variance of H, the spread.
    train: entropy_bits (mean of a step) and entropy_target, as logged. With the target over the
    batch, what is left as spread is the variance of the micro-batches' means.
    """
    offset = spec.entropy_target_weight * (train["entropy_bits"] - spec.entropy_target_bits) ** 2
    return pd.DataFrame(
        {"step": train["step"], "offset": offset, "spread": train["entropy_target"] - offset}
    )


def term_pulls(model: PreTrainedModel, windows: Tensor, spec: ObjectiveSpec) -> pd.DataFrame:
    """A row a term of the objective on `windows`, int64 [windows, seq_len + 1], e.g. [2, 257], on
    the device of `model`.

    `norm`: ‖∂L/∂h‖ over all tokens, L their mean, h the residual stream; `relative`: as a multiple
    of the cross-entropy's; `cosine`: the angle to the cross-entropy's gradient, −1 where the term
    pulls straight against it, NaN where its weight is 0.

    Two more rows take the entropy target apart: "offset" is the gradient of w·(mean entropy −
    target)², "spread" that of the variance over tokens. They add up to the term's; with the target
    over the batch there is no spread.
    """
    labels = windows[:, 1:].contiguous()
    with torch.no_grad():
        residual = forward_body(model, windows[:, :-1]).residual
    residual.requires_grad_()
    hidden = model.model.norm(residual)
    head = model.get_output_embeddings().weight.detach().double()
    plain = dataclasses.replace(spec, **dict.fromkeys(_WEIGHTS.values(), 0.0))

    def at_hidden(**changes) -> Tensor:
        states = (
            hidden.detach().double().requires_grad_()
        )  # float64: the small terms are differences of large gradients
        chunked_objective(
            states, head, labels, dataclasses.replace(plain, **changes)
        ).total.backward()
        return states.grad

    cross_entropy = at_hidden()
    gradients = {"cross_entropy": cross_entropy}
    gradients |= {
        term: at_hidden(**{weight: getattr(spec, weight)}) - cross_entropy
        for term, weight in _WEIGHTS.items()
    }
    offset = (
        at_hidden(entropy_target_weight=spec.entropy_target_weight, entropy_target_over="batch")
        - cross_entropy
    )
    gradients |= {TARGET_OFFSET: offset, TARGET_SPREAD: gradients["entropy_target"] - offset}
    pulls = {
        term: (
            torch.autograd.grad(hidden, residual, gradient.to(hidden.dtype), retain_graph=True)[0]
            .double()
            .flatten()
        )
        for term, gradient in gradients.items()
    }
    penalty = activation_penalty(residual, labels, spec.activation_norm)
    pulls["activation_norm"] = torch.autograd.grad(penalty, residual)[0].double().flatten()
    rows = {}
    for term, pull in pulls.items():
        norm, reference = pull.norm(), pulls["cross_entropy"]
        cosine = pull @ reference / (norm * reference.norm())
        rows[term] = {
            "norm": norm.item(),
            "relative": (norm / reference.norm()).item(),
            "cosine": cosine.item(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")
