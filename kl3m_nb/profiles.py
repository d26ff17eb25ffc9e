"""Every number of a run, with its bounds: the profiles of the family, their fields, and what a
field accepts.

A profile is a tree of frozen dataclasses, one a subject. A field's name is unique over the whole
tree, so an override names the field alone. Values are checked here and nowhere else; a profile that
exists can be trusted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from kl3m_nb.common.text import did_you_mean, table_html

ATTENTION_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")


MLP_ROLES = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder. `experts = 0` is a dense Llama, `experts > 0` a Mixtral of that many
    experts per layer.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    rope_theta: float = 100_000.0
    tied_embeddings: bool = True
    sliding_window: int = 0  # 0: every position sees all earlier ones
    experts: int = 0
    active_experts: int = 0
    router_aux_loss: float = 0.0
    initializer_range: float = 0.02
    attention_bias: bool = False  # of q, k, v and o
    mlp_bias: bool = False  # of gate, up and down


@dataclass(frozen=True)
class ObjectiveSpec:
    """Weights of the training objective (kl3m-007 card, "Regularization"); all zero is plain
    cross-entropy.

    The card names an entropy target and not what has to meet it; both values of
    `entropy_target_over` are inferred. Over tokens the term is (mean entropy - target)² + the
    variance of the entropy over tokens, over the batch it is the first part alone.
    """

    label_smoothing: float = 0.001
    entropy_bonus: float = 0.001
    entropy_target_bits: float = 6.5
    entropy_target_weight: float = 0.001
    entropy_target_over: str = (
        "token"  # token: every token's entropy is to meet the target | batch: their mean is
    )
    activation_norm: float = (
        0.0006  # weight of mean(h²) of the residual stream before the final norm
    )
    chunk_tokens: int = 1024  # tokens whose logits exist at one time


@dataclass(frozen=True)
class OptimizerSpec:
    """Muon for the matrices of the blocks, AdamW ("aux") for the rest (kl3m-007 card, "Optimizer:
    Muon").

    The Muon LR is depth-scaled, `base_lr · √(16 / layers)`: 0.01 · √(16/120) = 0.00365 is the
    card's figure.
    """

    base_lr: float = 0.01
    momentum: float = 0.95
    weight_decay: float = 1e-5
    nesterov: bool = True
    ns_steps: int = 5
    ns_coefficients: str = "keller_jordan"
    ns_precision: str = "auto"  # float32 or bfloat16; auto: bfloat16 where that is fast
    adjust_lr: str = "original"
    attention_outer_multiplier: float = 0.5  # q_proj, o_proj
    attention_inner_multiplier: float = 0.75  # k_proj, v_proj
    mlp_multiplier: float = 1.0
    lm_head_multiplier: float = 0.9
    aux_lr: float = 5e-4
    aux_weight_decay: float = 1e-3
    aux_beta1: float = 0.9
    aux_beta2: float = 0.95


@dataclass(frozen=True)
class ClampSpec:
    """Ceilings on σ₁/σ_min by role and the cadence of the clamp (kl3m-007 card, "Spectral
    Clamping").
    """

    clamp_every: int = 100  # optimizer steps; 0 switches the clamp off
    attention_max_condition: float = 3000.0
    mlp_max_condition: float = 2000.0
    lm_head_max_condition: float = 2000.0
    sigma_floor: float = 5e-5

    def max_condition(self, role: str) -> float:
        """Ceiling for `role`; 0.0 for a role that is never clamped."""
        if role in ATTENTION_ROLES:
            return self.attention_max_condition
        if role in MLP_ROLES:
            return self.mlp_max_condition
        return self.lm_head_max_condition if role == "lm_head" else 0.0


@dataclass(frozen=True)
class ScheduleSpec:
    """Linear warmup and cosine decay of both learning rates, and clipping of the global gradient
    norm (card).
    """

    max_steps: int = 100_000
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    clip_mode: str = "adaptive"  # adaptive | fixed | off
    clip_max_norm: float = 64.0
    clip_coefficient: float = 2.0
    clip_beta: float = 0.9


@dataclass(frozen=True)
class DataSpec:
    """Where documents come from and how they become batches (kl3m-007 card, "Batch Configuration").

    `source` is one line, options and several weighted sources included: `kl3m_nb.data.sources` says
    how. A run may be resumed with another `micro_batch` and `grad_accumulation` of the same
    product.
    """

    source: str = "hub:alea-institute/kl3m-data-sample-006-medium"
    # hub id, folder, or "corpus"/"corpus-001": trained on the source
    tokenizer: str = "alea-institute/kl3m-004-128k-cased"
    seq_len: int = 4096
    micro_batch: int = 5
    grad_accumulation: int = (
        32  # micro-batches of an optimizer step, those of all processes together
    )
    shuffle_buffer: int = 32
    held_out_windows: int = 64
    seed: int = 7
    # dense: windows across documents | segments: never two documents in one, padded at random
    packing: str = "dense"
    # of dense windows: ignored | mask: attention stays inside, and positions begin anew
    document_borders: str = "ignored"
    # share of segments that are instruction pairs (inferred; the card says "hybrid NTP and SFT")
    p_sft: float = 0.0
    sft_loss: str = "response"  # response | all: which tokens of an instruction pair are trained on


@dataclass(frozen=True)
class RuntimeSpec:
    """How a run is carried out. Nothing here changes what is learned, so a run may be resumed under
    other values.
    """

    precision: str = "auto"  # auto | float32 | bfloat16 (autocast over float32 weights)
    attention: str = "auto"  # auto | sdpa | flash_attention_2 | flash_attention_4 | eager
    compile: str = "auto"  # auto | on | off: torch.compile of each block
    gradient_checkpointing: str = (
        "auto"  # auto: where memory asks for it | on: as the kl3m-007 card has it | off
    )
    tf32: str = "auto"  # auto | on | off: float32 products of a GPU with shorter mantissas
    log_every: int = 1
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 3  # the newest
    keep_every: int = 0  # and those whose step is a multiple of this; 0: no others
    prefetch_batches: int = 2  # made ahead in a thread; 0: made when they are asked for
    parallel: str = (
        "ddp"  # ddp | fsdp: how several processes hold the model, whole on each or in shards
    )


@dataclass(frozen=True)
class Profile:
    """Everything a run needs to know, by name. `growth_factor` g says the model is g copies of a
    source of layers/g.
    """

    name: str
    model: ModelSpec
    growth_factor: int = 1
    source_steps: int = (
        63_000  # optimizer steps of the source's own training (the card's source checkpoint)
    )
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    clamp: ClampSpec = field(default_factory=ClampSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    data: DataSpec = field(default_factory=DataSpec)
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)

    @property
    def muon_lr(self) -> float:
        """Depth-scaled peak learning rate of Muon, before the multipliers by role."""
        return self.optimizer.base_lr * math.sqrt(16 / self.model.layers)

    @property
    def tokens_per_step(self) -> int:
        """Labels of one optimizer step, all processes together, when packing is dense."""
        return self.data.micro_batch * self.data.grad_accumulation * self.data.seq_len

    def table(self) -> dict[str, str]:
        """Every value in words, a line for each section."""
        rows = {
            "profile": (
                f"{self.name} · growth_factor {self.growth_factor} · source_steps"
                f" {self.source_steps:,}"
            )
        }
        for section in _SECTIONS:
            values = dataclasses.asdict(getattr(self, section))
            rows[section] = " · ".join(f"{key} {value}" for key, value in values.items())
        return rows

    def _repr_html_(self) -> str:
        return table_html(self.table())

    def to_dict(self) -> dict:
        """Nested plain dict, ready for JSON."""
        return dataclasses.asdict(self)


_SECTIONS = ("model", "objective", "optimizer", "clamp", "schedule", "data", "runtime")


_KL3M_170M = ModelSpec(
    layers=30,
    hidden=576,
    mlp=1536,
    heads=9,
    kv_heads=3,
    head_size=64,
    vocabulary=131_072,
    context=4096,
)


_TINY = ModelSpec(
    layers=12, hidden=128, mlp=344, heads=4, kv_heads=2, head_size=32, vocabulary=4096, context=256
)


_TINY_MIXTURE = dataclasses.replace(
    _TINY,
    layers=8,
    mlp=176,
    rope_theta=10_000.0,
    tied_embeddings=False,
    sliding_window=64,
    experts=4,
    active_experts=2,
    router_aux_loss=0.05,
)


_KL3M_520M = ModelSpec(
    layers=16,
    hidden=1024,
    mlp=2048,
    heads=16,
    kv_heads=8,
    head_size=64,
    vocabulary=32_768,
    context=1024,
    rope_theta=10_000.0,
    tied_embeddings=False,
    sliding_window=256,
    experts=4,
    active_experts=2,
    router_aux_loss=0.05,
)


def _laptop_profile(name: str, model: ModelSpec) -> Profile:
    """A profile whose source, growth and comparison together take minutes on two CPU cores."""
    return Profile(
        name,
        model,
        growth_factor=4,
        source_steps=240,
        optimizer=OptimizerSpec(aux_lr=2e-3),
        clamp=ClampSpec(clamp_every=20),
        schedule=ScheduleSpec(max_steps=200, warmup_steps=20),
        data=DataSpec(
            source="package:licensedcode-data",
            tokenizer="corpus",
            seq_len=256,
            micro_batch=8,
            grad_accumulation=1,
            held_out_windows=48,
        ),
        runtime=RuntimeSpec(eval_every=10, checkpoint_every=100),
    )


# On an H200 the head and the loss of 20,480 tokens take 21 ms and 3.8 GB in chunks of 4,096, 24 ms
# and 2.2 GB in chunks of 2,048. The card of kl3m-006 has 1,024.
_LARGE_CHUNKS = ObjectiveSpec(chunk_tokens=4096)


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        _laptop_profile("tiny", _TINY),
        _laptop_profile("tiny-moe", _TINY_MIXTURE),
        Profile(
            "kl3m-006-170m",
            _KL3M_170M,
            objective=_LARGE_CHUNKS,
            clamp=ClampSpec(clamp_every=10, attention_max_condition=2000.0, sigma_floor=6e-4),
            optimizer=OptimizerSpec(
                ns_steps=3,
                attention_outer_multiplier=0.7,
                attention_inner_multiplier=0.9,
                lm_head_multiplier=0.85,
            ),
        ),
        Profile(
            "kl3m-007-500m",
            dataclasses.replace(_KL3M_170M, layers=120),
            objective=_LARGE_CHUNKS,
            growth_factor=4,
        ),
        Profile(
            "kl3m-002-520m",
            _KL3M_520M,
            objective=_LARGE_CHUNKS,
            data=DataSpec(
                # the rows' tokens are those of another tokenizer
                source="hub:alea-institute/kl3m-data-sample-006-medium(tokenizer=alea-institute/kl3m-004-128k-cased)",
                tokenizer="alea-institute/kl3m-001-32k",
                seq_len=1024,
                micro_batch=20,
                grad_accumulation=32,
                packing="segments",
                p_sft=0.1,
            ),
        ),
    )
}


def get_profile(name: str, /, **overrides) -> Profile:
    """The profile called `name`, with any of its fields changed: `get_profile("tiny", layers=3,
    max_steps=500)`.

    Raises ValueError for an unknown profile or field, a value of the wrong type, or numbers that
    contradict each other.
    """
    if name not in PROFILES:
        raise ValueError(f"There is no profile {name!r}; choose one of {', '.join(PROFILES)}.")
    return override_profile(PROFILES[name], **overrides)


def profile_with(name: str, /, **overrides) -> Profile:
    """`get_profile` for a notebook's parameters, where 0 and "" mean the profile's own value, and
    -1 that of `p_sft`.
    """
    own = {"p_sft": (-1,)}  # 0 is a value of its own: no instruction pairs
    return get_profile(
        name,
        **{key: value for key, value in overrides.items() if value not in own.get(key, (0, ""))},
    )


def source_profile(profile: Profile, /, **overrides) -> Profile:
    """The profile of the model that `profile` is grown from: `growth_factor` times shallower,
    trained for `source_steps`.

    It has a seed of its own: drawn in the same order, the grown model's first data would be what
    the source has just seen.
    """
    if profile.growth_factor == 1:  # a source itself
        return override_profile(profile, **overrides)
    own = {
        "layers": profile.model.layers // profile.growth_factor,
        "growth_factor": 1,
        "max_steps": profile.source_steps,
        "seed": profile.data.seed + 1,
    }
    return override_profile(profile, **{**own, **overrides})


def override_profile(profile: Profile, /, **overrides) -> Profile:
    """A copy of `profile` with the given fields changed, checked like `get_profile`."""
    sections = {section: {} for section in _SECTIONS}
    top = {}
    for key, value in overrides.items():
        section = FIELD_SECTIONS.get(key)
        if section is None:
            hint = (
                did_you_mean(key, FIELD_SECTIONS) or f"; it has {', '.join(sorted(FIELD_SECTIONS))}"
            )
            raise ValueError(f"A profile has no field {key!r}{hint}.")
        target = top if section == "profile" else sections[section]
        target[key] = _checked_type(key, value)
    for section, changes in sections.items():
        if changes:
            top[section] = dataclasses.replace(getattr(profile, section), **changes)
    changed = dataclasses.replace(profile, **top)
    check_values(fields_of(changed))
    return changed


def profile_from_dict(values: object) -> Profile:
    """Inverse of `Profile.to_dict`, for configurations read back from disk; a number that is
    missing is at its default.

    Raises ValueError for fields that no profile has, sections that are missing and values of the
    wrong type.
    """
    classes = typing.get_type_hints(Profile)
    top = _known_fields(Profile, values, "a profile")
    for section in _SECTIONS:
        fields = _known_fields(classes[section], top[section], f"a profile's {section}")
        top[section] = classes[section](
            **{key: _checked_type(key, value) for key, value in fields.items()}
        )
    if not isinstance(top["name"], str):
        raise ValueError(f"the name of a profile is text; {top['name']!r} is not")
    return Profile(
        **{
            key: _checked_type(key, value) if key in FIELD_TYPES else value
            for key, value in top.items()
        }
    )


def _known_fields(kind: type, values: object, what: str) -> dict:
    """A copy of `values` when it is a mapping with all that a dataclass needs and nothing else."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} is a mapping of fields; {values!r:.60} is not")
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    if unknown := values.keys() - known.keys():
        raise ValueError(f"{what} has no field {min(unknown)!r}")
    for key, entry in known.items():
        if entry.default is dataclasses.MISSING and key not in values:
            raise ValueError(f"{what} needs the field {key!r}, which is missing")
    return dict(values)


def _field_types() -> tuple[dict[str, str], dict[str, type]]:
    classes = typing.get_type_hints(Profile)
    sections = {"growth_factor": "profile", "source_steps": "profile"}
    types = {"growth_factor": int, "source_steps": int}
    for section in _SECTIONS:
        for name, kind in typing.get_type_hints(classes[section]).items():
            assert name not in sections, f"field {name} stands twice in the profile tree"
            sections[name] = section
            types[name] = kind
    return sections, types


FIELD_SECTIONS, FIELD_TYPES = _field_types()


def fields_of(profile: Profile) -> dict[str, object]:
    """Every field that can be overridden, by name."""
    sections = {section: getattr(profile, section) for section in _SECTIONS} | {"profile": profile}
    return {key: getattr(sections[section], key) for key, section in FIELD_SECTIONS.items()}


def _checked_type(key: str, value):
    kind = FIELD_TYPES[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # of hundreds of digits
            return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"The profile field {key!r} is of type {kind.__name__}; {value!r} is not.")
    return value


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
    ): (
        "document_borders 'positions' let tokens see earlier documents at rotary distances of zero"
        " and below, which no model is used with, and is gone; take 'mask', which hides them, or"
        " 'ignored'"
    ),
}


