"""The model card of a checkpoint: written from the run into its README.md.

A card states what was done and measured, in the sections that the cards of the KL3M family have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.model import decoder
from kl3m_nb.model.costs import count_parameters
from kl3m_nb.optim.model_clamp import ClampConditions
from kl3m_nb.profiles import PROFILES, ModelSpec, Profile, card_of, usage_of
from kl3m_nb.runs.lineage import Counts

_CITATION = """```bibtex
@inproceedings{gstack2024,
  title={Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training},
  author={Du, Wenyu and Luo, Tongxu and Qiu, Zihan and Huang, Zeyu and Shen, Yikang and Cheng, Reynold and Guo, Yike and Fu, Jie},
  booktitle={NeurIPS},
  year={2024},
  note={arXiv:2405.15319}
}
```"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a run beyond its profile. Losses are in nats per token; NaN stands for
    one that was not measured.

    `conditions` is what the last clamp knew. `stack` says how the model was grown, as `stack_facts`
    gives it.
    """

    counts: Counts
    init: str
    runtime: str
    held_out_loss: float = float("nan")
    held_out_step: int = 0
    cross_entropy: float = float("nan")
    conditions: ClampConditions = field(default_factory=ClampConditions)
    stack: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """What a card says of the model itself, by its own configuration and tokenizer: a start may
    differ from the profile in more than `decoder.check_fits` refuses.

    `scaling` says how positions are scaled, as `decoder.position_scaling` does; `start` is empty for
    a tokenizer without that token.
    """

    spec: ModelSpec
    scaling: str
    start: str  # the beginning-of-text token
    end: str  # the end-of-text token


def model_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
    """What the card of `model`, trained with `tokenizer`, says of them."""
    spec, scaling = decoder.spec_of(model.config), decoder.position_scaling(model.config)
    return ModelFacts(spec, scaling, tokenizer.bos_token or "", tokenizer.eos_token)


def published_name(profile: Profile, step: int) -> str:
    """The family's way of naming a checkpoint: kl3m-007-500m-step37000.

    A model that is not as deep as the profile's name says, such as the source it is grown from, is
    named after the profile of its own shape, kl3m-006-170m-step63000; where there is none its depth
    stands in the name, tiny-3-layers-step240.
    """
    name, named = profile.name, PROFILES.get(profile.name)
    if named and named.model.layers != profile.model.layers:
        alike = (other.name for other in PROFILES.values() if other.model == profile.model)
        name = next(alike, f"{name}-{profile.model.layers}-layers")
    return f"{name}-step{step}"


def model_card(profile: Profile, facts: CardFacts, model: ModelFacts) -> str:
    """The Markdown of a checkpoint's README.md, with the metadata block that the hub reads."""
    name, grown = published_name(profile, facts.counts.step), _source_layers(facts) > 0
    advised = usage_of(card_of(mixture=bool(model.spec.experts))).arguments
    metadata = {
        "model_name": name,
        "language": "en",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kl3m", "legal", *(["g_stack"] if grown else [])],
    }
    sections = {
        "Model Details": _details(profile, facts, model.spec),
        "Training Progress": _progress(profile, facts),
        "Model Architecture": _architecture(model),
        "G_stack": _stacking(profile, facts) if grown else "",
        "Training Configuration": _configuration(profile),
        "Training Details": _training_details(profile, facts, model),
        "Spectra": _spectra(facts),
        "Usage": _usage(name, advised),
        "Generation": f"Recommended sampling: {_advice(advised)}.",
        "Limitations": (
            "A small base model: it continues text in the manner of its data and does not know"
            " whether a sentence is true. Nothing it writes is legal advice."
        ),
        "Citation": _CITATION if grown else "",
        "License": "Apache 2.0. The text it was trained on has its own terms.",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n#"
        f" {name}\n\n{_summary(facts, model.spec)}\n\n{body}\n"
    )


def _summary(facts: CardFacts, spec: ModelSpec) -> str:
    total = count_parameters(spec).total
    kind = "mixture-of-experts" if spec.experts else "dense"
    layers = _source_layers(facts)
    grown = f", grown from {layers} layers by {_manner(facts.stack)}" if layers else ""
    return (
        f"A {kind} language model of {_millions(total)} parameters and {spec.layers} layers{grown},"
        f" after {facts.counts.step:,} training steps."
    )


def _details(profile: Profile, facts: CardFacts, spec: ModelSpec) -> str:
    count = count_parameters(spec)
    vocabulary = spec.vocabulary * spec.hidden * (1 if spec.tied_embeddings else 2)
    tied = "one matrix, tied" if spec.tied_embeddings else "two matrices"
    active = f", {count.active:,} active per token" if spec.experts else ""
    return _items(
        {
            "Architecture": "Mixtral" if spec.experts else "Llama with grouped-query attention",
            "Parameters": (
                f"{count.total:,}{active}; {count.total - vocabulary:,} without embedding and LM"
                f" head ({tied})"
            ),
            "Layers": str(spec.layers),
            "Started from": public_name(facts.init),
            "Training status": f"{facts.counts.step:,} of {profile.schedule.max_steps:,} steps",
            "Precision": f"float32 weights, trained on {facts.runtime}",
        }
    )


