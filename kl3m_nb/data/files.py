"""The files of a source: which of them a glob or a folder names, what each is, and the sentence for
one that cannot be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from kl3m_nb.common import paths
from kl3m_nb.data.sources import Part, log, parse_source

COMPRESSIONS = {".jsonl": "", ".json": "", ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}


SUFFIXES = (".parquet", *COMPRESSIONS)


_SIGNATURES = {
    b"\x1f\x8b": ".jsonl.gz",
    b"\x28\xb5\x2f\xfd": ".jsonl.zst",
    b"PAR1": ".parquet",
}  # how such files begin


_LFS_POINTER = b"version https://git-lfs"


def matching_files(pattern: str, skip: Sequence[str] = ()) -> list[Path]:
    """The files of a glob below the project's root, sorted, each once however many links lead to
    it, without those of `skip`.

    Raises FileNotFoundError when there is none, ValueError when one is of no known format or is no
    regular file, when all are empty, and when `skip` does not fit them.
    """
    found = [path for path in _matches(str(paths.resolve(pattern))) if not path.is_dir()]
    if not found:
        raise FileNotFoundError(
            f"No file matches {str(paths.resolve(pattern))!r}; check the glob, which is taken from"
            f" the project's root {paths.project_root()} and not from the shell's"
            f" folder{_hint(pattern)}."
        )
    found = _without_skipped(found, skip)
    for path in found:
        suffix_of(path)
    files = _sound(found, pattern)
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"Every file that matches {pattern!r} is empty; name files with rows.")
    return files


def mirror_files(folder: Path, skip: Sequence[str] = ()) -> list[Path]:
    """The files of the train split in a folder laid out like a hub data set: those with `train` in
    their path, if any has.

    Raises FileNotFoundError when there is none, ValueError when one is no regular file and when
    `skip` does not fit them.
    """
    suffixes = tuple(
        suffix for suffix in SUFFIXES if suffix != ".json"
    )  # *.json beside the data is metadata
    found = [Path(path) for path in _expand(f"{glob.escape(str(folder))}/**")]
    files = sorted(path for path in found if not path.is_dir() and path.name.endswith(suffixes))
    files = [path for path in files if "train" in str(path.relative_to(folder))] or files
    if not files:
        raise FileNotFoundError(
            f"The mirror {folder} holds no parquet or jsonl file; copy the data set's files there."
        )
    return _sound(_without_skipped(files, skip), str(folder))


def may_go_on_with(begun: str, source: str) -> bool:
    """Whether a run of the source line `begun` may go on with `source`: the same but for files that
    are left out.
    """
    pairs = list(itertools.zip_longest(parse_source(begun), parse_source(source)))
    return all(None not in pair and _is_narrower(*pair) for pair in pairs)


def _is_narrower(begun: Part, part: Part) -> bool:
    """Whether `part` differs from `begun` in `skip` only, or in a glob that matches
    no other files.
    """
    if part.kind == "files" == begun.kind and part.name != begun.name:
        files, known = (set(_matches(str(paths.resolve(name)))) for name in (part.name, begun.name))
        if not files <= known:
            return False
    elif part.name != begun.name:
        return False
    alike = dataclasses.replace(begun.options, skip=part.options.skip) == part.options
    return alike and (part.kind, part.weight) == (begun.kind, begun.weight)


def names_in_source(name: str, files: Sequence[Path]) -> list[str]:
    """Each of `files` as a source line that names `name`, a glob or a folder, would write it: alike
    wherever the project lies.
    """
    segments = name.split("/")
    fixed = "/".join(
        itertools.takewhile(lambda segment: not glob.has_magic(segment), segments[:-1])
    )
    written = fixed or ("/" if name.startswith("/") else "")
    folder = paths.resolve(written)
    return [os.path.join(written, os.path.relpath(path, folder)) for path in files]


def suffix_of(path: Path) -> str:
    """The suffix that tells how a file is read. Raises ValueError when none is known."""
    suffix = "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} is of no known format; files end in {', '.join(SUFFIXES)}.")
    return suffix


def check_signature(path: Path) -> None:
    """Raises ValueError when a file begins as those of another kind than its suffix says do."""
    with open(path, "rb") as file:
        beginning = file.read(len(_LFS_POINTER))
    if beginning == _LFS_POINTER:
        raise ValueError(
            f"{path} is a pointer of Git LFS and not the data; fetch them with `git lfs pull`."
        )
    suffix = suffix_of(path)
    for signature, own_suffix in _SIGNATURES.items():
        if beginning.startswith(signature) and suffix != own_suffix:
            raise ValueError(
                f"{path} is not what {suffix} says but begins as {own_suffix} does; give it that"
                " ending."
            )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns whatever the system or Arrow raises while `path` is read into a ValueError that names
    it and says what to do.
    """
    try:
        yield
    except (OSError, EOFError, MemoryError, UnicodeError, pa.ArrowException) as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else " ".join(str(error).split())
        )
        if (
            "too much memory" in reason
        ):  # zstd's own words for a window above the 128 MiB that every decoder accepts
            raise ValueError(
                f"{path} was compressed with a longer window than is read, as `zstd --long` makes"
                f" it; compress it again without, or {skip_remedy(path)}."
            ) from error
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            raise ValueError(
                f"{path} cannot be read ({reason}); mend that, or {skip_remedy(path)}."
            ) from error
        raise ValueError(
            f"{path} is cut off, damaged or no {suffix_of(path)[1:]} file ({reason}); replace it,"
            f" or {skip_remedy(path)}."
        ) from error


