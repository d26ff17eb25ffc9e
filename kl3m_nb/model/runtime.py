"""What this machine offers and what is chosen from it: device, precision, attention, compilation,
gradient checkpointing.

Chosen once, from a profile's "auto" or its word, and logged.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend
from transformers import PreTrainedModel

from kl3m_nb.common import distributed
from kl3m_nb.model import flash_attention
from kl3m_nb.model.costs import USABLE, step_memory
from kl3m_nb.model.experts import use_grouped_experts
from kl3m_nb.model.fused_projections import fuse_projections
from kl3m_nb.profiles import Profile

# of a micro-batch, from which on the GPU is slower than the host that prepares its calls
_FLASH_ATTENTION_4_TOKENS = 40_960


_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # what a container or a batch job may use


@dataclass(frozen=True)
class Runtime:
    """The resolved choices of a run. `precision` bfloat16 means autocast over float32 master
    weights.
    """

    device: torch.device
    precision: str  # float32 | bfloat16
    attention: str  # sdpa | flash_attention_2 | eager | flash_attention.IMPLEMENTATION
    compile_blocks: bool
    recompute: bool  # gradient checkpointing: activations are computed again in the backward pass
    tf32: bool
    # that torch takes for sdpa: cudnn_attention | flash_attention | efficient_attention | math
    kernel: str = ""

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context every forward pass runs in."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def describe(self) -> str:
        """One line for a log or a notebook."""
        place = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"CPU, {_threads()}"
        )
        attention = (
            "flash_attention_4"
            if self.attention == flash_attention.IMPLEMENTATION
            else self.attention
        )
        return " · ".join(
            (
                place,
                self.precision + (" with TF32" if self.tf32 else ""),
                f"attention {attention}" + (f" ({self.kernel})" if self.kernel else ""),
                "compiled per block" if self.compile_blocks else "not compiled",
                "gradient checkpointing" if self.recompute else "no gradient checkpointing",
                f"torch {torch.__version__}",
            )
        )


def choose_runtime(profile: Profile) -> Runtime:
    """Resolves every "auto" of `profile.runtime` for this machine.

    bfloat16 is chosen on a GPU that has it and never on a CPU, where it only helps with special
    instructions. Gradient checkpointing is switched on when a step would not fit into the device's
    memory without it, and only then: it costs a third of the forward pass. Raises ValueError when
    something is asked for that this machine does not have.
    """
    spec = profile.runtime
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    precision = spec.precision
    if precision == "auto":
        # not emulated, which a V100 or T4 offers too and is slower there than float32
        precision = (
            "bfloat16"
            if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            else "float32"
        )
    compiled = spec.compile == "on" or (spec.compile == "auto" and on_gpu)
    recompute = spec.gradient_checkpointing == "on"
    if spec.gradient_checkpointing == "auto":
        shards = distributed.world().size if spec.parallel == "fsdp" else 1
        recompute = step_memory(
            profile, precision, compiled, False, shards
        ).total > USABLE * device_memory(device)
    attention = _choose_attention(profile, device, precision)
    kernel = _sdpa_kernel(profile, device, precision) if attention == "sdpa" else ""
    return Runtime(
        device, precision, attention, compiled, recompute, _choose_tf32(spec.tf32, on_gpu), kernel
    )


def _choose_attention(profile: Profile, device: torch.device, precision: str) -> str:
    """FlashAttention where it is the fastest that is at hand and needs no mask, else sdpa, in which
    torch picks a kernel.

    On Hopper that kernel is cuDNN's: of kl3m-007 at 5 × 4096 it takes 0.93 ms a layer forward and
    backward, FlashAttention 2 1.46 and 4 0.78. But to prepare the calls of the latter keeps the
    host busy for longer than so small a micro-batch does the GPU. A sliding window needs a mask in
    sdpa, and none in flash_attention_2. A mask of padding in turn makes the host wait there, and
    keeps documents apart in one row only.
    """
    asked, spec, data = profile.runtime.attention, profile.model, profile.data
    in_bfloat16 = device.type == "cuda" and precision == "bfloat16"
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    unmasked = data.packing == "dense" and data.document_borders != "mask"
    windowed = 0 < spec.sliding_window < data.seq_len
    if asked == "auto":
        if not (in_bfloat16 and unmasked):
            return "sdpa"
        as_measured = (
            spec.head_size == 64 and data.micro_batch * data.seq_len >= _FLASH_ATTENTION_4_TOKENS
        )
        if on_hopper and not windowed and as_measured and flash_attention.loads():
            return flash_attention.IMPLEMENTATION
        return (
            "flash_attention_2"
            if (windowed or not on_hopper) and _flash_attention_2_loads()
            else "sdpa"
        )
    if asked == "flash_attention_2" and not (in_bfloat16 and _flash_attention_2_loads()):
        raise ValueError(
            "attention flash_attention_2 needs a GPU, bfloat16 and a flash-attn package that loads;"
            " choose auto or sdpa."
        )
    if asked == "flash_attention_2" and data.document_borders == "mask" and data.micro_batch > 1:
        raise ValueError(
            "attention flash_attention_2 keeps documents apart in one row at a time only, and"
            f" micro_batch is {data.micro_batch}; choose auto, sdpa or micro_batch 1."
        )
    if asked != "flash_attention_4":
        return asked
    if not (on_hopper and in_bfloat16 and flash_attention.loads()):
        raise ValueError(
            "attention flash_attention_4 needs a Hopper GPU, bfloat16 and a flash-attn-4 package"
            " that loads; choose auto or sdpa."
        )
    if windowed or not unmasked:
        raise ValueError(
            "attention flash_attention_4 takes no mask and no sliding window; choose auto or sdpa."
        )
    if spec.head_size % 8 or spec.head_size > 256:
        raise ValueError(
            "attention flash_attention_4 takes a head_size that is a multiple of 8 up to 256, not"
            f" {spec.head_size}; choose auto or sdpa."
        )
    return flash_attention.IMPLEMENTATION


def _flash_attention_2_loads() -> bool:
    """Whether the package is there and its extension fits this torch: one built for another is
    found, but breaks at import.
    """
    try:
        package = importlib.import_module("flash_attn")
    except (ImportError, OSError):
        return False
    return hasattr(package, "flash_attn_func")  # flash-attn-4 alone has the same name


def _sdpa_kernel(profile: Profile, device: torch.device, precision: str) -> str:
    """The fused kernel that torch would take for the attention of one window, in lower case as
    `SDPBackend` names it.
    """
    spec, data = profile.model, profile.data
    masked = (
        data.packing == "segments"
        or data.document_borders == "mask"
        or 0 < spec.sliding_window < data.seq_len
    )
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    query, key = (
        torch.empty(
            1, heads, data.seq_len, spec.head_size, dtype=dtype, device=device, requires_grad=True
        )
        for heads in (
            spec.heads,
            spec.heads if masked else spec.kv_heads,
        )  # with a mask transformers repeats keys and values
    )
    mask = (
        torch.ones(1, 1, data.seq_len, data.seq_len, dtype=torch.bool, device=device)
        if masked
        else None
    )
    chosen = torch._fused_sdp_choice(
        query, key, key, mask, is_causal=not masked, enable_gqa=not masked
    )
    return SDPBackend(chosen).name.lower()


def _choose_tf32(asked: str, on_gpu: bool) -> bool:
    """Whether float32 products run in TF32: the few of a bfloat16 run, or all of a float32 run on a
    GPU.
    """
    if asked == "on" and not on_gpu:
        raise ValueError("tf32 on needs an NVIDIA GPU; choose auto or off.")
    return on_gpu and asked != "off"


def device_memory(device: torch.device) -> int:
    """Bytes of memory that `device` has, for a CPU those this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _MEMORY_LIMIT.read_text().strip() if _MEMORY_LIMIT.is_file() else "max"
    return installed if limit == "max" else min(installed, int(limit))


def versions() -> str:
    """One line that names what a notebook ran on: Python, the libraries that decide results, and
    the machine.
    """
    names = ("torch", "transformers", "datasets", "papermill")
    libraries = " · ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"Python {platform.python_version()} · {libraries} · {platform.machine()}, {_threads()}"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def prepare_model(model: PreTrainedModel, runtime: Runtime) -> PreTrainedModel:
    """Moves `model` to the device and applies the choices to its blocks, in place.

    Each block, and the final norm, is compiled on its own: compiling the whole Hugging Face model
    forces an explicit mask into attention. Where it is compiled, projections that read the same
    input are one product.
    """
    model.to(runtime.device)
    if runtime.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if runtime.tf32 else "highest")
    if runtime.precision == "bfloat16":
        use_grouped_experts(model)
    if runtime.compile_blocks:
        fuse_projections(model)
        # combo_kernels: one launch for all casts of a block's weights, 2% of a layer on an H200,
        # and one for what `join` computes
        options = {"combo_kernels": True} if runtime.device.type == "cuda" else None
        for part in (*model.model.layers, model.model.norm):
            part.compile(dynamic=False, options=options)
    return model