def _progress(profile: Profile, facts: CardFacts) -> str:
    return _items(
        {
            "Steps": f"{facts.counts.step:,} / {profile.schedule.max_steps:,} planned",
            "Tokens Processed": f"{facts.counts.tokens:,}",
            "Valid Tokens": f"{facts.counts.valid_tokens:,}",
            "Held-out loss": _loss(facts.held_out_loss, f" at step {facts.held_out_step:,}"),
            "Cross-entropy of the last step": _loss(facts.cross_entropy),
            "Dataset": profile.data.source,
        }
    )


def _architecture(model: ModelFacts) -> str:
    spec = model.spec
    rows = {
        "Hidden size": f"{spec.hidden:,}",
        "Layers": str(spec.layers),
        "Attention heads": f"{spec.heads} ({spec.kv_heads} KV heads, {spec.head_size} each)",
        "Intermediate size": f"{spec.mlp:,}",
        "Vocabulary": f"{spec.vocabulary:,} tokens",
        "Context": (
            f"{spec.context:,} tokens"
            + (f", sliding window {spec.sliding_window}" if spec.sliding_window else "")
        ),
        "RoPE theta": (
            f"{spec.rope_theta:,.0f}"
            + (f", positions scaled ({model.scaling})" if model.scaling else "")
        ),
    }
    if spec.attention_bias or spec.mlp_bias:
        rows["Biases"] = ", ".join(["attention"] * spec.attention_bias + ["MLP"] * spec.mlp_bias)
    if spec.experts:
        rows["Experts"] = (
            f"{spec.experts} per layer, {spec.active_experts} active, router loss weight"
            f" {spec.router_aux_loss:g}"
        )
    return _items(rows)


def _source_layers(facts: CardFacts) -> int:
    """Depth of the model that this one was grown from; 0 when it was not grown."""
    return facts.stack["source_layers"] if facts.stack and facts.stack["factor"] > 1 else 0


def _manner(stack: dict) -> str:
    return "random blocks" if stack.get("order") == "random" else "stacking"


def _stacking(profile: Profile, facts: CardFacts) -> str:
    stack, layers = facts.stack, _source_layers(facts)
    times = profile.model.layers // layers
    blocks = (
        f"The model has {times} times the {layers} blocks of its source (G_stack,"
        " arXiv:2405.15319)."
    )
    if stack.get("order") == "random":
        blocks = (
            f"The first {layers} of its {profile.model.layers} blocks are its source's, the others"
            " were drawn at random."
        )
    if "source" not in stack:  # a card has told of it
        return f"{blocks} This run continues the grown model with a fresh optimizer."
    order, noise = stack["order"], stack["noise"]
    changed = "nothing was rescaled"
    if order == "zero_initialised":
        changed = f"o_proj and down_proj of all blocks after the first {layers} were set to zero"
    if noise:
        changed = f"every matrix of the copied blocks was mixed with {noise:.0%} of noise"
    rows = {"Source": public_name(stack["source"]), "Order": order, "Noise": f"{noise:.0%}"}
    rows |= {f"SHA-256 of {name}": digest for name, digest in stack["source_sha256"].items()}
    text = (
        f"{blocks} Embedding, final norm and LM head were copied once, {changed}, and the optimizer"
        " started fresh."
    )
    return f"{text}\n\n{_items(rows)}"


_TARGET_OF = {"token": "for every token", "batch": "for the mean of a batch"}


def _configuration(profile: Profile) -> str:
    spec, clamp, objective = profile.optimizer, profile.clamp, profile.objective
    optimizer = _items(
        {
            "Muon": (
                f"learning rate {profile.muon_lr:.5g} = {spec.base_lr:g} ×"
                f" √(16/{profile.model.layers}), momentum {spec.momentum}, {spec.ns_steps}"
                f" Newton-Schulz steps, weight decay {spec.weight_decay:g}"
            ),
            "AdamW": (
                f"learning rate {spec.aux_lr:g} for embedding, LM head, norms and router, weight"
                f" decay {spec.aux_weight_decay:g}"
            ),
            "Multipliers": (
                f"q/o {spec.attention_outer_multiplier:g}, k/v {spec.attention_inner_multiplier:g},"
                f" MLP {spec.mlp_multiplier:g}, LM head {spec.lm_head_multiplier:g}"
            ),
        }
    )
    ceilings = "off"
    if clamp.clamp_every:
        ceilings = (
            f"every {clamp.clamp_every} steps to a condition of at most"
            f" {clamp.attention_max_condition:g} (attention), {clamp.mlp_max_condition:g} (MLP),"
            f" {clamp.lm_head_max_condition:g} (LM head); floor {clamp.sigma_floor:g}"
        )
    regularization = _items(
        {
            "Spectral clamping": ceilings,
            "Label smoothing": f"{objective.label_smoothing:g}",
            "Entropy": (
                f"bonus {objective.entropy_bonus:g}, target {objective.entropy_target_bits:g} bits"
                f" {_TARGET_OF[objective.entropy_target_over]} with weight"
                f" {objective.entropy_target_weight:g}"
            ),
            "Activation norm": f"{objective.activation_norm:g}",
        }
    )
    data = profile.data
    batch = _items(
        {
            "Batch": (
                f"{data.micro_batch} × {data.grad_accumulation} sequences of {data.seq_len:,}"
                f" tokens, {profile.tokens_per_step:,} tokens a step"
            ),
        }
    )
    return "\n".join((optimizer, regularization, batch))


