"""Files written whole or not at all, files that somebody else may have put there, and the JSON
records read back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

MAXIMUM_JSON_BYTES = 2**26  # of a record; the index of the largest mixtures takes some 10 MB


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of the regular file `path`, opened or made with the `os.open` flags `flags`.

    Raises ValueError for a link, a pipe or a device, which a run folder from elsewhere may hold in
    place of a file of its own: what a link points to would be cut or written to. Raises OSError
    like `os.open`.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO) and not path.is_symlink():
            raise
        raise ValueError(_refusal(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(_refusal(path))
    return descriptor


def unlinked(path: Path) -> Path:
    """`path`, to be written anew: a link in its place is removed first, so that what it points to
    stays as it is.
    """
    if path.is_symlink():
        path.unlink()
    return path


def read_plain(path: Path, maximum_bytes: int) -> bytes:
    """The content of the regular file `path`, which a link may lead to, as in the hub's cache.

    Raises ValueError for a pipe, a device or a longer file, OSError like `open`.
    """
    with open(
        path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    ) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(maximum_bytes + 1)
    if len(content) > maximum_bytes:
        raise ValueError(f"it is longer than {maximum_bytes / 2**20:.0f} MiB")
    return content


def _refusal(path: Path) -> str:
    what = "a link" if path.is_symlink() else "a pipe or a device"
    return (
        f"{path} is {what}, and only a file of its own is written to; put the file itself there, or"
        " remove it."
    )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


_OF_DISKS = (*_FULL, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOLCK)


def replace_text(path: Path, text: str, durable: bool = False) -> None:
    """Write `text` to `path` so that a reader sees the old text or the new, never half of one.
    Raises OSError.

    `durable` waits for the disk first: after a power cut too it is then one of the two, and not an
    empty file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error of the disk that comes up in the block name `path`, where it names no file: the
    system does not know any.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OF_DISKS and error.filename is None:
            error.filename = str(path)
        raise


def why(error: OSError) -> str:
    """What went wrong, in one sentence that begins with the file, where it is known, and has no
    number of the system's.
    """
    if error.errno is None:  # one of ours, or of a library: it says what it knows
        return str(error)
    remedy = "; make room there, or choose another disk" if error.errno in _FULL else ""
    file = error.filename2 or error.filename
    return f"{file}: {error.strerror}{remedy}." if file else f"{error.strerror}{remedy}."


_UNFINISHED = re.compile(r"\.writing-.*-[0-9a-f]{12}")


def json_object(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError with the reason alone when it holds none,
    OSError when it cannot be read.
    """
    content = read_plain(path, MAXIMUM_JSON_BYTES)
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def read_json(path: Path, remedy: str = "give a finished checkpoint") -> dict:
    """The object in a JSON file. Raises ValueError that names the file when it holds none."""
    try:
        return json_object(path)
    except ValueError as error:
        raise ValueError(f"{path} {str(error).removeprefix('it ')}; {remedy}.") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` when the block ends and is removed when
    the block fails.

    What a process that was killed has left beside it is removed first: whoever writes holds a lock
    on its folder, which ends with the process. The folder has the mode of any new one, where
    mkdtemp's could be read by its owner alone. Raises OSError when `folder` is there already and
    holds something.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in folder.parent.glob(".writing-*"):
        if _UNFINISHED.fullmatch(path.name) and (unowned := _locked(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(unowned)
    temporary = folder.with_name(f".writing-{folder.name}-{uuid.uuid4().hex[:12]}")
    temporary.mkdir()
    lock = _locked(temporary)
    try:
        with naming(folder):
            yield temporary
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock of `folder`; None when a process has it, or the file system
    has no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
