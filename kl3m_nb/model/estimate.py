"""What a run will need, before it begins: memory by part, operations, time, on this machine or on a
named GPU.

Everything follows from a profile's numbers, so the real models are estimated on any laptop in no
time. Memory and operations are those of `costs`. On a GPU of `GPUS`, this
machine's or a named one, the time is the sum of three: matrix products at 80% of the data sheet's
rate, attention at 40% of it, and what the element-wise work moves at 90% of the memory's rate. The
shares, and the bytes moved, are what was measured on an H200 for single operations of kl3m-007-500m
in bfloat16. Whole training steps reached 105% of the speed that follows for the 500M there and 103%
for the 170M, with a faster attention than the one that the share is of, and 85% for the 520M, from
which the bytes that a mixture moves to route its tokens were taken. Take a GPU's time as good to a
quarter. In float32 twice the bytes are moved, and products run at half the rate in TF32. Any other
machine's rate is measured, with one product.

Windows are taken as full: where segments are padded, fewer tokens have a label. A sliding window
saves time with flash-attn alone; to sdpa it is a mask, and all keys are computed, as is assumed for
a named GPU unless the profile asks for flash-attn.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kl3m_nb.common.text import clock, table_html
from kl3m_nb.model import costs
from kl3m_nb.model.costs import (
    USABLE,
    StepMemory,
    count_parameters,
    largest_micro_batch,
    step_memory,
)
from kl3m_nb.model.runtime import Runtime, choose_runtime, device_memory
from kl3m_nb.profiles import ModelSpec, Profile, RuntimeSpec, warmup_remark

_GIB = 2**30


_PRODUCTS, _ATTENTION, _MEMORY = (
    0.80,
    0.40,
    0.90,
)  # shares of the data sheet's rates; 790 of 989 TFLOP/s on an H200


_HERE = 0.45  # share of the speed of large matrix products that a training step reaches


# Bytes that the element-wise work of a block moves per token and unit of `_block_elements`: for
# kl3m-007 1.63 GB forward and 3.70 GB backward at 5 × 4096; compiled per block 56% of that.
_MOVED_FORWARD, _MOVED_BACKWARD, _MOVED_COMPILED = 3.24, 7.35, 0.56


_LOGITS_MOVED = 16  # bytes per token and vocabulary entry, with the element-wise work fused


_TF32 = 0.5  # rate of products in TF32, relative to bfloat16


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: dense products in bfloat16 and float32 (operations a second), memory
    traffic (bytes a second), memory.

    `reported` is its name as the driver gives it: a sibling of less bandwidth, or a slice of one,
    has another.
    """

    name: str
    reported: str
    products: float
    float32_products: float
    traffic: float
    memory: int


GPUS = {
    "h200": Gpu("NVIDIA H200", "NVIDIA H200", 989e12, 67e12, 4.8e12, 141 * 10**9),
    "h100": Gpu("NVIDIA H100 SXM", "NVIDIA H100 80GB HBM3", 989e12, 67e12, 3.35e12, 80 * 10**9),
    "a100": Gpu("NVIDIA A100 80 GB", "NVIDIA A100-SXM4-80GB", 312e12, 19.5e12, 2.04e12, 80 * 10**9),
    "l40s": Gpu("NVIDIA L40S", "NVIDIA L40S", 362e12, 91.6e12, 0.864e12, 48 * 10**9),
    "4090": Gpu("NVIDIA RTX 4090", "NVIDIA GeForce RTX 4090", 165e12, 82.6e12, 1.01e12, 24 * 10**9),
}


