"""Which term of the objective pulls how hard, and whether with the data loss or against it.

A term's value says little of its influence: the activation norm may be small and steep, the entropy target large and flat. What
moves the weights is its gradient, taken here at the residual stream before the final norm, the last place that all terms share.
"""

from __future__ import annotations

import dataclasses

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kl3m_nb.models import forward_body
from kl3m_nb.objective import activation_penalty, chunked_objective
from kl3m_nb.profiles import ObjectiveSpec

_WEIGHTS = {"label_smoothing": "label_smoothing", "entropy_bonus": "entropy_bonus", "entropy_target": "entropy_target_weight"}

TARGET_OFFSET, TARGET_SPREAD = "entropy_target: offset", "entropy_target: spread"


def entropy_target_parts(train: pd.DataFrame, spec: ObjectiveSpec) -> pd.DataFrame:
    """The entropy target's value at each logged step, in nats, as `offset` and `spread`, which add up to it.

    (H - H*)² averaged over tokens is (mean H - H*)², the offset, and the variance of H, the spread. train: entropy_bits (mean of
    a step) and entropy_target, as logged. With the target over the batch, what is left as spread is the variance of the
    micro-batches' means.
    """
    offset = spec.entropy_target_weight * (train["entropy_bits"] - spec.entropy_target_bits) ** 2
    return pd.DataFrame({"step": train["step"], "offset": offset, "spread": train["entropy_target"] - offset})


def term_pulls(model: PreTrainedModel, windows: Tensor, spec: ObjectiveSpec) -> pd.DataFrame:
    """A row a term of the objective on `windows`, int64 [windows, seq_len + 1], e.g. [2, 257], on the device of `model`.

    `norm`: ‖∂L/∂h‖ over all tokens, L their mean, h the residual stream; `relative`: as a multiple of the cross-entropy's;
    `cosine`: the angle to the cross-entropy's gradient, −1 where the term pulls straight against it, NaN where its weight is 0.

    Two more rows take the entropy target apart: "offset" is the gradient of w·(mean entropy − target)², "spread" that of the
    variance over tokens. They add up to the term's; with the target over the batch there is no spread.
    """
    labels = windows[:, 1:].contiguous()
    with torch.no_grad():
        residual = forward_body(model, windows[:, :-1]).residual
    residual.requires_grad_()
    hidden = model.model.norm(residual)
    head = model.get_output_embeddings().weight.detach().double()
    plain = dataclasses.replace(spec, **dict.fromkeys(_WEIGHTS.values(), 0.0))

    def at_hidden(**changes) -> Tensor:
        states = hidden.detach().double().requires_grad_()  # float64: the small terms are differences of large gradients
        chunked_objective(states, head, labels, dataclasses.replace(plain, **changes)).total.backward()
        return states.grad

    cross_entropy = at_hidden()
    gradients = {"cross_entropy": cross_entropy}
    gradients |= {term: at_hidden(**{weight: getattr(spec, weight)}) - cross_entropy for term, weight in _WEIGHTS.items()}
    offset = at_hidden(entropy_target_weight=spec.entropy_target_weight, entropy_target_over="batch") - cross_entropy
    gradients |= {TARGET_OFFSET: offset, TARGET_SPREAD: gradients["entropy_target"] - offset}
    pulls = {
        term: torch.autograd.grad(hidden, residual, gradient.to(hidden.dtype), retain_graph=True)[0].double().flatten()
        for term, gradient in gradients.items()
    }
    penalty = activation_penalty(residual, labels, spec.activation_norm)
    pulls["activation_norm"] = torch.autograd.grad(penalty, residual)[0].double().flatten()
    rows = {}
    for term, pull in pulls.items():
        norm, reference = pull.norm(), pulls["cross_entropy"]
        cosine = pull @ reference / (norm * reference.norm())
        rows[term] = {"norm": norm.item(), "relative": (norm / reference.norm()).item(), "cosine": cosine.item()}
    return pd.DataFrame.from_dict(rows, orient="index")
