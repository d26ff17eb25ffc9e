"""From tokens to logits as a model's family does it, whatever stands between the last hidden state
and the logits.

Most families apply their output embedding to the last hidden state and nothing else; logits are
then computed for a few tokens at a time. Others scale them, cap them or add a layer (Granite,
Cohere, Gemma 2, BERT). Which it is, a model is asked: once, with a few tokens, and to the bit.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedModel

OWN_FAMILIES = (
    LlamaForCausalLM,
    MixtralForCausalLM,
)  # what the project trains; their code needs no asking


_PROBE_TOKENS = 8


_CAUSAL_WITHIN = (
    1e-3  # of the largest logit; what sees the next token moves its logits by about their size
)


_asked: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def head_is_all(model: PreTrainedModel) -> bool:
    """Whether the logits of `model` are its output embedding applied to its body's last hidden
    state.

    Call it in evaluation mode, without gradients. Raises ValueError for a model that sees the
    tokens it is to predict.
    """
    if type(model) in OWN_FAMILIES:
        return True
    if model not in _asked:
        _asked[model] = _ask(model)
    return _asked[model]


def before_head(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, nn.Module]:
    """What goes into the head, [batch, seq_len, width], and the head: logits themselves and no head
    where it is not all.

    input_ids: int64 [batch, seq_len], e.g. [8, 256]. To be called as `head_is_all`.
    """
    if head_is_all(model):
        return (
            model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state,
            model.get_output_embeddings(),
        )
    return model(input_ids=input_ids, use_cache=False).logits, nn.Identity()


def _ask(model: PreTrainedModel) -> bool:
    vocabulary = model.config.get_text_config().vocab_size
    # from the middle, where no padding token is: what follows one may be masked
    tokens = (vocabulary // 2 + torch.arange(_PROBE_TOKENS, device=model.device))[None] % vocabulary
    logits = model(input_ids=tokens, use_cache=False).logits
    _require_causal(model, tokens, logits)
    body, head = model.base_model, model.get_output_embeddings()
    if head is None or body is model:
        return False
    hidden = getattr(body(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
        return False
    return torch.equal(head(hidden).float(), logits.float())


def _require_causal(model: PreTrainedModel, tokens: Tensor, logits: Tensor) -> None:
    """Refuses a model whose logits at a position change with what follows it, tokens or padding."""
    shorter = model(input_ids=tokens[:, : _PROBE_TOKENS // 2], use_cache=False).logits.float()
    longer = logits[:, : _PROBE_TOKENS // 2].float()
    if not torch.allclose(
        longer, shorter, rtol=0.0, atol=_CAUSAL_WITHIN * shorter.abs().max().item(), equal_nan=True
    ):
        raise ValueError(
            f"A {type(model).__name__} as it is set up sees the tokens that it is to predict; "
            "give a causal language model (in config.json of the BERT family: is_decoder true)."
        )
