"""The weight matrices of a model or checkpoint: found by name, described from the file's header,
read one at a time.

A folder is never loaded as a model: `find_matrices` opens its safetensors files and keeps, for each
matrix, where it lies. Roles are those of Llama (`q_proj` … `down_proj`, `lm_head`); Mixtral's
experts, fused or one by one, are matrices of the same roles with an `expert` number. Tied weights
have one vocabulary matrix, and it is the LM head.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import xxhash
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from kl3m_nb.common import paths
from kl3m_nb.model.folder import ModelOrCheckpoint, read_config, weight_files
from kl3m_nb.model.loading import TensorsDiffer, check_loads, with_defaults
from kl3m_nb.model.roles import (
    BLOCK_ROLES,
    DENSE_NAME,
    EXPERT_NAME,
    EXPERT_ROLES,
    FUSED_NAME,
    HEAD_LAYER,
    NAME_IN_BLOCK,
    ROUTER_NAME,
    SEVERAL_ROLES,
    down_name,
    fused_matrices,
    head_role,
)

_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")


_FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that is known but not yet read. `layer` is -1 for the LM head, `expert` -1
    outside a mixture.
    """

    layer: int
    role: str
    expert: int
    shape: tuple[int, int]
    dtype: str  # float32, bfloat16, …
    read: Callable[[], torch.Tensor]


def content_hash(weight: torch.Tensor) -> str:
    """128 bits of XXH3 over a matrix's dtype, shape and bytes: equal for equal weights, wherever
    they are stored.

    It guards against mistakes, not against forgery, and takes a tenth of the time of SHA-256.
    """
    weight = weight.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.view(torch.uint8).numpy())
    return digest.hexdigest()


def find_matrices(model_or_checkpoint: ModelOrCheckpoint) -> list[Matrix]:
    """The matrices of a Llama or Mixtral, ordered by layer and role, the LM head last; tied weights
    make the embedding the head.

    Takes a Hugging Face folder (one or several safetensors files), a .safetensors file, a hub id
    OWNER/NAME (downloaded into the hub's own cache) or a module. Of a whole model that has other
    matrices too, or none of some role, those of the known roles are given and a warning names the
    rest.

    Raises ValueError for what is not there, not readable, not such a decoder, stored in other than
    floating-point numbers, or lacks a layer or one matrix of a layer; for several roles in one
    matrix, experts stored as [experts, columns, rows], layers that are not alike, and for more than
    one stack of layers.
    """
    if isinstance(model_or_checkpoint, torch.nn.Module):
        source, promised, folder = f"The module {type(model_or_checkpoint).__name__}", 0, None
        tensors = _module_tensors(model_or_checkpoint)
    else:
        source = os.fspath(model_or_checkpoint)
        place = local_checkpoint(source)
        tensors, promised = _file_tensors(place), _promised_layers(place)
        folder = place if place.is_dir() and (place / "config.json").is_file() else None
    _check_names(source, tensors)
    _check_fused(source, tensors)
    matrices, heads, others = [], {}, {}
    for name, (shape, dtype, read) in tensors.items():
        if match := DENSE_NAME.search(name):
            matrices.append(Matrix(int(match[1]), match[2] or match[3], -1, shape, dtype, read))
        elif match := EXPERT_NAME.search(name):
            role = EXPERT_ROLES.get(match[3], match[3])
            matrices.append(Matrix(int(match[1]), role, int(match[2]), shape, dtype, read))
        elif match := FUSED_NAME.search(name):
            matrices += _split_experts(int(match[1]), match[2], shape, dtype, read)
        elif role := head_role(name):
            heads[role] = Matrix(HEAD_LAYER, "lm_head", -1, shape, dtype, read)
        elif len(shape) > 1 and not ROUTER_NAME.search(name):
            if match := NAME_IN_BLOCK.search(name):
                others[match[1]] = name
    _check_whole(source, matrices, heads, promised)
    absent = [role for role in BLOCK_ROLES if role not in {matrix.role for matrix in matrices}]
    headless = "lm_head" not in heads and folder is not None and not _is_tied(folder)
    if absent or headless or _first_gap(matrices):
        is_whole = isinstance(model_or_checkpoint, torch.nn.Module) or (
            folder is not None and _loads(folder)
        )
        _check_alike(source, matrices, absent, headless, is_whole)
    _warn_of_the_rest(source, matrices, absent, list(others))
    matrices.sort(key=lambda matrix: (matrix.layer, BLOCK_ROLES.index(matrix.role), matrix.expert))
    return [*matrices, heads.get("lm_head", heads.get("embedding"))]


