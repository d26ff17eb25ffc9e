"""The names of tensors, and the role each plays: the only module that knows how Llama and Mixtral
call their parameters.

Roles are those of Llama (`q_proj` … `down_proj`, `lm_head`); Mixtral's experts have the same roles.
When embedding and LM head are tied, the shared matrix has the role `lm_head`.
"""

from __future__ import annotations

import re

from torch import nn

from kl3m_nb.profiles import ATTENTION_ROLES, MLP_ROLES

MUON_ROLES = frozenset(ATTENTION_ROLES + MLP_ROLES)


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """{parameter name: role}. A head tied to the embedding is one parameter, and its role is
    `lm_head`.

    Raises ValueError for a parameter that belongs to no role of the family.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return {name: _role(name, parameter, tied) for name, parameter in model.named_parameters()}


def _role(name: str, parameter: nn.Parameter, tied: bool) -> str:
    parts = name.split(".")
    module = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
    if parts[-1] == "bias":
        return "bias"
    if module == "embed_tokens":
        return "lm_head" if tied else "embedding"
    if module == "lm_head" or (module in MUON_ROLES and parameter.ndim >= 2):
        return module
    if module.endswith("norm") or module.endswith("layernorm"):
        return "norm"
    if module == "gate":  # the linear map that scores a Mixtral's experts
        return "router"
    raise ValueError(
        f"The parameter {name} of shape {tuple(parameter.shape)} has no role; Llama and Mixtral"
        " decoders are known."
    )


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters by component: embedding (with a tied head), attention, mlp, norms, lm_head when
    untied, and the total.
    """
    components = {"embedding": 0, "attention": 0, "mlp": 0, "norms": 0, "lm_head": 0}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            component = "embedding"
        elif "lm_head" in name:
            component = "lm_head"
        elif "self_attn" in name:
            component = "attention"
        else:
            component = "norms" if "norm" in name else "mlp"
        components[component] += parameter.numel()
    if tied:
        components["embedding (tied head)"] = components.pop("embedding")
        del components["lm_head"]
    components["total"] = sum(parameter.numel() for parameter in model.parameters())
    return components


BLOCK_ROLES = (*ATTENTION_ROLES, "gate_proj", "up_proj", "down_proj")


ROLES = (*BLOCK_ROLES, "lm_head")


HEAD_LAYER = -1  # the `layer` of the LM head, which belongs to no block


EXPERT_ROLES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


SEVERAL_ROLES = {"qkv_proj": "q_proj, k_proj and v_proj", "gate_up_proj": "gate_proj and up_proj"}


DENSE_NAME = re.compile(
    r"layers\.(\d+)\.(?:self_attn\.([qkvo]_proj|qkv_proj)|mlp\.(gate_proj|up_proj|down_proj|gate_up_proj))\.weight$"
)


EXPERT_NAME = re.compile(r"layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight$")


FUSED_NAME = re.compile(r"layers\.(\d+)\.\w+\.experts\.(gate_up_proj|down_proj)$")


BLOCK_NAME = re.compile(r"^model\.layers\.(\d+)\.")


EMBEDDING_NAME = "model.embed_tokens.weight"
