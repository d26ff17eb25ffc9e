"""Documents as tokens: the held-out ones in use, and training documents without end, pass after
pass, shuffled, resumable.

Rows that cannot be used are counted, said and left out of both alike. With several parts, the one
whose tokens are furthest below its share gives the next document: shares of tokens are exact to
within a document, and nothing is left to chance. The shuffle buffer is ours because a library's
loses examples on resume: it and its generator are part of the state. The state shares its arrays
with the stream, so one can be taken for every batch.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kl3m_nb.data import corpus
from kl3m_nb.data.near_duplicates import ShingleIndex
from kl3m_nb.data.readers import ListReader, open_rows
from kl3m_nb.data.sources import Document, Part, SourceReport, parse_source
from kl3m_nb.data.tokenizer import read_tokenizer
from kl3m_nb.profiles import DataSpec

log = logging.getLogger(__name__)


_BAD_DOCUMENTS_IN_A_ROW = 100


_SECONDS_OF_SILENCE = 10.0


class DocumentTokenizer:
    """Turns the documents of one part into token ids of the run's tokenizer."""

    def __init__(self, part: Part, tokenizer: PreTrainedTokenizerBase):
        """Raises ValueError when the tokenizer that the part's rows were made with cannot be
        loaded.
        """
        self._tokenizer = tokenizer
        self._size = len(tokenizer)
        self._stored = read_tokenizer(part.options.tokenizer) if part.options.tokenizer else None

    def __call__(self, document: Document) -> np.ndarray:
        """Token ids of one document, int32 [length], nothing added: those it stores, else those of
        its text.

        Raises ValueError when it stores ids that the tokenizer does not have.
        """
        tokens, text = document.tokens, document.text
        if tokens.size and self._stored:
            tokens, text = (), self._stored.decode(tokens)
        if not len(tokens):
            return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
        if tokens.max() >= self._size:
            raise ValueError(
                f"{document.identifier} holds the token {tokens.max()}, the tokenizer ends at"
                f" {self._size - 1}; use the tokenizer the rows were made with, or name it behind"
                " the source, (tokenizer=NAME), to have them tokenized anew"
            )
        return tokens.astype(np.int32)  # a copy of its own: what was read belongs to a larger array


def tokenized(
    documents: Iterable[Document],
    tokenize: DocumentTokenizer,
    min_tokens: int,
    report: SourceReport,
) -> Iterator[tuple[Document, np.ndarray]]:
    """Each of `documents` that can be used, with its tokens, int32 [length]; the others are counted
    in `report`.

    Raises ValueError after too many unusable ones in a row: they are the wrong data, not an
    accident.
    """
    bad_in_a_row = 0
    for document in documents:
        try:
            tokens = tokenize(document)
        except ValueError as error:
            bad_in_a_row += 1
            if bad_in_a_row == _BAD_DOCUMENTS_IN_A_ROW:
                raise
            report.note("bad_rows", str(error))
            continue
        bad_in_a_row = 0
        if tokens.size < min_tokens:
            report.note("too_short")
            continue
        yield document, tokens


def preview_tokenized(
    source: str, tokenizer: PreTrainedTokenizerBase, held_out: bool, most: int = 500
) -> Iterator[tuple[Document, np.ndarray]]:
    """The documents of `corpus.preview` that can be used, each with its tokens in the run's
    `tokenizer`.
    """
    for part in parse_source(source):
        documents = corpus.preview_part(part, held_out, most)
        yield from tokenized(
            documents, DocumentTokenizer(part, tokenizer), part.options.min_tokens, SourceReport()
        )


