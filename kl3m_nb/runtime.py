"""What this machine offers and what is chosen from it: device, precision, attention, compilation. Chosen once, and logged."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch
from torch import nn

from kl3m_nb.profiles import RuntimeSpec


@dataclass(frozen=True)
class Runtime:
    """The resolved choices of a run. `precision` bfloat16 means autocast over float32 master weights."""

    device: torch.device
    precision: str  # float32 | bfloat16
    attention: str  # sdpa | flash_attention_2 | eager
    compile_blocks: bool

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context every forward pass runs in."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def describe(self) -> str:
        """One line for a log or a notebook."""
        place = (
            torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        compiled = "compiled per block" if self.compile_blocks else "not compiled"
        return f"{place} · {self.precision} · attention {self.attention} · {compiled} · torch {torch.__version__}"


def choose_runtime(spec: RuntimeSpec) -> Runtime:
    """Resolves every "auto" of `spec` for this machine.

    bfloat16 is chosen on a GPU that has it and never on a CPU, where it only helps with special instructions. Raises ValueError
    when something is asked for that this machine does not have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    precision = spec.precision
    if precision == "auto":
        precision = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"
    has_flash = on_gpu and precision == "bfloat16" and importlib.util.find_spec("flash_attn") is not None
    attention = spec.attention
    if attention == "auto":
        attention = "flash_attention_2" if has_flash else "sdpa"
    elif attention == "flash_attention_2" and not has_flash:
        raise ValueError("attention flash_attention_2 needs a GPU, bfloat16 and the flash-attn package; choose auto or sdpa.")
    if on_gpu and precision == "float32":
        torch.set_float32_matmul_precision("high")  # TF32: the remaining float32 products of a GPU run
    return Runtime(device, precision, attention, compile_blocks=spec.compile == "on" or (spec.compile == "auto" and on_gpu))


def versions() -> str:
    """One line that names what a notebook ran on: Python, the libraries that decide results, and the machine."""
    names = ("torch", "transformers", "datasets", "papermill")
    libraries = " · ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"Python {platform.python_version()} · {libraries} · {platform.machine()}, {torch.get_num_threads()} threads"


def prepare_model(model: nn.Module, runtime: Runtime, gradient_checkpointing: bool) -> nn.Module:
    """Moves `model` to the device and applies the choices to its blocks, in place.

    Each block is compiled on its own: compiling the whole Hugging Face model forces an explicit mask into attention.
    """
    model.to(runtime.device)
    if gradient_checkpointing:
        # transformers 5.23 renamed the call; the older name serves 5.17 to 5.22
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if runtime.compile_blocks:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model
