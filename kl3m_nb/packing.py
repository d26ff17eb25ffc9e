"""From documents to training windows: tokenize, append `<|end|>`, shuffle lightly, pack densely across documents.

A window holds seq_len + 1 tokens: inputs are its first seq_len, labels its last seq_len, so every position is trained on and
there is no padding. Windows do not overlap: laid end to end they are the documents again. `PackedStream.state_dict()` holds
everything needed to continue with the very next token; the shuffle buffer is ours because a library's loses examples on resume.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedTokenizerBase

from kl3m_nb import corpus
from kl3m_nb.profiles import DataSpec


def document_tokens(document: corpus.Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one document, closed by `<|end|>`."""
    tokens = list(document.tokens) or tokenizer.encode(document.text, add_special_tokens=False)
    return [*tokens, tokenizer.eos_token_id]


def pack(token_lists: Iterable[list[int]], window: int) -> Iterator[list[int]]:
    """Cuts the concatenation of `token_lists` into consecutive windows of `window` tokens; an unfilled rest is dropped."""
    rest: list[int] = []
    for tokens in token_lists:
        rest.extend(tokens)
        full = len(rest) // window * window
        for start in range(0, full, window):
            yield rest[start : start + window]
        del rest[:full]


class PackedStream:
    """Endless training windows of one source, epoch after epoch, with a state that resumes to the token.

    Every process of a distributed run reads the same stream and takes its `rank_share` of each batch, so the state is the same
    on all of them and does not depend on how many there are.
    """

    def __init__(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase):
        self.spec = spec
        self.tokenizer = tokenizer
        self._random = random.Random(spec.seed)
        self._epoch = 0
        self._read = 0  # documents taken from the source in this epoch
        self._buffer: list[list[int]] = []
        self._rest: list[int] = []
        self._documents = self._open_epoch()

    @property
    def epoch(self) -> int:
        """Passes over the source that are complete."""
        return self._epoch

    def next_batch(self, windows: int) -> torch.Tensor:
        """The next `windows` windows, int64 [windows, seq_len + 1], e.g. [8, 257]."""
        length = self.spec.seq_len + 1
        while len(self._rest) < windows * length:
            self._rest.extend(self._next_shuffled())
        batch = torch.tensor(self._rest[: windows * length], dtype=torch.int64).view(windows, length)
        del self._rest[: windows * length]
        return batch

    def state_dict(self) -> dict:
        """Plain numbers and lists: position in the source, shuffle buffer, its generator, tokens not yet handed out."""
        version, words, gauss = self._random.getstate()
        return {
            "epoch": self._epoch,
            "read": self._read,
            "buffer": [list(tokens) for tokens in self._buffer],
            "rest": list(self._rest),
            "random": [version, list(words), gauss],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state` was taken; the source is re-read up to that document."""
        self._epoch, self._read = state["epoch"], state["read"]
        self._buffer = [list(tokens) for tokens in state["buffer"]]
        self._rest = list(state["rest"])
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))
        self._documents = self._open_epoch(skip=self._read)

    def _open_epoch(self, skip: int = 0) -> Iterator[corpus.Document]:
        documents = corpus.iterate_documents(self.spec.source, held_out=False)
        if self.spec.source.startswith("package:"):  # small enough to hold: a fresh order every epoch
            documents = list(documents)
            random.Random(self.spec.seed * 1_000_003 + self._epoch).shuffle(documents)
            return iter(documents[skip:])
        for _ in range(skip):
            next(documents)
        return iter(documents)

    def _next_tokens(self) -> list[int]:
        document = next(self._documents, None)
        if document is None:
            if self._read == 0:
                raise ValueError(f"The source {self.spec.source!r} has no training documents; choose another.")
            self._epoch, self._read = self._epoch + 1, 0
            self._documents = self._open_epoch()
            return self._next_tokens()
        self._read += 1
        return document_tokens(document, self.tokenizer)

    def _next_shuffled(self) -> list[int]:
        while len(self._buffer) < self.spec.shuffle_buffer:
            self._buffer.append(self._next_tokens())
        slot = self._random.randrange(len(self._buffer))
        tokens, self._buffer[slot] = self._buffer[slot], self._next_tokens()
        return tokens


def rank_share(windows: torch.Tensor, micro_batch: int, rank: int, ranks: int) -> list[torch.Tensor]:
    """The micro-batches of one rank, out of the `windows` [n, seq_len + 1] of one step; the shares of all ranks are the step.

    Micro-batches are dealt out one by one where they come out even, so that they are the same for any number of ranks; else
    their windows are. Raises ValueError when not even the windows can be shared evenly.
    """
    micro_batches = windows.split(micro_batch)
    if len(micro_batches) % ranks == 0:
        return list(micro_batches[rank::ranks])
    check_shares(len(windows), ranks)
    return list(windows[rank::ranks].split(micro_batch))


def check_shares(windows: int, ranks: int) -> None:
    """Raises ValueError when the `windows` of a step cannot be shared evenly by `ranks`."""
    if windows % ranks:
        raise ValueError(
            f"A step of {windows} windows cannot be shared evenly by {ranks} processes; start a number of them that divides it, "
            "or change micro_batch or grad_accumulation."
        )


def held_out_windows(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The fixed held-out set, int64 [held_out_windows, seq_len + 1]: spread evenly over the held-out documents.

    Raises ValueError when the source's held-out documents do not fill that many windows.
    """
    most = 16 * spec.held_out_windows  # an endless source is not read further than this
    documents = corpus.iterate_documents(spec.source, held_out=True)
    windows = []
    for window in pack((document_tokens(document, tokenizer) for document in documents), spec.seq_len + 1):
        windows.append(window)
        if len(windows) == most:
            break
    if len(windows) < spec.held_out_windows:
        raise ValueError(
            f"The held-out documents of {spec.source!r} fill {len(windows)} windows of {spec.seq_len + 1} tokens, "
            f"{spec.held_out_windows} are asked for; lower held_out_windows or seq_len."
        )
    chosen = torch.linspace(0, len(windows) - 1, spec.held_out_windows).round().long()
    return torch.tensor(windows, dtype=torch.int64)[chosen]
