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


_HEAD_NAME = re.compile(r"(?:^|\.)(lm_head|embed_tokens)\.weight$")


ROUTER_NAME = re.compile(r"(gate|router|wg)(\.\w+)?\.weight$")


# the last names of a block's tensor, of whatever architecture
NAME_IN_BLOCK = re.compile(r"layers\.\d+\.(?:\w+\.)*?((?:\w+\.)?\w+?)(?:\.weight)?$")


BLOCKS = "model.layers"


BLOCK_NAME = re.compile(r"^model\.layers\.(\d+)\.")


EMBEDDING_NAME, LM_HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"


# What writes into the residual stream; with these at zero a block passes its input on unchanged. w2
# is Mixtral's down_proj.
_WRITES_RESIDUAL = re.compile(r"(?:^|\.)(o_proj|down_proj|w2)((\.|_)(weight|bias))?$")


_READS_RESIDUAL = re.compile(
    r"(?:^|\.)(q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj|w1|w3|\w*gate|router)((\.|_)(weight|bias))?$"
)


def block_name(block: int, rest: str) -> str:
    """The name of the tensor that a block calls `rest`, such as self_attn.q_proj.weight."""
    return f"{BLOCKS}.{block}.{rest}"


def block_number(name: str) -> int:
    """The block that the tensor of this name belongs to; -1 for embedding, head and final norm."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(match[1]) if match else HEAD_LAYER


def head_role(name: str) -> str:
    """`lm_head` for the matrix of the LM head, `embedding` for that of the embedding, which stands
    for a tied head; empty for any other tensor.
    """
    match = _HEAD_NAME.search(name)
    return {"lm_head": "lm_head", "embed_tokens": "embedding"}[match[1]] if match else ""


def residual_writer(name: str) -> str:
    """The role of a tensor through which its block writes into the residual stream, `w2` being
    `down_proj`; empty for any other.
    """
    match = _WRITES_RESIDUAL.search(name)
    return EXPERT_ROLES.get(match[1], match[1]) if match else ""


def reads_residual(name: str) -> bool:
    """Whether a tensor is one of those through which a Llama-like block reads its input."""
    return _READS_RESIDUAL.search(name) is not None


def fused_matrices(role: str) -> tuple[str, ...]:
    """The roles of the matrices that one tensor of `role` holds, stacked along dim -2 in this
    order: Mixtral keeps gate and up of an expert in one tensor.
    """
    return ("gate_proj", "up_proj") if role == "gate_up_proj" else (role,)


def down_name(name: str) -> str:
    """The name of the fused experts' down_proj beside their gate_up_proj of this name."""
    return name.replace("gate_up_proj", "down_proj")


def is_buffer(name: str) -> bool:
    """Whether a tensor of an old file is no parameter: transformers once stored the angles of the
    rotary embedding.
    """
    return name.endswith("rotary_emb.inv_freq")
