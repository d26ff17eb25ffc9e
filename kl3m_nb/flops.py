"""Floating-point operations per token of a decoder: what a run's `flops` column, MFU, HFU and the growth speedups count.

Convention, everywhere in the project unless a function says otherwise: a multiply-add is 2 operations; only matrix products
count (blocks, attention scores and values, router, LM head), not norms, activations, softmax or the embedding lookup; causal
attention is counted exactly, position i sees min(i + 1, window) keys; of the experts only the active ones count. Backward is
twice forward, but 2.5 times for attention: FlashAttention-like kernels compute the scores again, so 5 products stand against 2.

Model FLOPs utilisation (MFU) counts what the model asks for, twice forward for attention too (`model_flops_per_token`); hardware
FLOPs utilisation (HFU) what is computed, recomputed scores and gradient checkpointing included (`flops_per_token`). The two names
are PaLM's (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import ArrayLike

from kl3m_nb.profiles import ModelSpec, Profile

MATMUL_BACKWARD = 2.0  # backward / forward of a matrix product: one product for the input's gradient, one for the weight's
ATTENTION_BACKWARD = 2.5  # 5 products against 2 (FlashAttention, arXiv:2205.14135: scores are recomputed)


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
    """Weights of one block that multiply a token: q, k, v, o and the MLP, or the router and the active experts."""
    query_width = spec.heads * spec.head_size
    key_width = spec.kv_heads * spec.head_size
    attention = 2 * spec.hidden * query_width + 2 * spec.hidden * key_width
    mlp = 3 * spec.hidden * spec.mlp
    if spec.experts:
        return attention + spec.active_experts * mlp + spec.hidden * spec.experts
    return attention + mlp


def mean_keys_seen(seq_len: int, sliding_window: int = 0) -> float:
    """Keys a position attends to, itself included, averaged over a causal sequence; `sliding_window` 0 means no window."""
    window = min(sliding_window or seq_len, seq_len)
    keys = window * (window + 1) // 2 + (seq_len - window) * window
    return keys / seq_len


def forward_flops_per_token(spec: ModelSpec, seq_len: int) -> ForwardFlops:
    """Forward operations per token for sequences of `seq_len` tokens, in the module's convention."""
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1.")
    products_per_key = 2 * spec.heads * spec.head_size
    return ForwardFlops(
        blocks=2.0 * spec.layers * block_matmul_parameters(spec),
        attention=2.0 * spec.layers * products_per_key * mean_keys_seen(seq_len, spec.sliding_window),
        lm_head=2.0 * spec.hidden * spec.vocabulary,
    )


def flops_per_token(spec: ModelSpec, seq_len: int, recompute: bool = False) -> float:
    """Operations of forward and backward per trained token, in the module's convention.

    `recompute` adds the second forward of the blocks that full gradient checkpointing costs; a comparison of runs leaves it out,
    since it buys memory and no learning. At their full context: kl3m-007-500m 4.98e9, kl3m-006-170m 1.59e9, kl3m-002-520m 1.76e9
    (6.40e9, 1.94e9 and 2.28e9 with `recompute`).
    """
    forward = forward_flops_per_token(spec, seq_len)
    training = (1 + MATMUL_BACKWARD) * (forward.blocks + forward.lm_head) + (1 + ATTENTION_BACKWARD) * forward.attention
    return training + (forward.blocks + forward.attention if recompute else 0.0)


def model_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Operations that forward and backward need per trained token, three times forward: those of an MFU.

    Nothing that is computed again counts. At their full context: kl3m-007-500m 4.70e9, kl3m-006-170m 1.51e9, kl3m-002-520m
    1.76e9.
    """
    return 3.0 * forward_flops_per_token(spec, seq_len).total


def palm_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """6 N + 12 L H T of PaLM (arXiv:2204.02311, appendix B): for comparing an MFU with figures published elsewhere.

    N is every active parameter that acts on a token: norms and LM head count, an untied embedding does not. H is heads ×
    head_size. Attention is counted as if every position saw all T others, so no causality and no window, and without the
    recomputed scores: for kl3m-007-500m 6.40e9, 28% more than `flops_per_token` and 36% more than three causal forwards.
    """
    norms = (2 * spec.layers + 1) * spec.hidden
    parameters = spec.layers * block_matmul_parameters(spec) + norms + spec.hidden * spec.vocabulary
    return 6.0 * parameters + 12.0 * spec.layers * spec.heads * spec.head_size * seq_len


def muon_flops_per_step(spec: ModelSpec, ns_steps: int) -> float:
    """Operations of Muon's Newton-Schulz iteration in one optimizer step, over every matrix of every block.

    A step of the iteration on an m × n matrix, m <= n, is three products: 4·m²·n + 2·m³. It does not depend on the batch: for
    kl3m-007-500m 5.9e12, as much as 1,200 tokens, nothing beside the card's 655,360 and most of the work at a few hundred.
    """
    query, key, experts = spec.heads * spec.head_size, spec.kv_heads * spec.head_size, max(1, spec.experts)
    per_step = 0.0
    for width, count in ((query, 2), (key, 2), (spec.mlp, 3 * experts)):  # of matrices between the hidden state and this width
        short, long = sorted((width, spec.hidden))
        per_step += count * (4.0 * short**2 * long + 2.0 * short**3)
    return spec.layers * ns_steps * per_step


def run_flops(profile: Profile, steps: ArrayLike, tokens: ArrayLike) -> ArrayLike:
    """Operations of a run after `steps` optimizer steps on `tokens` tokens: forward, backward and Newton-Schulz.

    Left out are recomputation, evaluations, the clamp, and what is done elementwise. A skipped step counts as a whole one.
    """
    per_token = flops_per_token(profile.model, profile.data.seq_len)
    return tokens * per_token + steps * muon_flops_per_step(profile.model, profile.optimizer.ns_steps)