def skip_remedy(path: Path) -> str:
    """What to do to go on without a file."""
    name = re.sub(r"[\[\](),|]", "?", path.name)
    return f"move it away or write (skip={name}) behind the source, and go on without its rows"


def _without_skipped(files: Sequence[Path], skip: Sequence[str]) -> list[Path]:
    """`files` but those that one of the globs `skip` names, by file name or by whole path."""
    kept = list(files)
    for pattern in skip:
        skipped = [
            path
            for path in files
            if fnmatchcase(path.name, pattern) or fnmatchcase(str(path), pattern)
        ]
        if not skipped:
            raise ValueError(
                f"skip={pattern} names no file of the source, which has {_some(files)}; correct it"
                " or leave it out."
            )
        kept = [path for path in kept if path not in skipped]
        _say_once(f"{_some(skipped)} not read: skip={pattern}")
    if not kept:
        raise ValueError(f"skip={'|'.join(skip)} leaves no file of {_some(files)}; name fewer.")
    return kept


def _matches(pattern: str) -> list[Path]:
    """What a glob matches. Brackets are letters to choose from, or, where nothing has that name,
    just brackets.
    """
    found = sorted(map(Path, {*_expand(pattern)}))
    plain = sorted(map(Path, {*_expand(pattern.replace("[", "[[]"))})) if "[" in pattern else []
    if found and plain and found != plain:
        raise ValueError(
            f"{pattern!r} matches {found[0]}, its brackets taken for letters to choose from, and"
            f" {plain[0]}, taken as they are; write ? for each bracket, or rename one."
        )
    return found or plain


def _expand(pattern: str) -> Iterator[str]:
    """The paths of a glob as `glob.glob` gives them, but `**` enters a folder once, however many
    links lead there.
    """
    segments = pattern.split("/")
    if "**" not in segments:
        yield from glob.iglob(pattern)
        return
    place = segments.index("**")
    rest = "/".join(segments[place + 1 :]) or "*"
    entered: set[str] = set()
    for top in sorted(glob.iglob("/".join(segments[:place]) or "/")):
        for folder in _folders(top, entered):
            yield from _expand(f"{glob.escape(folder).rstrip('/')}/{rest}")


def _folders(top: str, entered: set[str]) -> Iterator[str]:
    """`top` and the folders in it, those behind links last; not hidden ones, as in a glob, and none
    that is in `entered`.
    """
    real = os.path.realpath(top)
    if real in entered or not os.path.isdir(top):
        return
    entered.add(real)
    yield top
    try:
        with os.scandir(top) as entries:
            inner = sorted(
                (entry.is_symlink(), entry.path)
                for entry in entries
                if entry.is_dir() and entry.name[0] != "."
            )
    except OSError as error:
        _say_once(f"{top} cannot be looked into ({error.strerror}); what is in it is left out")
        return
    for _, folder in inner:
        yield from _folders(folder, entered)


def _sound(found: Sequence[Path], source: str) -> list[Path]:
    """`found` without what a link names a second time. Raises ValueError for what is no regular
    file.
    """
    files: dict[str, Path] = {}
    for path in found:
        if not path.is_file():
            kind = (
                "a link to a file that is not there"
                if not path.exists()
                else "a pipe, socket or device"
            )
            raise ValueError(
                f"{path} is {kind}, and only regular files are read; {skip_remedy(path)}."
            )
        if not str(path).isascii() and "\\udc" in ascii(str(path)):
            raise ValueError(f"{str(path)!a} has a name that is not UTF-8 text; rename it.")
        files.setdefault(os.path.realpath(path), path)
    if len(files) < len(found):
        _say_once(
            f"{source}: {len(found)} names lead to {len(files)} files by links; each file is read"
            " once"
        )
    return list(files.values())


@lru_cache(maxsize=1000)
def _say_once(what: str) -> None:
    """Logs what is found again at each pass, once a process."""
    log.warning("%s", what)


def _some(files: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in files[:3])
    return names if len(files) <= 3 else f"{names} and {len(files) - 3} more"


def _hint(pattern: str) -> str:
    folder = paths.resolve(pattern)
    if folder.is_dir():
        return "; this is a folder, name the files in it, such as FOLDER/*.jsonl"
    if any(path.is_dir() for path in _matches(str(folder))):
        return "; it matches folders, name the files in them, such as FOLDER/*.parquet"
    if re.search(r"\s\+\s", pattern):
        return "; a second source begins with package:, files: or hub:"
    return ""
