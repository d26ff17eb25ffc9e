"""The clamp of a model: every way to judge a matrix against a full SVD in float64, and certificates
against true spectra.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl3m_nb.common import linalg
from kl3m_nb.optim import model_clamp
from kl3m_nb.optim.clamp import clamp_spectrum_
from kl3m_nb.optim.model_clamp import ClampTarget, SpectralClamp
from tests.svd_reference import (
    CONDITION,
    FLOOR,
    geometric,
    orthonormal,
    reference,
    relative_error,
    with_spectrum,
)


@pytest.fixture(params=["exact", "tested"])
def route(request, monkeypatch):
    """Both ways to judge a small matrix: by its eigenvalues, as is usual, and by the test that
    large ones get.
    """
    if request.param == "tested":
        monkeypatch.setattr(linalg, "EIGENVALUES_UP_TO", 0)
        return "tested"
    return "decomposed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(80, 80), (48, 130), (130, 48), (1, 30), (30, 1), (1, 1)])
@pytest.mark.parametrize("condition", [2.0, 2900.0])
def test_a_matrix_that_needs_nothing_keeps_every_bit(shape, condition, dtype, route):
    weight = with_spectrum(geometric(min(shape), condition), *shape, dtype)
    original = weight.clone()
    outcome = clamp_spectrum_(weight, CONDITION, FLOOR)
    [event] = SpectralClamp([ClampTarget("w", weight, CONDITION, FLOOR)]).clamp()
    assert torch.equal(weight, original)
    assert outcome.raised == event.raised == 0 and event.route == route


def test_a_zero_matrix_and_one_that_is_not_finite_are_reported():
    zero, broken, overflown = torch.zeros(6, 9), torch.ones(9, 6), torch.ones(6, 6)
    broken[2, 3], overflown[5, 5] = math.nan, -math.inf
    targets = [
        ClampTarget(name, w, CONDITION, FLOOR)
        for name, w in (("a", zero), ("b", broken), ("c", overflown))
    ]
    assert [event.route for event in SpectralClamp(targets).clamp()] == [
        "zero",
        "not_finite",
        "not_finite",
    ]


def test_a_parameter_is_clamped_in_place():
    parameter = torch.nn.Parameter(with_spectrum(geometric(48, 10_000.0), 48, 48))
    SpectralClamp([ClampTarget("w", parameter, CONDITION, FLOOR)]).clamp()
    assert parameter.requires_grad and parameter.is_leaf
    assert torch.linalg.cond(parameter.detach()).item() == pytest.approx(CONDITION, rel=1e-6)


WALKED_SHAPES = [(40, 40), (40, 90), (90, 40)]


def mixed_targets(dtype=torch.float32):
    """Matrices of two shapes and orientations: healthy, near the ceiling, low, zero; and what a
    full SVD makes of them.
    """
    conditions = [3.0, 5.0, 40.0, 2500.0, 2999.0, 3010.0, 6000.0, 1e9]
    weights = [
        with_spectrum(geometric(40, c, 3.0), *shape, dtype, seed=i)
        for i, c in enumerate(conditions)
        for shape in WALKED_SHAPES
    ]
    return [ClampTarget(f"w{i}", weight, CONDITION, FLOOR) for i, weight in enumerate(weights)]


@pytest.mark.parametrize(("threads", "large"), [(1, 2**23), (3, 2**23), (2, 0)])
def test_a_walk_does_to_every_matrix_what_the_function_does(threads, large, route, monkeypatch):
    monkeypatch.setattr(model_clamp, "_ONE_THREAD_ELEMENTS", large)
    monkeypatch.setattr(model_clamp, "_worker_count", lambda device: threads)
    targets = mixed_targets()
    expected = [reference(target.parameter) for target in targets]
    singly = [target.parameter.clone() for target in targets]
    outcomes = [clamp_spectrum_(weight, CONDITION, FLOOR) for weight in singly]
    used_before = torch.get_num_threads()
    events = SpectralClamp(targets).clamp()
    assert torch.get_num_threads() == used_before
    assert [event.name for event in events] == [target.name for target in targets]
    assert {event.route for event in events} >= {route, "repaired"}
    for target, event, outcome, alone, (clamped, sigma, tau) in zip(
        targets, events, outcomes, singly, expected, strict=True
    ):
        # the order of a product's sums, hence its last bit, depends on how many threads share it
        assert (
            event.raised == outcome.raised
            and relative_error(target.parameter, alone.double()) < 2e-7
        )
        assert relative_error(target.parameter, clamped) < 2e-7
        if event.route == "tested":
            assert tau <= event.tau <= min(1.1 * tau, sigma[-1])
            assert 0.99 * sigma[0] < event.sigma_max <= sigma[0] * 1.00001
            assert sigma[-1] * 0.99999 <= event.sigma_min < 1.05 * sigma[-1]
        else:
            assert (event.sigma_max, event.sigma_min) == pytest.approx(
                (sigma[0].item(), sigma[-1].item()), rel=1e-6
            )


@pytest.mark.parametrize("decompose_on", ["cpu", "device"])
def test_what_fails_a_test_in_batches_is_decomposed_by_the_gram_matrix_of_the_test(
    decompose_on, monkeypatch
):
    """The route of a GPU, with tensors on the CPU."""
    monkeypatch.setattr(model_clamp, "_BATCHED", ("cpu",))
    monkeypatch.setattr(model_clamp, "_GPU_BATCH_ELEMENTS", 3 * 40 * 90)
    targets = mixed_targets()
    expected = [reference(target.parameter) for target in targets]
    built = []
    monkeypatch.setattr(
        model_clamp,
        "gram_matrix",
        lambda wide, dtype: built.append(len(wide)) or linalg.gram_matrix(wide, dtype),
    )
    events = SpectralClamp(targets, decompose_on=decompose_on).clamp()
    assert sum(built) == len(targets) and max(built) > 1  # of every matrix once
    assert {event.route for event in events} == {"tested", "decomposed", "repaired"}
    for target, event, (clamped, sigma, tau) in zip(targets, events, expected, strict=True):
        assert relative_error(target.parameter, clamped) < 2e-7
        assert event.raised == int(
            (sigma < tau - max(1e-9, torch.finfo(torch.float32).eps) * sigma[0]).sum()
        )


def test_beside_a_gpu_a_rank_decomposes_on_its_share_of_the_cores(monkeypatch):
    """torchrun gives every rank one thread, a scheduler the job 96 of the machine's cores."""
    monkeypatch.setattr("os.cpu_count", lambda: 256)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(96)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    counts = []
    for ranks in ("1", "8", "200"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        counts.append(model_clamp._worker_count(torch.device("cuda")))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert counts == [96, 12, 1] and model_clamp._worker_count(torch.device("cuda")) == 96
    assert model_clamp._worker_count(torch.device("cpu")) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decompose_on", ["cpu", "device"])
def test_a_gpu_does_what_the_cpu_does(decompose_on):
    targets = mixed_targets()
    on_gpu = [ClampTarget(t.name, t.parameter.cuda(), CONDITION, FLOOR) for t in targets]
    on_cpu = SpectralClamp(targets).clamp()
    for event, same, target, moved in zip(
        on_cpu,
        SpectralClamp(on_gpu, decompose_on=decompose_on).clamp(),
        targets,
        on_gpu,
        strict=True,
    ):
        assert (event.name, event.raised) == (same.name, same.raised)
        # of a small matrix a CPU asks for the eigenvalues at once, a GPU tests it with the others
        assert event.route == same.route or {event.route, same.route} == {"tested", "decomposed"}
        assert relative_error(moved.parameter.cpu(), target.parameter.double()) < 4e-7


def test_experts_are_clamped_one_by_one_and_gate_apart_from_up():
    """Gate and up differ a thousandfold in size: together one would raise the other, apart both are
    healthy.
    """
    experts = torch.stack(
        [
            torch.cat(
                [with_spectrum(geometric(20, 50.0, size), 20, 30, seed=i) for size in (1e3, 0.1)]
            )
            for i in range(3)
        ]
    )
    experts[1, 20:] = with_spectrum(geometric(20, 1e4), 20, 30)
    original = experts.clone()
    events = SpectralClamp([ClampTarget("experts", experts, 2000.0, FLOOR, fused=2)]).clamp()
    assert [event.name for event in events] == [
        f"experts[{i}].{half}" for i in range(3) for half in ("gate", "up")
    ]
    assert [event.raised > 0 for event in events] == [False, False, False, True, False, False]
    assert torch.equal(experts[[0, 2]], original[[0, 2]]) and torch.equal(
        experts[1, :20], original[1, :20]
    )
    assert relative_error(experts[1, 20:], reference(original[1, 20:], 2000.0)[0]) < 1e-9


def moving_clamp(condition=4.0, shape=(40, 90)):
    weight = with_spectrum(geometric(40, condition), *shape, torch.float32)
    clamp = SpectralClamp([ClampTarget("w", weight, 100.0, FLOOR)])
    clamp.clamp()
    return weight, clamp


@settings(max_examples=40, deadline=None)
@given(
    condition=st.floats(2, 90),
    size=st.floats(1e-3, 0.2),
    eigenvalues_up_to=st.sampled_from([0, 256]),
    decay=st.floats(0, 0.05),
    steps=st.integers(1, 8),
    seed=st.integers(0, 50),
)
def test_a_certificate_never_covers_a_matrix_that_needs_a_repair(
    condition, size, eigenvalues_up_to, decay, steps, seed
):
    """Moves as hard against the smallest singular value as the promise allows, and
    some at random.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linalg, "EIGENVALUES_UP_TO", eigenvalues_up_to)
        weight, clamp = moving_clamp(condition)
    for step in range(steps):
        left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
        if (seed + step) % 3:
            move = -size * torch.outer(left[:, -1], right[-1])
        else:
            move = size * orthonormal(40, 40, seed + step) @ orthonormal(90, 40, seed - step).T
        weight.mul_(1 - decay).add_(move.float())
        clamp.note_movement({"w": (size, decay)})
    sigma = torch.linalg.svdvals(weight.double())
    [event] = clamp.clamp()
    if event.route == "certified":
        assert event.sigma_min <= sigma[-1] and event.sigma_max >= sigma[0]
        assert sigma[-1] >= sigma[0] / 100.0


HADAMARD = torch.tensor(
    [[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)]
)  # rows of ±1, orthogonal


@pytest.mark.parametrize(("growth", "decay"), [(0.55, 0.0), (-0.55, 0.0), (0.0, 0.5)])
def test_a_certificate_allows_for_the_rounding_of_a_step(growth, decay):
    """All entries are to move by some half of the unit in their last place, and are rounded to move
    by a whole one.
    """
    eps = torch.finfo(torch.float32).eps
    weight = 1.5 * HADAMARD
    clamp = SpectralClamp([ClampTarget("w", weight, 100.0, FLOOR)])
    clamp.clamp()
    for _ in range(3):
        weight.mul_(1 - decay * eps).add_(growth * eps * HADAMARD)
        clamp.note_movement({"w": (abs(growth) * eps * math.sqrt(8), decay * eps)})
    sigma = torch.linalg.svdvals(weight.double())
    [event] = clamp.clamp()
    assert abs(weight.abs() - 1.5).min() == abs(weight.abs() - 1.5).max() == 3 * eps
    assert (
        event.route == "certified" and event.sigma_min <= sigma[-1] and sigma[0] <= event.sigma_max
    )


def test_a_certificate_covers_small_steps_and_ends_with_large_ones(route):
    weight, clamp = moving_clamp()
    original = weight.clone()
    for _ in range(5):
        clamp.note_movement({"w": (0.01, 1e-6)})
    [event] = clamp.clamp()
    assert event.route == "certified" and torch.equal(weight, original)
    sigma = torch.linalg.svdvals(weight.double())
    assert (
        sigma[0] < event.sigma_max < 1.1 * sigma[0] + 0.06
        and 0.7 * sigma[-1] - 0.06 < event.sigma_min < sigma[-1]
    )
    clamp.note_movement({"w": (0.5, 0.0)})
    assert clamp.clamp()[0].route == route
    assert clamp.clamp()[0].route == "certified"  # looking renewed it


def test_after_a_repair_the_certificate_speaks_of_the_repaired_spectrum():
    weight = with_spectrum(geometric(40, 6000.0), 40, 90, torch.float32)
    clamp = SpectralClamp([ClampTarget("w", weight, CONDITION, FLOOR)])
    assert clamp.clamp()[0].route == "repaired"
    lower, upper = clamp.state_dict()["intervals"]["w"]
    sigma = torch.linalg.svdvals(weight.double())
    assert 0.99 / CONDITION < lower < sigma[-1] and sigma[0] < upper < 1.001
    once = weight.clone()
    assert clamp.clamp()[0].route == "decomposed"
    assert torch.equal(weight, once)


def test_a_target_that_is_not_named_is_looked_at_again():
    _, clamp = moving_clamp()
    clamp.note_movement({})
    assert clamp.state_dict() == {"intervals": {}}
    assert clamp.clamp()[0].route == "decomposed"


def test_certificates_survive_a_file_bit_for_bit(tmp_path):
    weight, clamp = moving_clamp()
    clamp.note_movement({"w": (0.0123, 1e-6)})
    torch.save(clamp.state_dict(), tmp_path / "clamp.pt")
    resumed = SpectralClamp([ClampTarget("w", weight, 100.0, FLOOR)])
    resumed.load_state_dict(torch.load(tmp_path / "clamp.pt", weights_only=True))
    assert resumed.state_dict() == clamp.state_dict()
    for each in (clamp, resumed):
        each.note_movement({"w": (0.0321, 1e-6)})
    assert resumed.clamp() == clamp.clamp()
    with pytest.raises(ValueError, match="no clamp target"):
        SpectralClamp([]).load_state_dict(clamp.state_dict())


def test_bad_targets_movements_and_options_are_refused():
    weight = torch.ones(3, 4)
    target = ClampTarget("w", weight, 10.0, 0.0)
    for bad, message in (
        ({"parameter": torch.ones(3)}, "shape"),
        ({"fused": 2}, "fused"),
        ({"fused": 3}, "fused"),
    ):
        with pytest.raises(ValueError, match=message):
            ClampTarget(
                **{"name": "w", "parameter": weight, "max_condition": 10.0, "sigma_floor": 0.0}
                | bad
            )
    with pytest.raises(ValueError, match="share"):
        SpectralClamp([target, ClampTarget("tied", weight, 10.0, 0.0)])
    with pytest.raises(ValueError, match="decompose_on"):
        SpectralClamp([target], decompose_on="gpu")
    for movement in ((-1.0, 0.0), (math.nan, 0.0)):
        with pytest.raises(ValueError, match="movement"):
            SpectralClamp([target]).note_movement({"w": movement})
