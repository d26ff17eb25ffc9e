"""Muon against a float64 reference built from singular value decompositions, and against
torch.optim.Muon.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kl3m_nb.optim import muon
from kl3m_nb.optim.muon import Muon, orthogonalize, singular_value_bound

KELLER_JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [  # the published table, with the safety factor of its algorithm 1
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
]
PRECISIONS = ["float32", "bfloat16"]
SHAPES = [(24, 24), (16, 40), (40, 16), (3, 16, 24), (2, 2, 24, 16)]


def reference_update(update: np.ndarray, polynomials=KELLER_JORDAN) -> np.ndarray:
    """U p(S) Vᵀ of each matrix in float64, S scaled to Frobenius norm 1."""
    u, s, vt = np.linalg.svd(update.astype(np.float64), full_matrices=False)
    s = s / (np.linalg.norm(s, axis=-1, keepdims=True) + 1e-7)
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return u * s[..., None, :] @ vt


class ReferenceMuon:
    """Keller Jordan's update on one parameter in float64."""

    def __init__(self, weight, lr, momentum, weight_decay, nesterov, factor, fused=1):
        self.weight, self.buffer = weight.detach().double().numpy().copy(), 0.0
        self.lr, self.momentum, self.weight_decay, self.nesterov = (
            lr,
            momentum,
            weight_decay,
            nesterov,
        )
        self.factor, self.fused = factor, fused

    def step(self, gradient: torch.Tensor) -> None:
        gradient = gradient.double().numpy()
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        update = (
            (1 - self.momentum) * gradient + self.momentum * self.buffer
            if self.nesterov
            else self.buffer
        )
        parts = np.concatenate(
            [reference_update(part) for part in np.split(update, self.fused, axis=-2)], axis=-2
        )
        self.weight = (
            1 - self.lr * self.weight_decay
        ) * self.weight - self.lr * self.factor * parts


def conditioned(*shape, low=0.3, generator=None) -> torch.Tensor:
    """Matrices whose singular values are spread evenly over [low, 1]."""
    u, _, vt = torch.linalg.svd(
        torch.randn(*shape, generator=generator, dtype=torch.float64), full_matrices=False
    )
    return u * torch.linspace(1.0, low, min(shape[-2:]), dtype=torch.float64) @ vt


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def take_step(optimizer: Muon) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_float32_steps_equal_the_float64_reference(shape, nesterov, adjust_lr):
    torch.manual_seed(0)
    rows, cols = shape[-2:]
    factor = (
        math.sqrt(max(1, rows / cols))
        if adjust_lr == "original"
        else 0.2 * math.sqrt(max(rows, cols))
    )
    parameter = nn.Parameter(torch.randn(shape))
    expected = ReferenceMuon(parameter, 0.1, 0.9, 0.3, nesterov, factor)
    start = expected.weight
    settings = dict(
        momentum=0.9, weight_decay=0.3, nesterov=nesterov, adjust_lr=adjust_lr, precision="float32"
    )
    optimizer = Muon([parameter], lr=0.1, **settings)
    for _ in range(4):
        parameter.grad = torch.randn(shape)
        expected.step(parameter.grad)
        optimizer.step()
    assert relative_error(parameter.detach().numpy() - start, expected.weight - start) < 1e-5


def test_fused_matrices_are_updated_each_on_its_own():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 32, 24))
    expected = ReferenceMuon(
        parameter, 0.1, 0.9, 0.0, True, factor=1.0, fused=2
    )  # each matrix is 16 × 24: wide
    start = expected.weight
    optimizer = Muon(
        [{"params": [parameter], "fused": 2}], lr=0.1, momentum=0.9, precision="float32"
    )
    for _ in range(2):
        parameter.grad = torch.randn(3, 32, 24) * torch.linspace(1, 50, 32)[:, None]
        expected.step(parameter.grad)
        optimizer.step()
    assert relative_error(parameter.detach().numpy() - start, expected.weight - start) < 1e-5


