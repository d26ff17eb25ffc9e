"""Prefix recital: how much of a passage a model continues word for word from its first tokens.

A model that has learned the language recites a little of any text; one that has copied its training data recites more of that
than of held-out text. So the gap between the two is the measure, taken with the same prefixes, lengths and greedy decoding.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.corpus import Document
from kl3m_nb.document_stream import token_ids
from kl3m_nb.evaluation import bootstrap_interval, difference_interval, evaluation_mode

PREFIX_LENGTHS = (5, 10, 20, 50)


def choose_passages(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[list[int]]:
    """One passage of `length` token ids from each of up to `count` documents, both drawn with `seed`.

    Documents shorter than a passage are passed over. Raises ValueError when none is left.
    """
    rng = random.Random(seed)
    documents = list(documents)
    rng.shuffle(documents)
    passages: list[list[int]] = []
    for document in documents:
        if len(passages) == count:
            break
        tokens = token_ids(document, tokenizer)
        if len(tokens) >= length:
            start = rng.randrange(len(tokens) - length + 1)
            passages.append(tokens[start : start + length])
    if not passages:
        raise ValueError(f"None of the {len(documents)} documents has {length} tokens; lower the prefix or the continuation.")
    return passages


@torch.no_grad()
def recital(
    model: PreTrainedModel,
    passages: Sequence[Sequence[int]],
    prefix_lengths: Sequence[int] = PREFIX_LENGTHS,
    continuation: int = 32,
    batch_size: int = 64,
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
    truth = ids[:, -continuation:]
    end = model.generation_config.eos_token_id  # stands in no passage: what follows it counts as not recited
    config = GenerationConfig(do_sample=False, max_new_tokens=continuation, pad_token_id=0 if end is None else end)
    rows = []
    with evaluation_mode(model):
        for prefix in prefix_lengths:
            prompts = ids[:, -continuation - prefix : -continuation]
            written = [
                model.generate(part, attention_mask=torch.ones_like(part), generation_config=config)[:, prefix:]
                for part in prompts.split(batch_size)
            ]
            # a batch in which every text ended is shorter
            whole = [F.pad(part, (0, continuation - part.shape[1]), value=-1) for part in written]
            same = torch.cat(whole) == truth
            recited = same.long().cumprod(dim=1).sum(dim=1)
            rows.append(
                pd.DataFrame(
                    {
                        "passage": range(len(passages)),
                        "prefix": prefix,
                        "identical": same.double().mean(dim=1).tolist(),
                        "recited": recited.tolist(),
                    }
                )
            )
    return pd.concat(rows, ignore_index=True)


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
