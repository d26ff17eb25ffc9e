"""Checkpoints: ordinary Hugging Face folders plus `training_state/`, written so that a half-written
one is never found.

A checkpoint is built under a temporary name, synced, and renamed; its manifest names the run, and
every file with its size and SHA-256. Nothing in it can run code: weights are safetensors, the state
is read with `weights_only=True`. Training waits only for a `Snapshot` in host memory;
`BackgroundWriter` puts it on the disk meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.common import distributed
from kl3m_nb.common.files import json_object, sha256, why
from kl3m_nb.data.tokenizer import save_tokenizer
from kl3m_nb.model.folder import STATE_FOLDER, TRAINED_STEPS, read_stack
from kl3m_nb.model.older_readers import rewrite_for_older
from kl3m_nb.runs.folder import RUN_FILE
from kl3m_nb.runs.metrics import FILE_NAME

_NAME = re.compile(r"step-(\d{6,})")


_STATE = Path(STATE_FOLDER) / "state.pt"


MANIFEST = Path(STATE_FOLDER) / "manifest.json"


_TEMPORARY = re.compile(r"\.(saving|removing)-step-\d+-(\w+)")


_OWN = uuid.uuid4().hex[
    :12
]  # in the temporary names of this process; its number may have been another's before


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written. Those before it are as they were."""


@dataclass(frozen=True)
class Snapshot:
    """A copy in host memory of all that a checkpoint holds; what training does meanwhile does not
    reach it.

    `bytes`: what its tensors take in memory, and about as much on the disk.
    """

    step: int
    weights: dict[str, Tensor]
    state: dict
    bytes: int


def take_snapshot(step: int, model: torch.nn.Module, state: dict) -> Snapshot | None:
    """Copies the weights of `model` and `state` (numbers, strings, tensors, dicts, lists of one
    kind) to host memory.

    In a distributed run all ranks call it, because shards are gathered; only rank 0 keeps a copy,
    the others get None.
    """
    copied: dict[tuple, Tensor] = {}  # tied weights share memory in the copy too
    weights, state = _host_copy(dict(model.state_dict()), copied), _host_copy(state, copied)
    if not distributed.world().is_first:
        return None
    return Snapshot(step, weights, state, sum(tensor.nbytes for tensor in copied.values()))


def write_checkpoint(
    run_dir: Path,
    snapshot: Snapshot,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    identity: str,
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Writes `snapshot` to `run_dir/checkpoints/step-NNNNNN` and returns the folder. Weights are
    stored as float32.

    `model` gives its configuration only; `card` becomes the README.md. `identity` names the run,
    whose run.json is copied for the case that it gets lost. The `keep` newest checkpoints stay, and
    those whose step is a multiple of `keep_every` (0: no others). Raises CheckpointFailed when the
    disk is full or the folder read-only; earlier checkpoints are untouched then.
    """
    folder = Path(run_dir) / "checkpoints"
    name = f"step-{snapshot.step:06d}"
    target, temporary = folder / name, folder / f".saving-{name}-{_OWN}"
    try:
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < snapshot.bytes:
            raise OSError(f"it needs {_gigabytes(snapshot.bytes)} and {_gigabytes(free)} are free")
        _write_files(
            temporary, snapshot, model, tokenizer, card, identity, Path(run_dir) / RUN_FILE
        )
        if (
            metrics := Path(run_dir) / FILE_NAME
        ).is_file():  # the checkpoint counts on what was logged up to here
            _sync(metrics)
        if target.exists():
            _remove(target)
        os.rename(temporary, target)
        _sync(folder)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors have errors of their own for a full disk
        reason = why(error).rstrip(".") if isinstance(error, OSError) else error
        raise CheckpointFailed(
            f"The checkpoint {target} could not be written: {reason}."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in whole_checkpoints(run_dir)[:-keep]:
        if not keep_every or checkpoint_step(old) % keep_every:
            try:
                _remove(old)
            except OSError as error:
                warnings.warn(
                    f"The checkpoint {old} is no longer needed and could not be removed:"
                    f" {why(error)}",
                    stacklevel=2,
                )
    return target


class BackgroundWriter:
    """One checkpoint at a time, written by a thread."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pool.submit(
            int
        ).result()  # begins the thread: the system may have none left when a run is to be saved
        self._job: Future[Path] | None = None

    def start(self, write: Callable[..., Path], *arguments) -> None:
        """Calls `write(*arguments)` in the thread. The one before has to be collected first."""
        if self._job is not None:
            raise RuntimeError(
                "A checkpoint is still being written; collect it before the next is started."
            )
        self._job = self._pool.submit(write, *arguments)

    def collect(self, waiting: bool) -> Path | None:
        """The checkpoint that was written since the last call, or None. Raises CheckpointFailed
        when writing failed.
        """
        if self._job is None or not (waiting or self._job.done()):
            return None
        wait([self._job])
        job, self._job = self._job, None
        return job.result()

    def close(self) -> None:
        """Waits for what is being written."""
        self._pool.shutdown()


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; anything cut off or foreign is passed over.
    Contents are not read.
    """
    return [path for path in _candidates(run_dir) if _has_all_files(path)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; None when it has none. Contents are not read."""
    checkpoints = whole_checkpoints(run_dir)
    return checkpoints[-1] if checkpoints else None


