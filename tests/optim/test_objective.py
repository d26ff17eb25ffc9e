"""The chunked objective against float64 autograd of the formula written out in full."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kl3m_nb.optim import objective
from kl3m_nb.optim.objective import activation_penalty, chunked_objective
from kl3m_nb.profiles import ObjectiveSpec

CARD = ObjectiveSpec()
STRONG = ObjectiveSpec(
    label_smoothing=0.1, entropy_bonus=0.3, entropy_target_bits=2.0, entropy_target_weight=0.5
)
OVER_BATCH = dataclasses.replace(STRONG, entropy_target_over="batch")
PLAIN = ObjectiveSpec(label_smoothing=0.0, entropy_bonus=0.0, entropy_target_weight=0.0)


def reference(hidden, weight, labels, spec, num_valid=None) -> dict[str, torch.Tensor]:
    """Every term from the full logits, in the inputs' precision, by torch's own cross-entropy and
    an explicit entropy.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    valid = labels != -100
    count = int(valid.sum()) if num_valid is None else num_valid
    logits, labels = hidden[valid] @ weight.t(), labels[valid]
    log_p = logits.log_softmax(-1)
    bits = -(log_p.exp() * log_p).sum(-1) / math.log(2)
    plain = F.cross_entropy(logits, labels, reduction="sum")
    terms = {
        "cross_entropy": plain,
        "entropy_bits": bits.sum(),
        "label_smoothing": (
            F.cross_entropy(logits, labels, reduction="sum", label_smoothing=spec.label_smoothing)
            - plain
        ),
        "entropy_bonus": -spec.entropy_bonus * bits.sum(),
        "entropy_target": spec.entropy_target_weight * (_met(bits, spec) ** 2).sum(),
    }
    terms = {name: term / count for name, term in terms.items()}
    return terms | {"total": sum(term for name, term in terms.items() if name != "entropy_bits")}


def _met(bits, spec):
    """The distance of each token's entropy from the target, or of the mean over all of them."""
    return (
        bits if spec.entropy_target_over == "token" else bits.mean().expand_as(bits)
    ) - spec.entropy_target_bits


def reference_gradients(hidden, weight, labels, spec, num_valid=None):
    """Float64 terms, ∂total/∂hidden and ∂total/∂weight by autograd."""
    hidden, weight = (
        tensor.detach().double().requires_grad_() for tensor in (hidden.clone(), weight.clone())
    )
    terms = reference(hidden, weight, labels, spec, num_valid)
    gradients = torch.autograd.grad(terms["total"], (hidden, weight))
    return {name: term.detach() for name, term in terms.items()}, *gradients


