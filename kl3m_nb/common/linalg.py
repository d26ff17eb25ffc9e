"""Gram matrices, and what can be proven from them about the singular values of a weight.

`prove_healthy` shows, without a decomposition, that no singular value lies below its bound: a
Lanczos iteration estimates the ends of the spectrum, Cholesky factorisations of shifted Gram
matrices make bounds of the estimates. A Gram matrix squares the condition number, so one in float32
can prove only well-conditioned matrices healthy; float64 reaches a condition of about 1e5. The
bounds allow for all rounding (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed.,
section 3.5 and theorem 10.3).

Everything works on batches [batch, short, long] of matrices that have at most as many rows as
columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = {
    torch.float32: 512,
    torch.float64: 4096,
}  # columns multiplied at a time: bounds memory and rounding


EIGENVALUES_UP_TO = (
    256  # rows up to which the eigenvalues of a Gram matrix cost no more than a proof
)


_STEPS = {
    torch.float32: 12,
    torch.float64: 24,
}  # of the Lanczos iteration; near the ceiling it pays to know σ₁ well


_BLOCK = 144  # rows of a Gram matrix computed at a time, each up to the diagonal only


_FLOAT32_SHORT = 1024  # rows up to which a float32 factorisation bounds σ₁ to a few percent


_FLOAT32_LONG = (
    4096  # columns beyond which the rounding of a float32 Gram matrix leaves nothing to prove
)


@dataclass(frozen=True)
class Proof:
    """Outcome of a test. When it `holds`, every σ lies in the interval (lower, upper), and lower >=
    tau >= the true τ.
    """

    holds: bool
    lower: float
    upper: float
    tau: float
    ritz_min: float
    ritz_max: float


def prove_healthy(
    gram: Tensor, columns: int, max_condition: float, sigma_floor: float
) -> list[Proof]:
    """Try to prove for every Gram matrix of `gram` [batch, short, short] that all singular values
    are above τ.

    `gram` comes from `gram_matrix`, of weights with so many `columns`. A Cholesky factorisation of
    A that runs through proves λ_min(A) >= −error. Applied to level·I − G and to G − level·I it
    turns estimates of the extreme eigenvalues of G = W Wᵀ into bounds. All numbers here are squares
    of singular values.
    """
    precision, short = gram.dtype, gram.shape[-1]
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    summed = min(columns, PIECE[precision]) + math.ceil(columns / PIECE[precision])
    gram_error = (
        _gamma(summed + 4, precision) * trace + short * columns * torch.finfo(precision).tiny
    )

    # A few percent more or less in σ₁ do not matter; on a GPU float32 may be less than it says.
    coarse = gram.float() if gram.device.type == "cpu" and short <= _FLOAT32_SHORT else gram
    coarse_error = _gamma(
        short + 4, coarse.dtype
    )  # of a factorisation, in units of the trace of what is factored
    smallest, ritz_max, residual = _lanczos(
        lambda vectors: coarse @ vectors, coarse, _STEPS[precision]
    )
    level = (ritz_max + residual).to(coarse.dtype) * 1.002
    below_level, _ = _factor(-coarse, level)
    upper = level.double() * (1 + short * coarse_error) + coarse_error * trace + gram_error

    tau = torch.clamp(upper / max_condition**2, min=sigma_floor**2)
    error = gram_error + _gamma(short + 4, precision) * trace
    level = (tau + error) * (1 + torch.finfo(precision).eps)
    if (
        precision == torch.float32
    ):  # can only succeed far above τ, so let it prove something that makes a certificate last
        level = torch.maximum(level, 0.8 * smallest)
    level = level.to(precision)
    above_level, factor = _factor(gram, -level)
    holds = below_level & above_level
    lower = torch.maximum(level.double() - error, tau)
    ritz_min = lower
    if holds.any():
        _, inverse, residual = _lanczos(
            lambda vectors: torch.cholesky_solve(vectors, factor), gram, steps=6
        )
        ritz_min = level.double() + 1 / inverse
        if (holds & (ritz_min > 4 * lower)).any():
            level = (0.9 * (level.double() + 1 / (inverse + residual))).to(precision)
            above_level, _ = _factor(gram, -level)
            lower = torch.where(above_level, torch.maximum(level.double() - error, lower), lower)
    squares = torch.stack([lower, upper, tau, ritz_min, ritz_max])
    return [
        Proof(proven, *values)
        for proven, values in zip(holds.tolist(), squares.sqrt().T.tolist(), strict=True)
    ]


def useful_precisions(matrix: Tensor) -> tuple[torch.dtype, ...]:
    """Precisions of the test that are worth trying on a CPU, cheapest first; none where eigenvalues
    cost no more.
    """
    if min(matrix.shape) <= EIGENVALUES_UP_TO:
        return ()
    try_float32 = (
        matrix.dtype == torch.float32
        and max(matrix.shape) <= _FLOAT32_LONG
        and _float32_products_are_ieee()
    )
    return (torch.float32, torch.float64) if try_float32 else (torch.float64,)


def as_wide(matrix: Tensor) -> Tensor:
    """`matrix`, or its transpose, whichever has at least as many columns as rows; a view."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def gram_matrix(wide: Tensor, precision: torch.dtype) -> Tensor:
    """W Wᵀ [..., short, short] of `wide` [..., short, long], computed and summed in `precision`,
    half of it mirrored.
    """
    short = wide.shape[-2]
    gram = wide.new_zeros(*wide.shape[:-2], short, short, dtype=precision)
    starts = range(0, short, _BLOCK)
    for piece in wide.split(PIECE[precision], dim=-1):
        piece = piece.to(precision)
        for start in starts:
            end = start + _BLOCK
            gram[..., start:end, :end] += piece[..., start:end, :] @ piece[..., :end, :].mT
    for start in starts:
        gram[..., :start, start : start + _BLOCK] = gram[..., start : start + _BLOCK, :start].mT
    return gram


