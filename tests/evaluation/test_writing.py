"""Measures of writing on hand-made texts where the answer is known; entropy and the sampling sweep
on a model that is.
"""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kl3m_nb.evaluation.generation import Prompt, Sample, Sampling, generate
from kl3m_nb.evaluation.writing import (
    distinct_n,
    ends_in_loop,
    entropy_along,
    measure,
    measure_extraction,
    repetition_rate,
    samples_table,
    sampling_sweep,
    self_bleu,
)


def test_distinct_n_pools_the_texts():
    # the, law, and, the, rule | the, law: 7 words, 4 different; pairs inside a text only: 5, of
    # which "the law" twice.
    pair = ["The law and the rule", "the law"]
    assert distinct_n(pair, 1) == pytest.approx(4 / 7)
    assert distinct_n(pair, 2) == pytest.approx(4 / 5)
    assert math.isnan(distinct_n(["one two"], 3))


def test_repetition_rate():
    assert repetition_rate("a b c d e f g") == 0
    assert repetition_rate("a b c d a b c d") == pytest.approx(
        1 / 5
    )  # five 4-grams, the last is the first
    assert repetition_rate("no no no no no no no") == pytest.approx(3 / 4)
    assert math.isnan(repetition_rate("one two three"))


@pytest.mark.parametrize(
    ("text", "looped"),
    [
        ("The term ends. of the of the of the of the", True),
        ("the the the the the the the the", True),
        (
            (
                "as provided in this section, as provided in this section, as provided in this"
                " section, as"
            ),
            True,
        ),
        ("the the the", False),  # too short to tell
        ("of the of the of the of the parties to this Agreement", False),  # came out again
        ("The licensor grants the licensee the right to copy, to modify and to distribute.", False),
        ("as provided in this section, as provided in this section", False),  # twice is emphasis
        ("", False),
    ],
)
def test_loops(text, looped):
    assert ends_in_loop(text) is looped


def test_self_bleu_of_copies_is_one_and_of_strangers_zero():
    clause = "the licensee shall pay the licensor a fee"
    assert self_bleu([clause] * 3) == pytest.approx(1)
    assert self_bleu([clause, "a completely different sentence without overlap"]) == 0
    assert math.isnan(self_bleu([clause]))
    assert math.isnan(self_bleu([clause, "too short"]))


def test_self_bleu_by_hand():
    # Each of the two has 1-grams 4/5, 2-grams 3/4 of the other's, nothing clipped, lengths equal:
    # BLEU-2 = √(4/5 · 3/4).
    assert self_bleu(["a b c d x", "a b c d y"], n=2) == pytest.approx(math.sqrt(4 / 5 * 3 / 4))


def test_self_bleu_clips_by_the_best_other_text_and_punishes_brevity():
    # "a a a a" against {"a a b c d e", "a b b"}: at most two a's count (2/4), nearest length is 3,
    # so no penalty. "a a b c d e": nearest length 4 < 6; a twice, b once count: 3/6.   "a b b": a
    # and one b count: 2/3, penalty exp(1 - 4/3).
    expected = (2 / 4 + 3 / 6 + 2 / 3 * math.exp(1 - 4 / 3)) / 3
    assert self_bleu(["a a a a", "a a b c d e", "a b b"], n=1) == pytest.approx(expected)


SAMPLES = [
    Sample("The (first", " party) shall pay & deliver.", (4,), (5, 6, 7, 8), (1,), 0.5),
    Sample("Loop:", " of the of the of the of the", (4,), (9,) * 8, (), 0.5),
]


def test_measures_of_a_set():
    measures = measure(SAMPLES)
    assert measures["samples"] == 2
    assert measures["mean_tokens"] == 6
    assert measures["end_rate"] == measures["loop_rate"] == 0.5
    assert (
        measures["balanced_brackets_rate"] == measures["balanced_quotes_rate"] == 1.0
    )  # the bracket opens in the prompt
    assert measures["repetition_rate"] == pytest.approx((0 + 3 / 5) / 2)
    assert measures["tokens_per_second"] == 12
    with pytest.raises(ValueError, match="no samples"):
        measure([])


def test_table_has_a_row_a_sample():
    table = samples_table(SAMPLES)
    assert table["tokens"].tolist() == [4, 8]
    assert table["ends_in_loop"].tolist() == [False, True]
    assert table["ended"].tolist() == [True, False]


