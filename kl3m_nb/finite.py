"""Weights and gradients that are not finite, by name: looked for before a checkpoint is kept, and when a step cannot be used."""

from __future__ import annotations

import torch
from torch import nn

from kl3m_nb import distributed
from kl3m_nb.schedule import global_norm


def first_bad_weight(model: nn.Module) -> str | None:
    """The name of the first weight that is not finite on any rank, the same on all; None when every weight is.

    Then it costs one reduction over the model and one number read back from the device.
    """
    norm = global_norm([distributed.local(parameter.detach()) for parameter in model.parameters()])
    if not any(distributed.sum_over_ranks([not torch.isfinite(norm)])):
        return None
    bad = _first({name: parameter.detach() for name, parameter in model.named_parameters()})
    return next(filter(None, distributed.gather(bad)), None)


def why_not_finite(model: nn.Module) -> str:
    """Where a step went wrong, in words: the first gradient that is not finite, else the loss. All ranks have to call."""
    bad = _first({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    return f"the gradient of {bad}" if bad else "the loss"


def _first(tensors: dict[str, torch.Tensor]) -> str | None:
    return next((name for name, tensor in tensors.items() if not torch.isfinite(distributed.whole(tensor)).all()), None)
