"""The loss of a micro-batch: the objective of the head, the penalty on the residual stream, the balance of a mixture's router."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kl3m_nb import models
from kl3m_nb.objective import activation_penalty, chunked_objective
from kl3m_nb.packing import Batch
from kl3m_nb.profiles import Profile


def training_loss(
    model: PreTrainedModel,
    batch: Batch,
    valid_tokens: int,
    routed_tokens: int,
    profile: Profile,
    recompute: bool,
    compiled: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss to go backward from, and its terms by the names they are logged under, 0-d and without a backward.

    All are sums over the valid labels of `batch` divided by `valid_tokens`, those of the whole optimizer step, so they add up
    over micro-batches and ranks. The router's loss is a mean over the tokens of `batch` that are routed, padding left out, and
    weighs as their share of `routed_tokens`, those of the step. "expert_counts" [layers, experts] is no term and adds up as well.
    recompute: blocks are computed again in the backward pass. compiled: the objective's element-wise work is.
    """
    spec, labels = profile.objective, batch.labels
    body = models.forward_body(model, batch.input_ids, batch.attention_mask, batch.position_ids, batch.document_ids, recompute)
    head = model.get_output_embeddings().weight
    terms = chunked_objective(body.hidden, head, labels, spec, num_valid=valid_tokens, compiled=compiled)
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