@pytest.mark.parametrize("shape", [(64, 64), (32, 80), (80, 32)], ids=str)
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_update_as_torch(shape, adjust_lr, nesterov, precision):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    settings = dict(lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=nesterov, ns_steps=5)
    optimizer = Muon([ours], adjust_lr=adjust_lr, precision=precision, **settings)
    reference = torch.optim.Muon([theirs], adjust_lr_fn=adjust_lr, **settings)
    for _ in range(3):
        before = theirs.detach().clone()
        ours.data.copy_(before)
        ours.grad = conditioned(*shape).float()
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        assert (
            relative_error(ours.detach() - before, theirs.detach() - before) < 2.5e-2
        )  # torch iterates in bfloat16


@pytest.mark.parametrize(
    ("coefficients", "polynomials"),
    [("keller_jordan", KELLER_JORDAN), ("polar_express", POLAR_EXPRESS)],
)
@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_orthogonalize_maps_singular_values_through_the_polynomials(
    coefficients, polynomials, steps
):
    matrices = torch.randn(2, 12, 30)
    actual = orthogonalize(matrices, steps, coefficients, "float32")
    assert relative_error(actual, reference_update(matrices.numpy(), polynomials[:steps])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orthogonalize_keeps_shape_and_dtype_and_its_input(dtype):
    matrices = conditioned(2, 3, 10, 6).to(dtype)
    before = matrices.clone()
    result = orthogonalize(matrices.requires_grad_(), precision="float32")
    assert result.shape == matrices.shape and result.dtype == dtype and not result.requires_grad
    assert torch.equal(matrices, before)
    assert relative_error(result.double(), reference_update(before.double().numpy())) < (
        1e-2 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("coefficients", ["keller_jordan", "polar_express"])
@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (128, 48), (1, 7)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_singular_values_of_an_update_lie_near_one(coefficients, shape, precision):
    values = torch.linalg.svdvals(
        orthogonalize(conditioned(*shape).float(), 5, coefficients, precision)
    )
    assert 0.6 < values.min() and values.max() < 1.25


@pytest.mark.parametrize("amx", [True, False])
def test_the_precision_is_chosen_by_device_unless_it_is_named(monkeypatch, amx):
    monkeypatch.setattr(muon, "_has_amx", lambda: amx)
    single, double = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float64)
    assert muon.iteration_dtype(single, "auto") == (torch.bfloat16 if amx else torch.float32)
    assert (
        muon.iteration_dtype(single.bfloat16(), "float32")
        == muon.iteration_dtype(single, "float32")
        == torch.float32
    )
    assert muon.iteration_dtype(double, "auto") == torch.float64
    assert muon.iteration_dtype(double, "bfloat16") == torch.bfloat16


def test_zero_matrices_stay_zero():
    matrices = torch.stack([torch.zeros(8, 5), torch.randn(8, 5)])
    result = orthogonalize(matrices)
    assert not result[0].any() and result[1].any()


def random_spectrum(rows: int, cols: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "ones":
        return torch.ones(rows, cols)
    if kind == "diagonal":
        return torch.eye(rows, cols) * torch.rand(cols, generator=generator)
    if kind == "rank one":
        return torch.randn(rows, 1, generator=generator) @ torch.randn(1, cols, generator=generator)
    if kind == "conditioned":
        return conditioned(rows, cols, generator=generator).float()
    return torch.randn(rows, cols, generator=generator) ** 5  # heavy tails


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    kind=st.sampled_from(["ones", "diagonal", "rank one", "conditioned", "heavy tails"]),
    steps=st.integers(3, 5),
    coefficients=st.sampled_from(["keller_jordan", "polar_express"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_no_singular_value_exceeds_the_bound(rows, cols, kind, steps, coefficients, dtype, seed):
    matrix = random_spectrum(rows, cols, kind, seed)[None]
    result = muon._newton_schulz(
        muon._normalized(matrix, dtype), muon.polynomials(steps, coefficients)
    )
    assert torch.linalg.matrix_norm(result.double(), 2).item() <= singular_value_bound(
        steps, coefficients, dtype
    )


@pytest.mark.parametrize("coefficients", ["keller_jordan", "polar_express"])
@pytest.mark.parametrize("steps", [3, 4, 5])
def test_the_bound_is_tight_and_holds_for_every_bfloat16_value(coefficients, steps):
    bits = torch.arange(0x3F81, dtype=torch.int16)  # of every bfloat16 in [0, 1]
    values = bits.view(torch.bfloat16).view(-1, 1, 1).clone()
    largest = muon._newton_schulz(values, muon.polynomials(steps, coefficients)).max().item()
    bound = singular_value_bound(steps, coefficients, torch.bfloat16)
    assert 0.98 * bound < largest <= bound


@pytest.mark.parametrize(
    ("coefficients", "polynomials"),
    [("keller_jordan", KELLER_JORDAN), ("polar_express", POLAR_EXPRESS)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [3, 4, 5])
def test_the_bound_has_room_for_the_rounding_of_the_largest_value(
    coefficients, polynomials, dtype, steps
):
    """Rows of equal entries, their norms about the one that the exact polynomials make largest:
    some end beyond that.
    """

    def exact(values: np.ndarray) -> np.ndarray:
        for a, b, c in polynomials[:steps]:
            values = a * values + b * values**3 + c * values**5
        return values

    grid = np.linspace(0.0, 1.0, 1_000_001)
    peak = grid[exact(grid).argmax()]
    grid = np.linspace(peak - 1e-6, peak + 1e-6, 20_001)
    peak, largest = grid[exact(grid).argmax()], exact(grid).max()
    eps, cols = torch.finfo(dtype).eps, 1000
    norms = torch.from_numpy(
        peak * (1.0 + np.linspace(-0.1, 0.1, 1000) * math.sqrt(eps))
    )  # the exact result is flat there
    rows = (norms / math.sqrt(cols)).to(dtype).view(-1, 1, 1).repeat(1, 1, cols)
    result = muon._newton_schulz(rows, muon.polynomials(steps, coefficients))
    rounded = (
        math.sqrt(cols) * result.double().amin(-1).max().item()
    )  # at most the norm of one of them
    assert (
        largest * (1.0 + eps / 2)
        < rounded
        <= singular_value_bound(steps, coefficients, dtype)
        < 1.02 * largest
    )


@pytest.mark.parametrize("norm", [1e-5, 1e-7, 1e-9])
def test_a_gradient_that_all_but_vanishes_is_not_blown_up(norm):
    """To the norm 1e-7 is added, as in Keller Jordan's code."""
    matrices = conditioned(12, 30, generator=torch.Generator().manual_seed(0))
    matrices *= norm / torch.linalg.matrix_norm(matrices)
    assert (
        relative_error(
            orthogonalize(matrices.float(), precision="float32"), reference_update(matrices.numpy())
        )
        < 1e-4
    )


@pytest.mark.parametrize("coefficients", ["keller_jordan", "polar_express"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_movement_bounds_hold_for_every_matrix(coefficients, precision):
    torch.manual_seed(0)
    groups = [
        {
            "params": [nn.Parameter(torch.randn(20, 20)), nn.Parameter(torch.randn(30, 10))],
            "weight_decay": 2.0,
        },
        {
            "params": [nn.Parameter(torch.randn(3, 16, 24))],
            "fused": 2,
            "lr": 0.01,
            "adjust_lr": "match_rms_adamw",
        },
        {
            "params": [nn.Parameter(1e6 * torch.randn(8, 8))],
            "lr": 0.1,
        },  # a few units in the last place
    ]
    optimizer = Muon(groups, lr=0.05, ns_steps=4, coefficients=coefficients, precision=precision)
    for _ in range(5):
        before = copy.deepcopy([group["params"] for group in groups])
        take_step(optimizer)
        bounds = optimizer.movement_bounds()
        for group, old_parameters in zip(groups, before, strict=True):
            for parameter, old in zip(group["params"], old_parameters, strict=True):
                matrices = (-1, parameter.size(-2) // group.get("fused", 1), parameter.size(-1))
                old = old.detach().double().reshape(matrices)
                moved = torch.linalg.matrix_norm(
                    parameter.detach().double().reshape(matrices) - old, 2
                )
                additive, relative = bounds[parameter]
                assert (moved <= additive + relative * torch.linalg.matrix_norm(old, 2)).all()
    square = groups[0]["params"][0]
    assert bounds[square][0] == pytest.approx(
        0.05 * singular_value_bound(4, coefficients, getattr(torch, precision)), rel=1e-4
    )
    assert bounds[square][1] == pytest.approx(0.05 * 2.0, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_a_movement_bound_holds_where_rounding_moves_a_weight_further_than_its_update(
    dtype, direction
):
    """Every entry is to move by 0.55 of the unit in its last place, and so moves by a whole one."""
    pattern = torch.tensor([[1.0]])
    for _ in range(3):
        pattern = torch.cat(
            [torch.cat([pattern, pattern], 1), torch.cat([pattern, -pattern], 1)]
        )  # Hadamard's, 8 × 8
    update = orthogonalize(direction * pattern, precision="float32")
    unit = 2.0**19 * torch.finfo(dtype).eps
    parameter = nn.Parameter((1.5 * 2.0**19 * pattern).to(dtype))
    optimizer = Muon(
        [parameter], lr=0.55 * unit / update.abs().mean().item(), momentum=0.0, precision="float32"
    )
    before = parameter.detach().double().clone()
    parameter.grad = (direction * pattern).to(dtype)
    optimizer.step()
    moved = torch.linalg.matrix_norm(parameter.detach().double() - before, 2).item()
    additive, relative = optimizer.movement_bounds()[parameter]
    assert (
        moved == pytest.approx(unit * math.sqrt(8))
        and moved > 1.2 * optimizer.param_groups[0]["lr"]
    )
    assert moved <= additive + relative * torch.linalg.matrix_norm(before, 2).item()


def test_parameters_without_a_gradient_stay_and_have_not_moved():
    still, moving = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
    optimizer = Muon([still, moving], lr=0.1, weight_decay=0.1)
    assert set(optimizer.movement_bounds().values()) == {(0.0, 0.0)}
    before = still.detach().clone()
    moving.grad = torch.randn(6, 6)
    optimizer.step()
    assert torch.equal(still, before) and still not in optimizer.state
    assert (
        optimizer.movement_bounds()[still] == (0.0, 0.0)
        and optimizer.movement_bounds()[moving][0] > 0.1
    )


class CountBatches(TorchDispatchMode):
    """Batch sizes of all batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.bmm:
            self.sizes.append(args[0].size(0))
        return func(*args, **(kwargs or {}))


def test_all_matrices_of_one_shape_are_one_batch():
    def parameters(*shapes):
        return [nn.Parameter(torch.randn(shape)) for shape in shapes]

    groups = [
        {"params": parameters((8, 8), (16, 8), (8, 8)), "lr": 0.1},
        {"params": parameters((8, 8), (5, 8, 8)), "lr": 0.2},
        {"params": parameters((2, 32, 8)), "fused": 2},
    ]
    optimizer = Muon(groups, lr=0.3, ns_steps=3)
    with CountBatches() as seen:
        take_step(optimizer)
    assert sorted(seen.sizes) == [5] * 3 + [8] * 3  # 1 + 2·2 of 16 × 8, 3 + 5 of 8 × 8


def test_batching_changes_no_update(monkeypatch):
    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        shapes = [(12, 12), (12, 12), (4, 12, 12), (12, 20), (12, 12)]
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = Muon(
            [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}],
            lr=0.05,
            weight_decay=0.1,
        )
        take_step(optimizer)
        return [parameter.detach() for parameter in parameters]

    together = run()
    monkeypatch.setitem(muon._BATCH_ELEMENTS, "cpu", 300)  # two matrices at most
    for one, other in zip(together, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-6)


def test_transposing_everything_transposes_the_update():
    matrix = torch.randn(9, 21)
    torch.testing.assert_close(orthogonalize(matrix).mT, orthogonalize(matrix.mT))


def test_state_round_trip_continues_the_same_run():
    def build():
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(2, 9, 6))]
        return parameters, Muon(parameters, lr=0.1, weight_decay=0.01)

    first, optimizer = build()
    for _ in range(3):
        take_step(optimizer)
    second, resumed = build()
    with torch.no_grad():
        torch._foreach_copy_(second, first)
    state = copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(state)
    assert [set(entry) for entry in state["state"].values()] == [{"momentum_buffer"}] * 2
    for _ in range(2):
        gradients = [torch.randn_like(parameter) for parameter in first]
        for parameter, other, gradient in zip(first, second, gradients, strict=True):
            parameter.grad, other.grad = gradient, gradient.clone()
        optimizer.step()
        resumed.step()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_torch_scheduler_drives_the_groups():
    parameters = [nn.Parameter(torch.zeros(6, 6)), nn.Parameter(torch.zeros(6, 6))]
    optimizer = Muon(
        [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.2}],
        lr=1.0,
        momentum=0.0,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0][step])
    gradient = conditioned(6, 6).float()
    update = orthogonalize(gradient)
    for total in (1.0, 1.5, 1.5):
        for parameter in parameters:
            parameter.grad = gradient.clone()
        optimizer.step()
        scheduler.step() if total == 1.0 or scheduler.last_epoch < 2 else None
        for parameter, lr in zip(parameters, (0.1, 0.2), strict=True):
            torch.testing.assert_close(parameter.detach(), -lr * total * update)


def test_bfloat16_parameters_keep_their_dtype():
    parameter = nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
    optimizer = Muon([parameter], lr=0.5, momentum=0.0, precision="float32")
    parameter.grad = conditioned(8, 8).bfloat16()
    optimizer.step()
    assert parameter.dtype == optimizer.state[parameter]["momentum_buffer"].dtype == torch.bfloat16
    assert (
        relative_error(
            parameter.detach().double(), -0.5 * reference_update(parameter.grad.double().numpy())
        )
        < 1e-2
    )


def test_closure_is_called_with_gradients_enabled():
    parameter = nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([parameter], lr=0.1)

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    expected = parameter.detach().square().sum()
    assert optimizer.step(closure) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "learning rate"),
        ({"lr": math.inf}, "learning rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight decay"),
        ({"ns_steps": 2}, "3 to 5"),
        ({"ns_steps": 6}, "integer from 1 to 5"),
        ({"ns_steps": 5.0}, "integer"),
        ({"precision": "float16"}, "one of auto, float32, bfloat16"),
        ({"adjust_lr": "none"}, "adjust_lr"),
        ({"coefficients": "chebyshev"}, "polar_express"),
    ],
    ids=lambda value: str(value),
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.zeros(4, 4))], **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [nn.Parameter(torch.zeros(4, 4))], **options}], lr=0.1)


def test_parameters_that_hold_no_matrices_are_refused():
    with pytest.raises(ValueError, match="AdamW"):
        Muon([nn.Parameter(torch.zeros(4))], lr=0.1)
    with pytest.raises(ValueError, match="complex"):
        Muon([nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))], lr=0.1)
    with pytest.raises(ValueError, match="fused"):
        Muon([{"params": [nn.Parameter(torch.zeros(5, 4))], "fused": 2}], lr=0.1)
    with pytest.raises(ValueError, match="at least two dimensions"):
        orthogonalize(torch.zeros(4))
    shared = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        Muon([{"params": [shared]}, {"params": [shared]}], lr=0.1)


@pytest.mark.parametrize(
    "bad",
    [
        {"params": [nn.Parameter(torch.zeros(3))]},
        {"params": [nn.Parameter(torch.zeros(3, 2))], "lr": -1.0},
        {"params": [nn.Parameter(torch.zeros(3, 2))], "fused": 2},
        {"params": [nn.Parameter(torch.zeros(3, 2))], "ns_steps": 2},
        {"params": [nn.Parameter(torch.zeros(3, 2))], "precision": "half"},
    ],
    ids=["a vector", "lr", "fused", "ns_steps", "precision"],
)
def test_a_group_that_is_refused_leaves_nothing_behind(bad):
    parameter = nn.Parameter(torch.randn(4, 3))
    optimizer, alone = Muon([parameter], lr=0.1), nn.Parameter(parameter.detach().clone())
    with pytest.raises(ValueError):
        optimizer.add_param_group(bad)
    assert [group["params"] for group in optimizer.param_groups] == [[parameter]]
    bad["params"][0].grad, parameter.grad = torch.ones_like(bad["params"][0]), torch.ones(4, 3)
    alone.grad = torch.ones(4, 3)
    optimizer.step()
    Muon([alone], lr=0.1).step()
    assert torch.equal(parameter, alone) and not bad["params"][0].any()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    assert len(optimizer.param_groups) == 2
