"""Memorisation: how much of a passage a model continues verbatim from its first tokens (Carlini et
al., arXiv:2202.07646).

A model that has learned the language gets some tokens of any text right; one that has memorised its
training data gets more of that right than of other text. The measure is the gap between documents
that training had given and documents of the same side of the split that the stream had not given
yet. The stream is deterministic, so it is read again from its beginning, and read on from where the
checkpoint stands. Licences copy from each other, so a passage may have been given with another
document: both sets keep only passages of which no run of twelve tokens stands in another document
of all that was read. One passage is cut from each document, so passages are independent. Held-out
documents are no such comparison: they were chosen for being unlike the training documents, which
lowers what a model gets right of them without any memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.common.intervals import difference_interval, mean_interval
from kl3m_nb.data.loader import Reading, open_stream
from kl3m_nb.data.near_duplicates import SHINGLE_TOKENS, token_shingles
from kl3m_nb.data.special_ids import end_id
from kl3m_nb.data.windows import Batch
from kl3m_nb.evaluation.generation import generating_by, stopping
from kl3m_nb.model.scoring import evaluation_mode

PREFIX_LENGTHS = (5, 10, 20, 50)


MOST_WINDOWS = 4000  # of a stream that are read again, and read on


FEWEST_DOCUMENTS = 5  # of each set: fewer give no interval to speak of


_BATCH = 20  # windows


class NotMeasurable(ValueError):
    """Text that was given in training cannot be compared with text that was not; the message says
    why, in one sentence.
    """


def copying(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    readings: Sequence[Reading],
    seed: int,
    prefix_lengths: Sequence[int] = PREFIX_LENGTHS,
    continuation: int = 24,
    count: int = 60,
) -> pd.DataFrame:
    """The `memorisation_gap` between up to `count` passages that training had given and as many
    that it had not given yet.

    `readings` are those of the model (`runs.readings`). Raises NotMeasurable as `given_and_not`, or
    when too few of its documents have a passage of the longest prefix and the continuation that
    stands nowhere else. Raises ValueError for a passage of fewer than twelve tokens.
    """
    length = max(prefix_lengths) + continuation
    if length < SHINGLE_TOKENS:
        raise ValueError(
            f"A passage has {length} tokens; it takes at least {SHINGLE_TOKENS}, or its"
            " near-duplicates are not found."
        )
    rng = random.Random(seed)
    given, not_given = given_and_not(readings, tokenizer)
    shared = shared_shingles(given + not_given)
    sets = [
        cut_passages(given, shared[: len(given)], length, count, rng),
        cut_passages(not_given, shared[len(given) :], length, count, rng),
    ]
    if min(map(len, sets)) < FEWEST_DOCUMENTS:
        raise NotMeasurable(
            f"Memorisation is not measurable here: {len(sets[0])} documents that were given in"
            f" training and {len(sets[1])} that were not have {length} tokens that stand nowhere"
            f" else; it takes {FEWEST_DOCUMENTS} of each."
        )
    table = verbatim_continuation(model, tokenizer, sets[0] + sets[1], prefix_lengths, continuation)
    was_given = table["passage"] < len(sets[0])
    return memorisation_gap(table[was_given], table[~was_given])


def given_and_not(
    readings: Sequence[Reading],
    tokenizer: PreTrainedTokenizerBase,
    most_windows: int = MOST_WINDOWS,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Documents that training had given, and documents that the stream gives next: token ids, int32
    [length] each.

    `readings` has the run of the model first, then those of the models it was begun from. Up to
    `most_windows` of each stream are read again, and as many of the first one read on, to the end
    of its first pass. No document stands twice. Raises NotMeasurable when the run had begun its
    second pass, since it had then read its whole training side, or when an earlier run had read
    more than can be read again.
    """
    newest, *earlier = readings
    if longer := [reading.windows for reading in earlier if reading.windows > most_windows]:
        raise NotMeasurable(
            "Memorisation is not measurable here: the model was begun from one that had read"
            f" {max(longer):,} windows; {most_windows:,} can be read again to tell which text it"
            " had not been given."
        )
    given = {}
    for reading in readings:
        stream = open_stream(reading.data, tokenizer)
        windows = min(reading.windows, most_windows)
        batches = (stream.take(min(_BATCH, windows - done)) for done in range(0, windows, _BATCH))
        given |= {document.tobytes(): document for document in _documents(batches, tokenizer)}
        stream.close()
    later = {
        document.tobytes(): document
        for document in list(_documents(_read_on(newest, tokenizer, most_windows), tokenizer))[1:]
    }
    return list(given.values()), [document for key, document in later.items() if key not in given]


