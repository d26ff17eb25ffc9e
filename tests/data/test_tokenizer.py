from __future__ import annotations

import itertools
import json
import string
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from kl3m_nb.data import corpus, tokenizer
from kl3m_nb.training import loop
from tests.conftest import small_profile

TEXTS = [
    document.text for document in corpus.preview("package:licensedcode-data", held_out=False)[:200]
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train_tokenizer(TEXTS, 1024).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(str(folder))


def test_special_ids_and_sizes_are_the_familys(trained):
    assert len(trained) == 1024
    assert trained.convert_tokens_to_ids(list(tokenizer.SPECIAL_TOKENS)) == list(range(13))
    assert (
        trained.bos_token_id,
        trained.eos_token_id,
        trained.pad_token_id,
        trained.unk_token_id,
    ) == (0, 1, 2, 3)
    assert (trained.sep_token_id, trained.cls_token_id, trained.mask_token_id) == (4, 5, 6)
    assert trained.padding_side == "left"


def test_nothing_is_added_on_encode_and_runs_of_spaces_are_one_token(trained):
    assert trained.encode("Law") == trained.encode("Law", add_special_tokens=False)
    assert len(trained.encode("    ")) == 1
    assert len(trained.encode("\n\n")) == 1
    assert trained.encode("<|end|>") == [1]


@given(st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cs"]), max_size=200))
@settings(max_examples=60, deadline=None)
def test_ascii_text_comes_back_as_it_was(text):
    model = _module_tokenizer()
    assert model.decode(model.encode(text)) == text


def test_any_text_comes_back_up_to_its_normalization(trained):
    text = "§ 512(c) “notice” — número 7 ﬁled 漢字 \t\tx"
    assert trained.decode(trained.encode(text)) == text.replace("ﬁ", "fi")


def test_the_same_texts_give_the_same_tokenizer():
    first, second = (
        tokenizer.train_tokenizer(TEXTS, 600).backend_tokenizer.to_str() for _ in range(2)
    )
    assert first == second


def test_the_corpus_tokenizer_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_CACHE", str(tmp_path))
    first = tokenizer.load_tokenizer("corpus", "package:licensedcode-data", 400)
    monkeypatch.setattr(
        tokenizer, "train_tokenizer", lambda *_: pytest.fail("the cached tokenizer was not used")
    )
    again = tokenizer.load_tokenizer("corpus", "package:licensedcode-data", 400)
    assert first.get_vocab() == again.get_vocab()


def test_a_folder_is_read_once_and_again_when_its_files_are_others(tmp_path):
    tokenizer.train_tokenizer(TEXTS, 600).save_pretrained(tmp_path)
    first = tokenizer.read_tokenizer(str(tmp_path))
    assert tokenizer.read_tokenizer(str(tmp_path)) is first
    tokenizer.train_tokenizer(TEXTS, 610).save_pretrained(tmp_path)
    assert len(first) == 600 and len(tokenizer.read_tokenizer(str(tmp_path))) == 610


@given(st.text(max_size=120))
@settings(max_examples=80, deadline=None)
def test_any_text_comes_back(text):
    """Generation 004 gives it back up to its normalization, 001 character by character."""
    ordinary, unorthodox = _large_tokenizers()
    assert unorthodox.decode(unorthodox.encode(text)) == text
    found = ordinary.decode(ordinary.encode(text))
    assert unicodedata.normalize("NFKC", found) == unicodedata.normalize("NFKC", text)


def test_unorthodox_words_never_carry_a_blank():
    _, unorthodox = _large_tokenizers()
    ids = unorthodox.encode(TEXTS[3])
    texts = [unorthodox.decode([token]) for token in ids]
    blank = [text for text in texts if text.strip(" \n") != text]
    assert all(not text.strip() for text in blank)
    assert 0.3 < sum(text == " " for text in texts) / len(texts) < 0.5
    learned = [token for token in unorthodox.get_vocab() if "Ġ" in token or "Ċ" in token]
    assert sorted(learned) == ["Ċ", "Ġ"]


def test_custom_tokens_are_scaled_to_the_vocabulary():
    assert tokenizer.custom_entries(4096) == tokenizer.custom_entries(512)
    sizes = [len(tokenizer.custom_entries(size)) for size in (4096, 8192, 32_768, 131_072)]
    assert (
        sizes == sorted(sizes)
        and sizes[1] == sizes[0] + 256
        and sizes[-1] == sizes[0] + len(tokenizer.FRAGMENTS)
    )
    assert all(text.isascii() for text in tokenizer.FRAGMENTS)
    assert len(set(tokenizer.FRAGMENTS)) == len(tokenizer.FRAGMENTS)
    assert [tokenizer.roman(number) for number in (4, 9, 14, 40, 99)] == [
        "iv",
        "ix",
        "xiv",
        "xl",
        "xcix",
    ]


def test_fragments_are_one_token_and_leave_words_alone():
    ordinary, _ = _large_tokenizers()
    fragments = tokenizer.fragments(256)
    assert {"(a)", "(z)", "(12)", "```", "1776"} <= set(fragments)
    assert all(len(ordinary.encode(fragment)) == 1 for fragment in fragments)
    assert "1776" in ordinary.tokenize("of 1776, and")
    assert "1776" not in ordinary.tokenize("a217765b")


def test_sizes_are_exact_when_fragments_were_learned_already():
    texts = ["(a) (b) (c) 1999 2000 " * 50 + " ".join(f"word{i}" for i in range(9000))]
    assert len(tokenizer.train_tokenizer(texts, 8192)) == 8192


def test_a_vocabulary_may_have_the_familys_largest_size():
    words = itertools.islice(itertools.product(string.ascii_letters, repeat=3), 131_000)
    trained = tokenizer.train_tokenizer([" ".join(map("".join, words))], 131_072)
    assert len(trained) == 131_072 and trained.convert_tokens_to_ids("<|end|>") == 1
    assert max(trained.encode("abc zzz\n\n(a) 1776")) < 131_072


def test_what_the_texts_do_not_fill_goes_to_fragments():
    """Three texts give fewer than 2,000 entries, and no vocabulary of this size has fragments of
    its own.
    """
    trained = tokenizer.train_tokenizer(TEXTS[:3], 2100)
    fragments = [text for text in tokenizer.FRAGMENTS if text in trained.get_added_vocab()]
    assert len(trained) == 2100 and 100 < len(fragments) < 150 and "(a)" in fragments


def test_impossible_sizes_and_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="too small"):
        tokenizer.train_tokenizer(TEXTS, 100)
    with pytest.raises(ValueError, match="smaller vocabulary"):
        tokenizer.train_tokenizer(["one text"], 2000)
    with pytest.raises(ValueError, match="could not be loaded"):
        tokenizer.load_tokenizer(str(tmp_path / "nowhere"), "package:licensedcode-data", 4096)
    with pytest.raises(
        ValueError,
        match=r"no folder /\S+/nobody/nothing and could not be loaded from the hub \(.*\); name",
    ) as caught:
        tokenizer.read_tokenizer("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="ordinary, unorthodox"):
        tokenizer.train_tokenizer(TEXTS, 600, "none")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("README.md", "", "is not there"),
        ("config.json", '{"model_type": "llama"}', "is not there"),
        ("tokenizer.json", "{", "is damaged or of another kind"),
        ("tokenizer.json", "{}", "is damaged or of another kind"),
    ],
)
def test_a_folder_without_a_tokenizer_is_named_in_one_sentence(tmp_path, file, text, words):
    (tmp_path / file).write_text(text)
    with pytest.raises(
        ValueError, match=rf"The folder \S+ holds no tokenizer that can be loaded, .*{words}; name"
    ) as caught:
        tokenizer.read_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def _classed(folder, name, trained, **settings):
    """`trained` in a folder whose tokenizer_config.json names another class, as copied files often
    do.
    """
    trained.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": name} | settings)
    )
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


