"""Proofs about singular values: what is proven is true, and what is clearly true is proven."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl3m_nb.common import linalg
from kl3m_nb.common.linalg import gram_matrix, prove_healthy, useful_precisions

PRECISIONS = [torch.float32, torch.float64]


def weight_with_condition(condition, short, long, seed=0, largest=1.0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, short, generator=generator, dtype=torch.float64))[0]
        for size in (short, long)
    )
    return (
        (left * (largest * condition ** -torch.linspace(0, 1, short, dtype=torch.float64)))
        @ right.T
    ).float()


def prove(weights, max_condition, sigma_floor, precision):
    weights = weights if weights.dim() == 3 else weights.unsqueeze(0)
    return prove_healthy(
        gram_matrix(weights, precision), weights.shape[-1], max_condition, sigma_floor
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(5, 7), (150, 150), (300, 700), (20, 9000)])
def test_the_gram_matrix_is_that_of_the_weight(precision, shape):
    weight = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = weight.double() @ weight.double().mT
    gram = gram_matrix(weight, precision)
    # Sums of n products: a BLAS kernel may add them one after the other, whose rounding grows with
    # √n.
    rounding = max(20.0, shape[1] ** 0.5) * torch.finfo(precision).eps * expected.abs().max()
    assert gram.dtype == precision and (gram.double() - expected).abs().max() < rounding
    tall = weight[0].T.contiguous()
    assert (gram_matrix(tall.T, precision).double() - expected[0]).abs().max() < 5 * rounding


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.floats(0, 7),
    ceiling=st.floats(1.5, 1e5),
    short=st.integers(1, 60),
    extra=st.integers(0, 80),
    largest=st.sampled_from([1e-25, 1e-3, 1.0, 1e15]),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 99),
)
def test_what_is_proven_is_true(exponent, ceiling, short, extra, largest, precision, seed):
    weight = weight_with_condition(10**exponent, short, short + extra, seed, largest)
    sigma = torch.linalg.svdvals(weight.double())
    [proof] = prove(weight, ceiling, 0.0, precision)
    if proof.holds:
        assert sigma[-1] >= proof.lower >= proof.tau >= sigma[0] / ceiling
        assert sigma[0] <= proof.upper


def row_summed_wrongly(pieces, share, precision):
    """One row: a piece of ones, then in each further piece one entry whose square is that `share`
    of a unit of the sum so far.

    Squares of half a unit and more are rounded up when they are added, less than half is lost. Also
    σ² as a fraction.
    """
    size = linalg.PIECE[precision]
    row = torch.zeros(1, (pieces + 1) * size, dtype=precision)
    row[0, :size] = 1
    row[0, size::size] = math.sqrt(share * size * torch.finfo(precision).eps)
    return row, size + pieces * Fraction(row[0, -size].item()) ** 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gram_matrix_that_rounding_has_made_too_large_proves_nothing_false(precision):
    row, square = row_summed_wrongly(100, 0.51, precision)
    computed = gram_matrix(row, precision).item()
    below, above = math.sqrt(0.99 * square), math.sqrt((computed + square) / 2)
    assert prove(row, 10.0, below, precision)[0].holds
    assert Fraction(above) ** 2 > square and not prove(row, 10.0, above, precision)[0].holds


def test_a_gram_matrix_that_rounding_has_made_too_small_does_not_bound_the_largest_value(
    monkeypatch,
):
    """What is lost has to exceed the two parts in a thousand by which the estimate of σ₁² is
    raised: pieces of one column.
    """
    monkeypatch.setitem(linalg.PIECE, torch.float32, 1)
    row, square = row_summed_wrongly(36_000, 0.49, torch.float32)
    computed = gram_matrix(row.unsqueeze(0), torch.float32)
    [proof] = prove_healthy(computed, row.shape[1], 10.0, 0.0)
    assert computed.item() == 1 and square > 1.0021
    assert proof.holds and Fraction(proof.lower) ** 2 < square < Fraction(proof.upper) ** 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bounds_are_as_wide_as_rounding_may_move_them_at_worst(precision):
    """Higham, theorem 10.3: a factorisation of n rows is one of a matrix off by (n + 1)u of its
    trace; n products add n·u to it.

    Of the identity, whose trace is n and whose σ² are all 1.
    """
    size = 300
    worst = (2 * size + 1) * size * torch.finfo(precision).eps / 2
    too_high, low_enough = (math.sqrt(1 - share * worst) for share in (0.99, 1.1))
    weight = torch.eye(size, dtype=precision)
    assert not prove(weight, 10.0, too_high, precision)[0].holds
    [proof] = prove(weight, 10.0, low_enough, precision)
    assert proof.holds and proof.lower**2 <= 1 - worst and proof.upper**2 >= 1 + worst


def test_squares_that_are_lost_below_the_smallest_number_are_allowed_for():
    row = torch.full(
        (1, 2**18), 2.0**-75.5
    )  # each square is less than half of the smallest float32
    row[0, 0] = 2.0**-63
    square = sum(
        count * Fraction(value) ** 2
        for value, count in ((row[0, 0].item(), 1), (row[0, 1].item(), 2**18 - 1))
    )
    [proof] = prove(row, 10.0, 0.0, torch.float32)
    assert gram_matrix(row, torch.float32).item() == 2.0**-126 and square > Fraction(
        1.007 * 2.0**-126
    )
    assert not proof.holds or square < Fraction(proof.upper) ** 2


@pytest.mark.parametrize(
    ("condition", "precision"),
    [(5.0, torch.float32), (5.0, torch.float64), (300.0, torch.float64), (2800.0, torch.float64)],
)
def test_what_is_clearly_true_is_proven_and_sharply(condition, precision):
    weight = weight_with_condition(condition, 96, 256)
    [proof] = prove(weight, 3000.0, 0.0, precision)
    assert proof.holds
    assert proof.upper < 1.05 and proof.lower > 0.75 / max(condition, 300.0)
    assert 0.99 < proof.ritz_max <= 1.00001
    assert 0.99999 <= proof.ritz_min * condition < 1.05


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_is_judged_matrix_by_matrix(precision):
    """Healthy, too flat, zero, not a number, infinite: the bad ones must not touch the verdict on
    the good ones.
    """
    batch = torch.stack(
        [weight_with_condition(condition, 30, 50) for condition in (4.0, 1e4, 1.0, 1.0, 1.0, 6.0)]
    )
    batch[2] = 0
    batch[3, 4, 5], batch[4, 0, 0] = torch.nan, torch.inf
    proofs = prove(batch, 100.0, 0.0, precision)
    assert [proof.holds for proof in proofs] == [True, False, False, False, False, True]
    alone = prove(batch[5:], 100.0, 0.0, precision)[0]
    assert (proofs[5].lower, proofs[5].upper) == pytest.approx((alone.lower, alone.upper), rel=1e-5)


def test_the_floor_counts_as_well_as_the_condition():
    weight = weight_with_condition(4.0, 20, 30)
    assert prove(weight, 100.0, 0.2, torch.float64)[0].holds
    assert not prove(weight, 100.0, 0.3, torch.float64)[0].holds


def test_float32_is_tried_only_where_it_can_prove_something(monkeypatch):
    assert useful_precisions(torch.ones(576, 1536)) == (torch.float32, torch.float64)
    assert useful_precisions(torch.ones(131_072, 300)) == (torch.float64,)
    assert useful_precisions(torch.ones(300, 300, dtype=torch.float64)) == (torch.float64,)
    assert useful_precisions(torch.ones(192, 576)) == ()
    exact = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: exact(a.bfloat16(), b.bfloat16()).float()
    )
    assert useful_precisions(torch.ones(576, 1536)) == (torch.float64,)
