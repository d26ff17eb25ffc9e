"""What one optimizer step costs: memory by part, parameters, and floating-point operations per
token.

Memory: states are exact. Activations are the tensors that autograd keeps of transformers' blocks
for their backward pass, counted per token in units of the hidden size and the MLP's width; the
tests count them again. For kl3m-007-500m at 5 × 4096 under bfloat16 autocast they are 75 GB eager,
44 GB compiled per block. Allocators need a little more, so a plan leaves a tenth of a device free.

Operations. Convention, everywhere in the project unless a function says otherwise: a multiply-add
is 2 operations; only matrix products count (blocks, attention scores and values, router, LM head),
not norms, activations, softmax or the embedding lookup; causal attention is counted exactly,
position i sees min(i + 1, window) keys; of the experts only the active ones count. Backward is
twice forward, but 2.5 times for attention: FlashAttention-like kernels compute the scores again, so
5 products stand against 2.

Model FLOPs utilisation (MFU) counts what the model asks for, twice forward for attention too
(`model_flops_per_token`); hardware FLOPs utilisation (HFU) what is computed, recomputed scores and
gradient checkpointing included (`flops_per_token`). The two names are PaLM's (arXiv:2204.02311,
appendix B).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from numpy.typing import ArrayLike

from kl3m_nb.profiles import ModelSpec, Profile

USABLE = 0.9  # share of a device's memory that a plan may fill


_FLOAT32 = 4


# Elements kept per token of a block: multiples of hidden (dense; of a mixture beside 2 per active
# expert) and of mlp.
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
    """Parameters of a model. `muon`: the matrices of the blocks. `active`: those that act on one
    token.
    """

    total: int
    muon: int
    active: int


def count_parameters(spec: ModelSpec) -> ParameterCount:
    """The parameters of `spec` by arithmetic; of a mixture, all but `active_experts` of each
    layer's experts are inactive.
    """
    attention = 2 * spec.hidden * spec.head_size * (spec.heads + spec.kv_heads)
    mlp = 3 * spec.hidden * spec.mlp
    muon = spec.layers * (attention + max(1, spec.experts) * mlp)
    vocabulary = spec.vocabulary * spec.hidden * (1 if spec.tied_embeddings else 2)
    biases = spec.attention_bias * (spec.head_size * (spec.heads + 2 * spec.kv_heads) + spec.hidden)
    biases += spec.mlp_bias * (2 * spec.mlp + spec.hidden)
    others = (
        vocabulary
        + spec.hidden * (2 * spec.layers + 1)
        + spec.layers * (spec.hidden * spec.experts + biases)
    )
    idle = spec.layers * mlp * (spec.experts - spec.active_experts) if spec.experts else 0
    return ParameterCount(muon + others, muon, muon + others - idle)


def step_memory(
    profile: Profile, precision: str, compiled: bool, recompute: bool, shards: int = 1
) -> StepMemory:
    """Sizes for the micro-batch of `profile`. `precision` is "bfloat16" (autocast) or "float32".

    `shards` is the number of processes that share weights, gradients and states under FSDP2, which
    gathers one block at a time, beside embedding, head and final norm.

    With `recompute`, gradient checkpointing, only each block's input is kept, and the activations
    of the one block that is computed again.
    """
    spec, count = profile.model, count_parameters(profile.model)
    tokens = profile.data.micro_batch * profile.data.seq_len
    one_block = tokens * _kept_by_a_block(spec, precision, compiled)
    if (
        profile.runtime.attention == "eager"
    ):  # the weights of attention, in float32 as softmax gives them, and rounded
        one_block += (
            tokens
            * spec.heads
            * profile.data.seq_len
            * (_FLOAT32 + (2 if precision == "bfloat16" else 0))
        )
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
        logits=_logit_bytes(precision, compiled)
        * min(profile.objective.chunk_tokens, tokens)
        * spec.vocabulary,
    )


def largest_micro_batch(
    profile: Profile, memory: int, precision: str, compiled: bool, recompute: bool
) -> int:
    """The most windows of `profile.data.seq_len` that go through the model at once in nine tenths
    of `memory` bytes, maybe 0.
    """

    def needed(windows: int) -> int:
        data = dataclasses.replace(profile.data, micro_batch=windows)
        return step_memory(
            dataclasses.replace(profile, data=data), precision, compiled, recompute
        ).total

    room = USABLE * memory
    windows, beyond = 0, 1
    while needed(beyond) <= room:
        windows, beyond = beyond, 2 * beyond
    while beyond - windows > 1:
        middle = (windows + beyond) // 2
        windows, beyond = (middle, beyond) if needed(middle) <= room else (windows, middle)
    return windows


def _logit_bytes(precision: str, compiled: bool) -> int:
    """Bytes of the objective's buffers per logit: itself, its exponential unless that is fused, its
    gradient in bfloat16.
    """
    return _FLOAT32 + (0 if compiled else _FLOAT32) + (2 if precision == "bfloat16" else 0)


def _kept_by_a_block(spec: ModelSpec, precision: str, compiled: bool) -> int:
    """Bytes per token that a block of transformers' Llama or Mixtral keeps for its
    backward pass.
    """
    of_dense, of_mixture, of_mlp = _KEPT[precision, compiled]
    elements = of_mlp * spec.mlp * max(1, spec.active_experts)
    if spec.experts:
        elements += (of_mixture + 2 * spec.active_experts) * spec.hidden
    else:
        elements += of_dense * spec.hidden + 2 * spec.kv_heads * spec.head_size
    return elements * (2 if precision == "bfloat16" else _FLOAT32)


# backward / forward of a matrix product: one product for the input's gradient, one for the weight's
MATMUL_BACKWARD = 2.0


ATTENTION_BACKWARD = (
    2.5  # 5 products against 2 (FlashAttention, arXiv:2205.14135: scores are recomputed)
)


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one forward pass per token, averaged over the positions of a sequence."""

    blocks: float  # projections of attention, MLP or active experts, router
    attention: float  # scores Q Kᵀ and their product with V
    lm_head: float

    @property
    def total(self) -> float:
        """Sum of the three parts."""
        return self.blocks + self.attention + self.lm_head


