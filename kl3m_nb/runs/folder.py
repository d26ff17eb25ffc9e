"""The folder of a run: run.json says what is trained there, run.lock who is training, `save-now`
asks for a checkpoint.

The lock is the operating system's (flock): it ends with the process that holds it, however that
ends. What a killed process leaves behind is only the file with its name in it, which the next one
takes over. No clock is asked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import time
import uuid
import warnings
from pathlib import Path

from kl3m_nb import profiles
from kl3m_nb.common import distributed, paths
from kl3m_nb.common.files import json_object, open_plain, replace_text
from kl3m_nb.common.paths import RUN_FILE
from kl3m_nb.data.files import may_go_on_with
from kl3m_nb.model.folder import STACK_IDENTITY, STATE_FOLDER, read_stack
from kl3m_nb.profiles import REMOVED, Profile
from kl3m_nb.runs.metrics import FILE_NAME

LOCK_FILE, SAVE_REQUEST = "run.lock", "save-now"


MICRO_BATCHES = (
    "micro_batch",
    "grad_accumulation",
)  # how a step goes through the model; their product is the step itself


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunIsBusy(ValueError):
    """Another process is training in the run folder."""


class RunLock:
    """Held by the one process that may write to a run folder. Not reentrant: a second lock in the
    same process is refused too.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir / LOCK_FILE
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_) -> None:
        if self._descriptor is not None:
            if _is_same_file(self._descriptor, self.path):
                self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def held(self) -> bool:
        """True from `acquire` to the end of the with block."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Makes the folder if need be and takes the lock, or raises RunIsBusy naming the process
        that has it.

        Warns when a killed process had it before. Raises ValueError for a folder that cannot be
        written to, and for a lock file that is a link, a pipe or a device.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, holder = self._take()
        except OSError as error:
            raise ValueError(
                f"{self.path.parent} cannot be written to ({error.strerror}); choose another run"
                " folder."
            ) from error
        if holder:
            warnings.warn(
                f"{holder} trained in {self.path.parent} and was killed; its lock is taken over.",
                stacklevel=2,
            )
        self._descriptor = descriptor

    def keep(self) -> None:
        """To be called before anything is written: takes the lock again where somebody has removed
        its file.

        Raises RunIsBusy when another process was there first. Does nothing where no lock is held,
        and none can be seen.
        """
        if self._descriptor is None or _is_same_file(self._descriptor, self.path):
            return
        try:
            descriptor, _ = self._take()
        except (
            OSError
        ):  # the file system does not say just now; what cannot be written is a failed checkpoint
            return
        warnings.warn(
            f"{self.path} was removed while this process held it; it is made anew.", stacklevel=2
        )
        os.close(self._descriptor)
        self._descriptor = descriptor

    def _take(self) -> tuple[int, str]:
        """A descriptor that holds the lock of the file at the path, and who had it before. Raises
        RunIsBusy and OSError.
        """
        while True:
            descriptor = open_plain(self.path, os.O_RDWR | os.O_CREAT)
            holder = os.read(descriptor, 4096).decode(errors="replace").strip()
            try:
                lock_exclusively(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                raise RunIsBusy(_busy(self.path.parent, holder)) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    error.filename = str(self.path)
                    raise
                warnings.warn(
                    f"The file system of {self.path} has no locks; see to it that one process"
                    " trains there.",
                    stacklevel=2,
                )
            if _is_same_file(descriptor, self.path):
                break
            os.close(descriptor)  # its holder has just ended and removed it
        with contextlib.suppress(
            OSError
        ):  # a full disk has no room for the name; the lock is there
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return descriptor, holder


def request_checkpoint(run_dir: str | Path) -> None:
    """Asks whoever trains in `run_dir` to save a checkpoint after the present step; `touch
    runs/NAME/save-now` does the same.
    """
    folder = paths.resolve(run_dir)
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder} is no run folder, it holds no {RUN_FILE}; name another run.")
    os.close(open_plain(folder / SAVE_REQUEST, os.O_WRONLY | os.O_CREAT))


def take_save_request(run_dir: Path) -> bool:
    """True when a checkpoint was asked for since the last call; not while the file system does not
    say.
    """
    try:
        (run_dir / SAVE_REQUEST).unlink()
    except OSError:
        return False
    return True


def read_run_profile(run_dir: str | Path) -> Profile:
    """The profile a run folder was trained with. Raises ValueError when it is no run folder, or one
    of another version.
    """
    return profiles.profile_from_dict(_record(run_dir)["profile"])


def read_run_init(run_dir: str | Path) -> str | None:
    """What a run was started from: a checkpoint's path or hub id; None for random weights."""
    init = _record(run_dir)["init"]
    return None if init == init_name(None) else init


