"""Special ids are those of the tokenizer in use, in data, configurations, embedding and generation;
what is missing is said.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl3m_nb.data import instructions, special_ids, windows
from kl3m_nb.data.instructions import InstructionPair
from kl3m_nb.data.loader import open_stream
from kl3m_nb.data.segments import SegmentedStream
from kl3m_nb.data.sources import Document
from kl3m_nb.data.tokenizer import read_tokenizer
from kl3m_nb.evaluation import generation
from kl3m_nb.evaluation.documents import evaluate_documents
from kl3m_nb.model import decoder
from kl3m_nb.profiles import DataSpec
from kl3m_nb.training import loop
from tests.conftest import SECTIONS, make_tokenizer, small_profile

END = "<|endoftext|>"
EVERY = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory):
    """One token that begins and ends texts, behind all others, and none for padding."""
    return make_tokenizer(
        tmp_path_factory.mktemp("tokenizers") / "gpt2", bos_token=END, eos_token=END
    )


def source(folder):
    (folder / "a.jsonl").write_text(
        "".join(
            json.dumps({"identifier": f"d{n}", "text": text}) + "\n"
            for n, text in enumerate(SECTIONS)
        )
    )
    return f"files:{folder}/a.jsonl"


@pytest.mark.parametrize("packed", ["dense", "segments"])
def test_a_checkpoint_and_its_data_end_texts_where_the_tokenizer_does(tmp_path, gpt2_like, packed):
    profile = small_profile(
        tokenizer=str(gpt2_like), source=source(tmp_path), max_steps=2, packing=packed
    )
    checkpoint = loop.train(profile, tmp_path / "run").checkpoint
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    end = tokenizer.convert_tokens_to_ids(END)
    assert end == 400
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (
        end,
        end,
        None,
    )
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (end, end, end)
    assert model.model.embed_tokens.padding_idx is None, (
        "every row is read, so every row has to learn"
    )
    norms = model.model.embed_tokens.weight[:400].detach().norm(dim=1)
    assert norms.min() > 0.5 * norms.median(), "no row of a token of the text was set to zero"
    batch = open_stream(profile.data, tokenizer).take(16)
    tokens = set(batch.input_ids.flatten().tolist())
    assert end in tokens and not tokens & {0, 2} - {*tokenizer.encode("".join(SECTIONS))}
    if packed == "segments":
        assert (batch.input_ids[~batch.attention_mask] == end).all() and (
            batch.labels[~batch.attention_mask] == -100
        ).all()
    card = (checkpoint / "README.md").read_text()
    assert f"`{END}`" in card and "<|end|>" not in card and "<|start|>" not in card


def test_a_model_that_is_trained_on_takes_its_tokenizers_ids(tmp_path, gpt2_like):
    """It was saved with those of the family, as an earlier version did."""
    profile = small_profile(tokenizer=str(gpt2_like), source=source(tmp_path), max_steps=1)
    decoder.build_model(profile).save_pretrained(tmp_path / "start")
    checkpoint = loop.train(profile, tmp_path / "run", init=tmp_path / "start").checkpoint
    saved = [
        json.loads((checkpoint / name).read_text())
        for name in ("config.json", "generation_config.json")
    ]
    assert [entry["eos_token_id"] for entry in saved] == [400, 400]


def test_the_embedding_of_a_padding_token_alone_has_no_gradient(tmp_path):
    named = {
        "pad_token": "<|pad|>",
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "unk_token": "<|unk|>",
    }
    tokenizer = read_tokenizer(
        str(
            make_tokenizer(
                tmp_path / "a", ("<|unk|>", "<|pad|>", "<|end|>", "<|start|>"), (), **named
            )
        )
    )
    assert special_ids.special_ids(tokenizer) == (3, 2, 1)
    model = decoder.build_model(small_profile(tied_embeddings=False))
    special_ids.adopt_special_ids(model, tokenizer)
    model(input_ids=torch.tensor([[0, 1, 2, 3]])).logits.sum().backward()
    assert [bool(row.any()) for row in model.model.embed_tokens.weight.grad[:4]] == [
        True,
        False,
        True,
        True,
    ]
    for shared in ("eos_token", "bos_token", "unk_token"):
        tokenizer.pad_token = named[shared]
        assert special_ids.special_ids(tokenizer).padding is None
        tokenizer.pad_token = named["pad_token"]


def test_several_ends_that_a_model_names_stay_when_the_tokenizers_is_among_them(gpt2_like):
    tokenizer, model = read_tokenizer(str(gpt2_like)), decoder.build_model(small_profile())
    for named, stops in (([17, 400], [17, 400]), ([17, 18], [400]), (1, [400]), (None, [400])):
        model.generation_config.eos_token_id = named
        assert special_ids.stop_ids(model, tokenizer) == stops
        special_ids.adopt_special_ids(model, tokenizer)
        assert model.generation_config.eos_token_id == (stops if len(stops) > 1 else stops[0])
        assert model.config.eos_token_id == 400


@pytest.mark.parametrize(
    ("named", "changes", "words"),
    [
        ({}, {}, "eos_token"),
        ({"bos_token": "<|start|>", "pad_token": "<|pad|>"}, {}, "eos_token"),
        ({"eos_token": "<|end|>", "pad_token": "<|pad|>"}, {"packing": "segments"}, "bos_token"),
        (
            {"bos_token": "<|start|>", "eos_token": "<|end|>"},
            {"packing": "segments", "p_sft": 0.5},
            "p_sft",
        ),
    ],
)
def test_a_token_that_training_needs_and_the_tokenizer_lacks_is_named_before_anything_is_written(
    tmp_path, named, changes, words
):
    folder = make_tokenizer(tmp_path / "words", ("<|start|>", "<|end|>", "<|pad|>"), (), **named)
    profile = small_profile(tokenizer=str(folder), source=source(tmp_path), **changes)
    with pytest.raises(ValueError, match=rf"{folder}.*{words}") as caught:
        loop.train(profile, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_every_place_that_needs_the_end_says_so(tmp_path):
    bare = read_tokenizer(str(make_tokenizer(tmp_path / "bare", last=())))
    data = DataSpec(source=source(tmp_path), seq_len=31, held_out_windows=2)
    model = decoder.build_model(small_profile())
    for needing in (
        lambda: windows.PackedStream(data, bare),
        lambda: SegmentedStream(data, bare),
        lambda: windows.held_out_windows(data, bare),
        lambda: instructions.pair_sample(
            InstructionPair("a", "regulation", "one", "two"), bare, "all"
        ),
        lambda: evaluate_documents(model, bare, [Document("a", "x", "A fee.")], 8, 8),
        lambda: special_ids.adopt_special_ids(model, bare),
    ):
        with pytest.raises(ValueError, match=r"names no .*_token"):
            needing()
    assert model.config.eos_token_id == 1, "a refused tokenizer changes nothing"


def test_a_text_is_predicted_from_the_beginning_where_a_tokenizer_has_no_end(tmp_path):
    tokenizer = read_tokenizer(
        str(make_tokenizer(tmp_path / "a", ("<|end|>", "<|start|>"), (), bos_token="<|start|>"))
    )
    model, documents = decoder.build_model(small_profile()), [Document("a", "x", SECTIONS[0])]
    found, named = (
        evaluate_documents(model, tokenizer, documents, 32, 32, **given)
        for given in ({}, {"prefix": 1})
    )
    assert found.loss.mean == named.loss.mean


@pytest.mark.parametrize("named", [{}, {"eos_token": "<|end|>", "bos_token": "<|start|>"}, EVERY])
def test_texts_are_written_with_any_tokenizer_and_no_token_of_the_text_ends_them(tmp_path, named):
    """A batch gives the texts that each prompt has alone, greedily; a bare tokenizer's token 1 is a
    word like any other.
    """
    special = ("<|start|>", "<|end|>", "<|pad|>")
    tokenizer = read_tokenizer(
        str(make_tokenizer(tmp_path / "words", special if named else (), (), **named))
    )
    model = decoder.build_model(small_profile(initializer_range=0.4)).eval()
    assert model.generation_config.eos_token_id == 1
    prompts, sampling = (
        ["The holder of", "A fee", "Section 12. The holder of permit 9"],
        generation.Sampling(0, max_new_tokens=12),
    )
    written = generation.generate(model, tokenizer, prompts, sampling, seed=1)
    for prompt, sample in zip(prompts, written, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        expected = []
        with torch.no_grad():
            while len(expected) < 12 and tokenizer.eos_token_id not in expected:
                expected.append(
                    model(torch.tensor([[*ids, *expected]])).logits[0, -1].argmax().item()
                )
        assert [*sample.tokens, *sample.end_tokens] == expected
        assert sample.ended == (tokenizer.eos_token_id in expected)


def test_nothing_of_a_models_own_settings_enters_its_texts(gpt2_like):
    """A model from the hub may name a repetition penalty, or tokens that must not come:
    transformers would obey.
    """
    tokenizer, model = (
        read_tokenizer(str(gpt2_like)),
        decoder.build_model(small_profile(initializer_range=0.4)),
    )
    asked = (["The holder of"], generation.Sampling(0, max_new_tokens=8), 1)
    (plain,) = generation.generate(model, tokenizer, *asked)
    model.generation_config.suppress_tokens = list(plain.tokens)
    model.generation_config.eos_token_id = plain.tokens[2]
    (again,) = generation.generate(model, tokenizer, *asked)
    assert again.tokens == plain.tokens and len(again.tokens) == 8
    assert model.generation_config.eos_token_id == plain.tokens[2], (
        "the model's own are as they were"
    )
