"""Spectral clamping of one matrix: singular values that lie below τ = max(sigma_floor, σ₁ /
max_condition) are raised to τ.

The result is W' = U max(S, τ) Vᵀ (kl3m-007 card, "Spectral Clamping"), without a full SVD where
that can be: the eigenvectors of the float64 Gram matrix below τ² span the part to be changed; a
small SVD of that part gives its exact singular values and vectors, and a low-rank update raises
them. Only when a singular value is too small for a Gram matrix to resolve (exact zeros, rank one)
is the whole matrix decomposed.

A matrix that needs nothing keeps every bit. A value within one rounding of the weight's dtype
(eps·σ₁) below τ counts as τ, since it cannot be stored better: clamping twice is clamping once.
`model_clamp` clamps all matrices of a model, and decomposes only those that it cannot prove
healthy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kl3m_nb.common.linalg import PIECE, as_wide, gram_matrix

_EXACTNESS = 1e-9  # in units of σ₁: the error of what is called exact


_GRAM_RESOLUTION = 1e-5  # in units of σ₁: smaller values are lost in a float64 Gram matrix


@dataclass(frozen=True)
class ClampOutcome:
    """What `clamp_spectrum_` found and did.

    `sigma_max`, `sigma_min`: extreme singular values before, exact to 1e-9·σ₁. `tau`: the lower
    bound that was put in force. `raised`: how many values were raised to it. A weight that is not
    finite (`finite` is False and the three numbers are NaN) or all zero (`sigma_max` is 0) has no
    spectrum to repair and is left untouched.
    """

    sigma_max: float
    sigma_min: float
    tau: float
    raised: int
    finite: bool = True


@torch.no_grad()
def clamp_spectrum_(weight: Tensor, max_condition: float, sigma_floor: float) -> ClampOutcome:
    """Replace `weight` by U max(S, τ) Vᵀ, τ = max(sigma_floor, σ₁ / max_condition), in place.

    `weight`: (rows, cols), e.g. [1536, 576], float32 or float64. The result is exact to 1e-9·σ₁ and
    the rounding of the dtype. ValueError for other shapes and dtypes, max_condition < 1, or
    sigma_floor < 0.
    """
    if weight.dim() != 2:
        raise ValueError(
            f"The weight has the shape {tuple(weight.shape)}; clamp_spectrum_ takes one matrix"
            " (rows, cols)."
        )
    check_clampable("The weight", weight, max_condition, sigma_floor)
    usable = (
        weight if weight.device.type == "cuda" else weight.cpu()
    )  # not every accelerator has float64
    outcome, _ = clamp_exactly_(
        usable,
        gram_matrix(as_wide(usable), torch.float64),
        max_condition,
        sigma_floor,
        suspect=False,
    )
    if outcome.raised and usable is not weight:
        weight.copy_(usable)
    return outcome


def clamp_exactly_(
    matrix: Tensor, gram: Tensor, max_condition: float, sigma_floor: float, suspect: bool
) -> tuple[ClampOutcome, tuple[float, float] | None]:
    """Clamp `matrix` by its exact spectrum; also bounds of all its singular values afterwards, None
    where it has no spectrum.

    `gram` is the float64 Gram matrix of `as_wide(matrix)`. What is decomposed is decomposed on its
    device; the products with the matrix are made on the matrix's own. `suspect` says that something
    seems to lie below τ: the eigenvectors, which cost as much again as the eigenvalues, are then
    asked for at once.
    """
    wide = as_wide(matrix)
    trace = gram.trace().item()
    squares_fit = 1e-250 < trace < math.inf
    if not squares_fit:
        if not torch.isfinite(matrix).all():
            return ClampOutcome(math.nan, math.nan, math.nan, 0, finite=False), None
        if not matrix.any():
            return ClampOutcome(0.0, 0.0, sigma_floor, 0), None
    resolved = False
    if squares_fit:
        eigenvalues, eigenvectors = (
            torch.linalg.eigh(gram) if suspect else (torch.linalg.eigvalsh(gram), None)
        )
        sigma = eigenvalues.clamp(min=0).sqrt()
        resolved = bool(sigma[0] >= _GRAM_RESOLUTION * sigma[-1])
    if not resolved:
        left, sigma, right = torch.linalg.svd(
            matrix.to(gram.device, torch.float64), full_matrices=False
        )
        left, sigma, right = (
            left.flip(1),
            sigma.flip(0),
            right.flip(0),
        )  # ascending, as eigh gives them
    sigma_min, sigma_max = sigma[0].item(), sigma[-1].item()
    tau = max(sigma_floor, sigma_max / max_condition)
    tolerance = sigma_max * max(_EXACTNESS, torch.finfo(matrix.dtype).eps)
    raised = int((sigma < tau - tolerance).sum())
    outcome = ClampOutcome(sigma_max, sigma_min, tau, raised)
    margin = _EXACTNESS * sigma_max
    if not raised:
        return outcome, (sigma_min - margin, sigma_max + margin)
    if resolved:
        eigenvectors = (
            torch.linalg.eigh(gram).eigenvectors if eigenvectors is None else eigenvectors
        )
        below = _product(eigenvectors[:, :raised].T, wide)
        within, values, right = torch.linalg.svd(below.to(gram.device), full_matrices=False)
        _add_product_(wide, eigenvectors[:, :raised] @ within * (tau - values).clamp(min=0), right)
    else:
        _add_product_(matrix, left[:, :raised] * (tau - sigma[:raised]), right[:raised])
    # Storing rounds, by ‖·‖₂ ≤ eps/2·‖W'‖_F.
    margin += torch.finfo(matrix.dtype).eps * math.sqrt(len(sigma)) * max(sigma_max, tau)
    return outcome, (tau - tolerance - margin, max(sigma_max, tau) + margin)


def check_clampable(name: str, weight: Tensor, max_condition: float, sigma_floor: float) -> None:
    """Raises ValueError for a weight or bounds that the clamp cannot work with; the message calls
    the weight `name`.
    """
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} is {weight.dtype}; the clamp takes float32 or float64, so pass the master"
            " weight."
        )
    if weight.numel() == 0:
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} is empty; a clamp needs at least one element."
        )
    if not 1 <= max_condition < math.inf:
        raise ValueError(
            f"{name} has max_condition = {max_condition}; it must be finite and at least 1."
        )
    if not 0 <= sigma_floor < math.inf:
        raise ValueError(
            f"{name} has sigma_floor = {sigma_floor}; it must be finite and at least 0."
        )


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows` [k, m] @ `matrix` [m, n] in float64, in pieces, on the matrix's device."""
    rows = rows.to(matrix.device)
    return torch.cat(
        [rows @ piece.double() for piece in matrix.split(PIECE[torch.float64], dim=1)], dim=1
    )


def _add_product_(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """`matrix` [m, n] += `left` [m, k] @ `right` [k, n] in float64, in pieces, rounded once, on the
    matrix's device.
    """
    left, right = left.to(matrix.device), right.to(matrix.device)
    size = PIECE[torch.float64]
    for piece, columns in zip(matrix.split(size, dim=1), right.split(size, dim=1), strict=True):
        piece.copy_(torch.addmm(piece.double(), left, columns))
