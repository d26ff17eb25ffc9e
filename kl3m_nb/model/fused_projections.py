"""Projections that read the same hidden states as one matrix product: query, key and value; gate
and up.

At hidden 576 the five products of a block are too small for a large GPU one by one, and their
backward passes add five gradients of the input. The parameters stay those of transformers, so
checkpoints, optimizer and clamp see no difference: the weights are joined inside the pass, where
the cast to bfloat16 copies them anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    eager_attention_forward,
)
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

_JOINED_IN_ONE_KERNEL = (
    8  # inputs of a `torch.cat`, up to which torch.compile makes one kernel of it
)


_ALIGNED = 8  # entries in bfloat16 that a GPU loads at once


def fused_product(projections: list[nn.Linear], hidden: Tensor) -> Tensor:
    """What the bias-free `projections` make of hidden, [..., hidden], e.g. [5, 4096, 576], side by
    side, from one product.
    """
    return F.linear(hidden, torch.cat([projection.weight for projection in projections]))


def join(parts: Sequence[Tensor]) -> Tensor:
    """`parts` side by side in their last dimension, in so many pieces that a compiled pass computes
    each where it belongs.

    Up to eight inputs become one kernel, in which every entry of the result computes what each of
    the inputs would be there: the gradients of gate and up took 0.55 ms for 81,920 tokens of
    kl3m-007 on an H200, where the memory allows 0.3.
    """
    fewest = _JOINED_IN_ONE_KERNEL // len(parts) + 1
    aligned = (
        n
        for n in range(fewest, 2 * fewest)
        if all(part.size(-1) % (n * _ALIGNED) == 0 for part in parts)
    )
    pieces = next(aligned, fewest)
    return torch.cat([piece for part in parts for piece in part.chunk(pieces, -1)], -1)


class _Split(torch.autograd.Function):
    """Parts of a fused product, [..., sum of the sizes], each in memory of its own.

    Attention keeps the values for the backward pass, and with a view of them the whole product: 1.5
    kB a token and layer of kl3m-007.
    """

    @staticmethod
    def forward(ctx, product, sizes):
        return tuple(
            part.clone(memory_format=torch.contiguous_format) for part in product.split(sizes, -1)
        )

    @staticmethod
    def backward(ctx, *gradients):
        return join(gradients), None


class _GatedUnit(torch.autograd.Function):
    """silu(gate) · up of a fused product that holds both, [..., 2 · mlp], e.g. [5, 4096, 3072]:
    [..., mlp].
    """

    @staticmethod
    def forward(ctx, product):
        ctx.save_for_backward(product)
        gate, up = product.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        (product,) = ctx.saved_tensors
        dtype = torch.promote_types(product.dtype, torch.float32)
        gate, up = product.to(dtype).chunk(2, -1)
        sigmoid = gate.sigmoid()
        active = gate * sigmoid
        by_gate = gradient * up * (sigmoid + active * (1.0 - sigmoid))
        return join([by_gate.to(product.dtype), (gradient * active).to(product.dtype)])


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of states [batch, heads, seq_len, head_dim], e.g. [5, 9, 4096, 64],
    as transformers has it.

    cos, sin: [batch or 1, seq_len, head_dim]. The halves change places by indices, so the gradient
    is a rotation too; slices that are joined, as transformers has them, become gradients that are
    padded and added.
    """
    halves = states.unflatten(-1, (2, -1))
    cos, sin = (angles.unsqueeze(1).unflatten(-1, (2, -1)) for angles in (cos, sin))
    sign = torch.arange(-1, 2, 2, device=states.device).unsqueeze(
        -1
    )  # minus for the first half, plus for the second
    return (halves * cos + halves.flip(-2) * (sin * sign)).flatten(-2)


class _FusedAttention:
    """The attention of Llama and Mixtral, which compute alike; with a cache of keys and values
    transformers' own runs.
    """

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        **settings,
    ):
        """hidden_states: [batch, seq_len, hidden]. Returns the same shape and the attention's
        weights, if there are any.
        """
        if past_key_values is not None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **settings
            )
        projections = [self.q_proj, self.k_proj, self.v_proj]
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(
                1, 2
            )  # [batch, heads, seq_len, head_dim]
            for states in _Split.apply(
                fused_product(projections, hidden_states),
                [each.out_features for each in projections],
            )
        )
        query, key = (rotate(states, *position_embeddings) for states in (query, key))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        settings |= {"sliding_window": getattr(self.config, "sliding_window", None)}
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **settings,
        )
        return self.o_proj(output.flatten(-2)), weights


class _FusedLlamaAttention(_FusedAttention, LlamaAttention):
    pass


class _FusedMixtralAttention(_FusedAttention, MixtralAttention):
    pass


class _FusedLlamaMLP(LlamaMLP):
    def forward(self, x):
        """x: [batch, seq_len, hidden]; returns the same shape."""
        return self.down_proj(_GatedUnit.apply(fused_product([self.gate_proj, self.up_proj], x)))


_FUSED = {
    LlamaAttention: _FusedLlamaAttention,
    MixtralAttention: _FusedMixtralAttention,
    LlamaMLP: _FusedLlamaMLP,
}


def fuse_projections(model: PreTrainedModel) -> None:
    """Lets the blocks of a Llama or Mixtral `model` take their fused products, in place.

    What has a bias, and a gated unit with another activation than silu, is left as it is.
    """
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            if type(module) in _FUSED and _can_be_fused(module):
                module.__class__ = _FUSED[type(module)]


def _can_be_fused(module: nn.Module) -> bool:
    has_bias = any("bias" in name for name, _ in module.named_parameters())
    return not has_bias and (type(module) is not LlamaMLP or module.config.hidden_act == "silu")
