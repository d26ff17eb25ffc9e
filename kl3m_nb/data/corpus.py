"""Documents: which texts there are, and which of them are held out.

One family of documents in ten, by a hash of its name, is held out. Licence texts come in families
that copy from each other; a row of a stream is its own family. What still overlaps is told by
shingles: of the package, which can be read as a whole, held-out texts that share much with the
training texts are used nowhere; of a stream, which cannot, training documents that are too like the
held-out ones in use are left out as they come.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from kl3m_nb.data.near_duplicates import ShingleIndex, leak_rate, token_shingles, word_shingles
from kl3m_nb.data.readers import open_rows
from kl3m_nb.data.sources import PACKAGE, Document, Part, SourceReport, parse_source

HELD_OUT_SHARE = 10  # one family in ten


MOST_SHARED = (
    0.3  # share of its shingles that a held-out text may have in common with the training texts
)


_ROWS_LOOKED_AT = 500


_SPLIT_SALT = "a"  # keeps the large families (GNU, BSD, Creative Commons) on the training side


_FRONT_MATTER = re.compile(r"---\n(.*?\n)---\s*(.*)", re.DOTALL)


_OPEN_CATEGORIES = frozenset(("Permissive", "Copyleft", "Copyleft Limited", "Public Domain"))


_GNU_FAMILY = frozenset(
    "gpl lgpl agpl gfdl gcc fsf autoconf bison classpath libtool linking".split()
)


def family(document: Document) -> str:
    """Documents of one family never stand on both sides of the held-out split."""
    return document.family or document.identifier


def is_held_out(document: Document) -> bool:
    """True for about one family in ten, decided by a hash of its name: the same on every machine
    and in every order.
    """
    return (
        int.from_bytes(
            hashlib.sha256((_SPLIT_SALT + family(document)).encode()).digest()[:8], "big"
        )
        % HELD_OUT_SHARE
        == 0
    )


def part_documents(part: Part, held_out: bool) -> Iterator[Document]:
    """One pass over the training documents of one part, or over its held-out ones, in their own
    order.
    """
    if part.kind == "package":
        return iter(_package_split()[held_out])
    return (
        document
        for document in open_rows(part, SourceReport())
        if is_held_out(document) == held_out
    )


def iterate_documents(source: str, held_out: bool) -> Iterator[Document]:
    """One pass over the training documents of `source`, or over its held-out ones, part after part
    in their own order.

    Raises ValueError when the source is malformed or has no row that can be used, FileNotFoundError
    when no file matches, ConnectionError when the hub stays unreachable.
    """
    return itertools.chain.from_iterable(
        part_documents(part, held_out) for part in parse_source(source)
    )


def check_source(source: str) -> None:
    """Raises ValueError or FileNotFoundError when `source` is malformed, or files that it names are
    not there; reads none.
    """
    for part in parse_source(source):
        if part.kind != "package":
            open_rows(part, SourceReport())


def preview_part(part: Part, held_out: bool, most: int = 500) -> Iterator[Document]:
    """Documents of one part to look at: all of a package, of another the first `most`."""
    return itertools.islice(
        part_documents(part, held_out), None if part.kind == "package" else most
    )


def preview(source: str, held_out: bool, most: int = 500) -> list[Document]:
    """Documents of every part of `source` to look at, as they are stored."""
    return [
        document for part in parse_source(source) for document in preview_part(part, held_out, most)
    ]


def check_identifiers(source: str) -> None:
    """Raises ValueError when the rows of a part of `source` share so few identifiers that they
    cannot be split by them.

    For sources that have turned out to have no held-out or no training documents: the first rows
    are looked at.
    """
    for part in parse_source(source):
        if part.kind != "package":
            names = [
                document.identifier
                for document in itertools.islice(open_rows(part, SourceReport()), _ROWS_LOOKED_AT)
            ]
            if len(names) > len(set(names)) < HELD_OUT_SHARE:
                raise ValueError(
                    f"The first {len(names)} rows of {part} have only {len(set(names))}"
                    f" identifier(s), such as {names[0]!r:.60}, and rows of one identifier are held"
                    " out together; give each document its own, or leave the column out."
                )


def shingles_of(document: Document) -> np.ndarray:
    """uint64 [shingles]: of twelve token ids when the document stores tokens, else of
    eight words.
    """
    return token_shingles(document.tokens) if document.tokens.size else word_shingles(document.text)


def measure_leak(source: str, most: int = 500) -> float:
    """Share of the held-out shingles that stand in training documents, over the documents of
    `preview`.

    Of a package this is all of it; of an endless source its beginning, before a stream leaves out
    what is too alike.
    """
    held_out, training = (map(shingles_of, preview(source, side, most)) for side in (True, False))
    return leak_rate(held_out, training)


@lru_cache(maxsize=1)
def _package_split() -> tuple[list[Document], list[Document]]:
    """Training and held-out licences. A held-out text too much like the training texts is in
    neither.
    """
    documents = _package_documents()
    training = [document for document in documents if not is_held_out(document)]
    candidates = [document for document in documents if is_held_out(document)]
    index = ShingleIndex([shingles_of(document) for document in candidates])
    for document in training:
        index.mark(shingles_of(document))
    kept = (index.sizes > 0) & (index.marked_shares() <= MOST_SHARED)
    return training, list(itertools.compress(candidates, kept))


def _package_documents() -> list[Document]:
    """The English texts of open licences in licensedcode-data, deduplicated, in the order of their
    keys.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"The corpus package {PACKAGE} is not installed; run `pip install -e .` in the project."
        ) from None
    folder = Path(str(distribution.locate_file("licensedcode/data/licenses")))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    documents, seen = [], set()
    for path in sorted(folder.glob("*.LICENSE")):
        front_matter, text = _FRONT_MATTER.match(path.read_text(encoding="utf-8")).groups()
        facts = yaml.load(front_matter, Loader=loader)
        fingerprint = re.sub(r"\W+", " ", text.casefold()).strip()
        is_english = facts.get("language", "en") == "en"
        if (
            not is_english
            or facts["category"] not in _OPEN_CATEGORIES
            or not fingerprint
            or fingerprint in seen
        ):
            continue
        seen.add(fingerprint)
        stem = facts["key"].split("-")[0].split("_")[0]
        kin = "gnu" if stem in _GNU_FAMILY else stem
        documents.append(Document(facts["key"], facts["category"], text.strip() + "\n", family=kin))
    if not documents:
        raise ValueError(
            f"The corpus package {PACKAGE} holds no licence texts in {folder}; install it again."
        )
    return documents
