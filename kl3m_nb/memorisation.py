"""Prefix recital: how much of a passage a model continues word for word from its first tokens.

A model that has learned the language recites a little of any text; one that has copied its training data recites more of that
than of held-out text. So the gap between the two is the measure, taken with the same prefixes, lengths and greedy decoding. The
training passages are cut from windows that the run's stream is known to have given, not from documents it may never have reached.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.corpus import Document
from kl3m_nb.document_stream import token_ids
from kl3m_nb.evaluation import bootstrap_interval, difference_interval, evaluation_mode
from kl3m_nb.generation import generating_by, stopping
from kl3m_nb.profiles import DataSpec
from kl3m_nb.special_ids import end_id
from kl3m_nb.streams import open_stream

PREFIX_LENGTHS = (5, 10, 20, 50)


def held_out_passages(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[list[int]]:
    """One passage of `length` token ids from each of up to `count` documents, both drawn with `seed`.

    Documents shorter than a passage are passed over. Raises ValueError when none is left.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(documents, len(documents))
    return _cut((token_ids(document, tokenizer) for document in shuffled), length, count, rng)


def trained_passages(
    data: DataSpec, tokenizer: PreTrainedTokenizerBase, windows: int, length: int, count: int, seed: int, most_windows: int = 1000
) -> list[list[int]]:
    """Up to `count` passages of `length` token ids that a run has been trained on, drawn with `seed`.

    `data` are the run's, `windows` how many it had seen: the beginning of its stream is read again, up to `most_windows`. A
    passage lies within one document and one window. Raises ValueError when none is long enough.
    """
    stream = open_stream(data, tokenizer)
    labels = stream.take(min(windows, most_windows)).labels.numpy()
    stream.close()
    pieces, end = [], end_id(tokenizer)
    for row in labels:  # a label is a token that was trained on, −100 is none
        breaks = (row == end) | (row == -100)
        parts = zip(np.split(row, np.flatnonzero(breaks)), np.split(breaks, np.flatnonzero(breaks)), strict=True)
        pieces += [piece[~of_piece].tolist() for piece, of_piece in parts]
    rng = random.Random(seed)
    return _cut(rng.sample(pieces, len(pieces)), length, count, rng)


def _cut(texts: Iterable[list[int]], length: int, count: int, rng: random.Random) -> list[list[int]]:
    """A passage from each of the first `count` of `texts` that are long enough; no more of them are asked for."""
    passages: list[list[int]] = []
    longest = 0
    for tokens in texts:
        longest = max(longest, len(tokens))
        if len(tokens) >= length:
            start = rng.randrange(len(tokens) - length + 1)
            passages.append(tokens[start : start + length])
        if len(passages) == count:
            break
    if not passages:
        raise ValueError(f"No text has {length} tokens, the longest has {longest}; lower the prefix or the continuation.")
    return passages


@torch.no_grad()
def recital(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Sequence[int]],
    prefix_lengths: Sequence[int] = PREFIX_LENGTHS,
    continuation: int = 32,
    batch_size: int = 128,
) -> pd.DataFrame:
    """A row per passage and prefix length: `passage`, `prefix`, `identical`, `recited`.

    The model sees the last `prefix` tokens before the same `continuation` last tokens of a passage, whatever the prefix, and
    writes on greedily. `identical` is the share of positions whose token is the passage's, `recited` the number of tokens that
    are right before the first wrong one. Raises ValueError for passages of unequal length or too short for the longest prefix.
    """
    length = max(prefix_lengths) + continuation
    if {len(passage) for passage in passages} != {length} or min(prefix_lengths) < 1:
        raise ValueError(
            f"recital needs passages of exactly {length} tokens: the longest prefix, at least 1, and the continuation."
        )
    ids = torch.tensor(passages, device=model.device)
    # the end of a text stands in no passage: what follows it counts as not recited
    config = GenerationConfig(do_sample=False, max_new_tokens=continuation, **stopping(model, tokenizer))
    asked = pd.DataFrame(
        [(passage, prefix) for prefix in prefix_lengths for passage in range(len(passages))], columns=["passage", "prefix"]
    )
    written = []
    with evaluation_mode(model):
        for start in range(0, len(asked), batch_size):
            batch = asked.iloc[start : start + batch_size]
            longest, prefixes = batch["prefix"].max(), torch.tensor(batch["prefix"].to_numpy(), device=model.device)
            prompts = ids[batch["passage"].to_list(), -continuation - longest : -continuation]
            seen = torch.arange(longest, device=model.device) >= longest - prefixes[:, None]
            with generating_by(model, config):
                part = model.generate(prompts, attention_mask=seen.long(), generation_config=config)[:, longest:]
            written.append(F.pad(part, (0, continuation - part.shape[1]), value=-1))  # shorter where every text ended
    same = torch.cat(written) == ids[asked["passage"].to_list(), -continuation:]
    recited = same.long().cumprod(dim=1).sum(dim=1)
    return asked.assign(identical=same.double().mean(dim=1).tolist(), recited=recited.tolist())


def recital_gap(training: pd.DataFrame, held_out: pd.DataFrame) -> pd.DataFrame:
    """What copying adds: a row per prefix length with the mean `identical` of both sets and `gap`, `gap_low`, `gap_high`.

    The interval is a 95% bootstrap over passages, each set resampled on its own. `longest_training` and `longest_held_out` are
    the longest recitals in tokens. A gap whose interval contains 0 is no sign of copying, and no proof against it.
    """
    rows = []
    for prefix, of_training in training.groupby("prefix"):
        of_held_out = held_out[held_out["prefix"] == prefix]
        seen = bootstrap_interval(of_training["identical"])
        unseen = bootstrap_interval(of_held_out["identical"])
        gap = difference_interval(of_training["identical"], of_held_out["identical"])
        rows.append(
            {
                "prefix": prefix,
                "training": seen.mean, "training_low": seen.low, "training_high": seen.high,
                "held_out": unseen.mean, "held_out_low": unseen.low, "held_out_high": unseen.high,
                "gap": gap.mean, "gap_low": gap.low, "gap_high": gap.high,
                "longest_training": int(of_training["recited"].max()), "longest_held_out": int(of_held_out["recited"].max()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def copying(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSpec,
    windows: int,
    documents: Sequence[Document],
    seed: int,
    prefix_lengths: Sequence[int] = PREFIX_LENGTHS,
    continuation: int = 24,
    count: int = 40,
) -> pd.DataFrame:
    """The `recital_gap` between up to `count` passages that a run was trained on and as many of held-out `documents`.

    `data` are the run's, `windows` how many it had seen. Raises ValueError when no passage is long enough.
    """
    cut = {"length": max(prefix_lengths) + continuation, "count": count, "seed": seed}
    trained = trained_passages(data, tokenizer, windows, **cut)
    held_out = held_out_passages(documents, tokenizer, **cut)
    table = recital(model, tokenizer, trained + held_out, prefix_lengths, continuation)
    is_held_out = table["passage"] >= len(trained)
    return recital_gap(table[~is_held_out], table[is_held_out])