def local_checkpoint(checkpoint: str | os.PathLike) -> Path:
    """The folder or file a checkpoint's name stands for; a hub id OWNER/NAME that is no folder here
    is downloaded first.

    Raises ValueError when the hub cannot be reached or has no such model.
    """
    place = paths.checkpoint_place(checkpoint)
    if place.kind != "hub":
        return place.path
    try:
        return Path(huggingface_hub.snapshot_download(place.name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"There is no folder {checkpoint}, and the hub gave no model of that name"
            f" ({type(error).__name__}); give a checkpoint folder, a .safetensors file, or the id"
            " of a model that can be downloaded."
        ) from error


def _split_experts(
    layer: int, name: str, shape: tuple[int, ...], dtype: str, read: Callable
) -> list[Matrix]:
    # Mixtral's fused experts: gate_up_proj is (experts, 2·mlp, hidden) with the gate first,
    # down_proj (experts, hidden, mlp).
    experts, rows, cols = shape
    roles = fused_matrices(name)
    rows //= len(roles)
    parts = {role: slice(i * rows, (i + 1) * rows) for i, role in enumerate(roles)}
    return [
        Matrix(
            layer,
            role,
            expert,
            (rows, cols),
            dtype,
            lambda expert=expert, part=part: read((expert, part)),
        )
        for role, part in parts.items()
        for expert in range(experts)
    ]


def _promised_layers(place: Path) -> int:
    """The depth that the config.json of a checkpoint gives; 0 where there is none."""
    folder = place.parent if place.is_file() else place
    return (
        read_config(folder).get("num_hidden_layers") or 0
        if (folder / "config.json").is_file()
        else 0
    )


def _check_names(source: str, tensors: dict) -> None:
    places: dict[str, str] = {}  # what stands before `layers`: the first name that has it
    for name in tensors:
        if match := DENSE_NAME.search(name) or EXPERT_NAME.search(name) or FUSED_NAME.search(name):
            places.setdefault(name[: match.start()], name)
            if match.re is DENSE_NAME and (several := SEVERAL_ROLES.get(match[2] or match[3])):
                raise ValueError(
                    f"{source} stores {several} as one matrix ({name}), as Phi-3 does; "
                    "give a model that stores them apart, as Llama does."
                )
    if len(places) > 1:
        raise ValueError(
            f"{source} has more than one stack of layers"
            f" ({' and '.join(list(places.values())[:2])}); give one decoder's weights."
        )


def _check_whole(source: str, matrices: list[Matrix], heads: dict, promised: int) -> None:
    if not matrices or not heads:
        raise ValueError(
            f"{source} is not a decoder this analysis knows: it needs `layers.N.self_attn` and"
            " `layers.N.mlp` projections and an embedding, named as Hugging Face's Llama and"
            " Mixtral name them."
        )
    for matrix in (*matrices, *heads.values()):
        if matrix.dtype not in _FLOAT_DTYPES.values():
            raise ValueError(
                f"{source} stores {matrix.role} of layer {matrix.layer} as {matrix.dtype}; "
                "spectra need float64, float32, float16 or bfloat16 weights, not a quantised copy."
            )
    if promised > (last := max(matrix.layer for matrix in matrices)) + 1:
        raise ValueError(
            f"{source} ends at layer {last}, its config.json speaks of {promised} layers; give the"
            " whole model."
        )


def _first_gap(matrices: list[Matrix]) -> tuple[int, str] | None:
    """The first layer that lacks what another has, and the role that it lacks: empty for a layer
    without any matrix.
    """
    layers: dict[int, set] = {}
    for matrix in matrices:
        layers.setdefault(matrix.layer, set()).add((matrix.role, matrix.expert))
    everything = set().union(*layers.values())
    for layer in range(max(layers) + 1):
        if missing := everything - layers.get(layer, set()):
            return layer, min(missing)[0] if layer in layers else ""
    return None


def _check_alike(
    source: str, matrices: list[Matrix], absent: list[str], headless: bool, is_whole: bool
) -> None:
    """Refuses layers that are not alike, or not all there; a role that no layer has is the family's
    way where all is there.
    """
    gap = _first_gap(matrices)
    if is_whole:
        if gap:
            lacking = (
                f"no {gap[1]} in layer {gap[0]}, where others have one"
                if gap[1]
                else f"no known matrix in layer {gap[0]}"
            )
            raise ValueError(
                f"{source} is whole, but has {lacking}; spectra need a model whose layers are"
                " alike."
            )
        if headless:
            raise ValueError(
                f"{source} is whole, but its head is not named lm_head; give a model whose head is."
            )
        return
    if gap and not gap[1]:
        raise ValueError(
            f"{source} has no layer {gap[0]}, though it has a layer {layer_count(matrices) - 1};"
            " give the whole model."
        )
    if gap or absent:
        layer, role = gap or (0, min(absent))
        raise ValueError(
            f"{source} has no {role} in layer {layer}; give the whole model, a folder with its"
            " config.json."
        )
    raise ValueError(
        f"{source} has no lm_head, and its config.json ties none to the embedding; give the whole"
        " model."
    )


def _warn_of_the_rest(
    source: str, matrices: list[Matrix], absent: list[str], others: list[str]
) -> None:
    """Says of a whole model which matrices the analysis does not see."""
    if absent:
        found = ", ".join(role for role in BLOCK_ROLES if role not in absent)
        warnings.warn(
            f"{source} is whole, but has no {', '.join(absent)}; spectra are those of its {found}.",
            stacklevel=3,
        )
    if others:
        named = ", ".join(others[:4]) + (", …" if len(others) > 4 else "")
        warnings.warn(
            f"{source} has matrices of other roles, which the spectra leave out: {named}.",
            stacklevel=3,
        )


def _loads(folder: Path) -> bool:
    """Whether transformers finds all of the model in `folder`; False where it does not know it.
    Raises TensorsDiffer.
    """
    try:
        check_loads(folder)
    except TensorsDiffer:
        raise
    except ValueError:
        return False
    return True


def _is_tied(folder: Path) -> bool:
    """Whether the head is the embedding by config.json, or by what its family does where that says
    nothing.
    """
    return with_defaults(read_config(folder)).get("tie_word_embeddings") is not False


def _check_fused(source: str, tensors: dict) -> None:
    """Refuses fused experts of another layout than Mixtral's, [experts, 2·mlp, hidden] and
    [experts, hidden, mlp].
    """
    for name, (shape, *_) in tensors.items():
        if (match := FUSED_NAME.search(name)) and match[2] == "gate_up_proj":
            down = tensors.get(down_name(name), ((0, shape[2], shape[1] // 2),))[0]
            if (shape[1], shape[2]) != (2 * down[2], down[1]):
                raise ValueError(
                    f"{source} stores the matrices of its experts the other way round ({name} of"
                    f" shape {list(shape)}), as Llama 4 and GPT-OSS do; give a model that stores"
                    " them as [experts, rows, columns], as Mixtral does."
                )


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
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}); give a finished checkpoint."
            ) from error
        names = handle.keys()
        for name in names:
            view = handle.get_slice(name)
            dtype = _FLOAT_DTYPES.get(view.get_dtype(), view.get_dtype().lower())
            tensors[name] = (
                tuple(view.get_shape()),
                dtype,
                lambda index=slice(None), view=view: view[index],
            )
    return tensors


def layer_count(matrices: list[Matrix]) -> int:
    """Number of decoder blocks."""
    return 1 + max(matrix.layer for matrix in matrices)


def check_source_layers(layers: int, source_layers: int) -> int:
    """`source_layers` if `layers` is a multiple of it; raises ValueError otherwise."""
    if source_layers < 1 or layers % source_layers:
        raise ValueError(
            f"A model of {layers} layers is not made of copies of {source_layers}; give a divisor"
            f" of {layers}."
        )
    return source_layers


def model_name(model_or_checkpoint: ModelOrCheckpoint) -> str:
    """What a figure calls this model: its class, its folder's name, or the file's name without
    suffix.
    """
    if isinstance(model_or_checkpoint, torch.nn.Module):
        return type(model_or_checkpoint).__name__
    place = paths.checkpoint_place(model_or_checkpoint)
    return place.path.stem if place.kind == "file" else place.path.resolve().name
