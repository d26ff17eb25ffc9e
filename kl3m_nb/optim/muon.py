"""Muon for the matrices of a model, orthogonalised in batches of one shape.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix
by a matrix with the same singular vectors and singular values near 1, found with a few
Newton-Schulz steps. `torch.optim.Muon` does so one matrix at a time; here all matrices of one
shape, over all parameter groups, go through the same few batched products. The small square factor
of the iteration stands left of a wide matrix and right of a tall one, so nothing is ever
transposed.

Under torch.distributed every rank takes the same steps and orthogonalises its share of each batch.

The polynomial of the iteration bounds every singular value an update can have, so
`Muon.movement_bounds` tells how far each weight can have moved in spectral norm without looking at
it. The spectral clamp skips matrices on that ground.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kl3m_nb.common import distributed

KELLER_JORDAN = (3.4445, -4.7750, 2.0315)


# arXiv:2505.16932, algorithm 1, without the safety factor that the paper applies to all of these.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


POLAR_EXPRESS_SAFETY = 1.01


_NORM_EPSILON = 1e-7


PRECISIONS = ("auto", "float32", "bfloat16")


_BATCH_ELEMENTS = {
    "cuda": 2**26,
    "cpu": 2**22,
}  # bounds the memory of a batch; on a CPU keeps it in the cache


# Relative growth of the largest singular value by rounding in one step: five times what the worst
# matrices of the tests show. The polynomials of Polar Express leave their domain, and bound
# nothing, beyond 1%.
_ROUNDING_SLACK = {torch.bfloat16: 2.0**-7, torch.float32: 1e-3, torch.float64: 1e-3}


def polynomials(steps: int, coefficients: str) -> tuple[tuple[float, float, float], ...]:
    """The (a, b, c) of each step of the iteration X ← aX + b(XXᵀ)X + c(XXᵀ)²X.

    `coefficients` is "keller_jordan" (the same polynomial at every step) or "polar_express"
    (arXiv:2505.16932, another one at every step). Raises ValueError for another name, or a number
    of steps outside 1 … 5.
    """
    if type(steps) is not int or not 1 <= steps <= 5:
        raise ValueError(
            f"The number of Newton-Schulz steps is {steps!r}; it must be an integer from 1 to 5."
        )
    if coefficients == "keller_jordan":
        return (KELLER_JORDAN,) * steps
    if coefficients == "polar_express":
        safety = POLAR_EXPRESS_SAFETY
        return tuple(
            (a / safety, b / safety**3, c / safety**5) for a, b, c in POLAR_EXPRESS[:steps]
        )
    raise ValueError(
        f"The coefficients are {coefficients!r}; they must be 'keller_jordan' or 'polar_express'."
    )


def orthogonalize(
    matrices: Tensor, steps: int = 5, coefficients: str = "keller_jordan", precision: str = "auto"
) -> Tensor:
    """Matrices with the singular vectors of `matrices` and all singular values pushed towards 1.

    matrices: [..., rows, cols], for instance [240, 576, 576]; the result has its shape and dtype.
    For `precision` see `iteration_dtype`. Zero matrices stay zero. Raises ValueError for fewer than
    two dimensions and for the options that `polynomials` and `iteration_dtype` refuse.
    """
    if matrices.ndim < 2:
        raise ValueError(
            f"The tensor to orthogonalise has the shape {tuple(matrices.shape)}; it needs at least"
            " two dimensions."
        )
    iteration, dtype = polynomials(steps, coefficients), iteration_dtype(matrices, precision)
    with torch.no_grad():
        batch = matrices.reshape(-1, *matrices.shape[-2:])
        return (
            _newton_schulz(_normalized(batch, dtype), iteration)
            .view(matrices.shape)
            .to(matrices.dtype)
        )


def iteration_dtype(matrices: Tensor, precision: str) -> torch.dtype:
    """What the Newton-Schulz iteration of `matrices` is computed in.

    "float32": their own dtype, at least float32. "bfloat16": that, which moves an update by about
    1%. "auto": bfloat16 where it is several times as fast, on CUDA and, for float32, on CPUs with
    AMX; elsewhere as "float32". ValueError for another word.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}.")
    exact = torch.promote_types(matrices.dtype, torch.float32)
    is_fast = matrices.is_cuda or (
        matrices.device.type == "cpu" and exact == torch.float32 and _has_amx()
    )
    return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and is_fast) else exact


@functools.cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def singular_value_bound(steps: int, coefficients: str, dtype: torch.dtype) -> float:
    """A bound on every singular value that `orthogonalize` can return when it iterates in `dtype`.

    The input of the first step has singular values in [0, 1]. Step by step the interval is mapped
    through the polynomial, exactly (its extremes lie at the ends or where its derivative is zero),
    and widened by a slack for rounding.
    """
    return _singular_value_bound(polynomials(steps, coefficients), _ROUNDING_SLACK[dtype])