def read_run_runtime(run_dir: str | Path) -> str:
    """What the run was last carried out on, in words."""
    return _record(run_dir)["runtime"]


def run_identity(run_dir: Path) -> str | None:
    """The random name that run.json and the run's checkpoints share; None before the
    run has begun.
    """
    return _record(run_dir)["identity"] if (run_dir / RUN_FILE).is_file() else None


def init_name(init: str | Path | None) -> str:
    """How run.json names what a run was started from."""
    if init is None:
        return "random weights"
    path = paths.resolve(init)
    return (
        str(path.relative_to(paths.project_root()))
        if path.is_relative_to(paths.project_root())
        else str(init)
    )


def has_checkpoints(run_dir: Path) -> bool:
    """Whether anything is there that was a checkpoint of the run, whole, damaged or set aside."""
    return any((Path(run_dir) / "checkpoints").glob("step-*"))


def check_run_folder(run_dir: Path, profile: Profile, init: str | Path | None) -> None:
    """Raises ValueError when `run_dir` belongs to a run with other settings; how it is carried out
    may differ, and so may the files that are left out of its source: a damaged one does not end it.

    The windows of a step may go through the model in other micro-batches, so that a run can move to
    a smaller GPU. A run that ended before it began, for instance because its source was not found,
    may be begun with others.
    """
    begun = any((run_dir / name).exists() for name in (FILE_NAME, "checkpoints", LOCK_FILE))
    if not (run_dir / RUN_FILE).is_file():
        if has_checkpoints(run_dir):
            raise ValueError(
                f"{run_dir} holds checkpoints and no {RUN_FILE} that says of which run;"
                f" {_remedy(run_dir)}."
            )
        return
    if not begun:
        return
    record = _record(run_dir)
    was, now = _settings(record["profile"]), _settings(profile.to_dict())
    for key, value in now.items():
        if remark := REMOVED.get((key, was[key])):
            raise ValueError(
                f"The run of {run_dir} cannot be continued: {remark}, and use another run folder."
            )
        remedy = (
            "use the same source, from which files may be left out, or"
            if key == "source"
            else "use the same settings or"
        )
        if was[key] != value and not (key == "source" and may_go_on_with(was[key], value)):
            raise ValueError(
                f"The run folder {run_dir} belongs to the profile {was['name']} with {key} ="
                f" {was[key]!r}, now it is {value!r}; {remedy} another run folder."
            )
    if record["init"] != init_name(init):
        raise ValueError(
            f"The run folder {run_dir} was started from {record['init']}, now from"
            f" {init_name(init)}; use another run folder."
        )
    for key, value in _stack_facts(init).items():
        if record["stack"].get(key, value) != value:
            raise ValueError(
                f"The run folder {run_dir} was started from another stack than {record['init']} is"
                f" now: its {key} was {record['stack'][key]!r} and is {value!r}; use another run"
                " folder."
            )


def _settings(profile: dict) -> dict[str, object]:
    """What a profile, as `to_dict` gives it, sets by name and has to stay: no `runtime`, and of the
    micro-batches the product.
    """
    sections = (
        {name: value} if not isinstance(value, dict) else value
        for name, value in profile.items()
        if name != "runtime"
    )
    settings = {key: value for section in sections for key, value in section.items()}
    return settings | {
        " × ".join(MICRO_BATCHES): math.prod(settings.pop(key) for key in MICRO_BATCHES)
    }


def write_run_file(
    run_dir: Path, profile: Profile, init: str | Path | None, runtime: str, step: int | None = None
) -> str:
    """Writes run.json and returns the run's identity, which stays what it was, as do the facts of
    the stack it started from.

    With the `step` that training goes on from, run.json notes on what, and in which micro-batches,
    and a change is warned of.
    """
    before = _record(run_dir) if (run_dir / RUN_FILE).is_file() else {}
    identity = before.get("identity") or uuid.uuid4().hex
    record = {
        "profile": profile.to_dict(),
        "init": init_name(init),
        "stack": (
            _stack_facts(init) or (before["stack"] if before.get("init") == init_name(init) else {})
        ),
        "runtime": runtime,
        "identity": identity,
        "carried_out": before.get("carried_out", []),
    }
    if step is not None:
        entry = {"step": step, "runtime": runtime} | {
            key: getattr(profile.data, key) for key in MICRO_BATCHES
        }
        record["carried_out"] = _noted(record["carried_out"], entry, run_dir)
    replace_text(run_dir / RUN_FILE, json.dumps(record, indent=2) + "\n", durable=True)
    return identity


