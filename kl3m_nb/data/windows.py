"""From documents to training windows: append the end-of-text token and pack densely across
documents.

A window holds seq_len + 1 tokens: inputs are its first seq_len, labels its last seq_len, so every
position is trained on and there is no padding. Windows do not overlap: laid end to end they are the
documents again. `PackedStream.state_dict()` holds everything needed to continue with the very next
token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from kl3m_nb.data import corpus
from kl3m_nb.data.corpus import family
from kl3m_nb.data.documents import (
    DocumentStream,
    forget_held_out,
    held_out_documents,
    preview_tokenized,
)
from kl3m_nb.data.sources import SourceReport
from kl3m_nb.data.special_ids import end_id
from kl3m_nb.profiles import DataSpec


@dataclass(frozen=True)
class Batch:
    """What one step is trained on: input_ids and labels, int64 [windows, seq_len], e.g. [8, 256],
    labels −100 where none is.

    `attention_mask`, bool of the same shape, is False on padding; None says that every position is
    real. `position_ids`, int64 of the same shape, begins at 0 with every document; None says that
    positions count through. `document_ids`, int64 of the same shape, numbers the documents of a
    window, in which attention then stays; None says that it goes across.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None

    @property
    def valid_tokens(self) -> int:
        """Labels that count."""
        return int((self.labels != -100).sum())

    @property
    def routed_tokens(self) -> int:
        """Positions that are no padding: what a mixture's router sends to experts, with a label or
        without.
        """
        return (
            self.input_ids.numel()
            if self.attention_mask is None
            else int(self.attention_mask.sum())
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, windows: slice) -> Batch:
        return self._each(lambda tensor: tensor[windows])

    def split(self, windows: int) -> list[Batch]:
        """The same windows in batches of at most `windows`."""
        return [self[start : start + windows] for start in range(0, len(self), windows)]

    def to(self, device: torch.device | str) -> Batch:
        """A copy on `device`; without waiting when this one lies in pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """A copy in memory that a GPU can fetch by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change) -> Batch:
        tensors = (
            self.input_ids,
            self.labels,
            self.attention_mask,
            self.position_ids,
            self.document_ids,
        )
        return Batch(*(None if tensor is None else change(tensor) for tensor in tensors))


def pack(token_lists: Iterable[list[int]], window: int) -> Iterator[list[int]]:
    """Cuts the concatenation of `token_lists` into consecutive windows of `window` tokens; an
    unfilled rest is dropped.
    """
    rest: list[int] = []
    for tokens in token_lists:
        rest.extend(tokens)
        full = len(rest) // window * window
        for start in range(0, full, window):
            yield rest[start : start + window]
        del rest[:full]


def restarting_positions(input_ids: torch.Tensor, end_id: int) -> torch.Tensor:
    """Positions that begin at 0 behind every `end_id`; both int64 [windows, seq_len], e.g. [8,
    256].
    """
    places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == end_id
    return places - torch.where(begins, places, 0).cummax(dim=1).values


class BatchStream:
    """What every training stream has: documents without end, made into batches by `take`, which a
    subclass adds.

    Every process of a distributed run reads the same stream and takes its `rank_share` of each
    batch, so the state is the same on all of them and does not depend on how many there are.
    """

    def __init__(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase):
        """Raises ValueError or FileNotFoundError when the source is malformed or missing."""
        self.spec, self.tokenizer = spec, tokenizer
        self._documents = DocumentStream(spec, tokenizer)

    @property
    def epoch(self) -> int:
        """Passes over the source that are complete."""
        return self._documents.epoch

    @property
    def report(self) -> SourceReport:
        """What was read and what was left out so far."""
        return self._documents.report

    def close(self) -> None:
        """Closes the files that are open."""
        self._documents.close()


