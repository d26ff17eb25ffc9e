"""The weight matrices of a model or checkpoint: found by name, described from the file's header, read one at a time.

A folder is never loaded as a model: `find_matrices` opens its safetensors files and keeps, for each matrix, where it lies. Roles
are those of Llama (`q_proj` … `down_proj`, `lm_head`); Mixtral's experts, fused or one by one, are matrices of the same roles
with an `expert` number. Tied weights have one vocabulary matrix, and it is the LM head.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import xxhash
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from kl3m_nb import paths
from kl3m_nb.model_folder import STACK_RECORD, TRAINED_STEPS, read_config, read_stack, weight_files
from kl3m_nb.profiles import ATTENTION_ROLES

BLOCK_ROLES = (*ATTENTION_ROLES, "gate_proj", "up_proj", "down_proj")
ROLES = (*BLOCK_ROLES, "lm_head")
UNKNOWN_STEP = -1  # the `step` of a model that does not tell how long it was trained
HEAD_LAYER = -1  # the `layer` of the LM head, which belongs to no block

Checkpoint = str | os.PathLike | torch.nn.Module

_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_STEP_NAME = re.compile(r"step-(\d+)")
_FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EXPERT_ROLES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_SEVERAL_ROLES = {"qkv_proj": "q_proj, k_proj and v_proj", "gate_up_proj": "gate_proj and up_proj"}
_DENSE_NAME = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.weight$")
_EXPERT_NAME = re.compile(r"layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight$")
_FUSED_NAME = re.compile(r"layers\.(\d+)\.\w+\.experts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that is known but not yet read. `layer` is -1 for the LM head, `expert` -1 outside a mixture."""

    layer: int
    role: str
    expert: int
    shape: tuple[int, int]
    dtype: str  # float32, bfloat16, …
    read: Callable[[], torch.Tensor]


def content_hash(weight: torch.Tensor) -> str:
    """128 bits of XXH3 over a matrix's dtype, shape and bytes: equal for equal weights, wherever they are stored.

    It guards against mistakes, not against forgery, and takes a tenth of the time of SHA-256.
    """
    weight = weight.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.view(torch.uint8).numpy())
    return digest.hexdigest()


def find_matrices(model_or_checkpoint: Checkpoint) -> list[Matrix]:
    """The matrices of a Llama or Mixtral, ordered by layer and role, the LM head last; tied weights make the embedding the head.

    Takes a Hugging Face folder (one or several safetensors files), a .safetensors file, a hub id OWNER/NAME (downloaded into
    the hub's own cache) or a module. Raises ValueError for what is not there, not readable, not such a decoder, stored in other
    than floating-point numbers, or lacks a layer or one matrix of a layer; for several roles in one matrix, and for more than one
    stack of layers.
    """
    if isinstance(model_or_checkpoint, torch.nn.Module):
        source, promised = f"The module {type(model_or_checkpoint).__name__}", 0
        tensors = _module_tensors(model_or_checkpoint)
    else:
        source = os.fspath(model_or_checkpoint)
        place = local_checkpoint(source)
        tensors, promised = _file_tensors(place), _promised_layers(place)
    _check_names(source, tensors)
    matrices, heads = [], {}
    for name, (shape, dtype, read) in tensors.items():
        if match := _DENSE_NAME.search(name):
            if match[2] in BLOCK_ROLES:
                matrices.append(Matrix(int(match[1]), match[2], -1, shape, dtype, read))
        elif match := _EXPERT_NAME.search(name):
            role = _EXPERT_ROLES.get(match[3], match[3])
            matrices.append(Matrix(int(match[1]), role, int(match[2]), shape, dtype, read))
        elif match := _FUSED_NAME.search(name):
            matrices += _split_experts(int(match[1]), match[2], shape, dtype, read)
        elif name.endswith(("lm_head.weight", "embed_tokens.weight")):
            heads[name.rsplit(".", 2)[-2]] = Matrix(HEAD_LAYER, "lm_head", -1, shape, dtype, read)
    _check_whole(source, matrices, heads, promised)
    matrices.sort(key=lambda matrix: (matrix.layer, BLOCK_ROLES.index(matrix.role), matrix.expert))
    return [*matrices, heads.get("lm_head", heads.get("embed_tokens"))]