def _noted(entries: list[dict], entry: dict, run_dir: Path) -> list[dict]:
    """`entries` before the step of `entry`, and that one where it says anything new. Warns of what
    is new.
    """
    kept = [
        earlier for earlier in entries if earlier["step"] < entry["step"]
    ]  # later steps are not in the checkpoint
    if not kept:
        return [entry]
    was, now = _conditions(kept[-1]), _conditions(entry)
    if was == now:
        return kept
    new, old = (
        ", ".join(part for part in one if part not in other)
        for one, other in ((now, was), (was, now))
    )
    warnings.warn(
        f"{run_dir} goes on from step {entry['step']:,} with {new or 'nothing'} instead of"
        f" {old or 'nothing'}: it is given the same data in the same order, but rounds otherwise,"
        " so it does not end with the same bits"
        + (
            ", and a mixture's router is balanced within other micro-batches."
            if was[-1] != now[-1]
            else "."
        ),
        stacklevel=3,
    )
    return [*kept, entry]


def _conditions(entry: dict) -> list[str]:
    """What decides how sums are rounded, in words; the micro-batches last."""
    micro_batch, grad_accumulation = (entry[key] for key in MICRO_BATCHES)
    return [
        *entry["runtime"].split(" · "),
        f"{grad_accumulation} micro-batches of {micro_batch} windows",
    ]


def _is_entry(entry: object) -> bool:
    kinds = {"step": int, "runtime": str} | dict.fromkeys(MICRO_BATCHES, int)
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), kind) for key, kind in kinds.items()
    )


def _stack_facts(init: str | Path | None) -> dict:
    """What tells one stack from another that is made in its place; empty for any other start, and
    where it is gone.
    """
    try:
        record = read_stack(paths.recorded_place(init).path) if init else {}
    except ValueError:  # a run that begins refuses it; one that has begun does not need it
        return {}
    return {key: record[key] for key in STACK_IDENTITY if key in record}


def _record(run_dir: str | Path) -> dict:
    """run.json, in its profile a default for every number that an earlier version did not have.

    Raises ValueError naming the file when it holds anything else.
    """
    path = paths.resolve(run_dir) / RUN_FILE
    if not path.is_file():
        raise ValueError(
            f"{path.parent} is no run folder, it holds no {RUN_FILE}; train it first, or name"
            " another run."
        )
    try:
        record = json_object(path)
        for key in ("init", "runtime", "identity"):
            if not isinstance(record.get(key), str):
                raise ValueError(f"it has no text for {key!r}")
        if not isinstance(record.setdefault("stack", {}), dict):
            raise ValueError("its 'stack' is no mapping")
        entries = record.setdefault("carried_out", [])
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise ValueError("its 'carried_out' is no list of what the run was carried out on")
        return record | {"profile": profiles.profile_from_dict(record.get("profile")).to_dict()}
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{path} cannot be read ({reason}); {_remedy(path.parent)}.") from error


def _remedy(run_dir: Path) -> str:
    copies = {  # one of a checkpoint that was set aside may be another run's
        int(number): path
        for path in run_dir.glob(f"checkpoints/step-*/{STATE_FOLDER}/{RUN_FILE}")
        if (number := path.parts[-3].removeprefix("step-")).isdigit()
    }
    if not copies:
        return "put back the run.json that the run was begun with"
    return f"put back a copy of it, such as {copies[max(copies)]}"


def lock_exclusively(descriptor: int) -> None:
    """Locks an open file or raises BlockingIOError. Tried for half a second: whoever asks who has
    it takes it for a moment.
    """
    for _ in range(9):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _busy(run_dir: Path, holder: str) -> str:
    busy = f"The run folder {run_dir} is in use by {holder or 'another process'}"
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and not distributed.is_under_torchrun():
        return (
            f"{busy}, and srun has started {tasks} such processes; have it start torchrun, once on"
            " each machine."
        )
    return f"{busy}; wait for it, stop it, or use another folder."


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
    except OSError:  # a network file system does not say just now
        return True
