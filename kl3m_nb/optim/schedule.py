"""The learning-rate schedule and the clipping of the global gradient norm.

`lr_factor` multiplies the peak LR of every parameter group, Muon's and AdamW's alike.
`AdaptiveClip` follows the kl3m-007 card, "Adaptive clipping, max 64, coeff 2.0, beta 0.9": the
threshold is a multiple of a running mean of past norms. The mean takes in the *clipped* norm, so
one spike cannot raise the threshold for the steps after it by more than the coefficient allows. How
the mean starts is inferred: from the first norms, so that the clip is in force while the learning
rate warms up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kl3m_nb.profiles import ScheduleSpec

CLIP_MODES = ("adaptive", "fixed", "off")


_LARGEST_NORM = math.sqrt(
    torch.finfo(torch.float32).max
)  # the square of a larger one overflows in AdamW's second moment


def lr_factor(step: int, spec: ScheduleSpec, first_step: int = 0) -> float:
    """Factor of the peak learning rate for the update number `step`, counted from 0.

    Linear warmup reaches 1 at the update `warmup_steps - 1` (the first update is already above
    zero), then half a cosine falls to `min_lr_ratio` at `max_steps` and stays there. Fresh
    optimizers that begin at `first_step` get a warmup of their own from there, below the schedule.
    Raises ValueError for a negative step.
    """
    if step < 0:
        raise ValueError(f"The step is {step}; updates are counted from 0.")
    warmup = (step - first_step + 1) / max(1, spec.warmup_steps)
    if step >= spec.max_steps:
        return min(warmup, spec.min_lr_ratio)
    if step < spec.warmup_steps:
        return warmup
    progress = (step - spec.warmup_steps) / (spec.max_steps - spec.warmup_steps)
    return min(
        warmup,
        spec.min_lr_ratio + (1.0 - spec.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)),
    )


@dataclass(frozen=True)
class ClipOutcome:
    """What clipping saw and did at one step. `threshold` is infinite in the mode "off".

    `finite` speaks of norm and loss. It is False as well for a norm whose square overflows in
    float32: an optimizer would turn it into a non-finite weight.
    """

    norm: float
    threshold: float
    clipped: bool
    finite: bool


class AdaptiveClip:
    """Clips the global gradient norm in the mode of `spec`.

    * `adaptive`: threshold_t = min(max_norm, coefficient · mean_{t-1}), mean_t the running mean of
      min(norm, threshold) up to t with Adam's bias correction: EMA_t / (1 - β^t), EMA_t =
      β·EMA_{t-1} + (1-β)·min(norm_t, threshold_t), EMA_0 = 0. So it is in force from the second
      norm on; only the first threshold is `max_norm`. A norm of exactly zero, a step without any
      gradient, is not counted: it says nothing of the next, and as the first it would shut the clip
      for good.
    * `fixed`: threshold `max_norm` at every step.
    * `off`: the norm is measured, gradients stay as they are.
    """

    def __init__(self, spec: ScheduleSpec) -> None:
        """Raises ValueError for an unknown mode, a maximum or coefficient that is not positive, or
        a beta outside [0, 1).
        """
        if spec.clip_mode not in CLIP_MODES:
            raise ValueError(
                f"The clip mode is {spec.clip_mode!r}; it must be one of {', '.join(CLIP_MODES)}."
            )
        if not spec.clip_max_norm > 0 or not spec.clip_coefficient > 0:
            raise ValueError(
                f"clip_max_norm is {spec.clip_max_norm} and clip_coefficient"
                f" {spec.clip_coefficient}; both must be above zero."
            )
        if not 0.0 <= spec.clip_beta < 1.0:
            raise ValueError(f"clip_beta is {spec.clip_beta}; it must lie in [0, 1).")
        self.spec = spec
        self.norm_mean = (
            spec.clip_max_norm / spec.clip_coefficient
        )  # stands for the first threshold; the first norm replaces it
        self.norms: float = 0  # counted so far

    @property
    def threshold(self) -> float:
        """The norm above which the next step will be clipped."""
        if self.spec.clip_mode == "off":
            return math.inf
        if self.spec.clip_mode == "fixed":
            return self.spec.clip_max_norm
        return min(self.spec.clip_max_norm, self.spec.clip_coefficient * self.norm_mean)

    @torch.no_grad()
    def clip_(
        self,
        parameters: Iterable[nn.Parameter],
        norm: float | Tensor | None = None,
        loss: float = 0.0,
    ) -> ClipOutcome:
        """Scale the gradients of `parameters` in place so that their global 2-norm is at most the
        threshold.

        `norm` is the global norm when the caller has it already, for instance summed over ranks;
        otherwise it is computed here. A non-finite norm, or `loss` of the step, changes neither the
        gradients nor the EMA: the outcome has `finite=False`; skip the step.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = float(global_norm(gradients) if norm is None else norm)
        threshold = self.threshold
        if not (norm <= _LARGEST_NORM and math.isfinite(loss)):
            return ClipOutcome(norm, threshold, clipped=False, finite=False)
        clipped = norm > threshold
        if clipped and gradients:
            torch._foreach_mul_(gradients, threshold / norm)
        if self.spec.clip_mode == "adaptive" and norm > 0.0:
            self.norms += 1
            beta = self.spec.clip_beta
            share = (1.0 - beta) / (
                1.0 - beta**self.norms
            )  # of this norm in EMA / (1 - β^t), taken step by step
            self.norm_mean = (1.0 - share) * self.norm_mean + share * min(norm, threshold)
        return ClipOutcome(norm, threshold, clipped, finite=True)

    def state_dict(self) -> dict[str, float]:
        """The running mean and how many norms are in it, for a checkpoint; the settings come from
        the profile.
        """
        return {"norm_ema": self.norm_mean, "norms": self.norms}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Inverse of `state_dict`. A state of earlier versions has a mean without bias correction
        and goes on without one.
        """
        self.norm_mean, self.norms = state["norm_ema"], state.get("norms", math.inf)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """2-norm over all elements of `gradients`, a 0-d float32 tensor (float64 for float64
    gradients); 0 for an empty list.
    """
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(
        torch.stack(
            [
                norm.to(norms[0].device, torch.promote_types(norm.dtype, torch.float32))
                for norm in norms
            ]
        )
    )
