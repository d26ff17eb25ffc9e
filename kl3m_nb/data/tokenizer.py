"""Byte-level BPE tokenizers of the KL3M family: loading one, or training one by the family's
recipe.

The recipe: special tokens with fixed ids first, then BPE, then custom tokens (`custom_entries`) and
runs of whitespace as added tokens; nothing added on encode; left padding. Generation 004
(`"ordinary"`) normalizes by NFKC and leaves single spaces to the words they precede. Generation 001
(`"unorthodox"`) normalizes nothing, and every run of spaces or newlines is a token, the lone space
too, so words never carry a blank. What is saved loads with `AutoTokenizer` alone.

The family's custom tokens are fragments that legal and structured text is full of. All are ASCII,
so a byte-level decoder gives them back as they are. Words and numbers match between word borders
only: otherwise the numeral `iv` would cut `div` in two.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from kl3m_nb.common import files, paths
from kl3m_nb.data import corpus

log = logging.getLogger(__name__)


SPECIAL_TOKENS = (
    "<|start|>",
    "<|end|>",
    "<|pad|>",
    "<|unk|>",
    "<|sep|>",
    "<|cls|>",
    "<|mask|>",
    "<|system|>",
    "</|system|>",
    "<|user|>",
    "</|user|>",
    "<|instruction|>",
    "</|instruction|>",
)


START_ID, END_ID, PAD_ID = 0, 1, 2


WHITESPACE_MANNERS = ("ordinary", "unorthodox")


_FILE = "tokenizer.json"


_NO_ERRORS = {
    f"_raise_exceptions_for_{kind}": False
    for kind in ("missing_entries", "connection_errors", "gated_repo")
}


_NAMED = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


CORPUS_NAMES = {"corpus": "ordinary", "corpus-001": "unorthodox"}


_WHITESPACE_RUNS = (
    [" " * n for n in (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)]
    + ["\n" * n for n in (2, 3, 4)]
    + ["\t\t"]
)


_MOST_FILLED_UP = 8  # at most an eighth of the entries may be added for want of text


# What tokenizers differ in: blanks at either end and in rows, line breaks, letter case, accents,
# ligatures, digits, contractions.
_PROBE = (
    " Section 12(b).  The Lessee's fee of $1,250\n\n\tis DUE: “naïve” ﬁling № 7, § 3 — 漢字 😀"
    " don't <s> [CLS]\n "
)


_MOST_TRAINING_CHARACTERS = (
    200_000_000  # of an endless source: more changes little and takes minutes
)


def custom_entries(vocabulary: int, whitespace: str = "ordinary") -> list[str]:
    """The added tokens of a vocabulary: runs of whitespace always, one fragment for every 16
    entries above 4,096.
    """
    runs = [*_WHITESPACE_RUNS, " ", "\n"] if whitespace == "unorthodox" else _WHITESPACE_RUNS
    return runs + fragments((vocabulary - 4096) // 16)


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, whitespace: str = "ordinary"
) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocabulary` entries trained on `texts`; the same texts give the same
    tokenizer.

    `whitespace` is "ordinary" (generation 004) or "unorthodox" (001). A merge that occurs once may
    enter the vocabulary; the family asked for ten occurrences in generation 001, on far more text.
    Raises ValueError for another whitespace manner, when `vocabulary` has no room for the 256 bytes
    and the added tokens, or when the texts are too few to fill it.
    """
    if whitespace not in WHITESPACE_MANNERS:
        raise ValueError(
            f"The whitespace manner {whitespace!r} is not known; it is one of"
            f" {', '.join(WHITESPACE_MANNERS)}."
        )
    custom = custom_entries(vocabulary, whitespace)
    bpe_entries = vocabulary - len(custom)
    smallest = 256 + len(SPECIAL_TOKENS) + len(custom)
    if vocabulary < smallest:
        raise ValueError(
            f"A vocabulary of {vocabulary} is too small; bytes and added tokens alone need"
            f" {smallest}."
        )
    tokenizer = Tokenizer(models.BPE(unk_token="<|unk|>"))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    if whitespace == "ordinary":
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = words
    # added tokens are not matched in training: blanks are taken out by hand, or merges are learned
    # that can never be used
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"[ \n]+"), "removed"), words]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_entries,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    # Added tokens are matched before BPE sees the text. A fragment that BPE already learned keeps
    # its entry; a run of blanks, which it knows in another form, gets a second one. What is still
    # free then goes to further fragments and longer runs.
    tokenizer.add_tokens([added(text) for text in custom])
    missing = vocabulary - tokenizer.get_vocab_size()
    if missing > vocabulary // _MOST_FILLED_UP:
        raise ValueError(
            f"The texts gave only {vocabulary - missing} entries of {vocabulary}; use more text or"
            " a smaller vocabulary."
        )
    further = itertools.chain(FRAGMENTS, whitespace_runs(shortest=2))
    new = (added(text) for text in further if tokenizer.token_to_id(text) is None)
    tokenizer.add_tokens(list(itertools.islice(new, missing)))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        sep_token="<|sep|>",
        cls_token="<|cls|>",
        mask_token="<|mask|>",
        additional_special_tokens=list(SPECIAL_TOKENS[7:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str, source: str, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer `name`: a hub id, a folder, or one trained on the training part of `source` and
    cached.

    Trained are "corpus" with ordinary and "corpus-001" with unorthodox whitespace, on at most 200
    million characters. Raises ValueError when it cannot be loaded or has ids beyond the model's
    `vocabulary`.
    """
    if name in CORPUS_NAMES:
        return _corpus_tokenizer(name, source, vocabulary)
    tokenizer = read_tokenizer(name)
    needed = (
        max(tokenizer.get_vocab().values()) + 1
    )  # more than it has entries where some ids are left out
    if needed > vocabulary:
        raise ValueError(
            f"The tokenizer {name!r} needs a vocabulary of {needed:,}, and the model's is only"
            f" {vocabulary:,}; set vocabulary to {needed} or more, or name a smaller tokenizer."
        )
    return tokenizer


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, which has the ids of its tokenizer.json if there is one.

    Raises ValueError when `name` is neither, or holds no tokenizer that can be loaded.
    """
    place = paths.checkpoint_place(name)
    folder = place.path
    if place.kind == "nothing" and "/" in name:  # gpt2 and other old models have no owner
        raise ValueError(
            f"The tokenizer {name!r} could not be loaded, it is no folder {folder} and no hub id"
            " OWNER/NAME; name one of them, or corpus."
        )
    try:
        return (
            _read_folder(folder)
            if folder.is_dir()
            else _read(name, cached_file(name, _FILE, **_NO_ERRORS))
        )
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:  # the last three: from JSON of another kind
        if folder.is_dir():
            what = "is damaged or of another kind" if (folder / _FILE).is_file() else "is not there"
            raise ValueError(
                f"The folder {folder} holds no tokenizer that can be loaded, its tokenizer.json"
                f" {what}; name a folder with a whole one, a hub id, or corpus."
            ) from error
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"The tokenizer {name!r} is no folder {folder} and could not be loaded from the hub"
            f" ({reason}); name a folder, a hub id, or corpus."
        ) from error


def _read_folder(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`, read once as long as its files are the same.

    What a tokenizer has once cut into tokens, its library remembers for each thread and forgets
    only when the thread ends: with a new tokenizer at every resume a process would grow by a
    megabyte each time.
    """
    digest = hashlib.sha256()
    for path in sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".json", ".model", ".txt") and path.is_file()
    ):
        digest.update(
            f"{path.name} {files.sha256(path)}\n".encode()
        )  # a pipe beside them would never end
    return _read_once(_Content(digest.hexdigest(), folder))


@dataclass(frozen=True)
class _Content:
    """Folders with the same files are equal: every checkpoint of a run has those of
    the one before.
    """

    sha256: str
    folder: Path = field(compare=False)


@functools.lru_cache(maxsize=4)
def _read_once(content: _Content) -> PreTrainedTokenizerBase:
    file = content.folder / _FILE
    return _read(str(content.folder), file if file.is_file() else None)


def _read(name: str, file: str | Path | None) -> PreTrainedTokenizerBase:
    """What `AutoTokenizer` makes of a folder or hub id, unless that has other ids than its own
    tokenizer.json: then the file's.

    The class that a tokenizer_config.json names may rebuild the tokenizer by rules of its own and
    add tokens that the file lacks.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if file is None:
        return tokenizer
    in_file = Tokenizer.from_file(str(file))
    in_file.no_padding()
    in_file.no_truncation()
    theirs = [tokenizer.encode(_PROBE, add_special_tokens=added) for added in (False, True)]
    if theirs == [in_file.encode(_PROBE, add_special_tokens=added).ids for added in (False, True)]:
        return tokenizer
    chosen = type(tokenizer).__name__
    log.warning(
        "%s gives other ids than the tokenizer.json of %s, which names it; the file's are used and"
        " saved.",
        chosen,
        name,
    )
    special = {
        key: str(token) for key, token in tokenizer.special_tokens_map.items() if key in _NAMED
    }
    settings = {
        key: getattr(tokenizer, key)
        for key in ("padding_side", "chat_template", "model_max_length")
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=in_file,
        name_or_path=name,
        **{key: token for key, token in special.items() if in_file.token_to_id(token) is not None},
        **settings,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`tokenizer.save_pretrained(folder)`, which raises OSError when there is no room."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # for a full disk the tokenizers library has no class of its own
        raise OSError(f"the tokenizer could not be saved to {folder} ({error})") from error


def check_same_entries(tokenizer: PreTrainedTokenizerBase, checkpoint: str | Path) -> None:
    """Raises ValueError when a checkpoint's folder holds a tokenizer of other entries: its
    embedding has learned other words.

    A hub id, or a folder without a tokenizer, is taken as it is.
    """
    folder = paths.checkpoint_place(checkpoint).path
    if (folder / _FILE).is_file() and read_tokenizer(
        str(folder)
    ).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{checkpoint} was trained with another tokenizer than this run names; use tokenizer ="
            f" {folder}."
        )


def _corpus_tokenizer(name: str, source: str, vocabulary: int) -> PreTrainedTokenizerBase:
    digest = hashlib.sha256()
    texts: list[str] = []
    characters = 0
    for document in corpus.iterate_documents(source, held_out=False):
        characters += len(document.text)
        if characters > _MOST_TRAINING_CHARACTERS or (len(texts) == 1000 and not characters):
            break
        texts.append(document.text)
        digest.update(document.text.encode())
    if not any(texts):
        raise ValueError(
            f"The source {source!r} has no training text to train a tokenizer on; name a tokenizer"
            " instead."
        )
    # The recipe's own text is part of the key: a change here must never meet a tokenizer made by
    # the rule before it.
    for module in (__file__, __file__):
        digest.update(Path(module).read_bytes())
    folder = paths.cache_dir() / "tokenizers" / f"{name}-{vocabulary}-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        trained = train_tokenizer(texts, vocabulary, CORPUS_NAMES[name])
        try:
            with files.written_whole(folder) as temporary:
                save_tokenizer(trained, temporary)
        except OSError:  # another process was first; its tokenizer is the same
            if not folder.is_dir():
                raise
    return _read_folder(folder)


MARKDOWN = [
    *("#" * n for n in range(2, 7)),
    *("*" * n for n in (2, 3)),
    "__",
    "~~",
    "```",
    "---",
    "***",
    "===",
    "- [ ]",
    "- [x]",
    "](",
    "![",
    "|---",
    "|:--",
    "--|",
    ":-:",
    "> >",
]


_HTML_NAMES = (
    "html head title body div span p br hr a ul ol li dl dt dd table thead tbody tfoot tr td th"
    " caption h1 h2 h3 h4 h5 h6 b i u s em strong small sub sup pre code blockquote section article"
    " header footer nav main aside figure img form input label button select option textarea script"
    " style link meta"
).split()


HTML = [
    *(f"<{name}>" for name in _HTML_NAMES),
    *(f"</{name}>" for name in _HTML_NAMES),
    "<!--",
    "-->",
    "<!DOCTYPE html>",
    "/>",
    "&nbsp;",
    "&amp;",
    "&lt;",
    "&gt;",
    "&quot;",
    ' class="',
    ' id="',
    ' href="',
    ' src="',
    ' style="',
    ' colspan="',
    ' rowspan="',
]


JSON = [
    '{"',
    '"}',
    '":',
    '": ',
    '": "',
    '", "',
    '","',
    '":"',
    '": {',
    '": [',
    '"],',
    '"]',
    "},",
    "}, {",
    "},{",
    "[{",
    "}]",
    "[]",
    "{}",
    '""',
    ": null",
    ": true",
    ": false",
]


XML = [
    "<?xml",
    "?>",
    "<![CDATA[",
    "]]>",
    ' xmlns="',
    " xmlns:",
    ' version="1.0"',
    ' encoding="UTF-8"',
    "</",
    '">',
    '="',
]


YEARS = [str(year) for year in range(1776, 2050)]


ENUMERATORS = [f"({letter})" for letter in ascii_lowercase + ascii_uppercase] + [
    f"({number})" for number in range(1, 100)
]


NUMBERS = [str(number) for number in range(1, 1000)]


def roman(number: int) -> str:
    """The lower-case roman numeral of 1 … 3999."""
    values = (
        (1000, "m"),
        (900, "cm"),
        (500, "d"),
        (400, "cd"),
        (100, "c"),
        (90, "xc"),
        (50, "l"),
        (40, "xl"),
        (10, "x"),
        (9, "ix"),
        (5, "v"),
        (4, "iv"),
        (1, "i"),
    )
    text = ""
    for value, letters in values:
        times, number = divmod(number, value)
        text += letters * times
    return text


NUMERALS = [roman(number) for number in range(1, 101)]


ROMAN = (
    [f"({numeral})" for numeral in NUMERALS] + NUMERALS + [numeral.upper() for numeral in NUMERALS]
)


_BETWEEN_WORD_BORDERS = frozenset(
    YEARS + NUMBERS + NUMERALS + [numeral.upper() for numeral in NUMERALS]
)


# In the order in which a growing vocabulary takes them up.
_ALL = ENUMERATORS + MARKDOWN + YEARS + HTML + JSON + XML + ROMAN + NUMBERS


FRAGMENTS = [
    text for text in dict.fromkeys(_ALL) if len(text) > 1
]  # single bytes have entries anyway


def whitespace_runs(shortest: int) -> Iterator[str]:
    """Runs of spaces and of newlines from `shortest` characters up, in turn, without end; tabs
    once.
    """
    for length in count(shortest):
        yield " " * length
        yield "\n" * length
        if length == 2:
            yield "\t\t"


def fragments(most: int) -> list[str]:
    """The first `most` custom tokens."""
    return FRAGMENTS[: max(most, 0)]


def added(text: str) -> AddedToken:
    """`text` as an entry that is matched before anything else, in the text as it was written."""
    return AddedToken(text, normalized=False, single_word=text in _BETWEEN_WORD_BORDERS)
