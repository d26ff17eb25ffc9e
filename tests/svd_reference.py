"""Matrices with given singular values, and the clamp of them by a full SVD in float64: what the
clamp's tests share.
"""

import torch

CONDITION, FLOOR = 3000.0, 5e-5


def orthonormal(rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, cols, generator=generator, dtype=torch.float64))[0]


def with_spectrum(sigma, rows, cols, dtype=torch.float64, seed=0):
    """A (rows, cols) matrix with the singular values `sigma` and random singular vectors."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return (
        (orthonormal(rows, len(sigma), seed) * sigma) @ orthonormal(cols, len(sigma), seed + 1).T
    ).to(dtype)


def reference(weight, max_condition=CONDITION, sigma_floor=FLOOR):
    """W', S and τ by a full SVD in float64."""
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    tau = max(sigma_floor, sigma[0].item() / max_condition)
    return (left * sigma.clamp(min=tau)) @ right, sigma, tau


def geometric(count, condition, largest=1.0):
    return largest * condition ** -torch.linspace(0, 1, count, dtype=torch.float64)


def relative_error(weight, expected):
    return (
        torch.linalg.matrix_norm(weight.double() - expected, 2)
        / torch.linalg.matrix_norm(expected, 2)
    ).item()
