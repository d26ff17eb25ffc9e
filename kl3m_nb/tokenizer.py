"""Byte-level BPE tokenizers of the KL3M family: loading one, or training one by the family's recipe.

The recipe (tokenizer generation 004): special tokens with fixed ids first, then BPE, then runs of spaces and newlines as
added tokens; NFKC normalizer; nothing added on encode; left padding. What is saved loads with `AutoTokenizer` alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kl3m_nb import corpus, paths

SPECIAL_TOKENS = (
    "<|start|>", "<|end|>", "<|pad|>", "<|unk|>", "<|sep|>", "<|cls|>", "<|mask|>",
    "<|system|>", "</|system|>", "<|user|>", "</|user|>", "<|instruction|>", "</|instruction|>",
)  # fmt: skip
START_ID, END_ID, PAD_ID = 0, 1, 2
_WHITESPACE_RUNS = [" " * n for n in (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)] + ["\n" * n for n in (2, 3, 4)] + ["\t\t"]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocabulary` entries trained on `texts`; the same texts give the same tokenizer.

    Raises ValueError when `vocabulary` has no room for the 256 bytes and the added tokens, or the texts are too few to fill it.
    """
    bpe_entries = vocabulary - len(_WHITESPACE_RUNS)
    smallest = 256 + len(SPECIAL_TOKENS) + len(_WHITESPACE_RUNS)
    if vocabulary < smallest:
        raise ValueError(f"A vocabulary of {vocabulary} is too small; bytes and added tokens alone need {smallest}.")
    tokenizer = Tokenizer(models.BPE(unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_entries,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A run that BPE already learned in its byte form gets a second entry: added tokens are matched before BPE sees the text.
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in _WHITESPACE_RUNS])
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"The texts gave only {tokenizer.get_vocab_size()} entries of {vocabulary}; use more text or a smaller vocabulary."
        )
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
    """The tokenizer `name`: a hub id, a folder, or "corpus" for one trained on the training part of `source` and cached.

    Raises ValueError when it cannot be loaded or has more entries than the model's `vocabulary`.
    """
    if name == "corpus":
        return _corpus_tokenizer(source, vocabulary)
    folder = paths.resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer {name!r} is no folder here and could not be loaded from the hub: {error}") from error
    if len(tokenizer) > vocabulary:
        raise ValueError(f"The tokenizer {name!r} has {len(tokenizer)} entries, the model's vocabulary only {vocabulary}.")
    return tokenizer


def _corpus_tokenizer(source: str, vocabulary: int) -> PreTrainedTokenizerBase:
    digest = hashlib.sha256()
    texts = []
    for document in corpus.iterate_documents(source, held_out=False):
        texts.append(document.text)
        digest.update(document.text.encode())
    if not any(texts):
        raise ValueError(f"The source {source!r} has no training text to train a tokenizer on; name a tokenizer instead.")
    # The recipe's own text is part of the key: a change here must never meet a tokenizer made by the rule before it.
    digest.update(Path(__file__).read_bytes())
    folder = paths.cache_dir() / "tokenizers" / f"corpus-{vocabulary}-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder.parent, prefix=".training-")
        train_tokenizer(texts, vocabulary).save_pretrained(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first; its tokenizer is the same
            shutil.rmtree(temporary)
            if not folder.is_dir():
                raise
    return AutoTokenizer.from_pretrained(str(folder))
