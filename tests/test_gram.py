"""Proofs about singular values: what is proven is true, and what is clearly true is proven."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl3m_nb.gram import gram_matrix, prove_healthy, useful_precisions

PRECISIONS = [torch.float32, torch.float64]


def weight_with_condition(condition, short, long, seed=0, largest=1.0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, short, generator=generator, dtype=torch.float64))[0] for size in (short, long)
    )
    return ((left * (largest * condition ** -torch.linspace(0, 1, short, dtype=torch.float64))) @ right.T).float()


def prove(weights, max_condition, sigma_floor, precision):
    weights = weights if weights.dim() == 3 else weights.unsqueeze(0)
    return prove_healthy(gram_matrix(weights, precision), weights.shape[-1], max_condition, sigma_floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(5, 7), (150, 150), (300, 700), (20, 9000)])
def test_the_gram_matrix_is_that_of_the_weight(precision, shape):
    weight = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = weight.double() @ weight.double().mT
    gram = gram_matrix(weight, precision)
    rounding = 20 * torch.finfo(precision).eps * expected.abs().max()
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


@pytest.mark.parametrize(
    ("condition", "precision"), [(5.0, torch.float32), (5.0, torch.float64), (300.0, torch.float64), (2800.0, torch.float64)]
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
    """Healthy, too flat, zero, not a number, infinite: the bad ones must not touch the verdict on the good ones."""
    batch = torch.stack([weight_with_condition(condition, 30, 50) for condition in (4.0, 1e4, 1.0, 1.0, 1.0, 6.0)])
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
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: exact(a.bfloat16(), b.bfloat16()).float())
    assert useful_precisions(torch.ones(576, 1536)) == (torch.float64,)