_RANGES = {  # what is accepted, in words: the test, and the fields
    "at least 1 and finite": (
        lambda value: 1 <= value < math.inf,
        (
            "layers hidden mlp heads kv_heads head_size vocabulary context seq_len micro_batch"
            " grad_accumulation shuffle_buffer held_out_windows max_steps chunk_tokens log_every"
            " eval_every checkpoint_every keep_checkpoints growth_factor source_steps"
            " attention_max_condition mlp_max_condition lm_head_max_condition"
        ),
    ),
    "at least 0 and finite": (
        lambda value: 0 <= value < math.inf,
        (
            "sliding_window experts active_experts router_aux_loss entropy_bonus"
            " entropy_target_bits entropy_target_weight activation_norm base_lr weight_decay"
            " attention_outer_multiplier attention_inner_multiplier mlp_multiplier"
            " lm_head_multiplier aux_lr aux_weight_decay clamp_every sigma_floor warmup_steps seed"
            " keep_every prefetch_batches"
        ),
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
    """Raises ValueError for the first of a profile's `values`, all its fields by name, that cannot
    be meant.
    """
    for key, choices in _CHOICES.items():
        if remark := REMOVED.get((key, values[key])):
            raise ValueError(f"The profile field {remark}.")
        if values[key] not in choices:
            raise ValueError(
                f"The profile field {key!r} is {values[key]!r}; it accepts {', '.join(choices)}."
            )
    for words, (accepts, keys) in _RANGES.items():
        for key in keys.split():
            if not accepts(values[key]):
                raise ValueError(f"The profile field {key!r} is {values[key]}; it must be {words}.")
    for key, value in values.items():
        if isinstance(value, int) and value >= 2**63:
            raise ValueError(
                f"The profile field {key!r} is {value}; a whole number must be below 2**63."
            )
    _check_experts(values)
    _check_data(values)
    _check_shape(values)


def _check_experts(values: Mapping) -> None:
    experts, active = values["experts"], values["active_experts"]
    if experts:
        if not 1 <= active <= experts:
            raise ValueError(
                f"active_experts is {active} of {experts} experts; choose from 1 to {experts}."
            )
        for key in ("attention_bias", "mlp_bias"):
            if values[key]:
                raise ValueError(
                    f"{key} is true with {experts} experts, and a Mixtral has no biases; set"
                    f" experts to 0, or {key} to false."
                )
        return
    for key in ("active_experts", "router_aux_loss", "sliding_window"):
        if values[key]:
            raise ValueError(
                f"{key} is {values[key]} without experts, and a dense Llama has none; set experts,"
                f" or {key} to 0."
            )


def _check_data(values: Mapping) -> None:
    if values["p_sft"] and values["packing"] == "dense":
        raise ValueError(
            f"p_sft is {values['p_sft']} with packing 'dense'; instruction pairs need packing"
            " 'segments'."
        )
    if values["seq_len"] < 2 and values["packing"] == "segments":
        raise ValueError(
            "seq_len is 1 with packing 'segments', which has no room for a document; choose at"
            " least 2."
        )
    if values["sft_loss"] != "response" and not values["p_sft"]:
        raise ValueError(
            f"sft_loss is {values['sft_loss']!r} with p_sft 0, which takes no instruction pairs;"
            " raise p_sft too."
        )
    if values["document_borders"] != "ignored" and values["packing"] == "segments":
        raise ValueError(
            f"document_borders is {values['document_borders']!r} with packing 'segments', which"
            " never hold two documents; use packing 'dense' or document_borders 'ignored'."
        )


def _check_shape(values: Mapping) -> None:
    if values["seq_len"] > values["context"]:
        raise ValueError(
            f"seq_len {values['seq_len']} is longer than the context of {values['context']} tokens"
            f" that the model can take; choose at most {values['context']}."
        )
    if values["layers"] % values["growth_factor"]:
        raise ValueError(
            f"{values['layers']} layers are not a multiple of growth_factor"
            f" {values['growth_factor']}; a cyclic stack needs layers = growth_factor × source"
            " layers."
        )
    if values["heads"] % values["kv_heads"]:
        raise ValueError(
            f"{values['heads']} heads cannot share {values['kv_heads']} kv_heads evenly; choose a"
            " divisor."
        )
    if values["head_size"] % 2:
        raise ValueError(
            f"head_size is {values['head_size']}; rotary positions turn pairs of numbers, choose an"
            " even one."
        )
    for key in ("hidden", "mlp") if values["experts"] else ():
        if values[key] % 4:
            raise ValueError(
                f"{key} is {values[key]}; torch multiplies the matrices of experts in multiples of"
                " 4, choose one."
            )
    if (
        not values["experts"] and values["hidden"] % values["heads"]
    ):  # transformers asks it of a Llama, not of a Mixtral
        raise ValueError(
            f"hidden {values['hidden']} is not a multiple of {values['heads']} heads; a dense Llama"
            " needs that."
        )


@dataclass(frozen=True)
class CardUsage:
    """The call of `pipeline("text-generation", …)` that a model card prints: its prompts and its
    arguments.
    """

    prompts: tuple[str, ...]
    arguments: Mapping[str, object]


# kl3m-002 card, "Getting Started": "Governing Law." needs the newline, without which the card's own
# sample does not begin a line.
CARD_USAGE = {
    "kl3m-002-520m": CardUsage(
        ("Under this", "Governing Law.\n"),
        {"do_sample": True, "temperature": 0.5, "num_return_sequences": 3, "max_new_tokens": 32},
    ),
    "kl3m-007-500m": CardUsage(
        ("The United States Constitution establishes",),
        {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 100},
    ),
}


def card_of(mixture: bool) -> str:
    """The card whose advice holds for a model: kl3m-002 for the family's mixtures of experts,
    kl3m-007 for its Llamas.
    """
    return "kl3m-002-520m" if mixture else "kl3m-007-500m"


def usage_of(card: str) -> CardUsage:
    """What the card named `card` prints. Raises ValueError for a card that prints no call."""
    if card not in CARD_USAGE:
        raise ValueError(
            f"There is no usage of the card {card!r}; choose one of {', '.join(CARD_USAGE)}."
        )
    return CARD_USAGE[card]


def warmup_remark(spec: ScheduleSpec) -> str:
    """What is said of a run that ends before its warmup; empty for any other. A trial of a few
    steps may well be one.
    """
    if spec.warmup_steps < spec.max_steps:
        return ""
    return (
        f"warmup_steps {spec.warmup_steps} is not below max_steps {spec.max_steps}: the learning"
        " rate rises to the last step and has no time at its peak; raise max_steps or lower"
        " warmup_steps."
    )