def problem(
    tokens=37, hidden=16, vocabulary=101, ignored=0.3, dtype=torch.float64, seed=0, spread=1.0
):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight = spread * torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    labels[tokens // 2] = 0  # at least one is valid
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norms. A gradient that all but vanishes, as of a token predicted with certainty,
    counts as one of norm 1e-3.
    """
    return float(
        (actual.detach().double() - expected.detach()).norm()
        / expected.detach().norm().clamp(min=1e-3)
    )


def assert_equals_reference(hidden, weight, labels, spec, tolerance, num_valid=None):
    expected, hidden_grad, weight_grad = reference_gradients(
        hidden, weight, labels, spec, num_valid
    )
    terms = chunked_objective(hidden, weight, labels, spec, num_valid)
    actual_hidden_grad, actual_weight_grad = torch.autograd.grad(terms.total, (hidden, weight))
    for name, value in expected.items():
        scale = max(abs(float(value)), tolerance)  # a regulariser may be zero
        assert (
            abs(float(getattr(terms, name).detach()) - float(value))
            <= tolerance * scale + tolerance * 1e-2
        ), name
    assert relative_error(actual_hidden_grad, hidden_grad) < tolerance
    assert relative_error(actual_weight_grad, weight_grad) < tolerance


weights_of_terms = st.floats(0.0, 0.5)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 9),
    vocabulary=st.integers(2, 60),
    chunk=st.integers(1, 50),
    ignored=st.floats(0.0, 1.0),
    smoothing=weights_of_terms,
    bonus=weights_of_terms,
    target=st.floats(0.0, 8.0),
    target_weight=weights_of_terms,
    over=st.sampled_from(["token", "batch"]),
    seed=st.integers(0, 1000),
)
def test_equals_float64_autograd(
    tokens, hidden, vocabulary, chunk, ignored, smoothing, bonus, target, target_weight, over, seed
):
    spec = ObjectiveSpec(smoothing, bonus, target, target_weight, over, chunk_tokens=chunk)
    assert_equals_reference(*problem(tokens, hidden, vocabulary, ignored, seed=seed), spec, 1e-8)


@pytest.mark.parametrize(
    "spec", [CARD, STRONG, OVER_BATCH, PLAIN], ids=["card", "strong", "over batch", "plain"]
)
@pytest.mark.parametrize("ignored", [0.0, 1.0], ids=["all valid", "one valid"])
def test_float32_equals_float64_autograd_at_a_large_vocabulary(spec, ignored):
    # At this length torch's own float32 softmax is off by 1e-5.
    hidden, weight, labels = problem(24, 32, 50_000, ignored, torch.float32, spread=0.2)
    assert_equals_reference(
        hidden, weight, labels, dataclasses.replace(spec, chunk_tokens=10), 1e-6
    )


def test_shape_of_the_batch_does_not_matter():
    hidden, weight, labels = problem(24)
    flat = chunked_objective(hidden, weight, labels, CARD)
    shaped = chunked_objective(hidden.view(2, 3, 4, -1), weight, labels.view(2, 3, 4), CARD)
    assert torch.equal(flat.total, shaped.total)


def test_total_is_the_sum_of_its_parts():
    terms = chunked_objective(*problem(), STRONG)
    parts = terms.cross_entropy + terms.label_smoothing + terms.entropy_bonus + terms.entropy_target
    torch.testing.assert_close(terms.total.detach(), parts)
    assert not any(part.requires_grad for part in (parts, terms.entropy_bits, terms.num_valid))


def test_micro_batches_add_up_to_the_whole_step():
    hidden, weight, labels = problem(tokens=40)
    num_valid = int((labels != -100).sum())
    _, hidden_grad, weight_grad = reference_gradients(hidden, weight, labels, STRONG)
    pieces = [
        chunked_objective(h, weight, y, STRONG, n)
        for h, y, n in zip(
            hidden.split(11),
            labels.split(11),
            (num_valid, torch.tensor(num_valid)) * 2,
            strict=True,
        )
    ]
    sum(piece.total for piece in pieces).backward()
    whole = chunked_objective(hidden, weight, labels, STRONG)
    for name in (
        "total",
        "cross_entropy",
        "entropy_bits",
        "label_smoothing",
        "entropy_bonus",
        "entropy_target",
    ):
        torch.testing.assert_close(
            sum(getattr(piece, name).detach() for piece in pieces), getattr(whole, name).detach()
        )
    assert relative_error(hidden.grad, hidden_grad) < 1e-10
    assert relative_error(weight.grad, weight_grad) < 1e-10


def test_over_the_batch_micro_batches_add_up_to_the_step_and_the_variance_of_their_means():
    hidden, weight, labels = problem(tokens=40)
    num_valid = int((labels != -100).sum())
    pieces = [
        chunked_objective(h, weight, y, OVER_BATCH, num_valid)
        for h, y in zip(hidden.split(11), labels.split(11), strict=True)
    ]
    counts = torch.tensor([float((y != -100).sum()) for y in labels.split(11)])
    means = torch.stack([piece.entropy_bits for piece in pieces]) * num_valid / counts
    variance = (counts * (means - (counts * means).sum() / num_valid) ** 2).sum() / num_valid
    step = chunked_objective(hidden, weight, labels, OVER_BATCH).entropy_target
    total = sum(piece.entropy_target for piece in pieces)
    torch.testing.assert_close(total, step + OVER_BATCH.entropy_target_weight * variance)
    per_token = chunked_objective(hidden, weight, labels, STRONG).entropy_target
    assert step < total < per_token


def test_masking_equals_leaving_rows_out():
    """On CUDA ignored rows stay in the chunks with weight zero, on a CPU they are dropped first:
    both must agree.
    """
    hidden, weight, labels = problem()
    expected, hidden_grad, weight_grad = reference_gradients(hidden, weight, labels, STRONG)
    valid = labels != -100
    spec = dataclasses.replace(STRONG, chunk_tokens=8)
    total, *_ = objective._ChunkedObjective.apply(
        hidden, weight, labels, valid, valid.sum(), spec, torch.float64, (True, True), False
    )
    torch.testing.assert_close(total.detach(), expected["total"].detach())
    actual = torch.autograd.grad(total, (hidden, weight))
    assert relative_error(actual[0], hidden_grad) < 1e-10
    assert relative_error(actual[1], weight_grad) < 1e-10
    assert not actual[0][~valid].any()


@pytest.mark.parametrize("tokens", [6, 0])
def test_without_valid_labels_everything_is_zero(tokens):
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    terms = chunked_objective(hidden, weight, torch.full((tokens,), -100), CARD)
    terms.total.backward()
    assert terms.total == 0 and terms.num_valid == 0
    assert not hidden.grad.any() and not weight.grad.any()


def compile_without_a_compiler(monkeypatch):
    """The graph is traced as for the compiler, and run operation by operation."""
    torch._dynamo.reset()
    traced = torch.compile(
        objective._fused_softmax_terms_, backend="aot_eager", fullgraph=True, dynamic=False
    )
    monkeypatch.setattr(objective, "_compiled_softmax_terms", lambda: traced)


def check_counts_of_valid_labels(counts, vocabulary):
    """The gradients by hidden state for each count, in one process, against float64 autograd."""
    hidden, weight, labels = problem(tokens=max(counts), vocabulary=vocabulary, ignored=0.0)
    for valid in counts:
        labels = torch.where(torch.arange(len(labels)) < valid, labels.clamp(min=0), -100)
        _, hidden_grad, _ = reference_gradients(hidden, weight, labels, CARD)
        hidden.grad = None
        chunked_objective(
            hidden, weight, labels, dataclasses.replace(CARD, chunk_tokens=16), compiled=True
        ).total.backward()
        assert relative_error(hidden.grad, hidden_grad) < 1e-10


def test_however_many_labels_are_valid_one_size_is_compiled(monkeypatch):
    compile_without_a_compiler(monkeypatch)
    check_counts_of_valid_labels(range(1, 36), vocabulary=101)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_code_takes_any_count_of_labels_and_another_vocabulary():
    for vocabulary in (128, 256, 640):
        check_counts_of_valid_labels([1, 17, 33, 16, 5], vocabulary)


@pytest.mark.parametrize("vocabulary", [101, 1280], ids=["in one piece", "in five pieces"])
@pytest.mark.parametrize(
    "spec", [CARD, STRONG, OVER_BATCH, PLAIN], ids=["card", "strong", "over batch", "plain"]
)
def test_the_work_for_the_compiler_gives_the_same_terms_and_gradients(
    monkeypatch, spec, vocabulary
):
    compile_without_a_compiler(monkeypatch)
    hidden, weight, labels = problem(vocabulary=vocabulary, spread=3.0)
    expected, hidden_grad, weight_grad = reference_gradients(hidden, weight, labels, spec)
    terms = chunked_objective(
        hidden, weight, labels, dataclasses.replace(spec, chunk_tokens=16), compiled=True
    )
    terms.total.backward()
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(terms, name).detach(), value, rtol=1e-10, atol=1e-12, msg=name
        )
    assert relative_error(hidden.grad, hidden_grad) < 1e-10
    assert relative_error(weight.grad, weight_grad) < 1e-10
    with torch.no_grad():
        assert chunked_objective(
            hidden, weight, labels, spec, compiled=True
        ).total == pytest.approx(float(terms.total), rel=1e-12)


def test_gradient_of_the_loss_scales_the_gradients():
    hidden, weight, labels = problem()
    _, hidden_grad, weight_grad = reference_gradients(hidden, weight, labels, CARD)
    (-3.0 * chunked_objective(hidden, weight, labels, CARD).total).backward()
    assert relative_error(hidden.grad, -3.0 * hidden_grad) < 1e-10
    assert relative_error(weight.grad, -3.0 * weight_grad) < 1e-10


def test_second_backward_is_refused():
    terms = chunked_objective(*problem(), CARD)
    terms.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the objective again"):
        terms.total.backward()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_gets_no_gradient(frozen):
    hidden, weight, labels = problem()
    _, *expected = reference_gradients(hidden, weight, labels, CARD)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    chunked_objective(hidden, weight, labels, CARD).total.backward()
    for tensor, gradient in zip((hidden, weight), expected, strict=True):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        if tensor.requires_grad:
            assert relative_error(tensor.grad, gradient) < 1e-10


def test_tied_head_adds_both_gradients():
    embedding = torch.nn.Embedding(50, 8, dtype=torch.float64)
    tokens = torch.randint(50, (20,))
    chunked_objective(
        embedding(tokens).tanh(), embedding.weight, tokens.roll(-1), CARD
    ).total.backward()
    weight = embedding.weight.detach().clone().requires_grad_()
    reference(F.embedding(tokens, weight).tanh(), weight, tokens.roll(-1), CARD)["total"].backward()
    assert relative_error(embedding.weight.grad, weight.grad) < 1e-10


class LargestTensors(TorchDispatchMode):
    """Records the number of elements of every tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes += [
            leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)
        ]
        return result