def require_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint whose every byte is as it was written. A damaged one is passed over
    with a warning that names it.

    Raises ValueError that says what to run when there is none, OSError like `flaw_of`.
    """
    checkpoint, flaws = newest_sound_checkpoint(run_dir)
    for flaw in flaws.values():
        warnings.warn(f"{flaw}; it is passed over.", stacklevel=2)
    if checkpoint is None:
        raise ValueError(
            f"The run {run_dir} has no whole checkpoint; train it first (notebooks 00 and 02), or"
            " name another run."
        )
    return checkpoint


def newest_sound_checkpoint(
    run_dir: Path, identity: str | None = None
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint without a flaw, and the flaws of those that are newer. None when none
    is sound.

    Raises OSError like `flaw_of`: going on from an older one would train again what is saved.
    """
    flaws = {}
    for path in reversed(_candidates(run_dir)):
        flaw = flaw_of(path, identity)
        if flaw is None:
            return path, flaws
        flaws[path] = flaw
    return None, flaws


def flaw_of(checkpoint: Path, identity: str | None = None) -> str | None:
    """What keeps `checkpoint` from being loaded, in one sentence; None when each file is as it was
    written.

    `identity`: the run it has to belong to. Raises OSError when a file is there and cannot be read:
    the disk, the network or permissions may be at fault, and the checkpoint sound.
    """
    try:
        manifest = json_object(checkpoint / MANIFEST)
        files, run = manifest["files"], manifest["run"]
        for name, entry in files.items():
            if flaw := _flaw_of_file(checkpoint / name, entry):
                return flaw
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint} is no whole checkpoint: it has no readable {MANIFEST}"
    except OSError as error:
        raise OSError(
            f"{error.filename or checkpoint} could not be read ({error.strerror or error}), which"
            " need not mean damage; see to its disk or permissions and try again, or move"
            f" {checkpoint} away to go on without it."
        ) from error
    return f"{checkpoint} belongs to another run" if identity not in (None, run) else None


def _flaw_of_file(path: Path, entry: dict) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    if not path.is_file():
        return f"{path} is no regular file"
    if size != entry["bytes"]:
        return f"{path} has {size} bytes instead of {entry['bytes']}"
    return (
        None
        if sha256(path) == entry["sha256"]
        else f"{path} is damaged: it is not what was written"
    )


