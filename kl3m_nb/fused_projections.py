"""Projections that read the same hidden states as one matrix product: query, key and value; gate and up.

At hidden 576 the five products of a block are too small for a large GPU one by one, and their backward passes add five gradients
of the input. The parameters stay those of transformers, so checkpoints, optimizer and clamp see no difference: the weights are
joined inside the pass, where the cast to bfloat16 copies them anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, eager_attention_forward
from transformers.models.mixtral.modeling_mixtral import MixtralAttention


def fused_projection(projections: list[nn.Linear], hidden: Tensor) -> tuple[Tensor, ...]:
    """What each of the bias-free `projections` makes of hidden, [..., hidden], e.g. [5, 4096, 576], from one product."""
    outputs = F.linear(hidden, torch.cat([projection.weight for projection in projections]))
    return outputs.split([projection.out_features for projection in projections], dim=-1)


class _Stored(torch.autograd.Function):
    """A copy that has memory of its own, as has its gradient.

    Attention keeps the values for the backward pass, and with a view of them the whole fused product: 1.5 kB a token and layer of
    kl3m-007. And with a gradient that is not stored the compiler rotates query and key inside the kernel that joins the three
    gradients, which takes 0.15 ms a layer on an H200 where the forward pass rotates in 0.02.
    """

    @staticmethod
    def forward(ctx, states):
        return states.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.as_strided(gradient.size(), gradient.stride())  # what is strided anew must be stored


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of states [batch, heads, seq_len, head_dim], e.g. [5, 9, 4096, 64], as transformers has it.

    cos, sin: [batch or 1, seq_len, head_dim]. The halves change places by indices, so the gradient is a rotation too; slices that
    are joined, as transformers has them, become gradients that are padded and added.
    """
    halves = states.unflatten(-1, (2, -1))
    cos, sin = (angles.unsqueeze(1).unflatten(-1, (2, -1)) for angles in (cos, sin))
    sign = torch.arange(-1, 2, 2, device=states.device).unsqueeze(-1)  # minus for the first half, plus for the second
    return (halves * cos + halves.flip(-2) * (sin * sign)).flatten(-2)


class _FusedAttention:
    """The attention of Llama and Mixtral, which compute alike; with a cache of keys and values transformers' own runs."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **settings):
        """hidden_states: [batch, seq_len, hidden]. Returns the same shape and the attention's weights, if there are any."""
        if past_key_values is not None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **settings)
        query, key, value = (
            _Stored.apply(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [batch, heads, seq_len, head_dim]
            for states in fused_projection([self.q_proj, self.k_proj, self.v_proj], hidden_states)
        )
        query, key = (rotate(states, *position_embeddings) for states in (query, key))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        settings |= {"sliding_window": getattr(self.config, "sliding_window", None)}
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **settings)
        return self.o_proj(output.flatten(-2)), weights


class _FusedLlamaAttention(_FusedAttention, LlamaAttention):
    pass


class _FusedMixtralAttention(_FusedAttention, MixtralAttention):
    pass


class _FusedLlamaMLP(LlamaMLP):
    def forward(self, x):
        """x: [batch, seq_len, hidden]; returns the same shape."""
        gate, up = fused_projection([self.gate_proj, self.up_proj], x)
        return self.down_proj(self.act_fn(gate) * up)


_FUSED = {LlamaAttention: _FusedLlamaAttention, MixtralAttention: _FusedMixtralAttention, LlamaMLP: _FusedLlamaMLP}


def fuse_projections(model: PreTrainedModel) -> None:
    """Lets the blocks of a Llama or Mixtral `model` take their fused products, in place; what has a bias is left as it is."""
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            if type(module) in _FUSED and not any("bias" in name for name, _ in module.named_parameters()):
                module.__class__ = _FUSED[type(module)]