def local_checkpoint(checkpoint: str | os.PathLike) -> Path:
    """The folder or file a checkpoint's name stands for; a hub id OWNER/NAME that is no folder here is downloaded first.

    Raises ValueError when the hub cannot be reached or has no such model.
    """
    place = paths.find(checkpoint)
    if place.exists():
        return place
    if not _HUB_ID.fullmatch(os.fspath(checkpoint)):
        return Path(checkpoint)
    try:
        return Path(huggingface_hub.snapshot_download(os.fspath(checkpoint), allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"There is no folder {checkpoint}, and the hub gave no model of that name ({type(error).__name__}); "
            "give a checkpoint folder, a .safetensors file, or the id of a model that can be downloaded."
        ) from error


def _split_experts(layer: int, name: str, shape: tuple[int, ...], dtype: str, read: Callable) -> list[Matrix]:
    # Mixtral's fused experts: gate_up_proj is (experts, 2·mlp, hidden) with the gate first, down_proj (experts, hidden, mlp).
    experts, rows, cols = shape
    parts = {"down_proj": slice(0, rows)}
    if name == "gate_up_proj":
        rows //= 2
        parts = {"gate_proj": slice(0, rows), "up_proj": slice(rows, 2 * rows)}
    return [
        Matrix(layer, role, expert, (rows, cols), dtype, lambda expert=expert, part=part: read((expert, part)))
        for role, part in parts.items()
        for expert in range(experts)
    ]


def _promised_layers(place: Path) -> int:
    """The depth that the config.json of a checkpoint gives; 0 where there is none."""
    folder = place.parent if place.is_file() else place
    return read_config(folder).get("num_hidden_layers") or 0 if (folder / "config.json").is_file() else 0


def _check_names(source: str, tensors: dict) -> None:
    places: dict[str, str] = {}  # what stands before `layers`: the first name that has it
    for name in tensors:
        if match := _DENSE_NAME.search(name) or _EXPERT_NAME.search(name) or _FUSED_NAME.search(name):
            places.setdefault(name[: match.start()], name)
            if match.re is _DENSE_NAME and match[2] in _SEVERAL_ROLES:
                raise ValueError(
                    f"{source} stores {_SEVERAL_ROLES[match[2]]} as one matrix ({name}), as Phi-3 does; "
                    "give a model that stores them apart, as Llama does."
                )
    if len(places) > 1:
        raise ValueError(
            f"{source} has more than one stack of layers ({' and '.join(list(places.values())[:2])}); give one decoder's weights."
        )


def _check_whole(source: str, matrices: list[Matrix], heads: dict, promised: int) -> None:
    if not matrices or not heads:
        raise ValueError(
            f"{source} is not a decoder this analysis knows: it needs `layers.N.self_attn` and `layers.N.mlp` projections "
            "and an embedding, named as Hugging Face's Llama and Mixtral name them."
        )
    for matrix in (*matrices, *heads.values()):
        if matrix.dtype not in _FLOAT_DTYPES.values():
            raise ValueError(
                f"{source} stores {matrix.role} of layer {matrix.layer} as {matrix.dtype}; "
                "spectra need float64, float32, float16 or bfloat16 weights, not a quantised copy."
            )
    layers: dict[int, set] = {}
    for matrix in matrices:
        layers.setdefault(matrix.layer, set()).add((matrix.role, matrix.expert))
    everything = set().union(*layers.values())
    everything |= {(role, -1) for role in BLOCK_ROLES if role not in {found for found, _ in everything}}
    if promised > max(layers) + 1:
        raise ValueError(
            f"{source} ends at layer {max(layers)}, its config.json speaks of {promised} layers; give the whole model."
        )
    for layer in range(max(layers) + 1):
        missing = everything - layers.get(layer, set())
        if missing == everything:
            raise ValueError(f"{source} has no layer {layer}, though it has a layer {max(layers)}; give the whole model.")
        if missing:
            raise ValueError(f"{source} has no {min(missing)[0]} in layer {layer}; give the whole model.")


def _module_tensors(model: torch.nn.Module) -> dict[str, tuple]:
    return {
        name: (
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            lambda index=..., tensor=tensor: tensor.detach()[index],
        )
        for name, tensor in model.named_parameters()
    }


def _file_tensors(path: Path) -> dict[str, tuple]:
    files = [path] if path.is_file() else weight_files(path)
    tensors = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); give a finished checkpoint.") from error
        names = handle.keys()
        for name in names:
            view = handle.get_slice(name)
            dtype = _FLOAT_DTYPES.get(view.get_dtype(), view.get_dtype().lower())
            tensors[name] = (tuple(view.get_shape()), dtype, lambda index=slice(None), view=view: view[index])
    return tensors


def layer_count(matrices: list[Matrix]) -> int:
    """Number of decoder blocks."""
    return 1 + max(matrix.layer for matrix in matrices)


def check_source_layers(layers: int, source_layers: int) -> int:
    """`source_layers` if `layers` is a multiple of it; raises ValueError otherwise."""
    if source_layers < 1 or layers % source_layers:
        raise ValueError(f"A model of {layers} layers is not made of copies of {source_layers}; give a divisor of {layers}.")
    return source_layers


def model_name(model_or_checkpoint: Checkpoint) -> str:
    """What a figure calls this model: its class, its folder's name, or the file's name without suffix."""
    if isinstance(model_or_checkpoint, torch.nn.Module):
        return type(model_or_checkpoint).__name__
    path = paths.find(model_or_checkpoint)
    return path.stem if path.is_file() else path.resolve().name


def model_step(model_or_checkpoint: Checkpoint) -> int:
    """Optimizer steps behind a checkpoint, -1 where nothing says.

    It is the number in `step-000200`, 0 for a fresh stack, and what `stack.json` says of a model that was trained from one.
    Raises ValueError for a `stack.json` that is broken.
    """
    if isinstance(model_or_checkpoint, torch.nn.Module):
        return UNKNOWN_STEP
    path = paths.find(model_or_checkpoint)
    folder = path.parent if path.is_file() else path
    if match := _STEP_NAME.fullmatch(folder.resolve().name):
        return int(match[1])
    return read_stack(folder).get(TRAINED_STEPS, 0) if (folder / STACK_RECORD).is_file() else UNKNOWN_STEP
