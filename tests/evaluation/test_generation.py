"""Sampling on a tiny random model, against an argmax loop, the exact distribution, and the cards'
own calls.
"""

from __future__ import annotations

import collections
import math
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from kl3m_nb.evaluation.generation import (
    PROMPT_KINDS,
    Gallery,
    Prompt,
    Sample,
    Sampling,
    advised_sampling,
    answer_extractions,
    generate,
    load_prompts,
    run_card,
)
from kl3m_nb.profiles import CARD_USAGE, card_of

SPECIAL = ("<|start|>", "<|end|>", "<|pad|>", "<|unk|>")
CONTEXT = 48


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, a token a byte; it pads on the right, which `generate` must
    not follow.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(
        models.BPE({token: index for index, token in enumerate([*SPECIAL, *alphabet])}, [])
    )
    bpe.add_special_tokens(list(SPECIAL))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        padding_side="right",
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def always_ending(model):
    """The same model, which ends the text whatever stands before."""
    weight = model.lm_head.weight
    before = weight.detach().clone()
    hook = model.lm_head.register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, torch.tensor([1]), 1e4)
    )
    yield model
    hook.remove()
    assert torch.equal(weight, before)


SHORT = Sampling(max_new_tokens=12)
GREEDY = Sampling(temperature=0, max_new_tokens=12)
PROMPTS = ["Under this", "A", "The parties agree"]


def texts(samples) -> list[str]:
    return [sample.text for sample in samples]


def test_each_row_ends_where_its_own_text_is_whole(model, tokenizer):
    wanted = dict(zip(PROMPTS, (3, 1, 99), strict=True))
    free = generate(model, tokenizer, PROMPTS, GREEDY, seed=1)
    cut = generate(
        model,
        tokenizer,
        PROMPTS,
        GREEDY,
        1,
        is_whole=lambda prompt, text: len(text.encode()) >= wanted[prompt],
    )
    for sample, whole in zip(cut, free, strict=True):
        lengths = (
            n
            for n in range(1, 13)
            if len(tokenizer.decode(whole.tokens[:n]).encode()) >= wanted[sample.prompt]
        )
        assert sample.tokens == whole.tokens[: next(lengths, 12)]
        assert not sample.ended
    assert len(cut[1].tokens) < len(cut[0].tokens) < len(cut[2].tokens) == 12


def test_extractions_are_answered_in_order_up_to_the_closed_value(monkeypatch, tokenizer):
    answers = {"first": " 1} and more", "second": ' "x", '}

    def written(model, tokenizer, prompts, sampling, seed, batch_size, is_whole):
        texts = [
            next(text for name, text in answers.items() if name in prompt) for prompt in prompts
        ]
        assert sampling.temperature == 0 and sampling.max_new_tokens == 64
        cut = []
        for prompt, text in zip(prompts, texts, strict=True):
            length = next((n for n in range(len(text)) if is_whole(prompt, text[:n])), None)
            cut.append(prompt + text[:length])
        return cut

    monkeypatch.setattr("kl3m_nb.evaluation.generation.generate", written)
    prompts = [
        Prompt(name, "extraction", f'Fields: {name}\nJSON: {{"{name}":', {name: 1})
        for name in answers
    ]
    plain = answer_extractions(None, tokenizer, prompts, cotrained=False)
    assert plain == ['Fields: first\nJSON: {"first": 1}', 'Fields: second\nJSON: {"second": "x", ']
    monkeypatch.setattr(
        "kl3m_nb.evaluation.generation.as_instruction",
        lambda prompt, _: f"<{prompt.replace(' {', '>{')}",
    )
    assert (
        answer_extractions(None, tokenizer, prompts, cotrained=True)[0]
        == '<Fields: first\nJSON:>{"first": 1}'
    )


def test_greedy_batch_equals_an_argmax_loop_without_padding_or_cache(model, tokenizer):
    """Padding on the left, its mask and the cache must be invisible in the result."""
    samples = generate(model, tokenizer, PROMPTS, GREEDY, seed=0)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        with torch.no_grad():
            while ids.shape[1] < start + GREEDY.max_new_tokens:
                following = model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)
                if following.item() == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, following], dim=1)
        assert sample.prompt == prompt
        assert sample.tokens == tuple(ids[0, start:].tolist())
        assert sample.ended == (len(sample.tokens) < GREEDY.max_new_tokens)
        assert sample.text == tokenizer.decode(sample.tokens, skip_special_tokens=True)