def test_logits_never_exist_at_once():
    hidden, weight, labels = problem(tokens=64, hidden=4, vocabulary=500)
    with LargestTensors() as seen:
        chunked_objective(
            hidden, weight, labels, dataclasses.replace(CARD, chunk_tokens=8)
        ).total.backward()
    assert max(seen.sizes) == 8 * 500


def test_evaluation_gives_the_same_terms_without_gradient_work():
    hidden, weight, labels = problem(tokens=6, hidden=32, vocabulary=500, ignored=0.0)
    trained = chunked_objective(hidden, weight, labels, STRONG)
    with torch.no_grad(), LargestTensors() as seen:
        evaluated = chunked_objective(hidden, weight, labels, STRONG)
    for field in dataclasses.fields(evaluated):
        assert torch.equal(getattr(evaluated, field.name), getattr(trained, field.name).detach()), (
            field.name
        )
    assert not evaluated.total.requires_grad
    assert (
        sum(size == weight.numel() for size in seen.sizes) <= 2
    )  # the head and its transpose, no gradient of it


def test_extreme_logits_stay_finite_and_right():
    hidden, weight, labels = problem(tokens=12, spread=1e4)
    assert_equals_reference(hidden, weight, labels, CARD, 1e-8)
    with torch.no_grad():
        terms = chunked_objective(hidden.float(), weight.float(), labels, CARD)
    expected = reference(hidden, weight, labels, CARD)["total"]
    assert relative_error(terms.total, expected) < 1e-5