def block_matmul_parameters(spec: ModelSpec) -> int:
    """Weights of one block that multiply a token: q, k, v, o and the MLP, or the router and the
    active experts.
    """
    query_width = spec.heads * spec.head_size
    key_width = spec.kv_heads * spec.head_size
    attention = 2 * spec.hidden * query_width + 2 * spec.hidden * key_width
    mlp = 3 * spec.hidden * spec.mlp
    if spec.experts:
        return attention + spec.active_experts * mlp + spec.hidden * spec.experts
    return attention + mlp


def mean_keys_seen(seq_len: int, sliding_window: int = 0) -> float:
    """Keys a position attends to, itself included, averaged over a causal sequence;
    `sliding_window` 0 means no window.
    """
    window = min(sliding_window or seq_len, seq_len)
    keys = window * (window + 1) // 2 + (seq_len - window) * window
    return keys / seq_len


def forward_flops_per_token(spec: ModelSpec, seq_len: int) -> ForwardFlops:
    """Forward operations per token for sequences of `seq_len` tokens, in the module's
    convention.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1.")
    products_per_key = 2 * spec.heads * spec.head_size
    return ForwardFlops(
        blocks=2.0 * spec.layers * block_matmul_parameters(spec),
        attention=2.0
        * spec.layers
        * products_per_key
        * mean_keys_seen(seq_len, spec.sliding_window),
        lm_head=2.0 * spec.hidden * spec.vocabulary,
    )


def flops_per_token(spec: ModelSpec, seq_len: int, recompute: bool = False) -> float:
    """Operations of forward and backward per trained token, in the module's convention.

    `recompute` adds the second forward of the blocks that full gradient checkpointing costs; a
    comparison of runs leaves it out, since it buys memory and no learning. At their full context:
    kl3m-007-500m 4.98e9, kl3m-006-170m 1.59e9, kl3m-002-520m 1.76e9 (6.40e9, 1.94e9 and 2.28e9 with
    `recompute`).
    """
    forward = forward_flops_per_token(spec, seq_len)
    training = (1 + MATMUL_BACKWARD) * (forward.blocks + forward.lm_head) + (
        1 + ATTENTION_BACKWARD
    ) * forward.attention
    return training + (forward.blocks + forward.attention if recompute else 0.0)


def model_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Operations that forward and backward need per trained token, three times forward: those of an
    MFU.

    Nothing that is computed again counts. At their full context: kl3m-007-500m 4.70e9,
    kl3m-006-170m 1.51e9, kl3m-002-520m 1.76e9.
    """
    return 3.0 * forward_flops_per_token(spec, seq_len).total


def palm_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """6 N + 12 L H T of PaLM (arXiv:2204.02311, appendix B): for comparing an MFU with figures
    published elsewhere.

    N is every active parameter that acts on a token: norms and LM head count, an untied embedding
    does not. H is heads × head_size. Attention is counted as if every position saw all T others, so
    no causality and no window, and without the recomputed scores: for kl3m-007-500m 6.40e9, 28%
    more than `flops_per_token` and 36% more than three causal forwards.
    """
    norms = (2 * spec.layers + 1) * spec.hidden
    parameters = spec.layers * block_matmul_parameters(spec) + norms + spec.hidden * spec.vocabulary
    return 6.0 * parameters + 12.0 * spec.layers * spec.heads * spec.head_size * seq_len


def muon_flops_per_step(spec: ModelSpec, ns_steps: int) -> float:
    """Operations of Muon's Newton-Schulz iteration in one optimizer step, over every matrix of
    every block.

    A step of the iteration on an m × n matrix, m <= n, is three products: 4·m²·n + 2·m³. It does
    not depend on the batch: for kl3m-007-500m 5.9e12, as much as 1,200 tokens, nothing beside the
    card's 655,360 and most of the work at a few hundred.
    """
    query, key, experts = (
        spec.heads * spec.head_size,
        spec.kv_heads * spec.head_size,
        max(1, spec.experts),
    )
    per_step = 0.0
    for width, count in (
        (query, 2),
        (key, 2),
        (spec.mlp, 3 * experts),
    ):  # of matrices between the hidden state and this width
        short, long = sorted((width, spec.hidden))
        per_step += count * (4.0 * short**2 * long + 2.0 * short**3)
    return spec.layers * ns_steps * per_step


def run_flops(profile: Profile, steps: ArrayLike, tokens: ArrayLike) -> ArrayLike:
    """Operations of a run after `steps` optimizer steps on `tokens` tokens: forward, backward and
    Newton-Schulz.

    Left out are recomputation, evaluations, the clamp, and what is done elementwise. A skipped step
    counts as a whole one.
    """
    per_token = flops_per_token(profile.model, profile.data.seq_len)
    return tokens * per_token + steps * muon_flops_per_step(
        profile.model, profile.optimizer.ns_steps
    )
