"""The tasks are sound; our answers equal explicit log-likelihoods, and lm-eval's own figures where
it is installed.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import math

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kl3m_nb.common import paths
from kl3m_nb.data.sources import Document
from kl3m_nb.data.tokenizer import read_tokenizer
from kl3m_nb.evaluation import documents, tasks
from kl3m_nb.evaluation.tasks import (
    ChoiceItem,
    accuracy,
    answer_bits,
    answer_items,
    load_items,
    task_summary,
)
from kl3m_nb.model import decoder


@pytest.mark.parametrize("task", tasks.TASKS)
def test_items_are_sound(task):
    items = load_items(task)
    assert len(items) >= 60
    assert len({item.id for item in items}) == len({item.context for item in items}) == len(items)
    for item in items:
        assert len(item.choices) == len(set(item.choices)) == 4 and 0 <= item.answer < 4
        assert item.context == item.context.strip() and all(
            choice == choice.strip() for choice in item.choices
        )
    places = collections.Counter(item.answer for item in items)
    assert max(places.values()) < len(items) / 2, (
        "a model that always names one place would score high"
    )


def test_wrong_words_are_of_many_kinds():
    """A model must not do well by disliking one word."""
    items = load_items("clause_cloze")
    wrong = [
        choice
        for item in items
        for place, choice in enumerate(item.choices)
        if place != item.answer
    ]
    (_, most), *_ = collections.Counter(
        choice.lower().removesuffix("s") for choice in wrong
    ).most_common()
    assert most <= len(wrong) / 12


def test_the_right_section_is_not_given_away_by_its_length():
    longest = [
        max(item.choices, key=len) == item.choices[item.answer]
        for item in load_items("next_section")
    ]
    assert sum(longest) / len(longest) < 0.5


@pytest.mark.parametrize("task", tasks.TASKS)
def test_lm_evals_file_and_ours_name_the_same_items(task):
    config = tasks.task_config(task)
    assert config["task"] == task and config["output_type"] == "multiple_choice"
    given = (paths.tasks_dir() / f"{task}.yaml").read_text()
    assert f"data/tasks/{task}.jsonl" in given
    first = json.loads((paths.tasks_dir() / f"{task}.jsonl").read_text().splitlines()[0])
    assert load_items(task)[0].context == first[config["doc_to_text"]]


def test_unknown_task():
    with pytest.raises(
        ValueError, match="no task 'poems'; choose one of clause_cloze, next_section"
    ):
        load_items("poems")


@pytest.fixture(scope="module")
def checkpoint(trained_run):
    return trained_run[1].checkpoint


@pytest.fixture(scope="module")
def loaded(checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(
        checkpoint
    )


ITEMS = [
    ChoiceItem("a", "The Tenant shall pay", ("rent", "a very long list of things", "tax"), 0, " "),
    ChoiceItem("b", "Term.", ("Rent.\nThe rent is due.", "Law.\nOhio."), 1, "\n\n"),
]


def test_answers_equal_explicit_log_likelihoods(loaded):
    model, tokenizer = loaded
    table = answer_items(model, tokenizer, ITEMS)
    for item, row in zip(ITEMS, table.itertuples(), strict=True):
        start = len(tokenizer(item.context)["input_ids"])
        sums = []
        for choice in item.choices:
            ids = torch.tensor([tokenizer(item.context + item.delimiter + choice)["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(dim=-1)
            sums.append(
                sum(logs[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))
            )
        assert row.right_log_likelihood == pytest.approx(sums[item.answer], abs=1e-4)
        assert row.best_wrong_log_likelihood == pytest.approx(
            max(sums[: item.answer] + sums[item.answer + 1 :]), abs=1e-4
        )
        assert row.correct == (sums[item.answer] == max(sums))
        by_length = [value / len(choice) for value, choice in zip(sums, item.choices, strict=True)]
        assert row.correct_per_character == (by_length[item.answer] == max(by_length))
    total = -table.right_log_likelihood.sum() / math.log(2)
    assert answer_bits(table) == pytest.approx(total / (len("rent") + len("Law.\nOhio.")))


def test_accuracy_is_a_share_with_its_interval(loaded):
    table = answer_items(*loaded, load_items("clause_cloze"))
    interval = accuracy(table)
    assert interval.mean == table.correct.sum() / len(table)
    assert interval.low < interval.mean < interval.high


def test_the_summary_of_a_task_by_hand():
    right, character = [True, True, True, False], [False, False, True, False]
    table = pd.DataFrame({"correct": right, "correct_per_character": character})
    table = table.assign(right_log_likelihood=-math.log(2) * 6, right_characters=3)
    summary = task_summary(table)
    assert list(summary) == ["accuracy", "low", "high", "per_character", "answer_bits"]
    assert (summary["accuracy"], summary["per_character"]) == (0.75, 0.25)
    assert summary["low"] < 0.75 < summary["high"] and summary["answer_bits"] == pytest.approx(2)


def spanning(folder, items, **kinds):
    """A tokenizer whose tokens go over blanks, so that the last words of a context and a choice are
    one token.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    phrases = [
        " ".join(item.context.split()[-2:]) + item.delimiter + choice
        for item in items
        for choice in item.choices
    ]
    special = ["<|start|>", "<|end|>", "<|pad|>"]
    settings = dict(vocab_size=600, show_progress=False, special_tokens=special)
    made.train_from_iterator(
        phrases * 3,
        trainers.BpeTrainer(**settings, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    made.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        **kinds,
    )


SPANNING = [
    ChoiceItem("a", "The Tenant shall pay", ("rent", "tax due", "a very long list"), 0, " "),
    ChoiceItem("b", "pay", ("rent", "fees"), 1, " "),  # one token with the whole context
    ChoiceItem("c", "The Landlord.", ("Law.\nOhio.", "Rent."), 1, "\n\n"),
]


def test_an_answer_inside_a_token_is_scored_from_the_border_before_it(tmp_path):
    """Against a plain loop: the longest row of whole tokens that lies within the context is read,
    all others are predicted.
    """
    tokenizer, model = spanning(tmp_path, SPANNING), built(vocab_size=600)
    table = answer_items(model, tokenizer, SPANNING)
    inside = 0
    for item, row in zip(SPANNING, table.itertuples(), strict=True):
        sums = []
        for choice in item.choices:
            text = item.context + item.delimiter + choice
            ids = tokenizer(text)["input_ids"]
            read = 0
            while item.context.startswith(tokenizer.decode(ids[: read + 1])):
                read += 1
            inside += tokenizer.decode(ids[:read]) != item.context
            before = [] if read else [tokenizer.eos_token_id]
            with torch.no_grad():
                logs = model(torch.tensor([[*before, *ids]])).logits[0].log_softmax(dim=-1)
            shift = len(before) - 1
            sums.append(
                sum(logs[place + shift, ids[place]].item() for place in range(read, len(ids)))
            )
        assert row.right_log_likelihood == pytest.approx(sums[item.answer], abs=1e-4)
        assert row.correct == (sums[item.answer] == max(sums))
    assert inside >= 4, "choices that have no token of their own"


@pytest.mark.parametrize("blanks", ["", "  "])
def test_texts_are_cut_as_lm_eval_documents_it_where_that_leaves_nothing_out(loaded, blanks):
    _, tokenizer = loaded
    for item in [item for task in tasks.TASKS for item in load_items(task)[:10]]:
        for choice in item.choices:
            context, continuation = item.context + blanks, item.delimiter + choice
            whole, alone = (
                tokenizer.encode(context + continuation),
                tokenizer.encode(context.rstrip()),
            )
            assert tasks.encode_pair(tokenizer, context, continuation) == (
                alone,
                whole[len(alone) :],
            )


def test_what_a_tokenizer_adds_to_every_text_is_read(tmp_path):
    """Llama's and Gemma's put the beginning-of-text token before a text, and lm-eval leaves it
    there.
    """
    tokenizer = spanning(tmp_path, SPANNING)
    made = tokenizer.backend_tokenizer
    made.post_processor = processors.TemplateProcessing(
        "<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    for choice in ("rent", "zebra"):
        context, continuation = tasks.encode_pair(tokenizer, "pay", f" {choice}")
        assert (
            context[0] == 0
            and 0 not in continuation
            and tokenizer.decode(context[1:] + continuation) == f"pay {choice}"
        )


def built(**shape):
    torch.manual_seed(3)
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(LlamaConfig(**sizes | shape, initializer_range=0.3)).eval()


DOCUMENTS = [
    Document(
        "a",
        "x",
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this"
        " software. " * 9,
    ),
    Document("b", "x", "Governing law: Ohio – §3."),
]


def test_a_context_that_is_too_long_loses_its_beginning(loaded):
    model, tokenizer = loaded
    item = ChoiceItem(
        "a", "The Tenant shall pay the rent to the Landlord." * 20, ("rent", "tax"), 0, " "
    )
    context, whole = (
        tokenizer(item.context)["input_ids"],
        tokenizer(f"{item.context} rent")["input_ids"],
    )
    assert len(whole) > 65 == model.config.max_position_embeddings + 1
    with torch.no_grad():
        logs = model(torch.tensor([whole[-65:-1]])).logits[0].log_softmax(dim=-1)
    new = len(whole) - len(context)
    expected = sum(logs[-place, whole[-place]].item() for place in range(1, new + 1))
    assert answer_items(model, tokenizer, [item]).right_log_likelihood.item() == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: harness)"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("from_start", [False, True])
def test_lm_eval_gives_the_same_figures(loaded, tmp_path, from_start):
    model, tokenizer = loaded
    prefix = tokenizer.bos_token_id if from_start else None
    model.config.max_position_embeddings = 128  # some items are longer, none of their choices is
    try:
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        theirs = tasks.run_lm_eval(tmp_path, window=128, documents=DOCUMENTS, prefix=prefix)
        for task in tasks.TASKS:
            table = answer_items(model, tokenizer, load_items(task))
            assert theirs[task]["acc"] == pytest.approx(accuracy(table).mean, abs=1e-12)
            assert theirs[task]["acc_norm"] == pytest.approx(
                accuracy(table, "correct_per_character").mean, abs=1e-12
            )
        judged = documents.evaluate_documents(
            model, tokenizer, DOCUMENTS, window=128, stride=128, prefix=prefix
        )
    finally:
        model.config.max_position_embeddings = 64
    ours = judged.bits_per_byte.mean
    assert theirs["held_out_documents"]["bits_per_byte"] == pytest.approx(ours, abs=1e-5)
    assert theirs["held_out_documents"]["byte_perplexity"] == pytest.approx(2**ours, abs=1e-4)


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: harness)"
)
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_gives_the_same_figures_for_answers_inside_a_token(tmp_path):
    items = load_items("clause_cloze")
    spanning(tmp_path, items).save_pretrained(tmp_path)
    built(vocab_size=600, max_position_embeddings=512).save_pretrained(tmp_path)
    theirs = tasks.run_lm_eval(tmp_path, window=512, tasks=["clause_cloze"])["clause_cloze"]
    table = answer_items(decoder.load_model(tmp_path), read_tokenizer(str(tmp_path)), items)
    assert theirs["acc"] == pytest.approx(accuracy(table).mean, abs=1e-12)
    assert theirs["acc_norm"] == pytest.approx(
        accuracy(table, "correct_per_character").mean, abs=1e-12
    )


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_extra_is_named(checkpoint):
    with pytest.raises(ValueError, match=r"pip install -e '.\[harness\]'"):
        tasks.run_lm_eval(checkpoint, window=32)


def test_documents_without_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="decode them first"):
        tasks._document_config([Document("a", "x", "", (4, 5))], tmp_path)