@functools.cache
def _singular_value_bound(iteration: tuple[tuple[float, float, float], ...], slack: float) -> float:
    bound = 1.0 + slack
    for a, b, c in iteration:
        extremes = [bound]
        discriminant = (
            9.0 * b * b - 20.0 * a * c
        )  # of the derivative a + 3b·x² + 5c·x⁴, a quadratic in x²
        if discriminant >= 0.0:
            squares = [
                (-3.0 * b + sign * math.sqrt(discriminant)) / (10.0 * c) for sign in (-1.0, 1.0)
            ]
            extremes += [math.sqrt(square) for square in squares if 0.0 < square < bound * bound]
        bound = max(abs(a * x + b * x**3 + c * x**5) for x in extremes) * (1.0 + slack)
    return bound


def _normalized(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """`batch` [n, rows, cols] divided by its Frobenius norms, which are taken before anything is
    rounded to `dtype`.
    """
    norms = torch.linalg.vector_norm(
        batch, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(batch.dtype, torch.float32)
    )
    return torch.div(batch, norms + _NORM_EPSILON).to(dtype)


def _newton_schulz(batch: Tensor, iteration: Iterable[tuple[float, float, float]]) -> Tensor:
    """The iteration on `batch` [n, rows, cols] with singular values at most 1; uses `batch` as a
    work space.
    """
    tall = batch.size(-2) > batch.size(-1)
    side = min(batch.shape[-2:])
    gram = batch.new_empty(batch.size(0), side, side)
    factor = torch.empty_like(gram)
    result = torch.empty_like(batch)
    for a, b, c in iteration:
        torch.bmm(*((batch.mT, batch) if tall else (batch, batch.mT)), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=factor)
        torch.baddbmm(batch, *((batch, factor) if tall else (factor, batch)), beta=a, out=result)
        batch, result = result, batch
    return batch


@dataclass(frozen=True)
class _Member:
    """A parameter of a batch, with the factors its group gives it: W ← decay·W - rate·O."""

    parameter: nn.Parameter
    momentum_buffer: Tensor
    decay: float
    rate: float


@dataclass(frozen=True)
class _BatchKey:
    """What the matrices of one batch have in common. `buffer_weight` is μ with Nesterov and 1
    without: u = lerp(g, m, weight).
    """

    rows: int
    cols: int
    device: torch.device
    dtype: torch.dtype
    iteration_dtype: torch.dtype
    buffer_weight: float
    iteration: tuple[tuple[float, float, float], ...]


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay: m ← μm + (1-μ)g, u = (1-μ)g + μm, W ← (1 - lr·wd)·W -
    lr·s·orthogonalize(u).

    Without `nesterov`, u = m. Every option can be set per parameter group, and any torch scheduler
    can drive the groups' `lr`. The state is one momentum buffer per parameter.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: str = "original",
        coefficients: str = "keller_jordan",
        precision: str = "auto",
    ) -> None:
        """
        params: parameters [..., rows, cols], or groups of them. Leading dimensions (experts) hold
            independent matrices. A group may set `fused`: that many matrices of equal height are
            stacked along the rows of each stored matrix (2 for gate and up projections in one) and
            are orthogonalised each on its own.
        lr: learning rate before the shape factor s; the weight decay uses it as it is.
        adjust_lr: "original", s = √max(1, rows/cols), or "match_rms_adamw", s = 0.2·√max(rows,
            cols) (arXiv:2502.16982).
        ns_steps, coefficients: 3 to 5 steps of "keller_jordan" or "polar_express" (see
            `polynomials`).
        precision: of these steps, "auto", "float32" or "bfloat16" (see `iteration_dtype`).

        Raises ValueError for a parameter that holds no real matrices and for any value outside
        these ranges.
        """
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
            "coefficients": coefficients,
            "precision": precision,
            "fused": 1,
        }
        super().__init__(params, defaults)
        self._movement: dict[nn.Parameter, tuple[float, float]] = {}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._movement = {}

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group, checked as the constructor does. One that is refused, with ValueError,
        leaves the optimizer as it was.
        """
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        _check_group(group)
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._movement = {}
        for key, members in self._batches():
            self._update(key, members)
        return loss

    def movement_bounds(self) -> dict[nn.Parameter, tuple[float, float]]:
        """For each parameter (additive, relative) with ‖ΔW‖₂ ≤ additive + relative·‖W‖₂ in the last
        step, W its value before.

        With leading dimensions or `fused` above 1 this holds for each single matrix. A parameter
        that the last step left alone has (0.0, 0.0), as has every one before the first step. The
        bound presumes finite gradients.
        """
        return {
            parameter: self._movement.get(parameter, (0.0, 0.0))
            for group in self.param_groups
            for parameter in group["params"]
        }

    def _batches(self) -> Iterator[tuple[_BatchKey, list[_Member]]]:
        """Advance the momentum and sort the parameters with gradients into batches of
        bounded size.
        """
        batches: dict[_BatchKey, list[_Member]] = {}
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [
                distributed.local(self.state[parameter]["momentum_buffer"])
                for parameter in parameters
            ]
            gradients = [distributed.local(parameter.grad) for parameter in parameters]
            torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])

            lr = float(group["lr"])
            iteration = polynomials(group["ns_steps"], group["coefficients"])
            buffer_weight = group["momentum"] if group["nesterov"] else 1.0
            for parameter, momentum_buffer in zip(parameters, buffers, strict=True):
                rows, cols = parameter.size(-2) // group["fused"], parameter.size(-1)
                shrink = lr * group["weight_decay"]
                rate = lr * _shape_factor(rows, cols, group["adjust_lr"])
                dtype = iteration_dtype(parameter, group["precision"])
                key = _BatchKey(
                    rows, cols, parameter.device, parameter.dtype, dtype, buffer_weight, iteration
                )
                batches.setdefault(key, []).append(
                    _Member(parameter, momentum_buffer, 1.0 - shrink, rate)
                )
                bound = singular_value_bound(group["ns_steps"], group["coefficients"], dtype)
                rounding = 2.0 * torch.finfo(parameter.dtype).eps * math.sqrt(min(rows, cols))
                self._movement[parameter] = (rate * bound * (1.0 + rounding), shrink + rounding)

        for key, members in batches.items():
            limit = (
                _BATCH_ELEMENTS.get(key.device.type, _BATCH_ELEMENTS["cpu"])
                * distributed.world().size
            )
            batch: list[_Member] = []
            elements = 0
            for member in members:
                if batch and elements + member.parameter.numel() > limit:
                    yield key, batch
                    batch, elements = [], 0
                batch.append(member)
                elements += member.parameter.numel()
            yield key, batch

    @staticmethod
    def _update(key: _BatchKey, members: list[_Member]) -> None:
        parameters = [member.parameter for member in members]
        updates = torch._foreach_lerp(
            [distributed.local(parameter.grad) for parameter in parameters],
            [member.momentum_buffer for member in members],
            key.buffer_weight,
        )
        updates = [
            distributed.whole_of(update, parameter)
            for update, parameter in zip(updates, parameters, strict=True)
        ]
        # A contiguous [..., fused·rows, cols] is a [count, rows, cols] in the same memory.
        batch = torch.cat([update.reshape(-1, key.rows, key.cols) for update in updates])
        del updates
        dtype = key.iteration_dtype
        batch = distributed.shared_out(
            lambda part: _newton_schulz(_normalized(part, dtype), key.iteration), batch, dtype
        )
        batch = batch.to(torch.promote_types(key.dtype, torch.float32))

        counts = [parameter.numel() // (key.rows * key.cols) for parameter in parameters]
        updates = [
            piece.view(parameter.shape)
            for piece, parameter in zip(batch.split(counts), parameters, strict=True)
        ]
        updates = [
            distributed.shard_of(update, parameter)
            for update, parameter in zip(updates, parameters, strict=True)
        ]
        weights = [distributed.local(parameter) for parameter in parameters]
        torch._foreach_mul_(updates, [-member.rate for member in members])
        torch._foreach_mul_(weights, [member.decay for member in members])
        torch._foreach_add_(weights, updates)


def _shape_factor(rows: int, cols: int, adjust_lr: str) -> float:
    return (
        math.sqrt(max(1.0, rows / cols))
        if adjust_lr == "original"
        else 0.2 * math.sqrt(max(rows, cols))
    )


def _check_group(group: dict) -> None:
    for parameter in group["params"]:
        if parameter.ndim < 2 or not parameter.is_floating_point():
            raise ValueError(
                f"Muon was given a {parameter.dtype} parameter of shape {tuple(parameter.shape)};"
                " it takes real matrices or stacks of them, give vectors to another optimizer such"
                " as AdamW."
            )
        if (
            type(group["fused"]) is not int
            or group["fused"] < 1
            or parameter.size(-2) % group["fused"]
        ):
            raise ValueError(
                f"fused is {group['fused']!r} for a parameter of shape {tuple(parameter.shape)}; it"
                " must be a whole number of matrices that divides the rows."
            )
    if not 0.0 <= group["lr"] < math.inf:
        raise ValueError(f"The learning rate is {group['lr']}; it must be finite and at least 0.")
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"The momentum is {group['momentum']}; it must lie in [0, 1).")
    if not 0.0 <= group["weight_decay"] < math.inf:
        raise ValueError(
            f"The weight decay is {group['weight_decay']}; it must be finite and at least 0."
        )
    if group["adjust_lr"] not in ("original", "match_rms_adamw"):
        raise ValueError(
            f"adjust_lr is {group['adjust_lr']!r}; it must be 'original' or 'match_rms_adamw'."
        )
    iteration_dtype(torch.empty(0), group["precision"])
    if len(polynomials(group["ns_steps"], group["coefficients"])) < 3:
        raise ValueError(f"ns_steps is {group['ns_steps']}; Muon needs 3 to 5.")
