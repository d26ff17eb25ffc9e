"""Singular values kept beside their checkpoint, under the content hash of the matrix they belong to.

A second look at a checkpoint costs reading it, and equal matrices (the copies of a fresh stack) are decomposed once. The key is
a 128-bit hash of dtype, shape and bytes, so a changed weight is not given an old spectrum, whatever its file is called.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kl3m_nb.matrices import Checkpoint, local_checkpoint
from kl3m_nb.model_folder import SPECTRA_FOLDER

_FILE = "singular_values-3.safetensors"  # the number changes with how values and keys are computed


class SpectrumCache:
    """A mapping from `matrices.content_hash` to singular values (1-D float64, descending). `path` None keeps nothing on disk."""

    def __init__(self, path: Path | None):
        self.path = path
        self._new = False
        self._values: dict[str, np.ndarray] = _read(path) if path else {}

    @classmethod
    def beside(cls, checkpoint: Checkpoint) -> SpectrumCache:
        """The cache of a checkpoint: in its folder, or in the folder of its file; a module's lives as long as the object."""
        if isinstance(checkpoint, torch.nn.Module):
            return cls(None)
        place = local_checkpoint(checkpoint)
        return cls((place.parent if place.is_file() else place) / SPECTRA_FOLDER / _FILE)

    def get(self, key: str) -> np.ndarray | None:
        """The singular values stored for `key`; None when there are none yet."""
        return self._values.get(key)

    def add(self, key: str, values: np.ndarray) -> None:
        """Remembers `values`; `save` writes them."""
        self._values[key] = values
        self._new = True

    def save(self) -> None:
        """Writes what is new, whole or not at all, together with what others wrote meanwhile. A folder that takes no file
        (a read-only mirror) is told in a warning: the analysis itself is not lost."""
        if self.path is None or not self._new:
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_bytes(save(_read(self.path) | self._values))
            os.replace(temporary, self.path)
        except OSError as error:
            warnings.warn(f"The spectra are not kept: {self.path.parent} cannot be written ({error}).", stacklevel=2)
        self._new = False


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "numpy") as kept:
            ours = (name for name in kept.keys() if kept.get_slice(name).get_dtype() == "F64")
            return {name: kept.get_tensor(name) for name in ours}
    except SafetensorError:  # cut off by a full disk, or not ours: what it held is computed anew
        return {}