CLASSES = ("GemmaTokenizer", "Qwen2Tokenizer", "BertTokenizer", "RobertaTokenizer")


@pytest.mark.parametrize("name", CLASSES)
def test_ids_are_those_of_the_file_whatever_class_is_named_beside_it(
    trained, tmp_path, caplog, name
):
    file, text = (
        _classed(tmp_path / "given", name, trained),
        "Section 12.  The holder’s\n\n    fee  (a) is DUE ",
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "given").encode(text) != file.encode(text).ids
    ), "the class has its own rules"
    read = tokenizer.read_tokenizer(str(tmp_path / "given"))
    [said] = [
        record.getMessage() for record in caplog.records if record.name == "kl3m_nb.data.tokenizer"
    ]
    assert name in said and str(tmp_path / "given") in said
    assert read.encode(text) == file.encode(text).ids and len(read) == len(trained)
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id, read.padding_side) == (
        0,
        1,
        2,
        "left",
    )
    assert read.decode(read.encode("A fee .  Is due")) == "A fee .  Is due"
    tokenizer.save_tokenizer(read, tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.encode(text) == file.encode(text).ids and again.eos_token_id == 1


def test_a_class_that_gives_the_files_ids_is_taken_as_it_is(trained, tmp_path, caplog):
    for number, name in enumerate(("PreTrainedTokenizerFast", "NoSuchTokenizer")):
        file = _classed(tmp_path / str(number), name, trained)
        assert (
            tokenizer.read_tokenizer(str(tmp_path / str(number))).encode("A  fee")
            == file.encode("A  fee").ids
        )
    assert not [record for record in caplog.records if record.name == "kl3m_nb.data.tokenizer"]


def test_what_the_file_puts_before_a_text_is_kept_and_what_it_cuts_off_is_not(trained, tmp_path):
    """Truncation and padding stand in many files; they are those of whoever wrote it, and no rule
    of the tokenizer.
    """
    file = _classed(tmp_path, "GemmaTokenizer", trained)
    file.post_processor = processors.TemplateProcessing(
        "<|cls|> $A", special_tokens=[("<|cls|>", 5)]
    )
    file.enable_truncation(4)
    file.enable_padding(length=9, pad_id=2, pad_token="<|pad|>")
    file.save(str(tmp_path / "tokenizer.json"))
    text = "Section 12. The holder shall pay the fee"
    read = tokenizer.read_tokenizer(str(tmp_path))
    assert read.encode(text) == [5, *trained.encode(text)] and read.encode(
        text, add_special_tokens=False
    ) == trained.encode(text)


def test_a_run_saves_the_tokenizer_that_it_was_trained_with(trained, tmp_path):
    file = _classed(tmp_path / "given", "GemmaTokenizer", trained)
    rows = [{"identifier": f"d{number}", "text": text[:500]} for number, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "tokenizer": str(tmp_path / "given"),
        "source": f"files:{tmp_path}/a.jsonl",
        "vocabulary": 1024,
        "max_steps": 1,
    }
    checkpoint = loop.train(small_profile(**given), tmp_path / "run").checkpoint
    saved = AutoTokenizer.from_pretrained(checkpoint)
    assert saved.encode(TEXTS[0]) == file.encode(TEXTS[0]).ids and saved.eos_token_id == 1


def test_a_start_and_its_own_tokenizer_fit_whatever_its_settings_add(trained, tmp_path):
    """A token that tokenizer_config.json names and tokenizer.json lacks becomes a new entry."""
    _classed(tmp_path, "PreTrainedTokenizerFast", trained, pad_token="[PAD]")
    read = tokenizer.read_tokenizer(str(tmp_path))
    assert len(read) == len(trained) + 1
    tokenizer.check_same_entries(read, tmp_path)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only 512"):
        tokenizer.load_tokenizer(str(tmp_path), "package:licensedcode-data", 512)


_CACHE, _LARGE = [], []


def _large_tokenizers():
    """One of each whitespace manner, with room for custom tokens."""
    if not _LARGE:
        _LARGE.extend(
            [
                tokenizer.train_tokenizer(TEXTS, 8192),
                tokenizer.train_tokenizer(TEXTS, 6000, "unorthodox"),
            ]
        )
    return _LARGE


def _module_tokenizer():
    if not _CACHE:
        _CACHE.append(tokenizer.train_tokenizer(TEXTS, 600))
    return _CACHE[0]


def test_a_checkpoint_with_other_entries_is_refused(tmp_path):
    texts = ["Permission is hereby granted to copy this text."] * 20
    mine, other = (
        tokenizer.train_tokenizer(texts + more, 300)
        for more in ([], ["whereas the licensee shall indemnify"] * 30)
    )
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another tokenizer"):
        tokenizer.check_same_entries(mine, tmp_path)
    mine.save_pretrained(tmp_path)
    tokenizer.check_same_entries(mine, tmp_path)