@pytest.mark.parametrize("spec", [CARD, PLAIN], ids=["card", "plain"])
def test_bfloat16_autocast(spec):
    hidden, weight, labels = problem(64, 32, 500, dtype=torch.float32, spread=0.3)
    expected, hidden_grad, weight_grad = reference_gradients(hidden, weight, labels, spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = chunked_objective(hidden.bfloat16(), weight, labels, spec)
    terms.total.backward()
    assert terms.total.dtype == weight.grad.dtype == torch.float32
    assert relative_error(terms.total, expected["total"]) < 2e-3
    assert relative_error(hidden.grad, hidden_grad) < 1e-2
    assert relative_error(weight.grad, weight_grad) < 1e-2


def test_gradient_of_the_head_is_accumulated_in_float32():
    # One token a chunk: adding 512 times in bfloat16 would stop early and lose most of the sum.
    hidden = torch.ones(512, 4).requires_grad_()
    weight = torch.zeros(3, 4, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked_objective(
            hidden, weight, labels, dataclasses.replace(PLAIN, chunk_tokens=1)
        ).total.backward()
    torch.testing.assert_close(
        weight.grad[:, 0], torch.tensor([-2 / 3, 1 / 3, 1 / 3]), rtol=4e-3, atol=0.0
    )


def test_float16_products_are_refused():
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16"):
        chunked_objective(*problem(dtype=torch.float32), CARD)


def test_misfitting_inputs_are_refused():
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match=r"\[vocabulary, hidden\]"):
        chunked_objective(hidden, weight.t(), labels, CARD)
    with pytest.raises(ValueError, match="int64"):
        chunked_objective(hidden, weight, labels.int(), CARD)
    with pytest.raises(ValueError, match="labels"):
        chunked_objective(hidden, weight, labels[1:], CARD)


def test_activation_penalty_is_a_mean_over_valid_positions():
    residual = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(10, (3, 5))
    labels[0, :3] = -100
    penalty = activation_penalty(residual, labels, 0.25)
    (gradient,) = torch.autograd.grad(penalty, residual)
    kept = residual.detach()[labels != -100]
    torch.testing.assert_close(penalty.detach(), 0.25 * kept.square().mean())
    torch.testing.assert_close(gradient[labels != -100], 0.5 * kept / kept.numel())
    assert not gradient[labels == -100].any()


def test_activation_penalty_of_micro_batches_adds_up():
    residual, labels = torch.randn(6, 5, 8), torch.randint(10, (6, 5))
    labels[0] = -100
    whole = activation_penalty(residual, labels, 0.1)
    counts = (25, torch.tensor(25), 25)
    pieces = [
        activation_penalty(r, y, 0.1, n)
        for r, y, n in zip(residual.split(2), labels.split(2), counts, strict=True)
    ]
    torch.testing.assert_close(sum(pieces), whole)


@pytest.mark.parametrize(
    "num_valid", [None, 0, torch.tensor(0)], ids=["counted", "a number", "a tensor"]
)
@pytest.mark.parametrize("tokens", [5, 0])
def test_activation_penalty_without_valid_labels_is_zero(tokens, num_valid):
    residual = torch.randn(3, tokens, 8, requires_grad=True)
    penalty = activation_penalty(residual, torch.full((3, tokens), -100), 0.1, num_valid)
    penalty.backward()
    assert penalty == 0 and not residual.grad.any()


def test_activation_penalty_checks_shapes():
    with pytest.raises(ValueError, match="labels"):
        activation_penalty(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64), 0.1)
