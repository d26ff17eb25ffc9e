"""Checkpoints: ordinary Hugging Face folders plus `training_state/`, written so that a half-written one is never found.

A checkpoint is built under a temporary name, synced, and renamed; its manifest lists every file with its size and SHA-256.
Nothing in it can run code: weights are safetensors, the state is read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = re.compile(r"step-(\d{6,})")
_STATE = Path("training_state") / "state.pt"
_MANIFEST = Path("training_state") / "manifest.json"


def save_checkpoint(
    run_dir: Path, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict, keep: int, card: str
) -> Path:
    """Writes `run_dir/checkpoints/step-NNNNNN`, keeps the `keep` newest, returns the folder. Weights are stored as float32.

    `state` may hold numbers, strings, lists, dicts and tensors; `card` becomes the README.md. Raises OSError when the disk is
    full or read-only; earlier checkpoints are untouched then.
    """
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:06d}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / _STATE.parent).mkdir()
        torch.save(state, temporary / _STATE)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
        (temporary / _MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1) + "\n")
        for path in [*files, temporary / _MANIFEST, temporary / _STATE.parent, temporary]:
            _sync(path)
        if target.exists():  # the same step saved before: the run was resumed from an earlier one
            _remove(target)
        os.rename(temporary, target)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in whole_checkpoints(run_dir)[:-keep]:
        _remove(old)
    return target


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; anything cut off or foreign is passed over."""
    folder = Path(run_dir) / "checkpoints"
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and _has_all_files(path)]
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; None when it has none."""
    checkpoints = whole_checkpoints(run_dir)
    return checkpoints[-1] if checkpoints else None


def require_checkpoint(run_dir: Path) -> Path:
    """Like `latest_checkpoint`, for those who cannot go on without one. Raises ValueError that says what to run."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        raise ValueError(f"The run {run_dir} has no whole checkpoint; train it first (notebooks 00 and 02), or name another run.")
    return checkpoint


def checkpoint_step(checkpoint: Path) -> int:
    """The number of optimizer steps in a checkpoint's name."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def load_state(checkpoint: Path) -> dict:
    """The training state saved with `checkpoint`, after every file was compared with the manifest.

    Raises ValueError naming the first file whose content changed since it was written.
    """
    manifest = json.loads((checkpoint / _MANIFEST).read_text())["files"]
    for name, entry in manifest.items():
        if _sha256(checkpoint / name) != entry["sha256"]:
            raise ValueError(f"{checkpoint / name} is damaged; remove the folder {checkpoint} to resume from the one before.")
    return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)


def _has_all_files(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text())["files"]
        return all((checkpoint / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def _remove(folder: Path) -> None:
    """Renamed first, so that a folder that is half gone is not mistaken for a checkpoint."""
    doomed = folder.with_name(f".removing-{folder.name}-{os.getpid()}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
