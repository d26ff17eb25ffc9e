"""The clamp of one matrix against U max(S, τ) Vᵀ in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from svd_reference import CONDITION, FLOOR, geometric, orthonormal, reference, relative_error, with_spectrum

from kl3m_nb.clamping import ClampOutcome, clamp_spectrum_

SHAPES = [(80, 80), (48, 130), (130, 48)]


def spectra(count):
    """Adversarial spectra of `count` values with σ₁ = 1, by name."""
    healthy = geometric(count, 1000.0)

    def tail(*values):
        return torch.cat([healthy[: count - len(values)], torch.tensor(values, dtype=torch.float64)])

    return {
        "one below": tail(1e-4),
        "forty equal below": tail(*[1 / 4000] * 40),
        "equal at and below": tail(*[1 / 3000] * 20, *[1 / 3300] * 20),
        "just below": tail(1 / 3001),
        "small beyond a Gram matrix": tail(1e-6, 1e-8, 1e-10),
        "two equal and a tiny one": tail(1e-4, 1e-4, 1e-5),
        "flat": torch.ones(count, dtype=torch.float64),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", spectra(48))
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-9), (torch.float32, 2e-7)])
def test_equals_the_full_svd(shape, name, dtype, accuracy):
    weight = with_spectrum(spectra(min(shape))[name], *shape, dtype)
    expected, sigma, tau = reference(weight)
    outcome = clamp_spectrum_(weight, CONDITION, FLOOR)
    assert relative_error(weight, expected) < accuracy
    assert (outcome.sigma_max, outcome.sigma_min) == pytest.approx((sigma[0].item(), sigma[-1].item()), rel=1e-7, abs=1e-9)
    assert outcome.tau == pytest.approx(tau, rel=1e-9)
    assert outcome.raised == int((sigma < tau - max(1e-9, torch.finfo(dtype).eps)).sum())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 24),
    cols=st.integers(1, 24),
    exponents=st.lists(st.floats(-7, 1), min_size=24, max_size=24),
    max_condition=st.floats(1, 1e6),
    sigma_floor=st.sampled_from([0.0, 1e-3, 3.0]),
    seed=st.integers(0, 100),
)
def test_equals_the_full_svd_for_random_spectra(rows, cols, exponents, max_condition, sigma_floor, seed):
    weight = with_spectrum([10.0**exponent for exponent in exponents[: min(rows, cols)]], rows, cols, seed=seed)
    expected, sigma, tau = reference(weight, max_condition, sigma_floor)
    outcome = clamp_spectrum_(weight, max_condition, sigma_floor)
    assert torch.linalg.matrix_norm(weight - expected, 2) < 1e-6 * max(sigma[0], tau)
    assert outcome.raised <= int((sigma < tau * (1 + 1e-9)).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("defect", ["rank one", "three short of full rank", "zero rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_zeros_are_raised_and_nothing_else_changes(shape, defect, dtype):
    """The vectors of zero singular values are free, so W' is judged by its properties rather than against one SVD."""
    rank = {"rank one": 1, "three short of full rank": min(shape) - 3, "zero rows": min(shape)}[defect]
    weight = with_spectrum(geometric(rank, 100.0), *shape, dtype)
    if defect == "zero rows":
        weight[20:] = 0
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    tau = sigma[0].item() / CONDITION
    kept = sigma > tau
    original = weight.clone()
    outcome = clamp_spectrum_(weight, CONDITION, FLOOR)
    after = torch.linalg.svdvals(weight.double())
    assert outcome.raised == int((~kept).sum()) > 0
    assert torch.allclose(after, sigma.clamp(min=tau), rtol=0, atol=2e-7 * sigma[0].item())
    change = weight.double() - original.double()
    assert torch.linalg.matrix_norm(left[:, kept].T @ change, 2) < 2e-7 * sigma[0]
    assert torch.linalg.matrix_norm(change @ right[kept].T, 2) < 2e-7 * sigma[0]


