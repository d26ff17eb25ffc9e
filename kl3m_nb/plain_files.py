"""Opening files that somebody else may have put there: no link is followed to be written, and no pipe or device waited for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAXIMUM_JSON_BYTES = 2**26  # of a record; the index of the largest mixtures takes some 10 MB


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of the regular file `path`, opened or made with the `os.open` flags `flags`.

    Raises ValueError for a link, a pipe or a device, which a run folder from elsewhere may hold in place of a file of its own:
    what a link points to would be cut or written to. Raises OSError like `os.open`.
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
    """`path`, to be written anew: a link in its place is removed first, so that what it points to stays as it is."""
    if path.is_symlink():
        path.unlink()
    return path


def read_plain(path: Path, maximum_bytes: int) -> bytes:
    """The content of the regular file `path`, which a link may lead to, as in the hub's cache.

    Raises ValueError for a pipe, a device or a longer file, OSError like `open`.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(maximum_bytes + 1)
    if len(content) > maximum_bytes:
        raise ValueError(f"it is longer than {maximum_bytes / 2**20:.0f} MiB")
    return content


def _refusal(path: Path) -> str:
    what = "a link" if path.is_symlink() else "a pipe or a device"
    return f"{path} is {what}, and only a file of its own is written to; put the file itself there, or remove it."
