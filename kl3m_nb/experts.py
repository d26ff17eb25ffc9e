"""A mixture's experts as two grouped matrix products in the precision of autocast; what its routers decide.

transformers' own grouped form multiplies in the dtype of the weights. Over float32 master weights that is float32 even under
bfloat16 autocast, for which a GPU has no fast grouped kernel. Nothing here asks the host for a number, so a GPU never waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "kl3m_nb_grouped_autocast"


def grouped_experts(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's chosen experts, in the shape and dtype of `hidden`.

    experts: holds gate_up_proj [experts, 2·mlp, hidden], down_proj [experts, hidden, mlp] and act_fn, as transformers' Mixtral
    does. hidden: [tokens, hidden], e.g. [20480, 1024]. chosen (int64), weights: [tokens, active], e.g. [20480, 2].
    """
    tokens, active = chosen.shape
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else experts.gate_up_proj.dtype
    sorted_experts, order = torch.sort(chosen.flatten(), stable=True)
    every_expert = torch.arange(len(experts.gate_up_proj), device=hidden.device)
    ends = torch.searchsorted(sorted_experts, every_expert, right=True, out_int32=True)  # of each expert's rows
    rows = hidden[order // active].to(dtype)
    gate, up = F.grouped_mm(rows, experts.gate_up_proj.to(dtype).mT, offs=ends).chunk(2, dim=-1)
    output = F.grouped_mm(experts.act_fn(gate) * up, experts.down_proj.to(dtype).mT, offs=ends)
    output = output * weights.flatten()[order].unsqueeze(-1)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=hidden.device))
    return output[position].view(tokens, active, -1).sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, grouped_experts)


def use_grouped_experts(model: PreTrainedModel) -> None:
    """Lets the mixture layers of `model` compute with `grouped_experts`. A dense model is left as it is."""
    if getattr(model.config, "num_local_experts", 0):
        model.set_experts_implementation(IMPLEMENTATION)


def keep_router_logits(model: PreTrainedModel) -> PreTrainedModel:
    """Lets every router of a Mixtral keep the logits of its last pass, for `take_router_logits`; others are left as they are.

    transformers' own way, `output_router_logits`, cannot be compiled: it breaks each block into several graphs.
    """
    if isinstance(model, MixtralForCausalLM):
        for layer in model.model.layers:
            layer.mlp.gate.logits = None
            layer.mlp.gate.register_forward_hook(_keep_logits)
    return model


def _keep_logits(router: nn.Module, _inputs, output: tuple[Tensor, ...]) -> None:
    router.logits = output[0]  # an attribute: a list that grows would be guarded by its length, one graph for every layer


def take_router_logits(layer: nn.Module) -> Tensor | None:
    """Hands over the logits [tokens, experts] of a block's last pass, which the router then forgets; None for a dense block."""
    if not hasattr(layer.mlp, "gate"):
        return None
    logits, layer.mlp.gate.logits = layer.mlp.gate.logits, None
    return logits


@torch.no_grad()
def expert_counts(router_logits: Sequence[Tensor], active: int, attention_mask: Tensor | None = None) -> Tensor:
    """How many tokens chose each expert of each layer, float32 [layers, experts]; a row sums to tokens × `active`.

    router_logits: a tensor [batch·seq_len, experts] for each layer, e.g. 16 of [20480, 4]. attention_mask: bool
    [batch, seq_len], False on padding, which does not count.
    """
    logits = torch.stack(router_logits)
    chosen = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.topk(active, dim=-1).indices, 1.0)
    return chosen.sum(1) if attention_mask is None else (chosen * attention_mask.reshape(1, -1, 1)).sum(1)


def load_balancing_loss(router_logits: Sequence[Tensor], counts: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Experts × Σ over them of (share of tokens that chose it) × (its mean probability), a 0-d float32 tensor over all layers.

    Switch Transformer, arXiv:2101.03961, equations 4 to 6, as transformers computes it; even use gives the number of active
    experts. router_logits, attention_mask: as for `expert_counts`, which gave `counts`.
    """
    probabilities = torch.stack(router_logits).float().softmax(-1)
    tokens = probabilities.shape[1]
    if attention_mask is not None:
        probabilities, tokens = probabilities * attention_mask.reshape(1, -1, 1), attention_mask.sum().clamp(min=1)
    rows = len(counts) * tokens
    return counts.shape[1] * ((counts.sum(0) / rows) * (probabilities.sum((0, 1)) / rows)).sum()


def expert_columns(counts: Tensor) -> dict[str, list]:
    """Each expert's share of its layer's choices, as columns to log: layer, expert, share. counts: as of `expert_counts`."""
    layers, experts = counts.shape
    return {
        "layer": [layer for layer in range(layers) for _ in range(experts)],
        "expert": list(range(experts)) * layers,
        "share": [round(share, 5) for share in (counts / counts.sum(1, keepdim=True)).flatten().tolist()],
    }
