"""Which values the fields of a profile accept, and which contradict each other.

Field names are unique over the whole tree of a profile, so everything here works on one flat mapping from name to value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

_CHOICES = {
    "entropy_target_over": ("token", "batch"),
    "clip_mode": ("adaptive", "fixed", "off"),
    "precision": ("auto", "float32", "bfloat16"),
    "attention": ("auto", "sdpa", "flash_attention_2", "flash_attention_4", "eager"),
    "compile": ("auto", "on", "off"),
    "parallel": ("ddp", "fsdp"),
    "gradient_checkpointing": ("auto", "on", "off"),
    "tf32": ("auto", "on", "off"),
    "adjust_lr": ("original", "match_rms_adamw"),
    "packing": ("dense", "segments"),
    "document_borders": ("ignored", "mask"),
    "sft_loss": ("response", "all"),
    "ns_coefficients": ("keller_jordan", "polar_express"),
    "ns_precision": ("auto", "float32", "bfloat16"),
}
REMOVED = {  # what an earlier version accepted: field and value, and why it is gone
    (
        "document_borders",
        "positions",
    ): "document_borders 'positions' let tokens see earlier documents at rotary distances of zero "
    "and below, which no model is used with, and is gone; take 'mask', which hides them, or 'ignored'",
}
_RANGES = {  # what is accepted, in words: the test, and the fields
    "at least 1 and finite": (
        lambda value: 1 <= value < math.inf,
        "layers hidden mlp heads kv_heads head_size vocabulary context seq_len micro_batch grad_accumulation shuffle_buffer "
        "held_out_windows max_steps chunk_tokens log_every eval_every checkpoint_every keep_checkpoints growth_factor "
        "source_steps attention_max_condition mlp_max_condition lm_head_max_condition",
    ),
    "at least 0 and finite": (
        lambda value: 0 <= value < math.inf,
        "sliding_window experts active_experts router_aux_loss entropy_bonus entropy_target_bits entropy_target_weight "
        "activation_norm base_lr weight_decay attention_outer_multiplier attention_inner_multiplier mlp_multiplier "
        "lm_head_multiplier aux_lr aux_weight_decay clamp_every sigma_floor warmup_steps seed keep_every prefetch_batches",
    ),
    "above 0 and finite": (
        lambda value: 0 < value < math.inf,
        "rope_theta initializer_range clip_max_norm clip_coefficient",
    ),
    "at least 0 and below 1": (
        lambda value: 0 <= value < 1,
        "label_smoothing momentum aux_beta1 aux_beta2 clip_beta",
    ),
    "between 0 and 1": (lambda value: 0 <= value <= 1, "min_lr_ratio p_sft"),
    "from 3 to 5": (lambda value: 3 <= value <= 5, "ns_steps"),
}


def check_values(values: Mapping[str, object]) -> None:
    """Raises ValueError for the first of a profile's `values`, all its fields by name, that cannot be meant."""
    for key, choices in _CHOICES.items():
        if remark := REMOVED.get((key, values[key])):
            raise ValueError(f"The profile field {remark}.")
        if values[key] not in choices:
            raise ValueError(f"The profile field {key!r} is {values[key]!r}; it accepts {', '.join(choices)}.")
    for words, (accepts, keys) in _RANGES.items():
        for key in keys.split():
            if not accepts(values[key]):
                raise ValueError(f"The profile field {key!r} is {values[key]}; it must be {words}.")
    for key, value in values.items():
        if isinstance(value, int) and value >= 2**63:
            raise ValueError(f"The profile field {key!r} is {value}; a whole number must be below 2**63.")
    _check_experts(values)
    _check_data(values)
    _check_shape(values)


def _check_experts(values: Mapping) -> None:
    experts, active = values["experts"], values["active_experts"]
    if experts:
        if not 1 <= active <= experts:
            raise ValueError(f"active_experts is {active} of {experts} experts; choose from 1 to {experts}.")
        for key in ("attention_bias", "mlp_bias"):
            if values[key]:
                raise ValueError(
                    f"{key} is true with {experts} experts, and a Mixtral has no biases; set experts to 0, or {key} to false."
                )
        return
    for key in ("active_experts", "router_aux_loss", "sliding_window"):
        if values[key]:
            raise ValueError(f"{key} is {values[key]} without experts, and a dense Llama has none; set experts, or {key} to 0.")


def _check_data(values: Mapping) -> None:
    if values["p_sft"] and values["packing"] == "dense":
        raise ValueError(f"p_sft is {values['p_sft']} with packing 'dense'; instruction pairs need packing 'segments'.")
    if values["seq_len"] < 2 and values["packing"] == "segments":
        raise ValueError("seq_len is 1 with packing 'segments', which has no room for a document; choose at least 2.")
    if values["sft_loss"] != "response" and not values["p_sft"]:
        raise ValueError(f"sft_loss is {values['sft_loss']!r} with p_sft 0, which takes no instruction pairs; raise p_sft too.")
    if values["document_borders"] != "ignored" and values["packing"] == "segments":
        raise ValueError(
            f"document_borders is {values['document_borders']!r} with packing 'segments', which never hold two documents; "
            "use packing 'dense' or document_borders 'ignored'."
        )


def _check_shape(values: Mapping) -> None:
    if values["seq_len"] > values["context"]:
        raise ValueError(
            f"seq_len {values['seq_len']} is longer than the context of {values['context']} tokens that the model can take; "
            f"choose at most {values['context']}."
        )
    if values["layers"] % values["growth_factor"]:
        raise ValueError(
            f"{values['layers']} layers are not a multiple of growth_factor {values['growth_factor']}; "
            "a cyclic stack needs layers = growth_factor × source layers."
        )
    if values["heads"] % values["kv_heads"]:
        raise ValueError(f"{values['heads']} heads cannot share {values['kv_heads']} kv_heads evenly; choose a divisor.")
    if values["head_size"] % 2:
        raise ValueError(f"head_size is {values['head_size']}; rotary positions turn pairs of numbers, choose an even one.")
    for key in ("hidden", "mlp") if values["experts"] else ():
        if values[key] % 4:
            raise ValueError(f"{key} is {values[key]}; torch multiplies the matrices of experts in multiples of 4, choose one.")
    if not values["experts"] and values["hidden"] % values["heads"]:  # transformers asks it of a Llama, not of a Mixtral
        raise ValueError(f"hidden {values['hidden']} is not a multiple of {values['heads']} heads; a dense Llama needs that.")