def test_batches_do_not_change_greedy_texts_or_their_order(model, tokenizer):
    assert texts(generate(model, tokenizer, PROMPTS, GREEDY, 0, batch_size=2)) == texts(
        generate(model, tokenizer, PROMPTS, GREEDY, 0)
    )


def test_the_seed_decides_and_the_callers_random_state_is_untouched(model, tokenizer):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, SHORT, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert texts(generate(model, tokenizer, PROMPTS, SHORT, seed=1)) == texts(first)
    assert texts(generate(model, tokenizer, PROMPTS, SHORT, seed=2)) != texts(first)


def test_a_prompt_given_twice_is_sampled_twice(model, tokenizer):
    first, second = generate(model, tokenizer, ["Under this"] * 2, SHORT, seed=1)
    assert first.text != second.text


@pytest.mark.parametrize(
    ("sampling", "temperature", "top_p"),
    [(Sampling(2.0, 1.0, 1.0, 1), 2.0, 1.0), (Sampling(0.7, 0.8, 1.0, 1), 0.7, 0.8)],
)
def test_samples_follow_the_distribution_that_sampling_describes(
    model, tokenizer, sampling, temperature, top_p
):
    """4,000 first tokens against softmax(z / temperature) cut to the nucleus; a hidden top-k of 50
    would show at 2.0.
    """
    with torch.no_grad():
        logits = model(tokenizer("A", return_tensors="pt")["input_ids"]).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, dim=-1)
    ordered, order = expected.sort(descending=True)
    expected[order[ordered.cumsum(0) - ordered >= top_p]] = 0
    expected /= expected.sum()
    samples = generate(model, tokenizer, ["A"] * 4000, sampling, seed=3, batch_size=4000)
    counts = collections.Counter(
        sample.tokens[0] if sample.tokens else tokenizer.eos_token_id for sample in samples
    )
    drawn = torch.zeros(len(expected), dtype=torch.float64)
    for token, count in counts.items():
        drawn[token] = count / 4000
    assert (drawn[expected == 0] == 0).all()
    assert (
        0.5 * (drawn - expected).abs().sum()
        < 1.5 * (expected * (1 - expected) / 4000).sqrt().sum() * 0.5
    )  # total variation


def test_ending_and_training_mode(always_ending, tokenizer):
    always_ending.train()
    samples = generate(always_ending, tokenizer, PROMPTS, SHORT, seed=0)
    assert always_ending.training
    assert [(sample.text, sample.tokens, sample.ended) for sample in samples] == [
        ("", (), True)
    ] * 3


def test_seconds_of_the_samples_add_up_to_the_call(model, tokenizer):
    started = time.perf_counter()
    samples = generate(model, tokenizer, PROMPTS, SHORT, seed=0, batch_size=2)
    assert 0 < sum(sample.seconds for sample in samples) <= time.perf_counter() - started


def test_what_cannot_be_continued_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="'' has no tokens"):
        generate(model, tokenizer, ["Under this", ""], SHORT, seed=0)
    with pytest.raises(
        ValueError, match=f"has 10 tokens.*max_new_tokens {CONTEXT}.*context of {CONTEXT}"
    ):
        generate(model, tokenizer, ["Under this"], Sampling(max_new_tokens=CONTEXT), seed=0)


def test_the_context_can_be_filled_to_its_end(model, tokenizer):
    (sample,) = generate(
        model,
        tokenizer,
        ["Under this"],
        Sampling(temperature=0, max_new_tokens=CONTEXT - 10),
        seed=0,
    )
    assert sample.ended or len(sample.tokens) == CONTEXT - 10


