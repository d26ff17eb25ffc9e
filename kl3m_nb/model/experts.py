"""A mixture's experts as two grouped matrix products in the precision of autocast; what its routers
decide, and their loss.

transformers' own grouped form multiplies in the dtype of the weights. Over float32 master weights
that is float32 even under bfloat16 autocast, for which a GPU has no fast grouped kernel. The
routers' logits are the exception: they stay in the dtype of the weights (ST-MoE, arXiv:2202.08906).
Only what is logged asks the host for a number, so a GPU does not wait.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from kl3m_nb.common import distributed
from kl3m_nb.profiles import ModelSpec

IMPLEMENTATION = "kl3m_nb_grouped_autocast"


# what `load_balancing_loss` is; earlier versions pooled the layers, and named nothing
ROUTER_LOSS = "mean over layers"


IDLE = 0.2  # of an even share: 5% with four experts


def grouped_experts(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's chosen experts, in the shape and dtype of `hidden`.

    experts: holds gate_up_proj [experts, 2·mlp, hidden], down_proj [experts, hidden, mlp] and
    act_fn, as transformers' Mixtral does. hidden: [tokens, hidden], e.g. [20480, 1024]. chosen
    (int64), weights: [tokens, active], e.g. [20480, 2].
    """
    tokens, active = chosen.shape
    device_type = hidden.device.type
    dtype = (
        torch.get_autocast_dtype(device_type)
        if torch.is_autocast_enabled(device_type)
        else experts.gate_up_proj.dtype
    )
    sorted_experts, order = torch.sort(chosen.flatten(), stable=True)
    every_expert = torch.arange(len(experts.gate_up_proj), device=hidden.device)
    ends = torch.searchsorted(
        sorted_experts, every_expert, right=True, out_int32=True
    )  # of each expert's rows
    rows = hidden[order // active].to(dtype)
    gate, up = F.grouped_mm(rows, experts.gate_up_proj.to(dtype).mT, offs=ends).chunk(2, dim=-1)
    output = F.grouped_mm(experts.act_fn(gate) * up, experts.down_proj.to(dtype).mT, offs=ends)
    output = output * weights.flatten()[order].unsqueeze(-1)
    position = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=hidden.device)
    )
    return output[position].view(tokens, active, -1).sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, grouped_experts)


def use_grouped_experts(model: PreTrainedModel) -> None:
    """Lets the mixture layers of `model` compute with `grouped_experts`. A dense model is left as
    it is.
    """
    if getattr(model.config, "num_local_experts", 0):
        model.set_experts_implementation(IMPLEMENTATION)


