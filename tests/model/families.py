"""Every causal family of the installed transformers, built small, and what this project does with
it: the table docs/families.md.

`python tests/model/families.py` writes the table; tests/model/test_families.py fails where it is
out of date.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kl3m_nb.common import paths
from kl3m_nb.growth import stacking
from kl3m_nb.model import decoder, logits, roles, scoring
from kl3m_nb.model.loading import REFUSALS, reason
from kl3m_nb.spectra import matrices

TABLE = paths.project_root() / "docs" / "families.md"
BEST_KNOWN = (
    "llama",
    "mixtral",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "cohere",
    "olmo2",
    "gpt2",
    "gpt_oss",
)
MOST_PARAMETERS = 5_000_000  # beyond these a family has not become small
ENTRIES = 96

# A small size by every name that families have for it; a name that a family's config does not know
# is left out.
_SMALL = dict(
    vocab_size=ENTRIES,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    d_model=32,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    n_heads=4,
    n_layers=2,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_k=2,
    moe_topk=2,
    shared_expert_intermediate_size=16,
    expert_ffn_hidden_size=16,
    ffn_hidden_size=48,
    n_group=1,
    topk_group=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    vocab_size_per_layer_input=ENTRIES,
    hidden_size_per_layer_input=8,
    state_size=8,
    num_heads=4,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_n_groups=1,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=1,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    lru_width=32,
    attention_window_size=16,
    dim=32,
    embedding_size=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    ffn_dim=48,
    embed_dim=32,
    num_layers=2,
    sliding_window=16,
    num_kv_shared_layers=0,
    intermediate_size_mlp=48,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=16,
    word_embed_proj_dim=32,
    is_decoder=True,
    pad_token_id=1,
    bos_token_id=1,
    eos_token_id=1,
)
# What stands between hidden states and logits, or scales what leads there, at values that a loss
# cannot miss.
_TELLING = dict(
    logits_scaling=3.0,
    logit_scale=0.3,
    final_logit_softcapping=2.0,
    attn_logit_softcapping=2.0,
    embedding_multiplier=2.0,
    residual_multiplier=0.7,
    attention_multiplier=0.3,
    lm_head_multiplier=0.4,
    scale_emb=2.0,
    dim_model_base=16,
    scale_depth=1.4,
)
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # latent attention has as many keys as queries
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_OF_FAMILY = {
    **dict.fromkeys(
        (
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
        ),
        _LATENT,
    ),
    **dict.fromkeys(("minicpm3", "youtu", "axk1", "axk2", "dots3_note_text"), _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _LINEAR),
    "dots1": {"n_shared_experts": 1, "num_key_value_heads": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _LATENT | _LINEAR),
    "granitemoehybrid": _LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"expand": 2, "head_dim": 8, "num_heads": 8},
}


@dataclass(frozen=True)
class Verdict:
    """What is done with a family, in the words of the table; `difference` is that of our losses
    from its own, in nats.
    """

    evaluate: str = ""
    stack: str = ""
    train: str = ""
    spectra: str = ""
    not_built: str = ""
    difference: float = 0.0


def small_config(family: str) -> transformers.PreTrainedConfig:
    """The family's configuration at a small size, all else as its makers have it."""
    config_class = CONFIG_MAPPING[family]
    defaults = config_class()
    known = {*defaults.to_dict(), *config_class.attribute_map}
    small = {key: value for key, value in _SMALL.items() if key in known}
    telling = {
        key: value for key, value in _TELLING.items() if getattr(defaults, key, None) is not None
    }
    return config_class(**small | telling | _OF_FAMILY.get(family, {}))


