"""What a run will need, before it begins: memory by part, operations, and how long this machine would take.

Parameters are counted on the meta device, so the real models can be estimated on any laptop. Activations follow a formula
fitted to a measured run (120 layers, micro-batch 5 × 4096, eager, bfloat16 autocast: 60 GB); treat them as good to a quarter.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kl3m_nb import flops, models, roles
from kl3m_nb.display import table_html
from kl3m_nb.profiles import Profile
from kl3m_nb.progress import clock
from kl3m_nb.runtime import choose_runtime

_EFFICIENCY = 0.45  # share of the speed of large matrix products that a training step reaches
_GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, work in floating-point operations, time in seconds on this machine."""

    profile: str
    parameters: int
    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    logits: int
    flops_per_token: float
    tokens_per_step: int
    max_steps: int
    seconds: float
    device: str

    @property
    def memory(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.gradients + self.optimizer_states + self.activations + self.logits

    def sentence(self) -> str:
        """The two numbers that decide whether to start."""
        return (
            f"{self.profile} for {self.max_steps:,} steps of {self.tokens_per_step:,} tokens needs about "
            f"{self.memory / _GIB:.1f} GiB of memory and {clock(self.seconds)} on this machine ({self.device})"
        )

    def table(self) -> dict[str, str]:
        """Every figure in words, for a shell or a notebook."""
        size = {
            name: f"{getattr(self, name) / _GIB:.2f} GiB"
            for name in ("weights", "gradients", "optimizer_states", "activations", "logits", "memory")
        }
        return {
            "profile": self.profile,
            "parameters": f"{self.parameters:,}",
            **{name.replace("_", " "): text for name, text in size.items()},
            "operations per token": f"{self.flops_per_token / 1e9:.2f} GFLOP (forward and backward, causal attention exactly)",
            "tokens per step": f"{self.tokens_per_step:,}",
            "steps": f"{self.max_steps:,}",
            "time on this machine": f"{clock(self.seconds)} ({self.device})",
        }

    def _repr_html_(self) -> str:
        return table_html(self.table())


def estimate(profile: Profile) -> Estimate:
    """Sizes and time of training `profile` on this machine; nothing of the model is allocated."""
    model = models.build_model(profile, device="meta")
    rules = roles.role_table(model, profile)
    sizes = {rule.name: _elements(rule.shape) for rule in rules}
    parameters = sum(sizes.values())
    states = sum(sizes[rule.name] * (4 if rule.optimizer == "muon" else 8) for rule in rules)
    runtime = choose_runtime(profile.runtime)
    width = 2 if runtime.precision == "bfloat16" else 4
    spec, data = profile.model, profile.data
    micro_tokens = data.micro_batch * data.seq_len
    per_layer = micro_tokens * (12 * spec.hidden + 7 * spec.mlp // 2 * max(1, spec.active_experts)) * width
    checkpointed = profile.runtime.gradient_checkpointing
    activations = per_layer + spec.layers * micro_tokens * spec.hidden * 4 if checkpointed else spec.layers * per_layer
    per_token = flops.flops_per_token(spec, data.seq_len, recompute=checkpointed)
    work = per_token * profile.tokens_per_step * profile.schedule.max_steps
    return Estimate(
        profile=profile.name,
        parameters=parameters,
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer_states=states,
        activations=activations,
        logits=2 * 4 * min(profile.objective.chunk_tokens, micro_tokens) * spec.vocabulary,
        flops_per_token=per_token,
        tokens_per_step=profile.tokens_per_step,
        max_steps=profile.schedule.max_steps,
        seconds=work / (_matmul_speed(runtime.device, runtime.precision) * _EFFICIENCY),
        device=runtime.device.type.upper(),
    )


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _matmul_speed(device: torch.device, precision: str) -> float:
    """Operations per second of a matrix product here, the best of three."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        product = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * product.numel() * side / best