def test_forty_values_at_tau_count_as_healthy():
    weight = with_spectrum(torch.cat([geometric(40, 500.0), torch.full((40,), 1 / CONDITION)]), 80, 80, torch.float32)
    original = weight.clone()
    assert clamp_spectrum_(weight, CONDITION, FLOOR).raised == 0
    assert torch.equal(weight, original)


@pytest.mark.parametrize("name", spectra(48))
def test_clamping_twice_is_clamping_once(name):
    weight = with_spectrum(spectra(48)[name], 48, 130, torch.float32)
    clamp_spectrum_(weight, CONDITION, FLOOR)
    once = weight.clone()
    assert clamp_spectrum_(weight, CONDITION, FLOOR).raised == 0
    assert torch.equal(weight, once)


def test_a_vector_is_scaled_to_the_floor():
    weight = torch.tensor([[3e-6, 4e-6]], dtype=torch.float64)
    outcome = clamp_spectrum_(weight, CONDITION, FLOOR)
    assert outcome.raised == 1 and torch.allclose(weight, torch.tensor([[3e-5, 4e-5]], dtype=torch.float64), rtol=1e-9)


def test_a_zero_matrix_and_one_that_is_not_finite_are_reported_and_left_alone():
    zero, broken, overflown = torch.zeros(6, 9), torch.ones(9, 6), torch.ones(6, 6)
    broken[2, 3], overflown[5, 5] = math.nan, -math.inf
    assert clamp_spectrum_(zero, CONDITION, FLOOR) == ClampOutcome(0.0, 0.0, FLOOR, 0)
    for weight in (broken, overflown):
        original = weight.clone()
        outcome = clamp_spectrum_(weight, CONDITION, FLOOR)
        assert not outcome.finite and math.isnan(outcome.sigma_max) and outcome.raised == 0
        assert torch.equal(weight.nan_to_num(), original.nan_to_num())


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_that_do_not_fit_float64_are_no_obstacle(scale):
    weight = with_spectrum([1.0, 0.5, 1e-4], 3, 5) * scale
    clamp_spectrum_(weight, 10.0, 0.0)
    assert torch.allclose(torch.linalg.svdvals(weight) / scale, torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64), rtol=1e-9)


def test_a_transposed_view_is_clamped_in_place():
    storage = with_spectrum(spectra(48)["one below"], 130, 48, torch.float32)
    expected = reference(storage)[0]
    clamp_spectrum_(storage.T, CONDITION, FLOOR)
    assert relative_error(storage, expected) < 2e-7


def test_a_head_of_the_real_shape():
    """131,072 × 576 with known singular vectors: left ones of disjoint supports, so that no reference SVD has to be computed."""
    sigma = geometric(576, 500.0)
    sigma[-3:] = torch.tensor([1 / 2500, 1 / 4000, 1 / 8000])
    right = orthonormal(576, 576, 3)
    support = torch.randperm(131_072, generator=torch.Generator().manual_seed(4))[: 576 * 200].view(576, 200)
    weight, expected = torch.zeros(131_072, 576), torch.zeros(131_072, 576)
    for column, rows in enumerate(support):
        row = right[:, column] * 200**-0.5
        weight[rows], expected[rows] = (row * sigma[column]).float(), (row * max(sigma[column], 1 / 2000)).float()
    outcome = clamp_spectrum_(weight, 2000.0, FLOOR)
    assert outcome.raised == 3 and outcome.sigma_min == pytest.approx(1 / 8000, rel=1e-3)
    assert torch.linalg.matrix_norm(weight - expected) < 2e-7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 10.0, 0.0), "takes one matrix"),
        ((torch.zeros(2, 3, 3), 10.0, 0.0), "takes one matrix"),
        ((torch.ones(3, 3, dtype=torch.bfloat16), 10.0, 0.0), "master weight"),
        ((torch.ones(0, 3), 10.0, 0.0), "empty"),
        ((torch.ones(3, 3), 0.0, 0.0), "max_condition"),
        ((torch.ones(3, 3), math.nan, 0.0), "max_condition"),
        ((torch.ones(3, 3), 10.0, -1.0), "sigma_floor"),
    ],
)
def test_bad_input_of_the_function_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        clamp_spectrum_(*arguments)