class Router(MixtralTopKRouter):
    """A Mixtral's router that multiplies in the dtype of its weights, also under autocast, and
    keeps the logits of its last pass.

    In bfloat16 a logit has 8 bits: experts of nearly the same logit would change places, and each
    probability be off by up to 1%. transformers' own way to the logits, `output_router_logits`,
    cannot be compiled: it breaks each block into several graphs.
    """

    logits: Tensor | None = (
        # not a list that grows: compiled code would be guarded by its length, one graph for every
        # layer
        None
    )

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [tokens, experts]; weights and numbers (int64) of the chosen experts, both
        [tokens, active].
        """
        with torch.autocast(hidden.device.type, enabled=False):
            output = super().forward(hidden.to(self.weight.dtype))
        self.logits = output[0]
        return output


def use_exact_routers(model: PreTrainedModel) -> PreTrainedModel:
    """Makes every router of a Mixtral a `Router`, in place; a model of another family is left as it
    is.
    """
    if isinstance(model, MixtralForCausalLM):
        for layer in model.model.layers:
            layer.mlp.gate.__class__ = Router
    return model


def take_router_logits(layer: nn.Module) -> Tensor | None:
    """Hands over the logits [tokens, experts] of a block's last pass, which the router then
    forgets; None for a dense block.
    """
    if not hasattr(layer.mlp, "gate"):
        return None
    logits, layer.mlp.gate.logits = layer.mlp.gate.logits, None
    return logits


@torch.no_grad()
def expert_counts(
    router_logits: Sequence[Tensor], active: int, attention_mask: Tensor | None = None
) -> Tensor:
    """How many tokens chose each expert of each layer, float32 [layers, experts]; a row sums to
    tokens × `active`.

    router_logits: a tensor [batch·seq_len, experts] for each layer, e.g. 16 of [20480, 4].
    attention_mask: bool [batch, seq_len], False on padding, which does not count.
    """
    logits = torch.stack(router_logits)
    chosen = torch.zeros_like(logits, dtype=torch.float32).scatter_(
        -1, logits.topk(active, dim=-1).indices, 1.0
    )
    return (
        chosen.sum(1)
        if attention_mask is None
        else (chosen * attention_mask.reshape(1, -1, 1)).sum(1)
    )


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    counts: Tensor,
    active: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The mean over layers of E · Σ_e f_e · P_e, 0-d: E experts, f_e the share of tokens that chose
    e, P_e its mean probability.

    Switch Transformer, arXiv:2101.03961, equations 4 to 6, one layer at a time; even use gives
    `active`. Pooled over layers, as transformers has it, layers cancel: where every layer leaves
    two of four experts out, others in each, it is that of even use. router_logits, active,
    attention_mask: as for `expert_counts`, which gave `counts` [layers, experts]. The result is
    float32 (float64 for float64 logits); a batch of nothing but padding gives 0.

    Σ over micro-batches, weighted by their share of the routed tokens: with `counts` of the whole
    optimizer step this is exactly the loss of the step, value and gradient, however it is divided
    into micro-batches or ranks, as P_e is a mean over tokens. But these counts are known only after
    the last micro-batch, and another forward pass to count takes a third of a step. With its own
    counts for each micro-batch, as in training, the sum exceeds the loss of the step by E · Σ_e
    cov(f_e, P_e) over the micro-batches, averaged over layers: little where each holds many
    documents. The shares that are logged are those of the step.
    """
    logits = torch.stack(router_logits)
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    tokens = probabilities.shape[1]
    if attention_mask is not None:
        probabilities, tokens = (
            probabilities * attention_mask.reshape(1, -1, 1),
            attention_mask.sum().clamp(min=1),
        )
    chosen = active * counts / counts.sum(1, keepdim=True).clamp(min=1)
    return counts.shape[1] * (chosen * (probabilities.sum(1) / tokens)).sum(1).mean()


def expert_columns(counts: Tensor) -> dict[str, list]:
    """Each expert's share of its layer's choices, as columns to log: layer, expert, share,
    least_share (of its layer).

    counts: as of `expert_counts`.
    """
    layers, experts = counts.shape
    shares = counts / counts.sum(1, keepdim=True)
    least = shares.min(1, keepdim=True).values.expand_as(shares)
    return {
        "layer": [layer for layer in range(layers) for _ in range(experts)],
        "expert": list(range(experts)) * layers,
        "share": [round(share, 5) for share in shares.flatten().tolist()],
        "least_share": [round(share, 5) for share in least.flatten().tolist()],
    }


class IdleExperts:
    """Warns of experts below a fifth of an even share, once for each layer."""

    def __init__(self) -> None:
        self._layers: set[int] = set()  # that were warned of

    def warn(self, counts: Tensor, step: int) -> None:
        """Looks at `counts`, as of `expert_counts`, of the step `step`; several ranks have the
        same, and the first speaks.
        """
        shares, even = counts / counts.sum(1, keepdim=True), 1.0 / counts.shape[1]
        for layer, share in enumerate(shares):
            if (
                share.min() < IDLE * even
                and layer not in self._layers
                and distributed.world().is_first
            ):
                self._layers.add(layer)
                warnings.warn(
                    f"In layer {layer} expert {share.argmin()} gets {share.min():.1%} of the"
                    f" choices at step {step:,}, where {even:.0%} would be even; if this stays so,"
                    " raise router_aux_loss.",
                    stacklevel=2,
                )


def warn_of_another_loss(spec: ModelSpec, name: str | None, step: int) -> None:
    """Warns when a mixture's steps up to `step` were trained with another router's loss than
    ROUTER_LOSS, by its `name`.
    """
    if spec.experts and name != ROUTER_LOSS and distributed.world().is_first:
        warnings.warn(
            f"The steps up to {step:,} were trained with a router's loss that pooled all layers;"
            " from here on it is the mean of the layers' own, so its value may jump.",
            stacklevel=2,
        )