def check_sound(folder: Path) -> None:
    """Raises ValueError when `folder` is a checkpoint of a run and a file of it is not as it was
    written; others pass.

    Raises OSError like `flaw_of`.
    """
    if (folder / MANIFEST).is_file() and (flaw := flaw_of(folder)):
        raise ValueError(f"{flaw}; name another checkpoint of its run.")


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that it neither counts as one of those to keep nor is in the
    way of a new one.
    """
    number = 0
    while (aside := checkpoint.with_name(f"{checkpoint.name}.damaged{number or ''}")).exists():
        number += 1
    return checkpoint.rename(aside)


def remove_leftovers(run_dir: Path) -> None:
    """Removes what killed processes have left half written. To be called by the one process that
    trains there.
    """
    for path in (Path(run_dir) / "checkpoints").glob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and match[2] != _OWN:
            shutil.rmtree(path, ignore_errors=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The number of optimizer steps in a checkpoint's name."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def load_state(checkpoint: Path) -> dict:
    """The training state saved with `checkpoint`, which `newest_sound_checkpoint` has looked
    through.
    """
    return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)


def stack_record(folder: Path) -> dict:
    """The `stack.json` of a model, for a run's checkpoint from its training state; empty where
    there is none.

    Raises ValueError for a file that is broken.
    """
    if not (folder / _STATE).is_file():
        return read_stack(folder)
    state = _unread_state(folder)
    stack = state.get("stack")  # those of earlier versions have none
    return stack | {TRAINED_STEPS: state["counters"]["step"]} if stack else {}


def stream_state(checkpoint: Path) -> dict:
    """Where the training stream of a run stood at its checkpoint: the state of
    `loader.open_stream`'s stream.
    """
    return _unread_state(checkpoint)["stream"]


def start_record(checkpoint: Path) -> dict:
    """What the run of a checkpoint took over of how its start was grown; with `trained_steps` when
    that had been trained.
    """
    return _unread_state(checkpoint).get("stack", {})  # an earlier version did not keep it


def _unread_state(checkpoint: Path) -> dict:
    """The training state with gigabytes of optimizer left on the disk."""
    return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True, mmap=True)


def _candidates(run_dir: Path) -> list[Path]:
    found = [
        path
        for path in (Path(run_dir) / "checkpoints").glob("step-*")
        if _NAME.fullmatch(path.name)
    ]
    return sorted(found, key=checkpoint_step)


def _has_all_files(checkpoint: Path) -> bool:
    try:
        files = json_object(checkpoint / MANIFEST)["files"]
        return all(
            (checkpoint / name).stat().st_size == entry["bytes"] for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_files(
    folder: Path,
    snapshot: Snapshot,
    model: PreTrainedModel,
    tokenizer,
    card: str,
    identity: str,
    run_file: Path,
) -> None:
    model.save_pretrained(folder, state_dict=dict(snapshot.weights))
    save_tokenizer(tokenizer, folder)
    rewrite_for_older(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / _STATE.parent).mkdir()
    torch.save(snapshot.state, folder / _STATE)
    if run_file.is_file():
        shutil.copy(run_file, folder / _STATE.parent)
    for weights in folder.glob(
        "*.safetensors"
    ):  # safetensors lets nobody but the owner read what it writes
        shutil.copymode(folder / "README.md", weights)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }
    manifest = {"step": snapshot.step, "run": identity, "files": described}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, folder / MANIFEST, folder / _STATE.parent, folder]:
        _sync(path)


def _host_copy(value, copied: dict[tuple, Tensor]):
    """`value` with a copy of each tensor on the CPU; on ranks other than the first they are
    gathered and dropped.
    """
    if isinstance(value, dict):
        return {key: _host_copy(entry, copied) for key, entry in value.items()}
    if isinstance(value, (list, tuple)) and any(
        isinstance(entry, (Tensor, dict, list, tuple)) for entry in value[:1]
    ):
        return type(value)(_host_copy(entry, copied) for entry in value)
    if not isinstance(value, Tensor):  # a list of tokens too: it is a copy already, and long
        return value
    shard = distributed.local(value)
    place = shard.data_ptr(), value.shape
    if place not in copied or shard.numel() == 0:
        gathered = distributed.whole(value.detach())
        copied[place] = (
            gathered.to("cpu", copy=True) if distributed.world().is_first else gathered.new_empty(0)
        )
    return copied[place]


def _remove(folder: Path) -> None:
    """Renamed first, so that a folder that is half gone is not mistaken for a checkpoint."""
    doomed = folder.with_name(f".removing-{folder.name}-{_OWN}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
