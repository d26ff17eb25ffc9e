"""FlashAttention 4 for causal windows in which nothing is masked, as operations that torch.compile
takes as they are.

transformers calls the package's own autograd function, which is not made for a compiled block. Here
its kernels are two custom operations, and whatever they do not take (a mask, a cache of keys,
float32) goes to `scaled_dot_product_attention`: one setting serves training, evaluation and
writing. On an H200 attention at 5 × 4096 takes 0.78 ms a layer instead of cuDNN's 0.93.

The kernels (`_flash_attn_fwd`, `_flash_attn_bwd` of `flash_attn.cute.interface`) are those
torch.nn.attention calls too.
"""

from __future__ import annotations

import importlib
import types

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# the name under which transformers knows it; with "flash" in it, it would look for a package
IMPLEMENTATION = "kl3m_nb_fa4"


def loads() -> bool:
    """Whether the package flash-attn-4 is there and fits this torch."""
    try:
        _kernels()
    except (ImportError, OSError):
        return False
    return True


def _kernels() -> types.ModuleType:
    return importlib.import_module("flash_attn.cute.interface")


@torch.library.custom_op("kl3m_nb::causal_attention", mutates_args=())
def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention and the logarithms of its softmax's sums, float32 [batch, heads, seq_len].

    query: [batch, seq_len, heads, head_dim], e.g. [5, 4096, 9, 64] in bfloat16, as is the first
    result. key, value: the same with a divisor of the heads, e.g. 3.
    """
    output, log_sums, *_ = _kernels()._flash_attn_fwd(
        query, key, value, softmax_scale=scale, causal=True, return_lse=True
    )
    return output, log_sums


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, seq_len, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, seq_len, dtype=torch.float32)


@torch.library.custom_op("kl3m_nb::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    output_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes; the arguments are those and the results
    of `causal_attention`.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    gradients = _kernels()._flash_attn_bwd(
        query,
        key,
        value,
        output,
        output_grad,
        log_sums,
        softmax_scale=scale,
        causal=True,
        deterministic=deterministic,
    )
    return tuple(gradients[:3])


@causal_attention_backward.register_fake
def _(
    output_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    scale: float,
):
    return tuple(torch.empty_like(tensor) for tensor in (query, key, value))


def _keep(ctx, inputs, output) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx, output_grad: Tensor, _log_sums_grad) -> tuple[Tensor | None, ...]:
    return *causal_attention_backward(output_grad.contiguous(), *ctx.saved_tensors, ctx.scale), None


causal_attention.register_autograd(_backward, setup_context=_keep)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings,
) -> tuple[Tensor, None]:
    """The attention that transformers' blocks call: query [batch, heads, seq_len, head_dim] to
    [batch, seq_len, heads, head_dim].

    `value` decides the precision: under autocast the rotation has left query and key in float32.
    """
    whole = attention_mask is None and not dropout and query.shape[2] == key.shape[2]
    if not (whole and value.dtype in (torch.bfloat16, torch.float16)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    query, key, value = (states.to(value.dtype).transpose(1, 2) for states in (query, key, value))
    return (
        causal_attention(
            query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling
        )[0],
        None,
    )


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
