"""The copies of a source block, and what is left of the source: divergence of weights and
inheritance of spectra.

At one checkpoint, or over the checkpoints of a run with a column `step`. All of it reads tensors
from the files, one source block of one role at a time; what needs the model to run is in
`block_function`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from kl3m_nb.common.linalg import as_wide, gram_matrix
from kl3m_nb.model.folder import ModelOrCheckpoint
from kl3m_nb.model.roles import HEAD_LAYER
from kl3m_nb.spectra.matrices import Matrix, check_source_layers, find_matrices, layer_count
from kl3m_nb.spectra.singular_values import (
    Progress,
    SingularValues,
    model_singular_values,
    on_every_core,
)

_SMALLEST_GAP = 1e-3  # relative, between neighbouring singular values that bound a subspace


def copy_divergence(
    checkpoint: ModelOrCheckpoint,
    source_layers: int,
    reference: ModelOrCheckpoint | None = None,
    top_k: int = 16,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How far the copies of each source block have drifted apart: a row per role, expert, source
    block and pair of copies.

    * distance: ‖W_a − W_b‖_F over the mean of the two norms (0 equal, √2 independent).
    * movement_cosine (with `reference`, the stack at step 0): cosine between W_a − W_a⁰ and W_b −
      W_b⁰; NaN if one has not moved. chance_cosine = 1/√(rows·cols) is the standard deviation of
      that of independent movements.
    * top_overlap, bottom_overlap: mean squared cosine of the principal angles between the spans of
      the `top_k` largest (smallest) singular vectors, on the matrix's shorter side n: 1 for one and
      the same, chance_overlap = top_k / n for random ones.
    * top_gap, bottom_gap: the smaller of the two copies' relative gaps between the last singular
      value inside and the first outside (1 where none is outside). Below 1e-3 the span is
      arbitrary, as where the clamp has raised several values to one, and the overlap is NaN.

    Columns before them: role, expert, source_layer, copy_a, copy_b. `progress` counts groups of
    copies.

    A non-finite matrix gives NaN. Raises ValueError as `find_matrices`, for `source_layers` that do
    not divide the layers or leave one copy, a `top_k` above a matrix's shorter side, or a reference
    of other shapes.
    """
    matrices = find_matrices(checkpoint)
    if check_source_layers(layer_count(matrices), source_layers) == layer_count(matrices):
        raise ValueError(
            f"A model of {source_layers} layers made of {source_layers} source layers has no copies"
            " to compare."
        )
    starts = (
        None
        if reference is None
        else {_identity(matrix): matrix for matrix in find_matrices(reference)}
    )
    groups: dict[tuple, list[Matrix]] = {}
    for matrix in matrices:
        if matrix.layer == HEAD_LAYER:
            continue
        if not 1 <= top_k <= min(matrix.shape):
            raise ValueError(
                f"top_k is {top_k}; a {matrix.role} of {matrix.shape[0]} × {matrix.shape[1]} takes"
                f" 1 to {min(matrix.shape)}."
            )
        if (
            starts is not None
            and getattr(starts.get(_identity(matrix)), "shape", None) != matrix.shape
        ):
            raise ValueError(
                f"The reference has no {matrix.role} of shape {matrix.shape} in layer"
                f" {matrix.layer}; give the stack at step 0."
            )
        groups.setdefault((matrix.role, matrix.expert, matrix.layer % source_layers), []).append(
            matrix
        )

    def compare(copies: list[Matrix]) -> list[dict]:
        return _compare_copies(copies, source_layers, starts, top_k)

    return pd.DataFrame(
        [row for rows in on_every_core(compare, list(groups.values()), progress) for row in rows]
    )


