"""What one optimizer step holds in memory, by part, from the numbers of a profile alone.

States are exact. Activations are the tensors that autograd keeps of transformers' blocks for their backward pass, counted per
token in units of the hidden size and the MLP's width; the tests count them again. For kl3m-007-500m at 5 × 4096 under bfloat16
autocast they are 75 GB eager, 44 GB compiled per block. Allocators need a little more, so a plan leaves a tenth of a device free.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kl3m_nb.profiles import ModelSpec, Profile

USABLE = 0.9  # share of a device's memory that a plan may fill
_FLOAT32 = 4
# Elements kept per token of a block: multiples of hidden (dense; of a mixture beside 2 per active expert) and of mlp.
_KEPT = {
    ("float32", False): (8, 10, 4),
    ("float32", True): (7, 10, 3),
    ("bfloat16", False): (15, 18, 4),
    ("bfloat16", True): (7, 10, 3),
}


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step. `logits` is the buffers of one chunk of the objective."""

    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model. `muon`: the matrices of the blocks. `active`: those that act on one token."""

    total: int
    muon: int
    active: int


def count_parameters(spec: ModelSpec) -> ParameterCount:
    """The parameters of `spec` by arithmetic; of a mixture, all but `active_experts` of each layer's experts are inactive."""
    attention = 2 * spec.hidden * spec.head_size * (spec.heads + spec.kv_heads)
    mlp = 3 * spec.hidden * spec.mlp
    muon = spec.layers * (attention + max(1, spec.experts) * mlp)
    vocabulary = spec.vocabulary * spec.hidden * (1 if spec.tied_embeddings else 2)
    biases = spec.attention_bias * (spec.head_size * (spec.heads + 2 * spec.kv_heads) + spec.hidden)
    biases += spec.mlp_bias * (2 * spec.mlp + spec.hidden)
    others = vocabulary + spec.hidden * (2 * spec.layers + 1) + spec.layers * (spec.hidden * spec.experts + biases)
    idle = spec.layers * mlp * (spec.experts - spec.active_experts) if spec.experts else 0
    return ParameterCount(muon + others, muon, muon + others - idle)


def step_memory(profile: Profile, precision: str, compiled: bool, recompute: bool, shards: int = 1) -> StepMemory:
    """Sizes for the micro-batch of `profile`. `precision` is "bfloat16" (autocast) or "float32".

    `shards` is the number of processes that share weights, gradients and states under FSDP2, which gathers one block at a time,
    beside embedding, head and final norm.

    With `recompute`, gradient checkpointing, only each block's input is kept, and the activations of the one block that is
    computed again.
    """
    spec, count = profile.model, count_parameters(profile.model)
    tokens = profile.data.micro_batch * profile.data.seq_len
    one_block = tokens * _kept_by_a_block(spec, precision, compiled)
    if profile.runtime.attention == "eager":  # the weights of attention, in float32 as softmax gives them, and rounded
        one_block += tokens * spec.heads * profile.data.seq_len * (_FLOAT32 + (2 if precision == "bfloat16" else 0))
    if precision == "bfloat16":  # and the matrices as autocast has rounded them
        one_block += 2 * count.muon // spec.layers
    inputs = tokens * spec.hidden * _FLOAT32  # the residual stream stays in float32 under autocast
    activations = spec.layers * inputs + one_block if recompute else spec.layers * one_block
    others = count.total - count.muon
    gathered = others + count.muon // spec.layers if shards > 1 else 0
    return StepMemory(
        weights=_FLOAT32 * (count.total // shards + gathered),
        gradients=_FLOAT32 * (count.total // shards + gathered),
        optimizer_states=_FLOAT32 * (count.muon + 2 * others) // shards,
        activations=activations,
        logits=_logit_bytes(precision, compiled) * min(profile.objective.chunk_tokens, tokens) * spec.vocabulary,
    )


def largest_micro_batch(profile: Profile, memory: int, precision: str, compiled: bool, recompute: bool) -> int:
    """The most windows of `profile.data.seq_len` that go through the model at once in nine tenths of `memory` bytes, maybe 0."""

    def needed(windows: int) -> int:
        data = dataclasses.replace(profile.data, micro_batch=windows)
        return step_memory(dataclasses.replace(profile, data=data), precision, compiled, recompute).total

    room = USABLE * memory
    windows, beyond = 0, 1
    while needed(beyond) <= room:
        windows, beyond = beyond, 2 * beyond
    while beyond - windows > 1:
        middle = (windows + beyond) // 2
        windows, beyond = (middle, beyond) if needed(middle) <= room else (windows, middle)
    return windows


def _logit_bytes(precision: str, compiled: bool) -> int:
    """Bytes of the objective's buffers per logit: itself, its exponential unless that is fused, its gradient in bfloat16."""
    return _FLOAT32 + (0 if compiled else _FLOAT32) + (2 if precision == "bfloat16" else 0)


def _kept_by_a_block(spec: ModelSpec, precision: str, compiled: bool) -> int:
    """Bytes per token that a block of transformers' Llama or Mixtral keeps for its backward pass."""
    of_dense, of_mixture, of_mlp = _KEPT[precision, compiled]
    elements = of_mlp * spec.mlp * max(1, spec.active_experts)
    if spec.experts:
        elements += (of_mixture + 2 * spec.active_experts) * spec.hidden
    else:
        elements += of_dense * spec.hidden + 2 * spec.kv_heads * spec.head_size
    return elements * (2 if precision == "bfloat16" else _FLOAT32)