def _factor(matrix: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Whether `matrix` [batch, n, n] + `diagonal` [batch]·I has a Cholesky factor, and the factor
    (the identity where not).
    """
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(diagonal.unsqueeze(-1))
    factor, failed_at = torch.linalg.cholesky_ex(shifted)
    definite = (failed_at == 0) & torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(
        -1
    )  # an infinity can slip through
    if not definite.all():
        factor[~definite] = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return definite, factor


def _lanczos(
    apply: Callable[[Tensor], Tensor], like: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest Ritz value of a symmetric map, and the norm of the latter's residual:
    three [batch] in float64.

    The spectrum reaches at least from the one to the other. `apply` maps [batch, n, 1] to the same;
    `like` [batch, n, n] gives shape, dtype and device. The start is always the same, so results can
    be had again.
    """
    batch, size = like.shape[:2]
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(size, 1, generator=generator, dtype=torch.float64).to(like)
    vector = (vector / vector.norm()).expand(batch, size, 1)
    previous, coupling = torch.zeros_like(vector), vector.new_zeros(batch, 1, 1)
    diagonal, off_diagonal = [], []
    for _ in range(min(steps, size)):
        image = apply(vector)
        projection = (vector * image).sum(-2, keepdim=True)
        image = image - projection * vector - coupling * previous
        coupling = image.norm(dim=-2, keepdim=True)
        previous, vector = vector, image / coupling.clamp(min=torch.finfo(like.dtype).tiny)
        diagonal.append(projection)
        off_diagonal.append(coupling)
    diagonal, off_diagonal = (
        torch.cat(values, dim=1).squeeze(-1).double().cpu() for values in (diagonal, off_diagonal)
    )
    tridiagonal = torch.diag_embed(diagonal) + torch.diag_embed(off_diagonal[:, :-1], offset=-1)
    # A weight that is not finite gets this far; its proof fails, and the reason is found by
    # decomposing it.
    values, vectors = torch.linalg.eigh(tridiagonal.nan_to_num(0.0, 0.0, 0.0))
    residual = off_diagonal[:, -1] * vectors[:, -1, -1].abs()
    return tuple(numbers.to(like.device) for numbers in (values[:, 0], values[:, -1], residual))


def _gamma(operations: int, precision: torch.dtype) -> float:
    """Higham's γ_k = k·u / (1 − k·u): relative error of a sum of products of length k, in any
    order.
    """
    rounding = operations * torch.finfo(precision).eps / 2
    return rounding / (1 - rounding) if rounding < 1 else math.inf


def _float32_products_are_ieee() -> bool:
    """False where the backend multiplies float32 in bfloat16 or TF32, as
    `torch.set_float32_matmul_precision` allows it to.
    """
    probe = torch.full((64, 64), 1 + 2.0**-12)
    return bool(((probe @ probe) - 64 * (1 + 2.0**-12) ** 2).abs().max() < 1e-3)
