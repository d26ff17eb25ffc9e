"""Named profiles: the single place for every number of a model, its optimizers, its data and its run.

A `Profile` is a tree of small frozen dataclasses. Field names are unique over the whole tree, so one flat keyword changes
any of them: `get_profile("tiny", max_steps=40, micro_batch=2)`. Numbers come from the model cards of the KL3M family;
where a card is silent, the docstring of the field's class says what was inferred.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from dataclasses import dataclass, field

from kl3m_nb.display import did_you_mean, table_html
from kl3m_nb.profile_checks import check_values

ATTENTION_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_ROLES = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder. `experts = 0` is a dense Llama, `experts > 0` a Mixtral of that many experts per layer."""

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
    """Weights of the training objective (kl3m-007 card, "Regularization"); all zero is plain cross-entropy.

    The card names an entropy target and not what has to meet it; both values of `entropy_target_over` are inferred. Over tokens
    the term is (mean entropy - target)² + the variance of the entropy over tokens, over the batch it is the first part alone.
    """

    label_smoothing: float = 0.001
    entropy_bonus: float = 0.001
    entropy_target_bits: float = 6.5
    entropy_target_weight: float = 0.001
    entropy_target_over: str = "token"  # token: every token's entropy is to meet the target | batch: their mean is
    activation_norm: float = 0.0006  # weight of mean(h²) of the residual stream before the final norm
    chunk_tokens: int = 1024  # tokens whose logits exist at one time


@dataclass(frozen=True)
class OptimizerSpec:
    """Muon for the matrices of the blocks, AdamW ("aux") for the rest (kl3m-007 card, "Optimizer: Muon").

    The Muon LR is depth-scaled, `base_lr · √(16 / layers)`: 0.01 · √(16/120) = 0.00365 is the card's figure.
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
    """Ceilings on σ₁/σ_min by role and the cadence of the clamp (kl3m-007 card, "Spectral Clamping")."""

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
    """Linear warmup and cosine decay of both learning rates, and clipping of the global gradient norm (card)."""

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

    `source` is one line, options and several weighted sources included: `kl3m_nb.sources` says how. A run may be resumed with
    another `micro_batch` and `grad_accumulation` of the same product.
    """

    source: str = "hub:alea-institute/kl3m-data-sample-006-medium"
    tokenizer: str = "alea-institute/kl3m-004-128k-cased"  # hub id, folder, or "corpus"/"corpus-001": trained on the source
    seq_len: int = 4096
    micro_batch: int = 5
    grad_accumulation: int = 32  # micro-batches of an optimizer step, those of all processes together
    shuffle_buffer: int = 32
    held_out_windows: int = 64
    seed: int = 7
    packing: str = "dense"  # dense: windows across documents | segments: never two documents in one, padded at random
    document_borders: str = "ignored"  # of dense windows: ignored | mask: attention stays inside, and positions begin anew
    p_sft: float = 0.0  # share of segments that are instruction pairs (inferred; the card says "hybrid NTP and SFT")
    sft_loss: str = "response"  # response | all: which tokens of an instruction pair are trained on


@dataclass(frozen=True)
class RuntimeSpec:
    """How a run is carried out. Nothing here changes what is learned, so a run may be resumed under other values."""

    precision: str = "auto"  # auto | float32 | bfloat16 (autocast over float32 weights)
    attention: str = "auto"  # auto | sdpa | flash_attention_2 | flash_attention_4 | eager
    compile: str = "auto"  # auto | on | off: torch.compile of each block
    gradient_checkpointing: str = "auto"  # auto: where memory asks for it | on: as the kl3m-007 card has it | off
    tf32: str = "auto"  # auto | on | off: float32 products of a GPU with shorter mantissas
    log_every: int = 1
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 3  # the newest
    keep_every: int = 0  # and those whose step is a multiple of this; 0: no others
    prefetch_batches: int = 2  # made ahead in a thread; 0: made when they are asked for
    parallel: str = "ddp"  # ddp | fsdp: how several processes hold the model, whole on each or in shards


@dataclass(frozen=True)
class Profile:
    """Everything a run needs to know, by name. `growth_factor` g says the model is g copies of a source of layers/g."""

    name: str
    model: ModelSpec
    growth_factor: int = 1
    source_steps: int = 63_000  # optimizer steps of the source's own training (the card's source checkpoint)
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
        rows = {"profile": f"{self.name} · growth_factor {self.growth_factor} · source_steps {self.source_steps:,}"}
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

_KL3M_170M = ModelSpec(layers=30, hidden=576, mlp=1536, heads=9, kv_heads=3, head_size=64, vocabulary=131_072, context=4096)
_TINY = ModelSpec(layers=12, hidden=128, mlp=344, heads=4, kv_heads=2, head_size=32, vocabulary=4096, context=256)
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


# On an H200 the head and the loss of 20,480 tokens take 21 ms and 3.8 GB in chunks of 4,096, 24 ms and 2.2 GB in chunks of 2,048.
# The card of kl3m-006 has 1,024.
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
                ns_steps=3, attention_outer_multiplier=0.7, attention_inner_multiplier=0.9, lm_head_multiplier=0.85
            ),
        ),
        Profile("kl3m-007-500m", dataclasses.replace(_KL3M_170M, layers=120), objective=_LARGE_CHUNKS, growth_factor=4),
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
    """The profile called `name`, with any of its fields changed: `get_profile("tiny", layers=3, max_steps=500)`.

    Raises ValueError for an unknown profile or field, a value of the wrong type, or numbers that contradict each other.
    """
    if name not in PROFILES:
        raise ValueError(f"There is no profile {name!r}; choose one of {', '.join(PROFILES)}.")
    return override_profile(PROFILES[name], **overrides)


def profile_with(name: str, /, **overrides) -> Profile:
    """`get_profile` for a notebook's parameters, where 0 and "" mean the profile's own value, and -1 that of `p_sft`."""
    own = {"p_sft": (-1,)}  # 0 is a value of its own: no instruction pairs
    return get_profile(name, **{key: value for key, value in overrides.items() if value not in own.get(key, (0, ""))})


def source_profile(profile: Profile, /, **overrides) -> Profile:
    """The profile of the model that `profile` is grown from: `growth_factor` times shallower, trained for `source_steps`.

    It has a seed of its own: drawn in the same order, the grown model's first data would be what the source has just seen.
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
            hint = did_you_mean(key, FIELD_SECTIONS) or f"; it has {', '.join(sorted(FIELD_SECTIONS))}"
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
    """Inverse of `Profile.to_dict`, for configurations read back from disk; a number that is missing is at its default.

    Raises ValueError for fields that no profile has, sections that are missing and values of the wrong type.
    """
    classes = typing.get_type_hints(Profile)
    top = _known_fields(Profile, values, "a profile")
    for section in _SECTIONS:
        fields = _known_fields(classes[section], top[section], f"a profile's {section}")
        top[section] = classes[section](**{key: _checked_type(key, value) for key, value in fields.items()})
    if not isinstance(top["name"], str):
        raise ValueError(f"the name of a profile is text; {top['name']!r} is not")
    return Profile(**{key: _checked_type(key, value) if key in FIELD_TYPES else value for key, value in top.items()})


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
