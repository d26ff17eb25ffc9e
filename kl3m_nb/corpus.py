"""Documents: where text comes from, and which of it is held out.

A source is named in one line: `package:licensedcode-data` (real licence texts in a PyPI package, no network needed),
`files:GLOB` (parquet or jsonl) or `hub:OWNER/NAME` (streamed through `datasets`). All give the same `Document`. Rows that
carry `tokens` keep them; rows with `text` are tokenized later. Licence texts copy from each other, so whole families are held
out, and of these only the texts that share little with the training texts: a held-out loss over single documents would leak.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from kl3m_nb import paths

HELD_OUT_SHARE = 10  # one family in ten
_SPLIT_SALT = "a"  # keeps the large families (GNU, BSD, Creative Commons) on the training side
_BLOCK_WORDS = 8  # texts are compared by their runs of eight words
_MOST_SHARED = 0.3  # share of its blocks that a held-out licence may have in common with the training texts
_PACKAGE = "licensedcode-data"
_FRONT_MATTER = re.compile(r"---\n(.*?\n)---\s*(.*)", re.DOTALL)
_OPEN_CATEGORIES = frozenset(("Permissive", "Copyleft", "Copyleft Limited", "Public Domain"))
_GNU_FAMILY = frozenset("gpl lgpl agpl gfdl gcc fsf autoconf bison classpath libtool linking".split())


@dataclass(frozen=True)
class Document:
    """One record in the family's schema; `tokens` is empty when the source stores text."""

    identifier: str
    dataset: str
    text: str
    tokens: tuple[int, ...] = ()


def family(document: Document) -> str:
    """Documents of one family never stand on both sides of the held-out split; for licences, the name's first part."""
    stem = document.identifier.split("-")[0].split("_")[0]
    return "gnu" if stem in _GNU_FAMILY else stem


def is_held_out(document: Document) -> bool:
    """True for about one family in ten, decided by a hash of its name: the same on every machine and in every order."""
    return int.from_bytes(hashlib.sha256((_SPLIT_SALT + family(document)).encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def check_source(source: str) -> None:
    """Raises ValueError with one sentence when `source` is not of a known form."""
    kind, _, rest = source.partition(":")
    if kind not in ("package", "files", "hub") or not rest:
        raise ValueError(f"The source {source!r} is not known; use package:{_PACKAGE}, files:GLOB or hub:OWNER/NAME.")
    if kind == "package" and rest != _PACKAGE:
        raise ValueError(f"The package {rest!r} is not a known corpus; the embedded one is package:{_PACKAGE}.")


def iterate_documents(source: str, held_out: bool) -> Iterator[Document]:
    """One pass over the training documents of `source`, or over its held-out ones, in the source's own order.

    Raises ValueError when the source is malformed, FileNotFoundError when no file matches.
    """
    check_source(source)
    kind, _, rest = source.partition(":")
    if kind == "package":
        return iter(_package_split()[held_out])
    return (document for document in _streamed_documents(kind, rest) if is_held_out(document) == held_out)


def word_blocks(text: str) -> set[int]:
    """A hash of every run of eight words in `text`, whatever the case, punctuation and white space; equal within a process."""
    words = re.findall(r"\w+", text.casefold())
    return {hash(tuple(words[start : start + _BLOCK_WORDS])) for start in range(len(words) - _BLOCK_WORDS + 1)}


def preview(source: str, held_out: bool, most: int = 5000) -> list[Document]:
    """Up to `most` documents to look at: all of a package, the beginning of an endless source."""
    return list(itertools.islice(iterate_documents(source, held_out), most))


@lru_cache(maxsize=1)
def _package_split() -> tuple[list[Document], list[Document]]:
    """Training and held-out licences. A held-out text too much like the training texts is in neither."""
    documents = _package_documents()
    training = [document for document in documents if not is_held_out(document)]
    known = set().union(*(word_blocks(document.text) for document in training))
    held_out = []
    for document in filter(is_held_out, documents):
        blocks = word_blocks(document.text)
        if blocks and len(blocks & known) <= _MOST_SHARED * len(blocks):
            held_out.append(document)
    return training, held_out


def _package_documents() -> list[Document]:
    """The English texts of open licences in licensedcode-data, deduplicated, in the order of their keys."""
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"The corpus package {_PACKAGE} is not installed; run `pip install -e .` in the project.") from None
    folder = Path(str(distribution.locate_file("licensedcode/data/licenses")))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    documents, seen = [], set()
    for path in sorted(folder.glob("*.LICENSE")):
        front_matter, text = _FRONT_MATTER.match(path.read_text(encoding="utf-8")).groups()
        facts = yaml.load(front_matter, Loader=loader)
        fingerprint = re.sub(r"\W+", " ", text.casefold()).strip()
        is_english = facts.get("language", "en") == "en"
        if not is_english or facts["category"] not in _OPEN_CATEGORIES or not fingerprint or fingerprint in seen:
            continue
        seen.add(fingerprint)
        documents.append(Document(facts["key"], facts["category"], text.strip() + "\n"))
    if not documents:
        raise ValueError(f"The corpus package {_PACKAGE} holds no licence texts in {folder}; install it again.")
    return documents


def _streamed_documents(kind: str, name: str) -> Iterator[Document]:
    import datasets

    if kind == "hub":
        rows = datasets.load_dataset(name, split="train", streaming=True)
    else:
        files = sorted(glob.glob(str(paths.resolve(name)), recursive=True))
        if not files:
            raise FileNotFoundError(f"No file matches {name!r} below {paths.project_root()}; check the glob.")
        files = [file for file in files if Path(file).stat().st_size]
        if not files:
            raise ValueError(f"Every file that matches {name!r} is empty; name files with rows.")
        builder = "parquet" if files[0].endswith(".parquet") else "json"
        rows = datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
    for number, row in enumerate(rows):
        if "tokens" not in row and "text" not in row:
            raise ValueError(f"The rows of {name} have the columns {', '.join(row)}; a column `tokens` or `text` is needed.")
        yield Document(
            identifier=str(row.get("identifier") or f"{name}#{number}"),
            dataset=str(row.get("dataset") or name),
            text=row.get("text") or "",
            tokens=tuple(row.get("tokens") or ()),
        )