def _compare_copies(
    copies: list[Matrix], source_layers: int, starts: dict | None, top_k: int
) -> list[dict]:
    weights = [matrix.read().cpu().double() for matrix in copies]
    norms = [float(weight.norm()) for weight in weights]
    spans: list[tuple[_Span, _Span]] = []
    for index, weight in enumerate(weights):
        equal = next(
            (
                span
                for span, other in zip(spans, weights[:index], strict=True)
                if torch.equal(other, weight)
            ),
            None,
        )
        spans.append(
            equal or _extreme_subspaces(weight, top_k)
        )  # the copies of a fresh stack are one matrix
    if starts is not None:
        begun = [starts[_identity(matrix)].read().cpu().double() for matrix in copies]
        movements = [weight - start for weight, start in zip(weights, begun, strict=True)]
    rows = []
    for a, b in combinations(range(len(copies)), 2):
        mean_norm = (norms[a] + norms[b]) / 2
        row: dict = {
            "role": copies[a].role,
            "expert": copies[a].expert,
            "source_layer": copies[a].layer % source_layers,
            "copy_a": a,
            "copy_b": b,
            "distance": float((weights[a] - weights[b]).norm()) / mean_norm if mean_norm else 0.0,
        }
        if starts is not None:
            length = float(movements[a].norm() * movements[b].norm())
            row["movement_cosine"] = (
                float((movements[a] * movements[b]).sum()) / length if length else math.nan
            )
            row["chance_cosine"] = 1 / math.sqrt(weights[a].numel())
        for side, first, second in zip(("top", "bottom"), spans[a], spans[b], strict=True):
            row[f"{side}_gap"] = min(first.gap, second.gap)
            overlap = float((first.basis.T @ second.basis).square().sum()) / top_k
            row[f"{side}_overlap"] = overlap if row[f"{side}_gap"] >= _SMALLEST_GAP else math.nan
        row["chance_overlap"] = top_k / min(copies[a].shape)
        rows.append(row)
    return rows


def _identity(matrix: Matrix) -> tuple[int, str, int]:
    return matrix.layer, matrix.role, matrix.expert


class _Span(NamedTuple):
    """An orthonormal basis (n, k) and the relative gap between the last singular value inside and
    the first outside.
    """

    basis: torch.Tensor
    gap: float


def _extreme_subspaces(weight: torch.Tensor, k: int) -> tuple[_Span, _Span]:
    """Those of the k largest and the k smallest singular directions on the shorter side n; NaN if
    not finite.
    """
    if not torch.isfinite(weight).all():
        unknown = _Span(torch.full((min(weight.shape), k), math.nan, dtype=weight.dtype), math.nan)
        return unknown, unknown
    squares, vectors = torch.linalg.eigh(gram_matrix(as_wide(weight), torch.float64))
    sigmas = squares.where(
        squares > squares[-1] * len(squares) * torch.finfo(torch.float64).eps, 0.0
    ).sqrt()

    def gap(above: int) -> float:
        """Between the `above` largest and the others; that of two zeros is none."""
        if above in (0, len(sigmas)):
            return 1.0
        low, high = sigmas[-above - 1], sigmas[-above]
        return float(1 - low / high) if high > 0 else 0.0

    return _Span(vectors[:, -k:], gap(k)), _Span(vectors[:, :k], gap(len(sigmas) - k))


def inheritance(
    checkpoint: ModelOrCheckpoint | SingularValues,
    source_checkpoint: ModelOrCheckpoint | SingularValues,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How much of its source's spectrum each matrix has kept: a row per matrix with layer,
    source_layer, copy, role and rmse.

    rmse is the root mean square of ln(σ_i/σ₁) − ln(σ_i⁰/σ₁⁰) over the i where neither is zero, σ⁰
    the spectrum of layer i mod L of the source; it is 0 right after stacking by construction, and
    NaN without such an i. Either argument may be what `model_singular_values` returned. An expert
    is in `role`, as in `spectrum_key`. `progress` counts the matrices of a `checkpoint` that is
    read. Raises ValueError as `find_matrices`, or if the model is no stack of such a source.
    """
    spectra = _as_singular_values(checkpoint, progress)
    sources = _as_singular_values(source_checkpoint)
    source_layers = 1 + max(layer for layer, _ in sources)
    check_source_layers(1 + max(layer for layer, _ in spectra), source_layers)
    rows = []
    for (layer, role), values in spectra.items():
        source_layer = layer % source_layers if layer != HEAD_LAYER else HEAD_LAYER
        before = sources.get((source_layer, role))
        if before is None or len(before) != len(values):
            raise ValueError(
                f"The source has no {role} with {len(values)} singular values in layer"
                f" {source_layer}; give the model it was grown from."
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


def _as_singular_values(
    source: ModelOrCheckpoint | SingularValues, progress: Progress | None = None
) -> SingularValues:
    return source if isinstance(source, Mapping) else model_singular_values(source, progress)