def test_legal_form_is_pooled_over_the_samples_and_counts_the_prompts_beginning():
    prompt = 'Fees.\n(a) The Buyer (the "Buyer") pays.\n(b)'
    good = Sample(prompt, " The Buyer pays late.\n(c) See 5 U.S.C. § 552.", (4,), (5,), (1,), 0.1)
    bad = Sample(prompt, " He pays.\n(e) See U.S.C. and 5 C.F.R.", (4,), (5,), (1,), 0.1)
    measures = measure([good, bad])
    assert measures["numbering_rate"] == pytest.approx(
        3 / 4
    )  # (b) twice right, (c) right, (e) wrong
    assert (measures["numbers"], measures["terms"], measures["citations"]) == (4, 2, 3)
    assert measures["terms_used_rate"] == 1.0
    assert measures["citations_rate"] == pytest.approx(1 / 3)
    assert math.isnan(measure(SAMPLES)["citations_rate"])


def test_extraction_is_measured_where_an_answer_is_expected():
    prompts = [
        Prompt("a", "clause", "Under"),
        Prompt("b", "extraction", 'Text: 3.\nJSON: {"n":', {"n": 3}),
    ]
    samples = [
        Sample("Under", " this", (4,), (5,), (), 0.1),
        Sample(prompts[1].text, ' 3} and {"n": 4}', (4,), (5,), (), 0.1),
    ]
    assert measure_extraction(prompts, samples) == {
        "json_parse_rate": 1,
        "json_schema_rate": 1,
        "json_value_rate": 1,
    }


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ("<|start|>", "<|end|>", "<|pad|>")
    bpe = Tokenizer(
        models.BPE({token: index for index, token in enumerate([*special, *alphabet])}, [])
    )
    bpe.add_special_tokens(list(special))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(2)
    shape = dict(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(
        LlamaConfig(
            **shape, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4
        )
    )


def test_entropy_along_samples_is_that_of_the_plain_prediction_at_each_position(model, tokenizer):
    samples = generate(model, tokenizer, ["Under this", "A"], Sampling(max_new_tokens=6), seed=3)
    table = entropy_along(model, samples)
    expected: dict[int, list[tuple[float, float]]] = {}
    for sample in samples:
        ids = [*sample.prompt_tokens, *sample.tokens, *sample.end_tokens]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        for position, token in enumerate(ids[len(sample.prompt_tokens) :]):
            distribution = torch.distributions.Categorical(
                logits=logits[len(sample.prompt_tokens) - 1 + position]
            )
            figures = (
                distribution.entropy().item(),
                -distribution.log_prob(torch.tensor(token)).item(),
            )
            expected.setdefault(position, []).append(figures)
    assert table["samples"].tolist() == [len(figures) for figures in expected.values()]
    for row in table.itertuples():
        entropy, surprise = (
            sum(values) / len(values) / math.log(2)
            for values in zip(*expected[row.position], strict=True)
        )
        assert (row.entropy_bits, row.surprise_bits) == pytest.approx((entropy, surprise), abs=1e-5)


def test_a_sweep_has_every_setting_once_and_marks_the_cards(model, tokenizer):
    advised = Sampling(0.8, 0.95, 1.0, 5)
    grid = [
        Sampling(temperature, 0.9, penalty, 5)
        for temperature in (0.0, 0.8)
        for penalty in (1.0, 1.2)
    ]
    sweep = sampling_sweep(model, tokenizer, ["Under", "A"], grid, advised, seed=1)
    settings = sweep[["temperature", "top_p", "repetition_penalty"]]
    assert len(sweep) == 5 and not settings.duplicated().any()
    assert settings[sweep["advised"]].to_numpy().tolist() == [[0.8, 0.95, 1.0]]
    within = sampling_sweep(model, tokenizer, ["Under", "A"], [grid[2], advised], advised, seed=1)
    assert within["advised"].tolist() == [False, True]
    alone = measure(generate(model, tokenizer, ["Under", "A"], Sampling(0.8, 0.95, 1.0, 5), seed=1))
    del alone["tokens_per_second"]
    for name, value in alone.items():
        assert within.iloc[1][name] == pytest.approx(value, nan_ok=True)