def data_sheet(reported: str) -> Gpu | None:
    """The GPU of `GPUS` whose driver gives it the name `reported`; None when its data sheet is not
    there.
    """
    return next((gpu for gpu in GPUS.values() if gpu.reported == reported), None)


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, work in floating-point operations, time in seconds. `memory` is a step's as
    it will be carried out.

    `kept` and `recomputed` are the same step without and with gradient checkpointing,
    `largest_kept` and `largest_recomputed` the most windows that fit into `device_bytes` each way
    (0: not one). `assumed` says in words what the time holds for.
    """

    profile: str
    device: str
    device_bytes: int
    precision: str
    parameters: int
    active_parameters: int
    recompute: bool
    kept: StepMemory
    recomputed: StepMemory
    largest_kept: int
    largest_recomputed: int
    flops_per_token: float
    model_flops_per_token: float
    palm_flops_per_token: float
    tokens_per_second: float
    tokens_per_step: int
    max_steps: int
    assumed: str
    remark: str  # of a run that ends before its warmup; else empty

    @property
    def memory(self) -> int:
        """Bytes at the peak of a step."""
        return (self.recomputed if self.recompute else self.kept).total

    @property
    def fits(self) -> bool:
        """Whether a step leaves the device the tenth that allocators need."""
        return self.memory <= USABLE * self.device_bytes

    @property
    def seconds(self) -> float:
        """Of all training steps; evaluations and checkpoints come on top."""
        return self.max_steps * self.tokens_per_step / self.tokens_per_second

    def sentence(self) -> str:
        """The two numbers that decide whether to start."""
        return (
            f"{self.profile} for {self.max_steps:,} steps of {self.tokens_per_step:,} tokens needs"
            f" about {self.memory / _GIB:.1f} GiB of memory and {clock(self.seconds)} on this"
            f" machine ({self.device})"
        )

    def table(self) -> dict[str, str]:
        """Every figure in words, for a shell or a notebook."""
        active = (
            f", {self.active_parameters:,} of them active per token"
            if self.active_parameters < self.parameters
            else ""
        )
        states = (
            f"{_gib(self.kept.weights)} + {_gib(self.kept.gradients)} +"
            f" {_gib(self.kept.optimizer_states)} GiB"
        )
        chosen = "with" if self.recompute else "without"
        return {
            "profile": self.profile,
            "on": f"{self.device}, {_gib(self.device_bytes)} GiB, {self.precision}",
            "parameters": f"{self.parameters:,}{active}",
            "weights + gradients + optimizer": states,
            "activations": (
                f"{_gib(self.kept.activations)} GiB, {_gib(self.recomputed.activations)} with"
                " gradient checkpointing"
            ),
            "logits": f"{_gib(self.kept.logits)} GiB",
            "a step": (
                f"{_gib(self.memory)} GiB, {chosen} gradient"
                f" checkpointing{'' if self.fits else ': does not fit'}"
            ),
            "largest micro_batch that fits": (
                f"{self.largest_kept}, {self.largest_recomputed} with gradient checkpointing"
            ),
            "operations per token": (
                f"{self.flops_per_token / 1e9:.2f} GFLOP computed, attention causal and its scores"
                f" twice, as an HFU counts; {self.model_flops_per_token / 1e9:.2f} needed, as an"
                f" MFU counts; {self.palm_flops_per_token / 1e9:.2f} in PaLM's convention, 6N +"
                " 12LHT"
            ),
            "tokens per second": (
                f"{self.tokens_per_second:,.{0 if self.tokens_per_second >= 10 else 1}f}"
            ),
            "a run": (
                f"{self.max_steps:,} steps of {self.tokens_per_step:,} tokens:"
                f" {clock(self.seconds)}"
            ),
            "assumed": self.assumed,
            **({"warning": self.remark} if self.remark else {}),
        }

    def _repr_html_(self) -> str:
        return table_html(self.table())


def estimate(profile: Profile, gpu: str = "") -> Estimate:
    """Sizes and time of training `profile` on this machine, or on one of `GPUS`; nothing of the
    model is allocated.

    Raises ValueError for a GPU that is not known.
    """
    if gpu and gpu not in GPUS:
        raise ValueError(
            f"The GPU {gpu!r} is not known; choose one of {', '.join(GPUS)}, or none for this"
            " machine."
        )
    sheet: Gpu | None
    if gpu:
        sheet, runtime = GPUS[gpu], _runtime_on_a_gpu(profile.runtime)
        device, device_bytes = sheet.name, sheet.memory
    else:
        runtime = choose_runtime(profile)
        on_gpu = runtime.device.type == "cuda"
        device = torch.cuda.get_device_name(runtime.device) if on_gpu else "CPU"
        sheet, device_bytes = data_sheet(device), device_memory(runtime.device)
    precision, compiled = runtime.precision, runtime.compile_blocks
    kept, recomputed = (
        step_memory(profile, precision, compiled, recompute) for recompute in (False, True)
    )
    largest = [
        largest_micro_batch(profile, device_bytes, precision, compiled, recompute)
        for recompute in (False, True)
    ]
    recompute = profile.runtime.gradient_checkpointing == "on"
    if profile.runtime.gradient_checkpointing == "auto":
        recompute = largest[0] < profile.data.micro_batch
    count = count_parameters(profile.model)
    seconds = (
        _seconds_on_gpu(profile, sheet, runtime, recompute)
        if sheet
        else _seconds_here(profile, runtime, recompute)
    )
    return Estimate(
        profile=profile.name,
        device=device,
        device_bytes=device_bytes,
        precision=precision,
        parameters=count.total,
        active_parameters=count.active,
        recompute=recompute,
        kept=kept,
        recomputed=recomputed,
        largest_kept=largest[0],
        largest_recomputed=largest[1],
        flops_per_token=costs.flops_per_token(profile.model, profile.data.seq_len, recompute),
        model_flops_per_token=costs.model_flops_per_token(profile.model, profile.data.seq_len),
        palm_flops_per_token=costs.palm_flops_per_token(profile.model, profile.data.seq_len),
        tokens_per_second=profile.tokens_per_step / seconds,
        tokens_per_step=profile.tokens_per_step,
        max_steps=profile.schedule.max_steps,
        assumed=_assumed(profile, runtime),
        remark=warmup_remark(profile.schedule),
    )


def _runtime_on_a_gpu(asked: RuntimeSpec) -> Runtime:
    """What `choose_runtime` chooses where there is a GPU and no flash-attn; gradient checkpointing
    is decided by its memory.
    """
    return Runtime(
        device=torch.device("cuda"),
        precision="bfloat16" if asked.precision == "auto" else asked.precision,
        attention="sdpa" if asked.attention == "auto" else asked.attention,
        compile_blocks=asked.compile != "off",
        recompute=False,
        tf32=asked.tf32 != "off",
    )


def _seconds_on_gpu(profile: Profile, gpu: Gpu, runtime: Runtime, recompute: bool) -> float:
    """Of one optimizer step."""
    spec, rate = profile.model, _rate(gpu, runtime.precision, runtime.tf32)
    moved = (1 + recompute) * _MOVED_FORWARD + _MOVED_BACKWARD
    moved *= (
        (_MOVED_COMPILED if runtime.compile_blocks else 1.0)
        * spec.layers
        * _block_elements(spec)
        * 2
    )
    if runtime.precision == "float32":
        moved *= 2
    moved += _LOGITS_MOVED * spec.vocabulary
    products, attention = _operations_per_token(profile, runtime, recompute)
    per_token = (
        products / (_PRODUCTS * rate)
        + attention / (_ATTENTION * rate)
        + moved / (_MEMORY * gpu.traffic)
    )
    iterating = _rate(
        gpu, profile.optimizer.ns_precision, runtime.tf32
    )  # in bfloat16 whatever the model's, unless it is named
    orthogonalising = costs.muon_flops_per_step(spec, profile.optimizer.ns_steps) / (
        _ATTENTION * iterating
    )
    return profile.tokens_per_step * per_token + orthogonalising


def _rate(gpu: Gpu, precision: str, tf32: bool) -> float:
    """Of products, in operations a second."""
    if precision != "float32":
        return gpu.products
    return _TF32 * gpu.products if tf32 else gpu.float32_products


def _seconds_here(profile: Profile, runtime: Runtime, recompute: bool) -> float:
    """Of one optimizer step."""
    work = profile.tokens_per_step * sum(_operations_per_token(profile, runtime, recompute))
    work += costs.muon_flops_per_step(profile.model, profile.optimizer.ns_steps)
    return work / (_HERE * _matmul_speed(runtime.device, runtime.precision))


def _operations_per_token(
    profile: Profile, runtime: Runtime, recompute: bool
) -> tuple[float, float]:
    """Forward and backward, of matrix products and of attention, as they are carried out."""
    spec, seq_len = profile.model, profile.data.seq_len
    forward = costs.forward_flops_per_token(spec, seq_len)
    attention = forward.attention
    if _window_is_a_mask(profile, runtime):
        attention *= seq_len / costs.mean_keys_seen(seq_len, spec.sliding_window)
    products = (1 + costs.MATMUL_BACKWARD) * (
        forward.blocks + forward.lm_head
    ) + recompute * forward.blocks
    return products, (1 + costs.ATTENTION_BACKWARD + recompute) * attention


def _window_is_a_mask(profile: Profile, runtime: Runtime) -> bool:
    return (
        0 < profile.model.sliding_window < profile.data.seq_len
        and runtime.attention != "flash_attention_2"
    )


def _assumed(profile: Profile, runtime: Runtime) -> str:
    text = "full windows"
    if profile.data.packing == "segments":
        text += " (this profile pads its segments: fewer tokens have a label)"
    if _window_is_a_mask(profile, runtime):
        window, keys = profile.model.sliding_window, profile.data.seq_len
        text += (
            f", attention over all {keys:,} keys: without flash-attn the window of {window} is a"
            " mask"
        )
    return text


def _block_elements(spec: ModelSpec) -> float:
    routed = (
        7 * spec.hidden * spec.active_experts
    )  # sorted by expert, weighted and sorted back; measured for kl3m-002-520m
    return 12 * spec.hidden + 3.5 * spec.mlp * max(1, spec.active_experts) + routed


def estimate_table(profiles: list[Profile], gpus: list[str]) -> list[dict[str, str]]:
    """A row per profile and GPU, the figures that are compared: for a table in a notebook or a
    text.
    """
    rows = []
    for profile in profiles:
        for gpu in gpus:
            needed = estimate(profile, gpu)
            rows.append(
                {
                    "profile": profile.name,
                    "on": needed.device,
                    "GiB a step": _gib(needed.memory),
                    "gradient checkpointing": "yes" if needed.recompute else "no",
                    "largest micro_batch": str(
                        needed.largest_recomputed if needed.recompute else needed.largest_kept
                    ),
                    "tokens/s": f"{needed.tokens_per_second:,.0f}",
                    "days": f"{needed.seconds / 86_400:.1f}",
                }
            )
    return rows


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}" if size < 10 * _GIB else f"{size / _GIB:.0f}"


def _matmul_speed(device: torch.device, precision: str) -> float:
    """Operations per second of a matrix product here, the best of four."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(
        side,
        side,
        device=device,
        dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32,
    )
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        product = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * product.numel() * side / best
