"""The special tokens of the tokenizer that is used; whoever needs an id, in data, configurations or
generation, asks here.

The family's are `<|start|>` 0, `<|end|>` 1 and `<|pad|>` 2. Another tokenizer has others, or lacks
some. A token that is needed and missing is an error that names it; for padding, which is masked,
the end-of-text token serves as well.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.common import paths
from kl3m_nb.data.tokenizer import CORPUS_NAMES, END_ID, PAD_ID, START_ID, load_tokenizer
from kl3m_nb.profiles import DataSpec


class SpecialIds(NamedTuple):
    """The ids that a model's config.json names; None for a token that there is not."""

    start: int | None
    end: int | None
    padding: (
        int | None
    )  # of a token that is nothing but padding: its row of the embedding is never read


FAMILY_IDS = SpecialIds(START_ID, END_ID, PAD_ID)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """What the config.json of a model says that is trained with `tokenizer`.

    A padding token that is also read (many tokenizers pad with the end-of-text token) is left out:
    torch gives the embedding of the padding token no gradient.
    """
    start, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return SpecialIds(
        start, end, None if padding in (start, end, tokenizer.unk_token_id) else padding
    )


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-text token, which closes each document. Raises ValueError when the tokenizer names
    none.
    """
    return _required(tokenizer, "eos_token", "end-of-text token, which closes each document")


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The beginning-of-text token, which opens a document in segments. Raises ValueError when the
    tokenizer names none.
    """
    return _required(
        tokenizer,
        "bos_token",
        "beginning-of-text token, which opens each document with packing 'segments'",
    )


def check_tokenizer(data: DataSpec, vocabulary: int) -> None:
    """Raises ValueError when the tokenizer that `data` names has ids beyond the model's
    `vocabulary`, lacks a token that the data need, or cannot be loaded.

    One that would first be trained or downloaded is left to `load_tokenizer`.
    """
    name = data.tokenizer
    if name in CORPUS_NAMES or paths.checkpoint_place(name).kind == "hub":
        return
    tokenizer = load_tokenizer(name, data.source, vocabulary)
    end_id(tokenizer)
    if data.packing == "segments":
        start_id(tokenizer)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills room that is masked and has no label: the padding token, or without one the
    end-of-text token.

    Raises ValueError when the tokenizer names neither.
    """
    return end_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def border_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text of which nothing is known: the end-of-text token, or without one
    the beginning-of-text token.

    Raises ValueError when the tokenizer names neither.
    """
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    return _required(
        tokenizer,
        "eos_token",
        "end-of-text token, from which the first token of a text is predicted",
    )


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text which `model` writes; empty when the tokenizer names no
    end-of-text token.

    They are the tokenizer's. A model that names its tokenizer's among several, as chat models do,
    ends at each of those.
    """
    end, named = tokenizer.eos_token_id, model.generation_config.eos_token_id
    if end is None:
        return []
    return list(named) if isinstance(named, list) and end in named else [end]


def adopt_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the special ids of `model` those of `tokenizer`, in place: both its configurations, and
    the row without a gradient.

    Raises ValueError when the tokenizer names no end-of-text token.
    """
    end_id(tokenizer)
    ids, padding, stops = special_ids(tokenizer), padding_id(tokenizer), stop_ids(model, tokenizer)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = ids
    if len(stops) > 1:
        model.generation_config.eos_token_id = stops
    model.generation_config.pad_token_id = padding
    model.get_input_embeddings().padding_idx = ids.padding


def _required(tokenizer: PreTrainedTokenizerBase, name: str, what: str) -> int:
    found = getattr(tokenizer, f"{name}_id")
    if found is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path} names no {what}; name the token as {name} in"
            " its tokenizer_config.json, or use another tokenizer."
        )
    return found
