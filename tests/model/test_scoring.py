"""Held-out loss against transformers' own, and that of single windows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kl3m_nb.model import scoring
from kl3m_nb.model.scoring import bits_per_byte, held_out_loss, score_sequences

SHAPE = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | changes)))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(3)
    return MixtralForCausalLM(
        MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=5)
    )


def random_windows(number=7, seq_len=20) -> torch.Tensor:
    return torch.randint(
        0, SHAPE["vocab_size"], (number, seq_len + 1), generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize(
    "build",
    [llama, lambda: llama(tie_word_embeddings=True), mixtral],
    ids=["llama", "tied", "mixtral"],
)
@pytest.mark.parametrize("tokens_at_once", [3, 1000], ids=["chunks", "whole"])
def test_equals_transformers_own_loss(build, tokens_at_once, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 0)
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", tokens_at_once)
    model, windows = build().eval(), random_windows()
    with torch.no_grad():
        reference = model(input_ids=windows, labels=windows)
    result = held_out_loss(model, windows, batch_windows=3)
    assert result.loss == pytest.approx(reference.loss.item(), abs=1e-5)
    assert result.tokens == 7 * 20
    distribution = torch.distributions.Categorical(logits=reference.logits[:, :-1])
    assert result.entropy_bits == pytest.approx(
        distribution.entropy().mean().item() / math.log(2), abs=1e-5
    )


def test_under_autocast_the_logits_are_float32():
    """Against float64 logits of the same hidden states, for the held-out loss and for scored
    sequences; logits are near 20.
    """
    model, windows, bodies = llama(initializer_range=1.0), random_windows(), []
    model.base_model.register_forward_hook(
        lambda *arguments: bodies.append(arguments[2].last_hidden_state)
    )
    result = held_out_loss(model, windows, autocast=torch.bfloat16)
    scores = score_sequences(model, windows.tolist(), autocast=torch.bfloat16)
    logits = bodies[0].double() @ model.lm_head.weight.detach().double().T
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert logits.abs().max() > 20 and result.loss == pytest.approx(expected.item(), rel=1e-6)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert result.entropy_bits == pytest.approx(entropy.mean().item() / math.log(2), rel=1e-5)
    confidence = torch.cat([each.confidence for each in scores])
    torch.testing.assert_close(
        confidence, logits.softmax(-1).amax(-1).flatten(), rtol=1e-5, atol=1e-7
    )


def test_the_precision_of_products_is_given_back():
    torch.set_float32_matmul_precision("high")
    try:
        held_out_loss(llama(), random_windows())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_losses_of_windows_are_means_of_single_tokens_and_average_to_the_total():
    model, windows = llama().eval(), random_windows()
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1]
    single = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    result = held_out_loss(model, windows, batch_windows=2)
    torch.testing.assert_close(
        result.loss_per_window.float(), single.mean(dim=1), rtol=0, atol=1e-5
    )
    assert result.loss_per_window.mean().item() == pytest.approx(result.loss, abs=1e-12)


def test_a_model_that_knows_nothing_has_the_loss_of_the_uniform_distribution():
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = held_out_loss(model, random_windows())
    assert result.loss == pytest.approx(math.log(101), abs=1e-6)
    assert result.entropy_bits == pytest.approx(math.log2(101), abs=1e-5)
    assert result.perplexity == pytest.approx(101, rel=1e-5)


def test_batch_size_changes_nothing_but_rounding():
    model, windows = llama(), random_windows()
    losses = [held_out_loss(model, windows, batch_windows=size).loss for size in (1, 4, 100)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_the_model_is_left_as_it_was():
    model, windows = llama(attention_dropout=0.5), random_windows()
    model.train()
    model.model.layers[0].eval()  # a mixed state must survive as well
    modes = [module.training for module in model.modules()]
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    random_state = torch.get_rng_state()
    first, second = held_out_loss(model, windows), held_out_loss(model, windows)
    assert first.loss == second.loss, "dropout was at work"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_no_graph_is_built(monkeypatch):
    model, seen, head_logits = llama(), [], scoring.head_logits

    def watched(*arguments):
        logits = head_logits(*arguments)
        seen.append(logits.requires_grad)
        return logits

    monkeypatch.setattr(scoring, "head_logits", watched)
    held_out_loss(model, random_windows())
    assert seen == [False]


def test_autocast_is_near_and_the_reduction_stays_in_float32():
    model, windows = llama(), random_windows()
    exact, rounded = (
        held_out_loss(model, windows),
        held_out_loss(model, windows, autocast=torch.bfloat16),
    )
    assert exact.loss != rounded.loss, "autocast did nothing"
    assert rounded.loss == pytest.approx(exact.loss, abs=0.05)


def test_a_diverged_model_gives_nan_and_keeps_its_mode():
    model = llama().train()
    model.model.norm.weight.data.fill_(math.nan)
    assert math.isnan(held_out_loss(model, random_windows()).loss)
    assert model.training


@pytest.mark.parametrize(
    "windows",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(0, 9, dtype=torch.int64),
        torch.zeros(2, 1, dtype=torch.int64),
        torch.zeros(2, 9),
    ],
)
def test_windows_of_another_kind_are_refused(windows):
    with pytest.raises(ValueError, match=r"int64 token ids of shape \[N, seq_len \+ 1\]"):
        held_out_loss(llama(), windows)


SEQUENCES = [[5, 9, 3, 77, 2, 8, 100], [1, 4], [30, 31, 32, 33], [9] * 12, [60, 61, 62]]


@pytest.mark.parametrize("build", [llama, mixtral])
def test_scores_of_sequences_are_those_of_each_alone(build):
    """Padding, batches and their order must be invisible in the result."""
    model = build().eval()
    for sequence, scores in zip(
        SEQUENCES, score_sequences(model, SEQUENCES, batch_tokens=20), strict=True
    ):
        ids = torch.tensor([sequence])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        distribution = torch.distributions.Categorical(logits=logits)
        torch.testing.assert_close(
            scores.loss, -distribution.log_prob(ids[0, 1:]), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(scores.entropy, distribution.entropy(), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            scores.confidence, distribution.probs.max(dim=-1).values, rtol=0, atol=1e-5
        )
        assert torch.equal(scores.correct, (logits.argmax(dim=-1) == ids[0, 1:]).double())


@pytest.mark.parametrize(
    ("batch_tokens", "batches"), [(20, [(1, 12), (2, 7), (2, 3)]), (21, [(1, 12), (3, 7), (1, 2)])]
)
def test_no_batch_is_larger_than_asked_for_and_none_has_room_for_the_next(batch_tokens, batches):
    model, seen = llama(), []
    model.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    score_sequences(model, SEQUENCES, batch_tokens=batch_tokens)
    assert seen == [
        (rows, width - 1) for rows, width in batches
    ]  # the last token of a sequence is only predicted


def test_only_the_predicted_end_of_a_sequence_is_scored():
    model = llama()
    whole = score_sequences(model, SEQUENCES)
    ends = score_sequences(model, SEQUENCES, predicted=[3, 1, 3, 5, 1])
    for all_scores, scores, number in zip(whole, ends, (3, 1, 3, 5, 1), strict=True):
        torch.testing.assert_close(scores.loss, all_scores.loss[-number:], rtol=0, atol=1e-6)
        assert len(scores.entropy) == len(scores.correct) == number


@pytest.mark.parametrize("predicted", [[0], [3]])
def test_a_sequence_without_context_or_label_is_refused(predicted):
    with pytest.raises(ValueError, match="of a sequence of 3"):
        score_sequences(llama(), [[1, 2, 3]], predicted)


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), tokens=1000, num_bytes=1000) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=250, num_bytes=1000) == pytest.approx(2)
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 1, 0)
