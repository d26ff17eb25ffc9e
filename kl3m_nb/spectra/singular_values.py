"""Spectra of weight matrices: the singular values and metrics of one matrix, and a table of every
matrix of a model.

Everything is computed in float64, from the eigenvalues of a Gram matrix where these tell enough,
because an SVD takes twice as long. They carry an error of about 1e-16·σ₁²: ten digits of a singular
value are left at a condition of 1,000, nine at 5,000, and eight where one value towers above all
others. From 1,000 on the smallest, of which a condition number is made, is therefore taken from the
matrix itself, to twelve digits (ten where dozens of values lie within that error of it and yet
differ). Beyond 5,000 an SVD decides, with an error of about 1e-16·σ₁. Matrices come from
`matrices.find_matrices` one at a time, so a checkpoint of any size needs the memory of its largest
matrix, and what was decomposed once is kept by `SpectrumCache`.

The cache beside a checkpoint is keyed by a 128-bit hash of dtype, shape and bytes. Equal matrices
(the copies of a fresh stack) are decomposed once, and a changed weight never gets an old spectrum.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kl3m_nb.common.files import naming, why
from kl3m_nb.common.linalg import gram_matrix
from kl3m_nb.model.folder import SPECTRA_FOLDER, ModelOrCheckpoint
from kl3m_nb.model.roles import HEAD_LAYER
from kl3m_nb.runs.lineage import model_step
from kl3m_nb.spectra.matrices import (
    Matrix,
    check_source_layers,
    content_hash,
    find_matrices,
    layer_count,
    local_checkpoint,
    model_name,
)

SingularValues = Mapping[
    tuple[int, str], np.ndarray
]  # keys from `spectrum_key`; each array float64, descending


Progress = Callable[[int, int], None]  # (matrices done, matrices in all)


_CHUNK_ROWS = 16_384


# condition up to which the eigenvalues of a Gram matrix are good enough for every singular value
_GRAM_TELLS_ALL = 1e3


_GRAM_TELLS_MOST = 5e3  # and up to which they are for all but the smallest


_SHIFT = 8  # what an inverse iteration stays below the eigenvalue, in roundings of the largest


_DIRECTIONS = 8  # it follows at a time


_STEPS = 8  # before it gives up


_SMALLEST_EIGENVALUE = 1e-5  # WeightWatcher fits alpha to the eigenvalues above it


class NotFinite(ValueError):
    """A matrix holds NaN or infinite values."""


def singular_values(weight: torch.Tensor | np.ndarray) -> np.ndarray:
    """All min(rows, cols) singular values of `weight` (2-D, e.g. (576, 1536), any float dtype):
    float64, descending.

    What is no more than the rounding of zero, σ₁·max(rows, cols)·2.2e-16, is given as zero. Raises
    ValueError for another number of dimensions, and NotFinite for a NaN or infinity.
    """
    weight = torch.as_tensor(weight).detach().cpu()
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            "Singular values need a non-empty matrix; this tensor has the shape"
            f" {tuple(weight.shape)}."
        )
    largest = _largest_entry(weight)
    if not math.isfinite(largest):
        raise NotFinite("The matrix holds NaN or infinite values; it has no singular values.")
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    if largest == 0.0:
        return np.zeros(tall.shape[1])
    scale = 1.0 if 1e-50 < largest < 1e50 else largest  # no square may over- or underflow
    tall = tall if scale == 1.0 else tall.double() / scale
    gram = gram_matrix(tall.T, torch.float64)
    squares = torch.linalg.eigvalsh(
        gram, UPLO="U"
    )  # LAPACK is a fifth faster with this triangle than with the other
    if squares[0] * _GRAM_TELLS_ALL**2 > squares[-1]:
        values = squares.sqrt()
    elif (
        squares[0] * _GRAM_TELLS_MOST**2 > squares[-1]
        and (smallest := _smallest(tall, gram, squares)) is not None
    ):
        values = squares.sqrt().clamp(min=smallest)
        values[0] = smallest
    else:
        values = _by_svd(tall).flip(0)
    values = values.flip(0).numpy() * scale
    return np.where(_above_rounding(values, tall.shape[0]), values, 0.0)


def _smallest(tall: torch.Tensor, gram: torch.Tensor, squares: torch.Tensor) -> torch.Tensor | None:
    """The smallest singular value by inverse iteration, given the Gram matrix and its eigenvalues;
    None where it is not found.

    The directions are those of the Gram matrix, with its error. The value is taken from the weight,
    and there the error of a direction counts squared. With the shift as close to the eigenvalue as
    rounding allows, two or three steps are enough. Of values closer together than that, as a clamp
    leaves them, any combination of directions tells the same.
    """
    rounding = torch.finfo(torch.float64).eps
    shifted = gram.clone()
    shifted.diagonal().sub_(squares[0] - _SHIFT * rounding * squares[-1])
    factor, failed_at = torch.linalg.cholesky_ex(shifted)
    if failed_at:
        return None
    size = len(gram)
    directions = torch.randn(
        size,
        min(size, _DIRECTIONS),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    value = torch.tensor(math.inf, dtype=torch.float64)
    for _ in range(_STEPS):
        directions = torch.linalg.qr(torch.cholesky_solve(directions, factor)).Q
        images = torch.cat([rows @ directions for rows in _double_chunks(tall)])
        before, value = value, torch.linalg.svdvals(images)[-1]
        if abs(before - value) <= rounding * squares[-1].sqrt():
            return value
    return None


def _by_svd(tall: torch.Tensor) -> torch.Tensor:
    factor, *others = _double_chunks(tall)
    for rows in others:
        factor = torch.linalg.qr(torch.cat([factor, rows]), mode="r").R
    return torch.linalg.svdvals(factor)


def _double_chunks(tall: torch.Tensor) -> Iterator[torch.Tensor]:
    # In chunks because an embedding in float64 is twice its file.
    return (rows.double() for rows in tall.split(_CHUNK_ROWS))


def _largest_entry(weight: torch.Tensor) -> float:
    """The largest magnitude in `weight`, e.g. [576, 1536]; NaN or infinite exactly when one of its
    entries is.
    """
    low, high = torch.aminmax(weight)
    return float(torch.maximum(-low.double(), high.double()))


def power_law_tail(eigenvalues: np.ndarray) -> tuple[float, float, float]:
    """Fit p(x) ∝ x^-alpha to the tail x ≥ xmin of the positive `eigenvalues` (1-D); returns (alpha,
    xmin, D).

    For every candidate xmin alpha is the maximum-likelihood estimate, and the xmin of the smallest
    Kolmogorov-Smirnov distance D is taken (Clauset, Shalizi and Newman, arXiv:0706.1062), with the
    conventions of WeightWatcher's own fit: every eigenvalue but the largest is a candidate, alpha =
    1 + n / Σ ln(x/xmin). All three are NaN for fewer than two positive eigenvalues.
    """
    eigenvalues = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    logs = np.log(eigenvalues[eigenvalues > 0])
    total = len(logs)
    if total < 2:
        return math.nan, math.nan, math.nan
    starts = np.arange(total - 1)
    tail_sizes = total - starts
    excess = (
        np.cumsum(logs[::-1])[::-1][:-1] - tail_sizes * logs[:-1]
    )  # Σ ln(x/xmin) over each tail
    excess[excess <= 0] = np.nan  # a tail of equal values follows no power law
    alphas = 1 + tail_sizes / excess
    distances = np.empty(total - 1)
    for rows in np.array_split(starts, math.ceil(total / 64)):
        ranks = np.maximum(np.arange(rows[0], total) - rows[:, None], 0)
        theory = 1 - np.exp(
            (1 - alphas[rows, None]) * np.maximum(logs[rows[0] :] - logs[rows, None], 0.0)
        )
        distances[rows] = np.abs(theory - ranks / tail_sizes[rows, None]).max(
            axis=1
        )  # 0 before the tail
    distances[np.isnan(distances)] = 1.0
    best = int(np.argmin(distances))
    return float(alphas[best]), float(np.exp(logs[best])), float(distances[best])


def spectrum_of(weight: torch.Tensor | np.ndarray, fit_alpha: bool = True) -> dict[str, float]:
    """The metrics of one matrix (2-D, e.g. (576, 1536)), see `spectrum_metrics`. Raises ValueError
    as `singular_values`.
    """
    return spectrum_metrics(singular_values(weight), tuple(weight.shape), fit_alpha)


def spectrum_metrics(
    values: np.ndarray, shape: tuple[int, int], fit_alpha: bool = True
) -> dict[str, float]:
    """Metrics of a spectrum σ (`values`, descending) of a matrix of `shape`. NaN where a zero
    matrix leaves one undefined, and throughout for `values` that are NaN.

    * sigma_max, sigma_min, max_over_median.
    * stable_rank ‖W‖_F²/σ₁², matrix_rank (σ above σ₁·max(rows, cols)·2.2e-16), participation_ratio
      (Σσ²)²/Σσ⁴.
    * condition σ₁/σ_min, infinite for a singular matrix, whose matrix_rank is below its shorter
      side.
    * entropy −Σ p ln p / ln(matrix_rank) with p = σ²/Σσ²: WeightWatcher's, between 0 and 1.
    * sigma_entropy −Σ p ln p in nats with p = σ/Σσ, and effective_rank, the exponential of it (Roy
      and Vetterli 2007).
    * mp_edge: the largest σ of a matrix of independent entries of the same mean square, s(√rows +
      √cols), after Marchenko and Pastur.
    * With `fit_alpha`, alpha, alpha_xmin and alpha_D of the eigenvalues σ² above 1e-5
      (`power_law_tail`), as WeightWatcher takes them.

    WeightWatcher's `spectral_norm` is σ₁², its largest eigenvalue.
    """
    sigma_max, sigma_min = float(values[0]), float(values[-1])
    rows, cols = shape
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = values / sigma_max  # squares of these cannot overflow
        energy = float(np.sum(relative**2))
        matrix_rank = (
            int(np.sum(_above_rounding(values, max(shape)))) if np.isfinite(sigma_max) else math.nan
        )
        sigma_entropy = _entropy(relative / relative.sum())
        metrics = {
            "sigma_max": sigma_max,
            "sigma_min": sigma_min,
            "condition": (
                math.inf
                if 0 < matrix_rank < len(values)
                else float(np.float64(sigma_max) / sigma_min)
            ),
            "stable_rank": energy,
            "matrix_rank": matrix_rank,
            "effective_rank": math.exp(sigma_entropy),
            "entropy": (
                _entropy(relative**2 / energy) / math.log(matrix_rank)
                if matrix_rank > 1
                else math.nan
            ),
            "sigma_entropy": sigma_entropy,
            "participation_ratio": float(energy**2 / np.sum(relative**4)),
            "max_over_median": float(sigma_max / np.median(values)),
            "mp_edge": (
                sigma_max * math.sqrt(energy / (rows * cols)) * (math.sqrt(rows) + math.sqrt(cols))
            ),
        }
    if fit_alpha:
        eigenvalues = values**2
        tail = power_law_tail(eigenvalues[eigenvalues > _SMALLEST_EIGENVALUE])
        metrics |= zip(("alpha", "alpha_xmin", "alpha_D"), tail, strict=True)
    return metrics


def _above_rounding(values: np.ndarray, longer_side: int) -> np.ndarray:
    """Which of the singular `values` (1-D, descending) are more than the rounding of zero: those
    above σ₁·longer_side·2.2e-16.
    """
    return values > values[0] * longer_side * np.finfo(np.float64).eps


def _entropy(p: np.ndarray) -> float:
    return float(-np.sum(p * np.log(np.where(p > 0, p, 1.0))))


def spectrum_key(layer: int, role: str, expert: int = -1) -> tuple[int, str]:
    """The key of one spectrum: (3, "q_proj"), (-1, "lm_head"), or (3, "gate_proj[2]") for the third
    expert.
    """
    return layer, role if expert < 0 else f"{role}[{expert}]"


def check_role(model_or_checkpoint: ModelOrCheckpoint, role: str) -> None:
    """Raises ValueError for a role that no block of a model has, and as `find_matrices`."""
    keys = [spectrum_key(m.layer, m.role, m.expert) for m in find_matrices(model_or_checkpoint)]
    roles = dict.fromkeys(name for layer, name in keys if layer != HEAD_LAYER)
    if role not in roles:
        raise ValueError(f"There is no role {role!r}; choose one of {', '.join(roles)}.")


def analyse_model(
    model_or_checkpoint: ModelOrCheckpoint,
    source_layers: int | None = None,
    fit_alpha: bool = False,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, dict[tuple[int, str], np.ndarray]]:
    """`model_spectra` and `model_singular_values` in one pass over the weights."""
    matrices = find_matrices(model_or_checkpoint)
    layers = layer_count(matrices)
    source_layers = check_source_layers(layers, layers if source_layers is None else source_layers)
    cache = SpectrumCache.beside(model_or_checkpoint)

    def measure(matrix: Matrix) -> tuple[np.ndarray, dict[str, float]]:
        weight = matrix.read()
        values = _kept_singular_values(weight, cache)
        finite = bool(np.isfinite(values[0]))
        told = {"finite": finite, "condition_reliable": finite and not _has_16_bit_values(weight)}
        return values, told | spectrum_metrics(values, matrix.shape, fit_alpha)

    try:
        measured = on_every_core(measure, matrices, progress)
    finally:
        cache.save()  # an interrupted analysis keeps what it has done
    model, step = model_name(model_or_checkpoint), model_step(model_or_checkpoint)
    rows, spectra = [], {}
    for matrix, (values, found) in zip(matrices, measured, strict=True):
        in_block = matrix.layer != HEAD_LAYER
        row = {
            "model": model,
            "step": step,
            "layer": matrix.layer,
            "source_layer": matrix.layer % source_layers if in_block else HEAD_LAYER,
            "copy": matrix.layer // source_layers if in_block else HEAD_LAYER,
            "role": matrix.role,
            "expert": matrix.expert,
            "rows": matrix.shape[0],
            "cols": matrix.shape[1],
            "dtype": matrix.dtype,
        }
        spectra[spectrum_key(matrix.layer, matrix.role, matrix.expert)] = values
        rows.append(row | found)
    return pd.DataFrame(rows), spectra


def _kept_singular_values(weight: torch.Tensor, cache: SpectrumCache) -> np.ndarray:
    """Those in the cache when they can be `weight`'s, else computed and added to it; NaN for a
    matrix that is not finite.
    """
    key = content_hash(weight)
    values = cache.get(key)
    if values is None or not _can_be_of(values, weight):
        try:
            values = singular_values(weight)
        except NotFinite:
            return np.full(min(weight.shape), math.nan)
        cache.add(key, values)
    return values


def _can_be_of(values: np.ndarray, weight: torch.Tensor) -> bool:
    """Whether kept values are as many as `weight` has singular values, in order, and their squares
    add up to its own.

    A key guards against mistakes and not against a file that was cut, forged or written by
    something else.
    """
    if (
        values.dtype != np.float64
        or values.shape != (min(weight.shape),)
        or not np.isfinite(values).all()
    ):
        return False
    squared_norm = torch.linalg.vector_norm(weight, dtype=torch.float64).item() ** 2
    in_order = values.size == 0 or (values[-1] >= 0 and (np.diff(values) <= 0).all())
    return bool(in_order) and math.isclose(
        (values**2).sum(), squared_norm, rel_tol=1e-9, abs_tol=1e-300
    )


def _has_16_bit_values(weight: torch.Tensor) -> bool:
    """Whether bfloat16 or float16 hold every entry exactly, also where it was saved as float32.
    Zeros alone tell nothing.
    """
    if weight.dtype == torch.float64:
        return False
    if weight.dtype != torch.float32:
        return True
    rows = weight.contiguous().view(torch.int32)
    chunks = (rows[:1], *rows.split(_CHUNK_ROWS))  # one row tells, unless the answer is yes
    return all(not (chunk & 0x1FFF).any() for chunk in chunks) and bool(weight.any())


def on_every_core(work: Callable, items: Sequence, progress: Progress | None = None) -> list:
    """`work` of every item, in the order of `items`, with as many workers as torch has threads and
    one thread each.

    A small decomposition gains little from more threads. The last item is begun first: of a model
    it is the largest by far. `progress` hears (done, total) whenever an item is finished. The first
    error stops the rest and is raised.
    """
    threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        order = [len(items) - 1, *range(len(items) - 1)] if items else []
        futures = {workers.submit(work, items[index]): index for index in order}
        results = [None] * len(items)
        for done, future in enumerate(as_completed(futures), start=1):
            results[futures[future]] = future.result()
            if progress is not None:
                progress(done, len(items))
        return results
    finally:
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def model_spectra(
    model_or_checkpoint: ModelOrCheckpoint,
    source_layers: int | None = None,
    fit_alpha: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """A row per matrix: model, step, layer, source_layer, copy, role, expert, rows, cols, dtype,
    finite, condition_reliable and the metrics of `spectrum_metrics`.

    `source_layers` L says that layer i is copy i // L of source block i mod L; by default every
    layer is its own source. The LM head has -1 for layer, source_layer and copy, a matrix outside a
    mixture -1 for expert, a model that does not tell its age -1 for step (`lineage.model_step`).
    `condition_reliable` is False for 16-bit weights, also where they were saved as float32:
    rounding alone moves a condition number of 2500 to 2900-3300. A matrix with NaN or infinite
    values has `finite` False and NaN metrics. Singular values are kept beside the checkpoint
    (`SpectrumCache`). Raises ValueError as `find_matrices`.
    """
    return analyse_model(model_or_checkpoint, source_layers, fit_alpha, progress)[0]


def model_singular_values(
    model_or_checkpoint: ModelOrCheckpoint, progress: Progress | None = None
) -> dict[tuple[int, str], np.ndarray]:
    """The spectrum of every matrix, by `spectrum_key`; each a float64 array, descending, NaN for a
    matrix that is not finite.
    """
    return analyse_model(model_or_checkpoint, progress=progress)[1]


def spectra_frame(singular_values: SingularValues, role: str) -> pd.DataFrame:
    """The spectra of `role` in every layer as a table to be saved: layer, index (from 1), sigma."""
    return pd.DataFrame(
        [
            (layer, index, sigma)
            for (layer, name), values in sorted(singular_values.items())
            for index, sigma in enumerate(values if name == role else (), start=1)
        ],
        columns=["layer", "index", "sigma"],
    )


_FILE = "singular_values-3.safetensors"  # the number changes with how values and keys are computed


class SpectrumCache:
    """A mapping from `matrices.content_hash` to singular values (1-D float64, descending). `path`
    None keeps nothing on disk.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._new = False
        self._values: dict[str, np.ndarray] = _read(path) if path else {}

    @classmethod
    def beside(cls, checkpoint: ModelOrCheckpoint) -> SpectrumCache:
        """The cache of a checkpoint: in its folder, or in the folder of its file; a module's lives
        as long as the object.
        """
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
        """Writes what is new, whole or not at all, together with what others wrote meanwhile. A
        folder that takes no file (a read-only mirror) is told in a warning: the analysis itself is
        not lost.
        """
        if self.path is None or not self._new:
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            with naming(self.path):
                temporary.write_bytes(save(_read(self.path) | self._values))
                os.replace(temporary, self.path)
        except OSError as error:
            warnings.warn(
                f"The spectra are not kept: {self.path.parent} cannot be written"
                f" ({why(error).rstrip('.')}).",
                stacklevel=2,
            )
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