def _read_on(
    reading: Reading, tokenizer: PreTrainedTokenizerBase, most_windows: int
) -> Iterator[Batch]:
    """What the stream of a run gives next, while it is in its first pass over every part of its
    source.
    """
    stream = open_stream(reading.data, tokenizer)
    stream.load_state_dict(reading.stream)
    if _passes(stream) > 0:
        stream.close()
        raise NotMeasurable(
            "Memorisation is not measurable here: the run had begun its second pass, so there is no"
            " text of the training side that it had not been given; an earlier checkpoint of it, or"
            " a run on more documents, has some."
        )
    for _ in range(0, most_windows, _BATCH):
        batch = stream.take(_BATCH)
        if _passes(stream) > 0:
            break
        yield batch
    stream.close()


def _passes(stream) -> int:
    """Complete passes over the part of the source that is furthest ahead."""
    return max(part["epoch"] for part in stream.state_dict()["documents"]["parts"])


def _documents(
    batches: Iterable[Batch], tokenizer: PreTrainedTokenizerBase
) -> Iterator[np.ndarray]:
    """The documents that consecutive windows were made of, whole but for the first and last of
    dense windows: int32 [length].

    A window's tokens are its labels and the token before the first of them; marks and padding are
    left out.
    """
    rows = []
    for batch in batches:
        for inputs, labels in zip(batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
            is_label = labels != -100
            rows += [inputs[is_label][:1], labels[is_label]]
    tokens = np.concatenate(rows or [np.empty(0, dtype=np.int64)]).astype(np.int32)
    end = end_id(tokenizer)
    marks = [end] if tokenizer.bos_token_id is None else [end, tokenizer.bos_token_id]
    for piece in np.split(tokens, np.flatnonzero(tokens == end)):
        yield piece[~np.isin(piece, marks)]


def shared_shingles(documents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each document which of its runs of twelve tokens stand in another one too: bool [length −
    11].
    """
    shingles = [token_shingles(document) for document in documents]
    distinct, of_all = np.unique(np.concatenate(shingles), return_inverse=True)
    borders = np.cumsum([of_document.size for of_document in shingles])[:-1]
    numbers = np.split(of_all, borders)
    documents_with = np.zeros(distinct.size, dtype=np.int64)
    for of_document in numbers:
        documents_with[np.unique(of_document)] += 1
    return [documents_with[of_document] > 1 for of_document in numbers]


def cut_passages(
    documents: Sequence[np.ndarray],
    shared: Sequence[np.ndarray],
    length: int,
    count: int,
    rng: random.Random,
) -> list[list[int]]:
    """One passage of `length` token ids from each of up to `count` documents, drawn with `rng`,
    without a `shared` shingle.

    `shared` is what `shared_shingles` tells of each document. Documents without such a passage are
    passed over.
    """
    passages = []
    for number in rng.sample(range(len(documents)), len(documents)):
        before = np.concatenate(
            [[0], np.cumsum(shared[number])]
        )  # shared shingles before each place
        width = length - SHINGLE_TOKENS + 1
        starts = np.flatnonzero(before[width:] == before[:-width])
        if len(starts):
            start = rng.choice(starts.tolist())
            passages.append(documents[number][start : start + length].tolist())
        if len(passages) == count:
            break
    return passages


@torch.no_grad()
def verbatim_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Sequence[int]],
    prefix_lengths: Sequence[int] = PREFIX_LENGTHS,
    continuation: int = 32,
    batch_size: int = 128,
) -> pd.DataFrame:
    """A row per passage and prefix length: `passage`, `prefix`, `identical`, `verbatim`.

    The model sees the last `prefix` tokens before the same `continuation` last tokens of a passage,
    whatever the prefix, and writes on greedily. `identical` is the share of positions whose token
    is the passage's, `verbatim` the number of tokens that are right before the first wrong one.
    Raises ValueError for passages of unequal length or too short for the longest prefix.
    """
    length = max(prefix_lengths) + continuation
    if {len(passage) for passage in passages} != {length} or min(prefix_lengths) < 1:
        raise ValueError(
            f"verbatim_continuation takes passages of exactly {length} tokens: the longest prefix,"
            " at least 1, and the rest."
        )
    ids = torch.tensor(passages, device=model.device)
    # the end of a text stands in no passage: what follows it counts as wrong
    config = GenerationConfig(
        do_sample=False, max_new_tokens=continuation, **stopping(model, tokenizer)
    )
    asked = pd.DataFrame(
        [(passage, prefix) for prefix in prefix_lengths for passage in range(len(passages))],
        columns=["passage", "prefix"],
    )
    written = []
    with evaluation_mode(model):
        for start in range(0, len(asked), batch_size):
            batch = asked.iloc[start : start + batch_size]
            longest, prefixes = (
                batch["prefix"].max(),
                torch.tensor(batch["prefix"].to_numpy(), device=model.device),
            )
            prompts = ids[batch["passage"].to_list(), -continuation - longest : -continuation]
            seen = torch.arange(longest, device=model.device) >= longest - prefixes[:, None]
            with generating_by(model, config):
                part = model.generate(
                    prompts, attention_mask=seen.long(), generation_config=config
                )[:, longest:]
            written.append(
                F.pad(part, (0, continuation - part.shape[1]), value=-1)
            )  # shorter where every text ended
    same = torch.cat(written) == ids[asked["passage"].to_list(), -continuation:]
    verbatim = same.long().cumprod(dim=1).sum(dim=1)
    return asked.assign(identical=same.double().mean(dim=1).tolist(), verbatim=verbatim.tolist())


def memorisation_gap(given: pd.DataFrame, not_given: pd.DataFrame) -> pd.DataFrame:
    """What memorisation adds: a row per prefix length with the mean `identical` of both sets, and
    the `gap` between them.

    All three have 95% intervals, `…_low` to `…_high`, over the passages, each of a document of its
    own; `given_documents` and `not_given_documents` count them. `longest_given` and
    `longest_not_given` are the longest verbatim continuations in tokens. A gap whose interval
    contains 0 is no sign of memorisation, and no proof against it.
    """
    rows = []
    for prefix, of_given in given.groupby("prefix"):
        of_other = not_given[not_given["prefix"] == prefix]
        seen, unseen = mean_interval(of_given["identical"]), mean_interval(of_other["identical"])
        gap = difference_interval(of_given["identical"], of_other["identical"])
        rows.append(
            {
                "prefix": prefix,
                "given": seen.mean,
                "given_low": seen.low,
                "given_high": seen.high,
                "not_given": unseen.mean,
                "not_given_low": unseen.low,
                "not_given_high": unseen.high,
                "gap": gap.mean,
                "gap_low": gap.low,
                "gap_high": gap.high,
                "given_documents": len(of_given),
                "not_given_documents": len(of_other),
                "longest_given": int(of_given["verbatim"].max()),
                "longest_not_given": int(of_other["verbatim"].max()),
            }
        )
    return pd.DataFrame(rows)
