"""The clamp of one matrix against U max(S, τ) Vᵀ in float64."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl3m_nb.common.linalg import as_wide, gram_matrix
from kl3m_nb.optim.clamp import ClampOutcome, clamp_exactly_, clamp_spectrum_
from tests.svd_reference import (
    CONDITION,
    FLOOR,
    geometric,
    orthonormal,
    reference,
    relative_error,
    with_spectrum,
)

SHAPES = [(80, 80), (48, 130), (130, 48)]


def spectra(count):
    """Adversarial spectra of `count` values with σ₁ = 1, by name."""
    healthy = geometric(count, 1000.0)

    def tail(*values):
        return torch.cat(
            [healthy[: count - len(values)], torch.tensor(values, dtype=torch.float64)]
        )

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
    assert (outcome.sigma_max, outcome.sigma_min) == pytest.approx(
        (sigma[0].item(), sigma[-1].item()), rel=1e-7, abs=1e-9
    )
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
def test_equals_the_full_svd_for_random_spectra(
    rows, cols, exponents, max_condition, sigma_floor, seed
):
    weight = with_spectrum(
        [10.0**exponent for exponent in exponents[: min(rows, cols)]], rows, cols, seed=seed
    )
    expected, sigma, tau = reference(weight, max_condition, sigma_floor)
    outcome = clamp_spectrum_(weight, max_condition, sigma_floor)
    assert torch.linalg.matrix_norm(weight - expected, 2) < 1e-6 * max(sigma[0], tau)
    assert outcome.raised <= int((sigma < tau * (1 + 1e-9)).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("defect", ["rank one", "three short of full rank", "zero rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_zeros_are_raised_and_nothing_else_changes(shape, defect, dtype):
    """The vectors of zero singular values are free, so W' is judged by its properties rather than
    against one SVD.
    """
    rank = {"rank one": 1, "three short of full rank": min(shape) - 3, "zero rows": min(shape)}[
        defect
    ]
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
    weight = with_spectrum(
        torch.cat([geometric(40, 500.0), torch.full((40,), 1 / CONDITION)]), 80, 80, torch.float32
    )
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
    assert outcome.raised == 1 and torch.allclose(
        weight, torch.tensor([[3e-5, 4e-5]], dtype=torch.float64), rtol=1e-9
    )


def test_a_zero_matrix_and_one_that_is_not_finite_are_reported_and_left_alone():
    zero, broken, overflown = torch.zeros(6, 9), torch.ones(9, 6), torch.ones(6, 6)
    broken[2, 3], overflown[5, 5] = math.nan, -math.inf
    assert clamp_spectrum_(zero, CONDITION, FLOOR) == ClampOutcome(0.0, 0.0, FLOOR, 0)
    for weight in (broken, overflown):
        original = weight.clone()
        outcome = clamp_spectrum_(weight, CONDITION, FLOOR)
        assert not outcome.finite and math.isnan(outcome.sigma_max) and outcome.raised == 0
        assert torch.equal(weight.nan_to_num(), original.nan_to_num())


def interval_of(weight, max_condition, sigma_floor):
    gram = gram_matrix(as_wide(weight), torch.float64)
    outcome, interval = clamp_exactly_(weight, gram, max_condition, sigma_floor, suspect=False)
    return outcome.raised, *interval


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 10])
def test_the_interval_of_an_irrational_value_holds_it(count):
    """Of a row of ones √count, which float64 stores too large for some counts and too small for
    others.
    """
    raised, lower, upper = interval_of(torch.ones(1, count, dtype=torch.float64), 10.0, 0.0)
    assert raised == 0 and Fraction(lower) ** 2 < count < Fraction(upper) ** 2 < count * (
        1 + Fraction(1, 10**8)
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_interval_holds_a_small_value_that_a_gram_matrix_blurs(seed):
    weight = with_spectrum(geometric(30, 4e4), 30, 50, seed=seed)
    sigma = torch.linalg.svdvals(weight)
    raised, lower, upper = interval_of(weight, 1e6, 0.0)
    assert (
        raised == 0
        and sigma[-1] - 1e-8 < lower <= sigma[-1]
        and sigma[0] <= upper < sigma[0] + 1e-8
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sigma_floor", [1e-3, 4e3])
def test_after_a_repair_the_interval_holds_what_is_stored(seed, sigma_floor):
    """Raised from below a ceiling of 1000 or from far below a floor; the repaired weight is rounded
    to float32.
    """
    weight = with_spectrum(geometric(6, 5000.0), 6, 8, torch.float32, seed)
    raised, lower, upper = interval_of(weight, 1000.0, sigma_floor)
    sigma = torch.linalg.svdvals(weight.double())
    assert (
        raised > 0
        and sigma[-1] - 2e-6 * sigma[0] < lower <= sigma[-1]
        and sigma[0] <= upper < sigma[0] * (1 + 2e-6)
    )


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_that_do_not_fit_float64_are_no_obstacle(scale):
    weight = with_spectrum([1.0, 0.5, 1e-4], 3, 5) * scale
    clamp_spectrum_(weight, 10.0, 0.0)
    assert torch.allclose(
        torch.linalg.svdvals(weight) / scale,
        torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64),
        rtol=1e-9,
    )


def test_a_transposed_view_is_clamped_in_place():
    storage = with_spectrum(spectra(48)["one below"], 130, 48, torch.float32)
    expected = reference(storage)[0]
    clamp_spectrum_(storage.T, CONDITION, FLOOR)
    assert relative_error(storage, expected) < 2e-7


def test_a_head_of_the_real_shape():
    """131,072 × 576 with known singular vectors: left ones of disjoint supports, so that no
    reference SVD has to be computed.
    """
    sigma = geometric(576, 500.0)
    sigma[-3:] = torch.tensor([1 / 2500, 1 / 4000, 1 / 8000])
    right = orthonormal(576, 576, 3)
    support = torch.randperm(131_072, generator=torch.Generator().manual_seed(4))[: 576 * 200].view(
        576, 200
    )
    weight, expected = torch.zeros(131_072, 576), torch.zeros(131_072, 576)
    for column, rows in enumerate(support):
        row = right[:, column] * 200**-0.5
        weight[rows], expected[rows] = (
            (row * sigma[column]).float(),
            (row * max(sigma[column], 1 / 2000)).float(),
        )
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
