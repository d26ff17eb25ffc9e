"""Spectra of weight matrices: one matrix, every matrix of a model, the copies of a block, a model against its source.

Singular values are exact in float64 at the price of a symmetric eigenproblem: the eigenvalues of the Gram matrix carry an error
of about 1e-16·σ₁², so they are taken only where the condition number is below 1e4, and an SVD decides above. Matrices come from
`matrices.find_matrices` one at a time, so a checkpoint of any size needs the memory of its largest matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from kl3m_nb.matrices import HEAD_LAYER, Checkpoint, Matrix, check_source_layers, find_matrices, layer_count, model_name

SingularValues = Mapping[tuple[int, str], np.ndarray]  # keys from `spectrum_key`; each array float64, descending
Progress = Callable[[int, int], None]  # (matrices done, matrices in all)

_GRAM_CONDITION_LIMIT = 1e4  # at 1e4 the Gram route's relative error of σ_min is about 1e-8, and grows with the square
_CHUNK_ROWS = 16_384


def singular_values(weight: torch.Tensor | np.ndarray) -> np.ndarray:
    """All min(rows, cols) singular values of `weight` (2-D, e.g. (576, 1536), any float dtype): float64, descending.

    Raises ValueError for another number of dimensions or a NaN or infinity.
    """
    weight = torch.as_tensor(weight).detach().cpu()
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"Singular values need a non-empty matrix; this tensor has the shape {tuple(weight.shape)}.")
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    scale = float(tall.abs().max())
    if not math.isfinite(scale):
        raise ValueError("The matrix holds NaN or infinite values; it has no singular values.")
    if scale == 0.0:
        return np.zeros(tall.shape[1])
    squares = torch.linalg.eigvalsh(sum(rows.T @ rows for rows in _double_chunks(tall, scale)))
    if squares[0] * _GRAM_CONDITION_LIMIT**2 > squares[-1]:
        return squares.sqrt().flip(0).numpy() * scale
    factor = torch.empty(0, tall.shape[1], dtype=torch.float64)
    for rows in _double_chunks(tall, scale):
        factor = torch.linalg.qr(torch.cat([factor, rows]), mode="r").R
    return torch.linalg.svdvals(factor).numpy() * scale


def _double_chunks(tall: torch.Tensor, scale: float):
    # Scaled so that no square over- or underflows; in chunks because an embedding in float64 is twice its file.
    return (rows.double() / scale for rows in tall.split(_CHUNK_ROWS))


def power_law_tail(eigenvalues: np.ndarray) -> tuple[float, float, float]:
    """Fit p(x) ∝ x^-alpha to the tail x ≥ xmin of the positive `eigenvalues` (1-D); returns (alpha, xmin, D).

    For every candidate xmin alpha is the maximum-likelihood estimate, and the xmin of the smallest Kolmogorov-Smirnov distance
    D is taken (Clauset, Shalizi and Newman, arXiv:0706.1062), with the conventions of WeightWatcher's own fit: every eigenvalue
    but the largest is a candidate, alpha = 1 + n / Σ ln(x/xmin). All three are NaN for fewer than two positive eigenvalues.
    """
    eigenvalues = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    logs = np.log(eigenvalues[eigenvalues > 0])
    total = len(logs)
    if total < 2:
        return math.nan, math.nan, math.nan
    starts = np.arange(total - 1)
    tail_sizes = total - starts
    excess = np.cumsum(logs[::-1])[::-1][:-1] - tail_sizes * logs[:-1]  # Σ ln(x/xmin) over each tail
    excess[excess <= 0] = np.nan  # a tail of equal values follows no power law
    alphas = 1 + tail_sizes / excess
    distances = np.empty(total - 1)
    for rows in np.array_split(starts, max(1, total * total // 2**21)):
        ranks = np.arange(rows[0], total) - rows[:, None]
        theory = -np.expm1((1 - alphas[rows, None]) * np.maximum(logs[rows[0] :] - logs[rows, None], 0.0))
        gap = np.abs(theory - ranks / tail_sizes[rows, None])
        distances[rows] = np.where(ranks < 0, 0.0, gap).max(axis=1)
    distances[np.isnan(distances)] = 1.0
    best = int(np.argmin(distances))
    return float(alphas[best]), float(np.exp(logs[best])), float(distances[best])


def spectrum_of(weight: torch.Tensor | np.ndarray, fit_alpha: bool = True) -> dict[str, float]:
    """The metrics of one matrix (2-D, e.g. (576, 1536)), see `spectrum_metrics`. Raises ValueError as `singular_values`."""
    return spectrum_metrics(singular_values(weight), tuple(weight.shape), fit_alpha)


def spectrum_metrics(values: np.ndarray, shape: tuple[int, int], fit_alpha: bool = True) -> dict[str, float]:
    """Metrics of a spectrum σ (`values`, descending) of a matrix of `shape`. NaN where a zero matrix leaves one undefined.

    sigma_max, sigma_min, condition (σ₁/σ_min, infinite for a singular matrix), stable_rank (‖W‖_F²/σ₁²), entropy (−Σ p ln p in
    nats, p = σ/Σσ), effective_rank (exp of it; Roy and Vetterli 2007), participation_ratio ((Σσ²)²/Σσ⁴), max_over_median, mp_edge
    (the largest σ a matrix of independent entries of the same mean square would have: s(√rows + √cols), Marchenko and Pastur)
    and, with `fit_alpha`, alpha, alpha_xmin and alpha_D of the eigenvalues σ² (`power_law_tail`).
    """
    sigma_max, sigma_min = float(values[0]), float(values[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = values / sigma_max  # squares of these cannot overflow
        p = relative / relative.sum()
        entropy = float(-np.sum(p * np.log(np.where(p > 0, p, 1.0))))
        energy = float(np.sum(relative**2))
        rows, cols = shape
        metrics = {
            "sigma_max": sigma_max,
            "sigma_min": sigma_min,
            "condition": float(np.float64(sigma_max) / sigma_min),
            "stable_rank": energy,
            "effective_rank": math.exp(entropy),
            "entropy": entropy,
            "participation_ratio": float(energy**2 / np.sum(relative**4)),
            "max_over_median": float(sigma_max / np.median(values)),
            "mp_edge": sigma_max * math.sqrt(energy / (rows * cols)) * (math.sqrt(rows) + math.sqrt(cols)),
        }
    if fit_alpha:
        metrics |= zip(("alpha", "alpha_xmin", "alpha_D"), power_law_tail(values**2), strict=True)
    return metrics


def spectrum_key(layer: int, role: str, expert: int = -1) -> tuple[int, str]:
    """The key of one spectrum: (3, "q_proj"), (-1, "lm_head"), or (3, "gate_proj[2]") for the third expert."""
    return layer, role if expert < 0 else f"{role}[{expert}]"


def analyse_model(
    model_or_checkpoint: Checkpoint,
    source_layers: int | None = None,
    fit_alpha: bool = False,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, dict[tuple[int, str], np.ndarray]]:
    """`model_spectra` and `model_singular_values` in one pass over the weights."""
    matrices = find_matrices(model_or_checkpoint)
    layers = layer_count(matrices)
    source_layers = check_source_layers(layers, layers if source_layers is None else source_layers)
    model = model_name(model_or_checkpoint)
    rows, spectra = [], {}
    measured = _on_every_core(_singular_values_if_finite, matrices)
    for done, (matrix, values) in enumerate(zip(matrices, measured, strict=True), start=1):
        in_block = matrix.layer != HEAD_LAYER
        row = {
            "model": model,
            "layer": matrix.layer,
            "source_layer": matrix.layer % source_layers if in_block else HEAD_LAYER,
            "copy": matrix.layer // source_layers if in_block else HEAD_LAYER,
            "role": matrix.role,
            "expert": matrix.expert,
            "rows": matrix.shape[0],
            "cols": matrix.shape[1],
            "dtype": matrix.dtype,
            "finite": values is not None,
            "condition_reliable": values is not None and matrix.dtype in ("float32", "float64"),
        }
        if values is not None:
            spectra[spectrum_key(matrix.layer, matrix.role, matrix.expert)] = values
            row |= spectrum_metrics(values, matrix.shape, fit_alpha)
        rows.append(row)
        if progress is not None:
            progress(done, len(matrices))
    return pd.DataFrame(rows), spectra


def _singular_values_if_finite(matrix: Matrix) -> np.ndarray | None:
    weight = matrix.read()
    return singular_values(weight) if torch.isfinite(weight).all() else None


def _on_every_core(work: Callable, items: Iterable) -> Iterator:
    """`map` with as many workers as torch has threads, one thread each: a small eigenproblem gains little from more."""
    threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from workers.map(work, items)
    finally:
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def model_spectra(
    model_or_checkpoint: Checkpoint,
    source_layers: int | None = None,
    fit_alpha: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """A row per matrix: model, layer, source_layer, copy, role, expert, rows, cols, dtype, finite, condition_reliable, metrics.

    `source_layers` L says that layer i is copy i // L of source block i mod L; by default every layer is its own source. The LM
    head has -1 for layer, source_layer and copy, a matrix outside a mixture -1 for expert. `condition_reliable` is False for
    16-bit weights: rounding alone moves a condition number of 2500 to 2900-3300. A matrix with NaN or infinite values has
    `finite` False and NaN metrics. Metrics are those of `spectrum_metrics`. Raises ValueError as `find_matrices`.
    """
    return analyse_model(model_or_checkpoint, source_layers, fit_alpha, progress)[0]


def model_singular_values(model_or_checkpoint: Checkpoint, progress: Progress | None = None) -> dict[tuple[int, str], np.ndarray]:
    """The spectrum of every finite matrix, by `spectrum_key`; each a float64 array, descending."""
    return analyse_model(model_or_checkpoint, progress=progress)[1]


def copy_divergence(
    checkpoint: Checkpoint, source_layers: int, reference: Checkpoint | None = None, top_k: int = 16
) -> pd.DataFrame:
    """How far the copies of each source block have drifted apart: a row per role, expert, source block and pair of copies.

    * distance: ‖W_a − W_b‖_F over the mean of the two norms (0 equal, √2 independent).
    * movement_cosine (with `reference`, the stack at step 0): cosine between W_a − W_a⁰ and W_b − W_b⁰; NaN if one has not moved.
    * top_overlap, bottom_overlap: mean squared cosine of the principal angles between the spans of the `top_k` largest (smallest)
      singular vectors, on the matrix's shorter side n: 1 for one and the same, chance_overlap = top_k / n for random ones.

    A non-finite matrix gives NaN. Raises ValueError as `find_matrices`, for `source_layers` that do not divide the layers or
    leave one copy, a `top_k` above a matrix's shorter side, or a reference of other shapes.
    """
    matrices = find_matrices(checkpoint)
    if check_source_layers(layer_count(matrices), source_layers) == layer_count(matrices):
        raise ValueError(f"A model of {source_layers} layers made of {source_layers} source layers has no copies to compare.")
    starts = None if reference is None else {_identity(matrix): matrix for matrix in find_matrices(reference)}
    groups: dict[tuple, list[Matrix]] = {}
    for matrix in matrices:
        if matrix.layer == HEAD_LAYER:
            continue
        if not 1 <= top_k <= min(matrix.shape):
            raise ValueError(
                f"top_k is {top_k}; a {matrix.role} of {matrix.shape[0]} × {matrix.shape[1]} takes 1 to {min(matrix.shape)}."
            )
        if starts is not None and getattr(starts.get(_identity(matrix)), "shape", None) != matrix.shape:
            raise ValueError(
                f"The reference has no {matrix.role} of shape {matrix.shape} in layer {matrix.layer}; give the stack at step 0."
            )
        groups.setdefault((matrix.role, matrix.expert, matrix.layer % source_layers), []).append(matrix)

    def compare(copies: list[Matrix]) -> list[dict]:
        return _compare_copies(copies, source_layers, starts, top_k)

    return pd.DataFrame([row for rows in _on_every_core(compare, groups.values()) for row in rows])


def _compare_copies(copies: list[Matrix], source_layers: int, starts: dict | None, top_k: int) -> list[dict]:
    weights = [matrix.read().cpu().double() for matrix in copies]
    norms = [float(weight.norm()) for weight in weights]
    spans = [_extreme_subspaces(weight, top_k) for weight in weights]
    if starts is not None:
        begun = [starts[_identity(matrix)].read().cpu().double() for matrix in copies]
        movements = [weight - start for weight, start in zip(weights, begun, strict=True)]
    rows = []
    for a, b in combinations(range(len(copies)), 2):
        mean_norm = (norms[a] + norms[b]) / 2
        row = {
            "role": copies[a].role,
            "expert": copies[a].expert,
            "source_layer": copies[a].layer % source_layers,
            "copy_a": a,
            "copy_b": b,
            "distance": float((weights[a] - weights[b]).norm()) / mean_norm if mean_norm else 0.0,
        }
        if starts is not None:
            length = float(movements[a].norm() * movements[b].norm())
            row["movement_cosine"] = float((movements[a] * movements[b]).sum()) / length if length else math.nan
        row["top_overlap"] = float((spans[a][0].T @ spans[b][0]).square().sum()) / top_k
        row["bottom_overlap"] = float((spans[a][1].T @ spans[b][1]).square().sum()) / top_k
        row["chance_overlap"] = top_k / min(copies[a].shape)
        rows.append(row)
    return rows


def _identity(matrix: Matrix) -> tuple[int, str, int]:
    return matrix.layer, matrix.role, matrix.expert


def _gram(weight: torch.Tensor) -> torch.Tensor:
    return weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight


def _extreme_subspaces(weight: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases (n, k) of the k largest and k smallest singular directions on the shorter side n; NaN if not finite."""
    if not torch.isfinite(weight).all():
        unknown = torch.full((min(weight.shape), k), math.nan, dtype=weight.dtype)
        return unknown, unknown
    vectors = torch.linalg.eigh(_gram(weight)).eigenvectors
    return vectors[:, -k:], vectors[:, :k]