def judge(family: str) -> Verdict:
    """Builds a family small with random weights and tries everything with it. An error is part of
    the verdict.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        folder = Path(folder)
        try:
            config = small_config(family)
            with torch.device("meta"):
                size = sum(
                    parameter.numel()
                    for parameter in AutoModelForCausalLM.from_config(config).parameters()
                )
            if size > MOST_PARAMETERS:
                return Verdict(not_built="several models in one, or sizes of its own")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(folder / "model")
        except REFUSALS as error:
            return Verdict(not_built=_short(reason(error), folder))
        evaluated, difference = _evaluated(folder)
        return Verdict(
            evaluate=evaluated,
            difference=difference,
            stack=_stacked(folder),
            train="yes" if family in decoder.TRAINED_FAMILIES else "no",
            spectra=_spectra(folder),
        )


def _evaluated(folder: Path) -> tuple[str, float]:
    """Whether and how it is evaluated, and how far its losses are from those of its own logits,
    loaded by transformers alone.
    """
    try:
        own = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        windows = torch.randint(4, ENTRIES, (3, 25), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = [
                F.cross_entropy(own(window[None, :-1]).logits[0].double(), window[1:]).item()
                for window in windows
            ]
    except REFUSALS as error:
        return f"no: its own code fails here ({_short(reason(error), folder)})", 0.0
    try:
        model = decoder.load_model(folder / "model")
        losses = scoring.held_out_loss(model, windows).loss_per_window.tolist()
        sequences = [windows[0].tolist(), windows[1].tolist(), windows[2, :9].tolist()]
        scores = scoring.score_sequences(model, sequences)
        losses += [scores[0].loss.mean().item(), scores[2].loss.mean().item()]
        with torch.no_grad():
            short = F.cross_entropy(own(windows[2:, :8]).logits[0].double(), windows[2, 1:9]).item()
        difference = max(
            abs(a - b) for a, b in zip(losses, [*expected, expected[0], short], strict=True)
        )
        return ("yes" if logits.head_is_all(model) else "yes, by its own forward pass"), difference
    except ValueError as error:
        return f"no: {_short(str(error), folder)}", 0.0


def _stacked(folder: Path) -> str:
    try:
        stacking.stack_checkpoint(folder / "model", folder / "stack", factor=2)
        stacking.verify_stack(folder / "model", folder / "stack")
    except ValueError as error:
        return f"no: {_short(str(error), folder)}"
    _, info = AutoModelForCausalLM.from_pretrained(folder / "stack", output_loading_info=True)
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return "WRONG: verified, and transformers does not find every tensor"
    try:
        stacking.stack_checkpoint(
            folder / "model", folder / "zero", factor=2, order="zero_initialised"
        )
    except ValueError:
        return "yes, not zero_initialised"
    tokens = torch.arange(4, 24)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder / name)(tokens).logits
            for name in ("model", "zero")
        )
    return (
        "yes"
        if torch.allclose(before, after, atol=1e-5, equal_nan=True)
        else "WRONG: zero-initialised copies compute something"
    )


def _spectra(folder: Path) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = dict.fromkeys(
                matrix.role for matrix in matrices.find_matrices(folder / "model")
            )
        except ValueError as error:
            return f"no: {_short(str(error), folder)}"
    absent = [role for role in roles.ROLES if role not in found]
    left_out = re.search(
        r"leave out: (.*)\.$", "\n".join(str(warning.message) for warning in caught)
    )
    remarks = [f"no {', '.join(absent)}"] * bool(absent) + (
        [f"without {left_out[1]}"] if left_out else []
    )
    return "; ".join(["yes", *remarks])


_REASONS = {
    r"named model\.layers\.N": "blocks of other names",
    r"no num_hidden_layers": "its depth has another name",
    r"not of one kind": "blocks of several kinds",
    r"has (\S+) .* where the (copied )?layer": r"\1 follows from the layer's number",
    r"not a decoder this analysis knows": "matrices of other names",
    r"as one matrix": "several roles in one matrix",
    r"the other way round": "experts stored as [experts, columns, rows]",
    r"layers are alike": "layers of several kinds",
    r"more than one stack": "several stacks of layers",
    r"sees the tokens": "what follows a token changes what is predicted before",
    r"holds tensors of the type": "tensors of whole numbers",
}


def _short(sentence: str, folder: Path) -> str:
    for pattern, words in _REASONS.items():
        if match := re.search(pattern, sentence):
            return match.expand(words)
    return sentence.replace(str(folder / "model"), "it").replace("|", "/").strip()[:110]


def table(verdicts: dict[str, Verdict]) -> str:
    """docs/families.md."""
    lines = [
        "# Families of models",
        "",
        (
            "What the project does with each causal family of transformers "
            f"{transformers.__version__}, tried with a small model of random weights."
        ),
        (
            "`python tests/model/families.py` writes this page, and `tests/model/test_families.py`"
            " fails where it is out of date."
        ),
        "",
        (
            "* **evaluate**: losses in notebook 04 and `evaluation` are those of the family's own"
            " logits, to 1e-5 nats. Most"
        ),
        (
            "  families apply their output embedding to the last hidden state and nothing else; of"
            " the others all logits of a row"
        ),
        "  exist at once.",
        (
            "* **stack**: `kl3m_nb stack` copies the blocks, and transformers finds every tensor of"
            " the stack."
        ),
        "* **train**: notebook 02 and `kl3m_nb train`. Other families are refused by name.",
        (
            "* **spectra**: notebook 03; *no* and *without* name matrices that the family does not"
            " have, or that are left out."
        ),
        "",
        "| family | evaluate | stack | train | spectra |",
        "|---|---|---|---|---|",
    ]
    for family, verdict in verdicts.items():
        if not verdict.not_built:
            lines.append(
                f"| {family} | {verdict.evaluate} | {verdict.stack} | {verdict.train} |"
                f" {verdict.spectra} |"
            )
    lines += ["", "These could not be built small, and are not tried:", ""]
    lines += [
        f"* {family}: {verdict.not_built}"
        for family, verdict in verdicts.items()
        if verdict.not_built
    ]
    return "\n".join(lines) + "\n"


def all_verdicts() -> dict[str, Verdict]:
    return {family: judge(family) for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    verdicts = all_verdicts()
    TABLE.write_text(table(verdicts), encoding="utf-8")
    far = {
        family: verdict.difference
        for family, verdict in verdicts.items()
        if not verdict.difference <= 1e-5
    }
    print(f"{TABLE}: {len(verdicts)} families" + (f"; WRONG: {far}" if far else ""))
