"""A model from its files, every tensor of it: none drawn at random, none left over, each of the
shape that config.json gives.

transformers loads what fits by name, draws the rest at random and says so in a log that is easily
missed. Here that is an error.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from kl3m_nb.model.folder import weight_files
from kl3m_nb.model.stored_tensors import read_headers

# What transformers raises for a config.json that is forged or of a newer version, and for weights
# that it cannot convert.
REFUSALS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
)


_NOT_CONVERTED = "conversion of the weights"


# What wrappers put into the names of a model's tensors: torch.compile, DDP and DataParallel, FSDP,
# checkpointing, PEFT.
_WRAPPERS = (
    "_orig_mod.",
    "module.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "base_model.model.",
)


class TensorsDiffer(ValueError):
    """A checkpoint's tensors are not those of its model."""


def load_whole(name: str, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a folder or hub id; no code of the repository is run, and no
    tensor may be missing.

    A family that has no attention by SDPA gets its eager one for "sdpa". Raises TensorsDiffer
    naming what is missing, left over or of another shape, and whatever transformers raises
    (`REFUSALS`).
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    model_class = _model_class(config)
    if attention == "sdpa" and not model_class._supports_sdpa:
        attention = "eager"
    config._attn_implementation = (
        attention  # what config.json says would win over an argument, and may name code on the hub
    )
    return _loaded(model_class, name, name, config=config, dtype=dtype)


def check_loads(folder: Path) -> None:
    """Raises ValueError when transformers would not find every tensor of the model in `folder`, or
    cannot build the model.

    Only headers are read: transformers gets tensors of the right names and shapes, each of which is
    one number in memory.
    """
    shapes = {name: tensor.shape for name, tensor in read_headers(weight_files(folder)).items()}
    stand_ins = {
        name: torch.zeros((), dtype=torch.bfloat16).expand(shape) for name, shape in shapes.items()
    }
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _loaded(
            _model_class(config),
            folder,
            None,
            config=config,
            state_dict=stand_ins,
            dtype=torch.bfloat16,
        )
    except TensorsDiffer:
        raise
    except REFUSALS as error:
        raise ValueError(
            f"transformers cannot load {folder} ({reason(error)}); correct its config.json."
        ) from error


def read_config(config: Mapping) -> PreTrainedConfig:
    """What transformers reads from a config.json that holds `config`. Raises whatever it raises
    (`REFUSALS`).
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def empty_model(config: Mapping) -> PreTrainedModel:
    """The model of a config.json on the meta device, without weights. Raises whatever transformers
    raises (`REFUSALS`).
    """
    made = read_config(config)
    with torch.device("meta"):
        return _model_class(made)(made)


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config.model_type} is no causal language model")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def reason(error: Exception) -> str:
    """What an error of another library says, in half a sentence."""
    first, *others = str(error).strip().splitlines() or [""]
    told = f"{first} {others[0].strip()}" if first.endswith(":") and others else first.rstrip(".")
    return (
        told
        if told and not isinstance(error, LookupError)
        else f"{type(error).__name__} {told}".rstrip()
    )


def _loaded(model_class: type, shown: str | Path, name: str | None, **settings) -> PreTrainedModel:
    log = logging.getLogger(
        "transformers.modeling_utils"
    )  # its report of many lines says what the error says in one
    log.disabled = True
    try:
        model, info = model_class.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except RuntimeError as error:
        if _NOT_CONVERTED not in str(error):
            raise
        raise TensorsDiffer(
            f"The experts of {shown} cannot be put together: a tensor is missing or has another"
            " shape; give a whole model."
        ) from error
    finally:
        log.disabled = False
    _require_whole(shown, info)
    return model


def _require_whole(shown: str | Path, info: Mapping[str, Iterable]) -> None:
    """Raises TensorsDiffer for what transformers tells of a loading: missing_keys, unexpected_keys,
    mismatched_keys.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing and (wrapper := _wrapper(missing, unexpected)):
        raise TensorsDiffer(
            f"The tensors of {shown} have {wrapper!r} in their names ({unexpected[0]}), as a"
            f" wrapped model's have; save the model that is wrapped, or remove {wrapper!r} from all"
            " names of the weights."
        )
    faults = []
    if missing:
        faults.append(f"lacks {_named(missing)}")
    if unexpected:
        faults.append(f"holds {_named(unexpected)}, not of this model")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        more = f", and {len(mismatched) - 1:,} more of other shapes" if len(mismatched) > 1 else ""
        faults.append(
            f"has {name} of shape {list(found)} where its config.json gives {list(wanted)}{more}"
        )
    if faults:
        raise TensorsDiffer(
            f"The checkpoint {shown} {' and '.join(faults)}; give weights and config.json of one"
            " whole model."
        )


def _named(names: list[str]) -> str:
    return (
        f"{len(names):,} tensor{'s' if len(names) > 1 else ''}"
        f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
    )


def _wrapper(missing: list[str], unexpected: list[str]) -> str | None:
    """The wrapper's part of the names without which names that are missing would be there."""
    wanted = set(missing)
    for part in _WRAPPERS:
        if any(part in name and name.replace(part, "") in wanted for name in unexpected):
            return part
    return None


def with_defaults(config: dict) -> dict:
    """`config` with what transformers adds to it; as it is when the family is unknown here or its
    values are refused.
    """
    try:
        return read_config(config).to_dict()
    except REFUSALS:
        return config
