"""The models: Hugging Face's `LlamaForCausalLM` and `MixtralForCausalLM`, built from a profile or
loaded from disk or hub.

Nothing here changes their code, so every checkpoint we write loads with `pipeline(...)` and
`AutoModelForCausalLM` alone. What is ours is one forward pass that stops before the LM head,
because the objective computes logits chunk by chunk.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from kl3m_nb.common import paths
from kl3m_nb.data.special_ids import FAMILY_IDS, SpecialIds
from kl3m_nb.model.experts import (
    expert_counts,
    load_balancing_loss,
    take_router_logits,
    use_exact_routers,
)
from kl3m_nb.model.folder import read_config, weight_files
from kl3m_nb.model.loading import REFUSALS, TensorsDiffer, load_whole, reason
from kl3m_nb.model.logits import OWN_FAMILIES
from kl3m_nb.profiles import ModelSpec, Profile

TRAINED_FAMILIES = tuple(family.config_class.model_type for family in OWN_FAMILIES)
# transformers' own bars for files that take milliseconds would drown the one that counts
disable_progress_bar()


def model_config(spec: ModelSpec, special: SpecialIds = FAMILY_IDS) -> LlamaConfig | MixtralConfig:
    """The Hugging Face configuration of `spec`, with the ids of a tokenizer's special tokens, by
    default the family's.
    """
    shared = dict(
        vocab_size=spec.vocabulary,
        hidden_size=spec.hidden,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_size,
        max_position_embeddings=spec.context,
        rms_norm_eps=1e-5,
        initializer_range=spec.initializer_range,
        tie_word_embeddings=spec.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        bos_token_id=special.start,
        eos_token_id=special.end,
        pad_token_id=special.padding,
        use_cache=True,
    )
    if not spec.experts:
        return LlamaConfig(**shared, attention_bias=spec.attention_bias, mlp_bias=spec.mlp_bias)
    return MixtralConfig(
        **shared,
        sliding_window=spec.sliding_window or None,
        num_local_experts=spec.experts,
        num_experts_per_tok=spec.active_experts,
        router_aux_loss_coef=spec.router_aux_loss,
    )


def spec_of(config: LlamaConfig | MixtralConfig) -> ModelSpec:
    """The numbers that a model's own configuration has for those of a `ModelSpec`: the inverse of
    `model_config`.
    """
    return ModelSpec(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=_setting(config.to_dict(), "head_dim"),
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        rope_theta=config.rope_parameters["rope_theta"],
        tied_embeddings=config.tie_word_embeddings,
        sliding_window=getattr(config, "sliding_window", None) or 0,
        experts=getattr(config, "num_local_experts", 0),
        active_experts=getattr(config, "num_experts_per_tok", 0),
        router_aux_loss=getattr(config, "router_aux_loss_coef", 0.0),
        initializer_range=config.initializer_range,
        attention_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
    )


def position_scaling(config: LlamaConfig | MixtralConfig) -> str:
    """How a model scales its rotary positions, in words such as "linear, factor 4.0"; empty when it
    does not.
    """
    settings = {key: value for key, value in config.rope_parameters.items() if key != "rope_theta"}
    kind = settings.pop("rope_type", "default")
    return (
        ""
        if kind == "default"
        else ", ".join([kind, *(f"{key} {value}" for key, value in settings.items())])
    )


def build_model(
    profile: Profile,
    device: str | torch.device | None = None,
    attention: str = "sdpa",
    special: SpecialIds = FAMILY_IDS,
) -> PreTrainedModel:
    """A float32 model of `profile` with fresh weights, drawn from `profile.data.seed`;
    `device="meta"` allocates nothing.

    `special` are the ids of the tokenizer it will be trained with: the embedding of the padding
    token is zero, and stays it.
    """
    config = model_config(profile.model, special)
    config._attn_implementation = attention
    model_class = MixtralForCausalLM if profile.model.experts else LlamaForCausalLM
    with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"):
        torch.manual_seed(profile.data.seed)
        return use_exact_routers(model_class(config))


def load_model(path_or_hub_id: str | Path, attention: str = "sdpa") -> PreTrainedModel:
    """A float32 model from a checkpoint folder or the hub.

    Raises ValueError with one sentence when a folder is missing, incomplete or cut off, the hub has
    no such model, or a tensor of the model is missing, left over or of another shape.
    """
    with _loadable(path_or_hub_id) as name:
        return use_exact_routers(load_whole(name, attention, torch.float32))


def context_of(path_or_hub_id: str | Path) -> int:
    """The number of tokens that the model of a checkpoint folder or hub id can read at once, by its
    config.json. Raises ValueError as `load_model`, but looks at no tensor.
    """
    with _loadable(path_or_hub_id) as name:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    return config.max_position_embeddings


@contextlib.contextmanager
def _loadable(path_or_hub_id: str | Path) -> Iterator[str]:
    """Gives the name that transformers loads a checkpoint by, and raises what it refuses there as
    ValueError with one sentence.
    """
    place = paths.checkpoint_place(path_or_hub_id)
    folder = place.path
    if place.kind != "hub":
        check_checkpoint(path_or_hub_id)
    try:
        yield place.name
    except TensorsDiffer:
        raise
    except REFUSALS as error:
        why = reason(error)
        if place.is_here:
            raise ValueError(
                f"The checkpoint {folder} cannot be loaded ({why}); name another."
            ) from error
        raise ValueError(
            f"There is no checkpoint folder {folder}, and the hub gave no model {place.name}"
            f" ({why}); name a folder or a hub id."
        ) from error


def check_checkpoint(folder: str | Path) -> dict:
    """The `config.json` of a checkpoint folder whose weight files are whole.

    Raises ValueError with one sentence naming the folder and what is wrong with it.
    """
    place = paths.checkpoint_place(folder)
    if place.kind not in ("run", "folder"):
        raise ValueError(paths.no_checkpoint(folder))
    folder = place.path
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json, so it is no checkpoint; name a Hugging Face model"
            " folder."
        )
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(
                f"The checkpoint file {path} is cut off or damaged ({error}); use an earlier"
                " checkpoint."
            ) from error
    return read_config(folder)


def check_fits(config: dict, profile: Profile, folder: str | Path) -> None:
    """Raises ValueError naming the first number in which a checkpoint's `config.json` differs from
    `profile`'s shape, and for a window that is longer than the checkpoint's context. The context,
    scaled positions and biases may be others: they are the checkpoint's.

    A family that is neither Llama nor Mixtral is refused by its name: no profile describes one.
    """
    if (family := config.get("model_type")) not in TRAINED_FAMILIES:
        raise ValueError(
            f"The checkpoint {folder} is a {family}; only {' and '.join(TRAINED_FAMILIES)} models"
            " can be trained here (docs/families.md)."
        )
    wanted = model_config(profile.model).to_dict()
    for key in (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
        "rope_theta",
        "num_local_experts",
        "num_experts_per_tok",
        "sliding_window",
    ):
        expected, found = (_setting(values, key) for values in (wanted, config))
        if expected != found:
            raise ValueError(
                f"The checkpoint {folder} has {key} {found}, the profile {profile.name} wants"
                f" {expected}; choose a matching checkpoint or profile."
            )
    if profile.data.seq_len > (context := config["max_position_embeddings"]):
        raise ValueError(
            f"seq_len {profile.data.seq_len} is longer than the context of {context} tokens that"
            f" the checkpoint {folder} takes; choose at most {context}."
        )


def profile_of_start(profile: Profile, start: str | Path | None) -> Profile:
    """`profile` with the numbers of the model that a run begins with, where `start` is a folder
    with a config.json.

    As it is when there is none: for random weights, a hub id, or a run that has begun and whose
    start is gone. Weights are not looked at. Raises ValueError for a config.json that cannot be
    read, or one that `check_fits` refuses.
    """
    folder = paths.checkpoint_place(start).path if start else None
    if folder is None or not (folder / "config.json").is_file():
        return profile
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"The checkpoint {folder} cannot be loaded ({reason}); name another."
        ) from error
    check_fits(config.to_dict(), profile, folder)
    return dataclasses.replace(profile, model=spec_of(config))


def _setting(config: dict, key: str):
    """A number of a config.json, also where an older transformers left it out or kept it elsewhere;
    None where it has none.
    """
    if key == "rope_theta":
        return config.get(key) or (config.get("rope_parameters") or {}).get(key)
    if key == "head_dim" and not config.get(key):
        return config["hidden_size"] // config["num_attention_heads"]
    return bool(config.get(key)) if key == "tie_word_embeddings" else config.get(key) or None


@dataclass(frozen=True)
class BodyOutput:
    """hidden and residual, both [batch, seq_len, hidden], e.g. [8, 256, 128]: after and before the
    final norm.

    Of a Mixtral, `router_loss` is the load-balancing loss (0-d, not yet weighted) and
    `expert_counts` [layers, experts] how many tokens chose each expert. For a dense model the loss
    is exactly zero and there are no counts, [0, 0].
    """

    hidden: torch.Tensor
    residual: torch.Tensor
    router_loss: torch.Tensor
    expert_counts: torch.Tensor


def forward_body(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    recompute: bool = False,
) -> BodyOutput:
    """Runs everything below the LM head on input_ids, int64 [batch, seq_len], e.g. [8, 256].

    `attention_mask`, bool [batch, seq_len], is False on padding, where the output means nothing.
    `position_ids`, int64 of the same shape, count through where none are given. `document_ids`,
    int64 too, keep attention within equal ids. Full windows have no mask and no documents: only
    then attention takes its fast causal path. `recompute` is gradient checkpointing: of each block
    only the input is kept, and the block runs again in the backward pass.

    `model` comes from `build_model` or `load_model`. Nothing makes the host wait for a GPU, except
    a mask or documents under FlashAttention 2. Raises ValueError where that would mix the
    documents.
    """
    if type(model) not in OWN_FAMILIES:
        raise ValueError(
            f"The forward pass of training is that of Llama and Mixtral; a {type(model).__name__}"
            " cannot be trained."
        )
    body, attention = model.model, model.config._attn_implementation
    if document_ids is not None and len(input_ids) > 1 and attention == "flash_attention_2":
        raise ValueError(
            "FlashAttention 2 keeps documents apart in one row at a time only; use attention 'sdpa'"
            " or micro_batch 1."
        )
    residual = body.embed_tokens(input_ids)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    settings = {
        "position_embeddings": body.rotary_emb(residual, position_ids=position_ids),
        "use_cache": False,
    }
    if attention == "flash_attention_2":
        # transformers finds the documents where positions begin anew, and the window in the config
        settings |= {
            "attention_mask": attention_mask,
            "position_ids": None if document_ids is None else position_ids,
        }
    else:
        settings["attention_mask"] = _square_mask(
            model.config, residual, attention_mask, document_ids
        )
    router_logits = []
    for layer in body.layers:
        # our own, around the compiled block: transformers' checkpoints in training mode only, and
        # inside the graph
        if recompute:
            residual, logits = checkpoint(
                _run_block, layer, residual, settings, use_reentrant=False, preserve_rng_state=False
            )
        else:
            residual, logits = _run_block(layer, residual, settings)
        router_logits.append(logits)
    router_loss, counts = residual.new_zeros(()), residual.new_zeros(0, 0)
    if getattr(model.config, "num_local_experts", 0):
        active = model.config.num_experts_per_tok
        counts = expert_counts(router_logits, active, attention_mask)
        router_loss = load_balancing_loss(router_logits, counts, active, attention_mask)
    return BodyOutput(body.norm(residual), residual, router_loss, counts)


def _run_block(
    layer: nn.Module, hidden: torch.Tensor, settings: dict
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The block's output, and its router's logits where it has a router."""
    try:
        return layer(hidden, **settings), take_router_logits(layer)
    # also where recomputation stops early: logits that stay would hold the activations they were
    # computed from
    finally:
        take_router_logits(layer)


def _square_mask(
    config: LlamaConfig | MixtralConfig,
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_ids: torch.Tensor | None,
) -> torch.Tensor | None:
    """Which positions a query sees, [batch or 1, 1, seq_len, seq_len]: bool for sdpa, added to the
    scores for eager attention.

    None where plain causal attention says the same, which is faster. hidden: [batch, seq_len,
    hidden].
    """
    seq_len, eager = hidden.shape[1], config._attn_implementation == "eager"
    window = getattr(config, "sliding_window", None) or seq_len
    if (
        attention_mask is None and document_ids is None and window >= seq_len and not eager
    ):  # eager is causal by its mask alone
        return None
    positions = torch.arange(seq_len, device=hidden.device)
    distance = positions[:, None] - positions[None, :]
    seen = ((distance >= 0) & (distance < window))[None]
    if document_ids is not None:
        seen = seen & (document_ids[:, :, None] == document_ids[:, None, :])
    if attention_mask is not None:
        # Padding sees itself: a softmax over nothing is NaN in some kernels, and reaches all
        # weights through the gradient.
        seen = seen & attention_mask[:, None, :] | (distance == 0)
    seen = seen[:, None]
    return torch.where(seen, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype) if eager else seen