def inheritance(checkpoint: Checkpoint | SingularValues, source_checkpoint: Checkpoint | SingularValues) -> pd.DataFrame:
    """How much of its source's spectrum each matrix has kept: a row per matrix with layer, source_layer, copy, role and rmse.

    rmse is the root mean square of ln(σ_i/σ₁) − ln(σ_i⁰/σ₁⁰) over the i where both are positive, σ⁰ the spectrum of layer i mod L
    of the source; it is 0 right after stacking by construction. Either argument may be what `model_singular_values` returned. An
    expert is in `role`, as in `spectrum_key`. Raises ValueError as `find_matrices`, or if the model is no stack of such a source.
    """
    spectra = _as_singular_values(checkpoint)
    sources = _as_singular_values(source_checkpoint)
    source_layers = 1 + max(layer for layer, _ in sources)
    check_source_layers(1 + max(layer for layer, _ in spectra), source_layers)
    rows = []
    for (layer, role), values in spectra.items():
        source_layer = layer % source_layers if layer != HEAD_LAYER else HEAD_LAYER
        before = sources.get((source_layer, role))
        if before is None or len(before) != len(values):
            raise ValueError(
                f"The source has no {role} with {len(values)} singular values in layer {source_layer}; "
                "give the model it was grown from."
            )
        known = (values > 0) & (before > 0)
        change = np.log(values[known] / values[0]) - np.log(before[known] / before[0])
        rows.append(
            {
                "layer": layer,
                "source_layer": source_layer,
                "copy": layer // source_layers if layer != HEAD_LAYER else HEAD_LAYER,
                "role": role,
                "rmse": float(np.sqrt(np.mean(change**2))) if known.any() else math.nan,
            }
        )
    return pd.DataFrame(rows)


def _as_singular_values(source: Checkpoint | SingularValues) -> SingularValues:
    return source if isinstance(source, Mapping) else model_singular_values(source)