def test_a_strong_repetition_penalty_leaves_no_token_twice(model, tokenizer):
    (sample,) = generate(
        model,
        tokenizer,
        ["A"],
        Sampling(temperature=0, repetition_penalty=1e6, max_new_tokens=40),
        seed=0,
    )
    assert len({*tokenizer("A")["input_ids"], *sample.tokens}) == 1 + len(sample.tokens)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 5.5},
        {"max_new_tokens": True},
        {"temperature": "hot"},
        {"top_p": None},
    ],
)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_prompts_are_sound_and_the_cards_come_first():
    prompts = load_prompts()
    assert [prompt.text for prompt in prompts[:3]] == [
        "The United States Constitution establishes",
        "Under this",
        "Governing Law.\n",
    ]
    assert (
        len({prompt.id for prompt in prompts})
        == len({prompt.text for prompt in prompts})
        == len(prompts)
        >= 123
    )
    assert {prompt.kind for prompt in prompts} == set(PROMPT_KINDS)
    assert not [prompt.id for prompt in prompts if prompt.text.endswith(" ")], (
        "a trailing space splits the next word's token"
    )
    assert max(len(prompt.text.encode()) for prompt in prompts) <= 166, "a prompt, not a document"


def test_prompts_of_one_kind():
    assert {prompt.kind for prompt in load_prompts("citation")} == {"citation"}
    with pytest.raises(
        ValueError, match="no prompts of the kind 'poem'; choose one of card, clause"
    ):
        load_prompts("poem")


def test_an_extraction_prompt_asks_for_the_fields_of_its_answer_and_begins_it():
    prompts = load_prompts("extraction")
    for prompt in prompts:
        source, _, question = prompt.text.partition("\nFields: ")
        fields, _, beginning = question.partition("\nJSON: ")
        assert [field.partition(" (")[0] for field in fields.split(", ")] == list(prompt.expected)
        assert beginning == f'{{"{next(iter(prompt.expected))}":'
        answer = [
            str(value)
            for value in prompt.expected.values()
            if isinstance(value, str) and not value[:4].isdigit()
        ]
        assert all(value in source for value in answer), (
            f"{prompt.id}: a text of the answer does not stand in the source"
        )
    assert len(prompts) >= 20
    assert not [
        prompt.id
        for prompt in load_prompts()
        if bool(prompt.expected) != (prompt.kind == "extraction")
    ]


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_cards_prompts_run_as_the_card_runs_them(checkpoint):
    """kl3m-002: temperature 0.5, three texts of up to 32 tokens a prompt; the same call by hand
    gives the same texts.
    """
    torch.manual_seed(50)
    before = torch.get_rng_state()
    written = run_card(checkpoint, "kl3m-002-520m", seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    writer = pipeline("text-generation", model=str(checkpoint))
    torch.manual_seed(5)
    for prompt, texts_of_prompt in zip(["Under this", "Governing Law.\n"], written, strict=True):
        by_hand = writer(
            prompt, do_sample=True, temperature=0.5, num_return_sequences=3, max_new_tokens=32
        )
        assert texts_of_prompt == [text["generated_text"] for text in by_hand]
        assert len(set(texts_of_prompt)) == 3 and all(
            text.startswith(prompt) for text in texts_of_prompt
        )


def test_advice_is_the_cards():
    assert advised_sampling("kl3m-007-500m") == Sampling(0.8, 0.95, 1.0, 100)
    assert advised_sampling("kl3m-002-520m") == Sampling(0.5, 1.0, 1.0, 32)
    assert {card_of(mixture=False), card_of(mixture=True)} == CARD_USAGE.keys()
    with pytest.raises(
        ValueError, match="no usage of the card 'gpt'; choose one of kl3m-002-520m, kl3m-007-500m"
    ):
        advised_sampling("gpt")


SAMPLES = [
    Sample("The (first", " party) shall pay & deliver.", (4,), (5, 6, 7, 8), (1,), 0.5),
    Sample("Loop:", " of the of the of the of the", (4,), (9,) * 8, (), 0.5),
]


def test_gallery_escapes_what_the_model_wrote():
    page = Gallery(
        [
            Sample(
                "<b>Under</b> & this", "<script>alert(1)</script>\nnext line", (3,), (4, 5), (), 0.1
            )
        ]
    )._repr_html_()
    assert "<script>" not in page
    assert (
        "<b>&lt;b&gt;Under&lt;/b&gt; &amp; this</b>&lt;script&gt;alert(1)&lt;/script&gt;\nnext line"
        in page
    )
    assert "pre-wrap" in page, "line breaks of the text must show"
    assert "color" not in page, "colours of our own fail in one of the two themes"


def test_gallery_in_a_terminal():
    assert (
        repr(Gallery(SAMPLES))
        == "> The (first| party) shall pay & deliver. [end]\n\n> Loop:| of the of the of the of the"
        " [cut at 8 tokens]"
    )
