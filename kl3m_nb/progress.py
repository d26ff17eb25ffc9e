"""One line of progress from a kernel to the runner that started it, through a small file.

The runner names the file in `$KL3M_NB_PROGRESS`. Training code reports there without knowing whether anybody reads it: in
JupyterLab, under nbval or under plain papermill the variable is not set and a report costs one look-up.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

PROGRESS_VARIABLE = "KL3M_NB_PROGRESS"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_DISKS = (*_FULL, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOLCK)


def write_progress(text: str) -> None:
    """Report one line, such as "step 120/300  loss 4.31  9,800 tokens/s  0:42 left"; without a runner nothing happens.

    A file that cannot be written (the runner is gone, the disk is full) is no reason to stop training: the line is lost.
    """
    path = os.environ.get(PROGRESS_VARIABLE)
    if not path:
        return
    try:
        replace_text(Path(path), " ".join(text.split()))
    except OSError:
        pass


def read_progress(path: Path) -> str:
    """The last line reported to `path`; empty when there is none yet."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def replace_text(path: Path, text: str, durable: bool = False) -> None:
    """Write `text` to `path` so that a reader sees the old text or the new, never half of one. Raises OSError.

    `durable` waits for the disk first: after a power cut too it is then one of the two, and not an empty file.
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
    """Lets an error of the disk that comes up in the block name `path`, where it names no file: the system does not know any."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_DISKS and error.filename is None:
            error.filename = str(path)
        raise


def why(error: OSError) -> str:
    """What went wrong, in one sentence that begins with the file, where it is known, and has no number of the system's."""
    if error.errno is None:  # one of ours, or of a library: it says what it knows
        return str(error)
    remedy = "; make room there, or choose another disk" if error.errno in _FULL else ""
    file = error.filename2 or error.filename
    return f"{file}: {error.strerror}{remedy}." if file else f"{error.strerror}{remedy}."


def time_left(seconds: float, done: int, remaining: int) -> str:
    """What `remaining` things will take, as people read it, at the pace of those `done` (1 or more) in `seconds`.

    From the whole time of a run, evaluations, clamps and checkpoints are counted in, and one slow step is not taken for all.
    """
    return clock(seconds / done * remaining)


def clock(seconds: float) -> str:
    """A duration in seconds as people read it: "0:42", "12:05", "3:00:00", "4 d 7 h"."""
    if seconds >= 2 * 86_400:
        return f"{seconds // 86_400:.0f} d {seconds % 86_400 // 3600:.0f} h"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