class PackedStream(BatchStream):
    """Endless training windows of one source, epoch after epoch, with a state that resumes to the
    token.
    """

    def __init__(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase):
        """Raises ValueError, beside what `BatchStream` does, when the tokenizer names no
        end-of-text token.
        """
        self._end = end_id(tokenizer)
        super().__init__(spec, tokenizer)
        self._rest = np.empty(0, dtype=np.int32)

    def next_batch(self, windows: int) -> torch.Tensor:
        """The next `windows` windows, int64 [windows, seq_len + 1], e.g. [8, 257]."""
        length = self.spec.seq_len + 1
        wanted = windows * length
        pieces, have = [self._rest], self._rest.size
        end = np.array([self._end], dtype=np.int32)
        while have < wanted:
            tokens = self._documents.next()
            pieces += [tokens, end]
            have += tokens.size + 1
        everything = np.concatenate(pieces)
        self._rest = everything[wanted:].copy()
        return torch.from_numpy(everything[:wanted].reshape(-1, length).astype(np.int64))

    def take(self, windows: int) -> Batch:
        """`next_batch` as inputs and labels, with positions and documents as the profile's
        `document_borders` says.
        """
        tokens = self.next_batch(windows)
        # Contiguous: a view is copied to a GPU through memory that is not pinned, and the host
        # waits for it.
        input_ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.spec.document_borders == "ignored":
            return Batch(input_ids, labels)
        # Only together: without the mask a query would see keys of earlier documents at rotary
        # distances of zero and below.
        positions = restarting_positions(input_ids, self._end)
        return Batch(
            input_ids, labels, position_ids=positions, document_ids=(positions == 0).cumsum(1)
        )

    def state_dict(self) -> dict:
        """Place in the source, shuffle buffer, its generator, tokens not yet given; cheap enough
        for every step.
        """
        return {"documents": self._documents.state_dict(), "rest": torch.from_numpy(self._rest)}

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state` was taken."""
        self._documents.load_state_dict(state["documents"])
        self._rest = state["rest"].numpy()


def rank_share(batch: Batch, micro_batch: int, rank: int, ranks: int) -> list[Batch]:
    """The micro-batches of one rank, out of the whole `batch` of one step; the shares of all ranks
    together are the step.

    Micro-batches are dealt out one by one where they come out even, so that they are the same for
    any number of ranks; else their windows are. Raises ValueError when not even the windows can be
    shared evenly.
    """
    micro_batches = batch.split(micro_batch)
    if len(micro_batches) % ranks == 0:
        return micro_batches[rank::ranks]
    check_shares(len(batch), ranks)
    share = len(batch) // ranks
    return batch[rank * share : (rank + 1) * share].split(micro_batch)


def check_shares(windows: int, ranks: int) -> None:
    """Raises ValueError when the `windows` of a step cannot be shared evenly by `ranks`."""
    if windows % ranks:
        raise ValueError(
            f"A step of {windows} windows cannot be shared evenly by {ranks} processes; start a"
            " number of them that divides it, or change micro_batch or grad_accumulation."
        )


def held_out_windows(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The fixed held-out set, int64 [held_out_windows, seq_len + 1]: spread evenly over the
    held-out documents.

    Raises ValueError when the source's held-out documents do not fill that many windows, with the
    cause where rows share names, or when the tokenizer names no end-of-text token.
    """
    end = end_id(tokenizer)
    forget_held_out()  # the files may be others than at the last call of this process
    documents = ([*tokens.tolist(), end] for _, tokens in held_out_documents(spec, tokenizer))
    windows = list(pack(documents, spec.seq_len + 1))
    if len(windows) < spec.held_out_windows:
        corpus.check_identifiers(spec.source)
    if not windows:
        raise ValueError(
            f"The held-out documents of {spec.source!r}, about one in ten by their text, do not"
            f" fill a window of {spec.seq_len + 1} tokens; give more documents or lower seq_len."
        )
    if len(windows) < spec.held_out_windows:
        raise ValueError(
            f"The held-out documents of {spec.source!r} fill {len(windows)} windows of"
            f" {spec.seq_len + 1} tokens, {spec.held_out_windows} are asked for; lower"
            " held_out_windows or seq_len."
        )
    return torch.tensor(windows, dtype=torch.int64)[_spread(len(windows), spec.held_out_windows)]


def sampled_windows(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, count: int
) -> tuple[torch.Tensor, list[str]]:
    """`count` of the `held_out_windows`, int64 [count, seq_len + 1], spread evenly over them, and
    the family of each.

    The family is that of the documents that most tokens of a window are from. All windows are given
    where there are no more than `count`. Raises ValueError as `held_out_windows`.
    """
    windows = held_out_windows(spec, tokenizer)
    documents = held_out_documents(spec, tokenizer)
    names = list(dict.fromkeys(family(document) for document, _ in documents))
    owners = np.repeat(
        [names.index(family(document)) for document, _ in documents],
        [tokens.size + 1 for _, tokens in documents],
    )
    length = spec.seq_len + 1
    owners = owners[: len(owners) // length * length].reshape(-1, length)
    owners = owners[
        _spread(len(owners), spec.held_out_windows)
    ]  # the same choice as that of the windows
    chosen = _spread(len(windows), min(count, len(windows)))
    return windows[chosen], [names[np.bincount(row).argmax()] for row in owners[chosen]]


def _spread(available: int, count: int) -> torch.Tensor:
    """`count` of the places 0 … available − 1, int64, spread evenly."""
    return torch.linspace(0, available - 1, count).round().long()


def document_table(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, most: int = 500
) -> pd.DataFrame:
    """A row per document of `corpus.preview` that can be used: part ("training" or "held out"),
    domain, tokens (a count).
    """
    rows = []
    for name, held_out in (("training", False), ("held out", True)):
        documents = preview_tokenized(spec.source, tokenizer, held_out, most)
        rows += [(name, document.dataset, tokens.size) for document, tokens in documents]
    return pd.DataFrame(rows, columns=["part", "domain", "tokens"])