def token_ids(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a document's text, nothing added: those it stores where they are this
    tokenizer's, else those of its text.

    Stored ids are a tokenizer's own when it decodes them to the text. Raises ValueError for a
    document without text.
    """
    stored = list(document.tokens)
    if stored and max(stored) < len(tokenizer) and tokenizer.decode(stored) == document.text:
        return stored
    ids = tokenizer.encode(document.text, add_special_tokens=False)
    if not ids:
        raise ValueError(
            f"The document {document.identifier!r} has no text; leave it out, or take it from"
            " unseen_documents."
        )
    return ids


def held_out_documents(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[Document, np.ndarray], ...]:
    """The held-out documents in use, each with its tokens: all of a package, of other parts what
    fills twice the windows.

    Read once for a run, when its held-out windows are made: its stream leaves out the same
    documents, and what is like them.
    """
    return _first_held_out(spec.source, 2 * spec.held_out_windows * (spec.seq_len + 1), tokenizer)


def forget_held_out() -> None:
    """Has the held-out documents read anew when they are asked for next: the files may have
    changed.
    """
    _first_held_out.cache_clear()


@lru_cache(maxsize=1)
def _first_held_out(
    source: str, most_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[Document, np.ndarray], ...]:
    parts = parse_source(source)
    wanted_tokens = most_tokens / sum(part.weight for part in parts)
    found = []
    for part in parts:
        room = wanted_tokens * part.weight
        documents = corpus.part_documents(part, held_out=True)
        usable = tokenized(
            documents, DocumentTokenizer(part, tokenizer), part.options.min_tokens, SourceReport()
        )
        for document, tokens in usable:
            found.append((document, tokens))
            room -= tokens.size + 1
            if room <= 0 and part.kind != "package":
                break
    return tuple(found)


def unseen_documents(runs: Sequence[tuple[DataSpec, PreTrainedTokenizerBase]]) -> list[Document]:
    """The documents that none of several runs of one source can have been trained on the like of,
    with their text.

    `runs` has the data and the tokenizer of each. A run leaves out what is like the held-out
    documents it uses itself; of an endless source there are others, which it does not look at, so
    only those that all of the runs use are given. A text that is stored as tokens is decoded; the
    document keeps the tokens of the first run's tokenizer. Raises ValueError when there are none.
    """
    forget_held_out()
    first, *others = [_texts(spec, tokenizer) for spec, tokenizer in runs]
    texts = [{document.text for document in documents} for documents in others]
    unseen = [document for document in first if all(document.text in known for known in texts)]
    if not unseen:
        corpus.check_identifiers(runs[0][0].source)
        raise ValueError(
            f"The source {runs[0][0].source!r} has no held-out document that all of the runs use;"
            " give it more documents, about one in ten of which is held out."
        )
    return unseen


def _texts(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    return [
        (
            document
            if document.text
            else dataclasses.replace(document, text=tokenizer.decode(tokens), tokens=tokens)
        )
        for document, tokens in held_out_documents(spec, tokenizer)
    ]


class DocumentStream:
    """The tokens of one training document after another. `report` counts what was read and what was
    left out.
    """

    def __init__(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase):
        """Raises ValueError or FileNotFoundError when the source is malformed or missing."""
        self.spec, self.tokenizer = spec, tokenizer
        self.report = SourceReport()
        self._random = random.Random(spec.seed)
        self._buffer: list[np.ndarray] = []
        self._parts = [_Passes(part, self) for part in parse_source(spec.source)]

    @property
    def epoch(self) -> int:
        """Passes over the source that are complete; of a mixture, over the part that is furthest
        behind.
        """
        return min(part.epoch for part in self._parts)

    @cached_property
    def held_out_index(self) -> ShingleIndex:
        """The shingles of the held-out documents in use; read when the first row comes that could
        be like one of them.
        """
        return ShingleIndex(
            [
                corpus.shingles_of(document)
                for document, _ in held_out_documents(self.spec, self.tokenizer)
            ]
        )

    def next(self) -> np.ndarray:
        """Token ids of the next document, int32 [length], without anything added."""
        if len(self._buffer) < self.spec.shuffle_buffer:
            self._fill_buffer()
        slot = self._random.randrange(len(self._buffer))
        tokens, self._buffer[slot] = self._buffer[slot], self._read()
        return tokens

    def state_dict(self) -> dict:
        """Everything needed to continue: numbers, names and int32 tensors that share their memory
        with the stream.
        """
        return {
            "parts": [part.state_dict() for part in self._parts],
            "buffer": [torch.from_numpy(tokens) for tokens in self._buffer],
            "random": self._random.getstate(),
            "report": self.report.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state` was taken. Raises ValueError when it belongs to a source of other
        parts.
        """
        if len(state["parts"]) != len(self._parts):
            raise ValueError(
                f"The saved stream has {len(state['parts'])} parts, the source {self.spec.source!r}"
                f" has {len(self._parts)}; resume with the source the run was started with."
            )
        self.report.load_state_dict(state["report"])
        for part, part_state in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(part_state)
        self._buffer = [tokens.numpy() for tokens in state["buffer"]]
        self._random.setstate(state["random"])

    def close(self) -> None:
        """Closes the files that are open."""
        for part in self._parts:
            part.close()

    def _fill_buffer(self) -> None:
        size, said = self.spec.shuffle_buffer, time.monotonic()
        while len(self._buffer) < size:
            self._buffer.append(self._read())
            if time.monotonic() - said > _SECONDS_OF_SILENCE:
                said = time.monotonic()
                log.warning(
                    "The shuffle buffer holds %d of %d documents; the first step waits for it.",
                    len(self._buffer),
                    size,
                )

    def _read(self) -> np.ndarray:
        return min(self._parts, key=lambda passes: passes.tokens / passes.part.weight).next()


class _Passes:
    """One part of the source, pass after pass, training documents only."""

    def __init__(self, part: Part, stream: DocumentStream):
        self.part, self._stream = part, stream
        self._tokenize = DocumentTokenizer(part, stream.tokenizer)
        self.epoch = 0
        self.tokens = 0  # given over all passes: what decides whose turn it is
        self._given = 0  # documents given in this pass
        self._open(None)

    def next(self) -> np.ndarray:
        """Token ids of the next document. Raises ValueError when a whole pass has none."""
        while (found := next(self._documents, None)) is None:
            if not self._given:
                report = self._stream.report
                corpus.check_identifiers(str(self.part))
                raise ValueError(
                    f"The source {str(self.part)!r} has no training documents ({report.rows} rows"
                    f" read, {report.bad_rows} bad, {report.above_score} above the score,"
                    f" {report.other_mime_type} of other mime types, {report.too_short} below"
                    f" min_tokens, {report.held_out} held out, {report.near_held_out} like a"
                    " held-out one); choose another or wider options."
                )
            self.epoch, self._given = self.epoch + 1, 0
            self._open(None)
        _, tokens = found
        self._given += 1
        self.tokens += tokens.size + 1
        return tokens

    def _training_documents(self) -> Iterator[Document]:
        report = self._stream.report
        for document in self._reader:
            if self.part.kind != "package":  # whose documents are those of training already
                if corpus.is_held_out(document):
                    report.note("held_out")
                    continue
                if (
                    self._stream.held_out_index.likeness(corpus.shingles_of(document))
                    > corpus.MOST_SHARED
                ):
                    report.note("near_held_out")
                    continue
            yield document

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "tokens": self.tokens,
            "given": self._given,
            "position": self._reader.position,
        }

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.tokens, self._given = state["epoch"], state["tokens"], state["given"]
        self._open(state["position"])

    def close(self) -> None:
        self._documents.close()

    def _open(self, position: dict | None) -> None:
        if self.part.kind == "package":  # small enough to hold: a fresh order every pass
            documents = list(corpus.part_documents(self.part, held_out=False))
            random.Random(self._stream.spec.seed * 1_000_003 + self.epoch).shuffle(documents)
            self._reader = ListReader(documents, self._stream.report)
        else:
            self._reader = open_rows(self.part, self._stream.report)
        if position is not None:
            self._reader.position = position
        self._documents: Generator[tuple[Document, np.ndarray], None, None] = tokenized(
            self._training_documents(),
            self._tokenize,
            self.part.options.min_tokens,
            self._stream.report,
        )