def _training_details(profile: Profile, facts: CardFacts, model: ModelFacts) -> str:
    schedule, data = profile.schedule, profile.data
    marks = f"dense windows, `{model.end}` after each document"
    if data.packing == "segments":
        marks = f"padded segments, `{model.start}` and `{model.end}` at a document's own borders"
    if data.p_sft:
        trained_on = "their responses" if data.sft_loss == "response" else "all their tokens"
        marks += (
            f"; {100 * data.p_sft:g}% of the segments are instruction pairs, trained on"
            f" {trained_on}"
        )
    return _items(
        {
            "Data": (
                f"{data.source}, tokenizer {public_name(data.tokenizer)}, shuffle buffer"
                f" {data.shuffle_buffer}, {marks}"
            ),
            "Schedule": (
                f"linear warmup over {schedule.warmup_steps} steps, cosine to"
                f" {schedule.min_lr_ratio:g} of the peak at step {schedule.max_steps:,}"
            ),
            "Gradient clipping": (
                f"{schedule.clip_mode}, maximum {schedule.clip_max_norm:g}, coefficient "
                f"{schedule.clip_coefficient:g}, beta {schedule.clip_beta:g}"
            ),
            "Runtime": facts.runtime,
        }
    )


def _spectra(facts: CardFacts) -> str:
    groups = facts.conditions.groups.items()
    if not groups:
        return (
            "The condition of the weight matrices is not known: no clamp has come since this run"
            " began or was last continued."
        )
    steps = facts.counts.step - facts.conditions.step
    since = (
        f", {steps:,} training step{'s' if steps > 1 else ''} before this checkpoint"
        if steps
        else ""
    )
    title = (
        f"Condition σ₁/σ_min of the weight matrices, as the clamp of step {facts.conditions.step:,}"
        f" left them{since}:"
    )
    header = (
        "| matrices | measured | median of these | maximum of these | not measured, proved to be"
        " below their ceiling |"
    )
    rows = (
        f"| {name} | {known.measured} of {known.matrices} | {_condition(known.median)} |"
        f" {_condition(known.maximum)} |"
        f" {'all' if known.certified == known.matrices else known.certified} |"
        for name, known in groups
    )
    text = "\n".join((f"{title}\n", header, "|---|---|---|---|---|", *rows))
    if estimated := sum(known.estimated for _, known in groups):
        text += (
            f"\n\nOf the measured conditions {estimated} are estimates from below, good to some"
            " percent; these matrices, too, were proved to be below their ceiling."
        )
    if zero := sum(known.zero for _, known in groups):
        text += f"\n\nMatrices that are all zero and have no condition: {zero}."
    return text


def _condition(value: float) -> str:
    return "–" if value != value else f"{value:,.1f}"


def _usage(name: str, advised: Mapping[str, object]) -> str:
    # The examples print one text, however many the family's card asks for.
    arguments = ", ".join(
        f"{key}={value}" for key, value in advised.items() if key != "num_return_sequences"
    )
    return f'''```python
from transformers import pipeline

generator = pipeline("text-generation", model="{name}")
print(generator("The United States Constitution establishes", {arguments})[0]["generated_text"])
```

or with model and tokenizer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("The United States Constitution establishes", return_tensors="pt", return_token_type_ids=False)
outputs = model.generate(**inputs, {arguments})
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
```

`{name}` stands for this folder.'''


def _advice(advised: Mapping[str, object]) -> str:
    if "top_p" not in advised:
        return f"temperature {advised['temperature']} alone"
    return f"temperature {advised['temperature']}, top-p {advised['top_p']}, repetition penalty 1.0"


def public_name(name: str) -> str:
    """A hub id or a path in the project as it is; any other path without its place, since a card is
    read elsewhere.

    What is left is the last part, of a run's checkpoint or a stack's what begins with the run's
    name: demo-stack/checkpoint.
    """
    path = Path(name)
    if not path.is_absolute():
        return name
    parts = 3 if path.parent.name == "checkpoints" else 2 if path.name == "checkpoint" else 1
    return str(Path(*path.parts[-parts:]))


def _items(rows: dict[str, str]) -> str:
    return "\n".join(f"- **{name}**: {text}" for name, text in rows.items())


def _loss(value: float, when: str = "") -> str:
    return "not measured yet" if value != value else f"{value:.4f} nats per token{when}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"
