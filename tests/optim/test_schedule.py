"""Learning-rate factors at their closed-form points, and clipping against torch's own and the
recurrence worked out by hand.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kl3m_nb.optim.schedule import AdaptiveClip, ClipOutcome, lr_factor
from kl3m_nb.profiles import ScheduleSpec

CARD = ScheduleSpec()


def parameters_with_norm(norm: float) -> list[nn.Parameter]:
    """Parameters of several shapes, one without a gradient, whose gradients have the given global
    norm.
    """
    shapes = [(3, 4), (5,), (2, 2, 2), (1,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    scale = norm / math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * scale
    return [*parameters, nn.Parameter(torch.zeros(2))]


def flat_gradient(parameters: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat(
        [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    )


def test_warmup_is_linear_and_starts_above_zero():
    assert [lr_factor(step, CARD) for step in (0, 1, 49, 99, 100)] == pytest.approx(
        [0.01, 0.02, 0.5, 1.0, 1.0]
    )


def test_cosine_passes_its_middle_and_ends_at_the_minimum():
    middle = (CARD.warmup_steps + CARD.max_steps) // 2
    assert lr_factor(middle, CARD) == pytest.approx(0.55)
    quarter = (3 * CARD.warmup_steps + CARD.max_steps) // 4
    assert lr_factor(quarter, CARD) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert lr_factor(CARD.max_steps - 1, CARD) == pytest.approx(0.1, abs=1e-6)
    assert lr_factor(CARD.max_steps, CARD) == lr_factor(10 * CARD.max_steps, CARD) == 0.1


@given(max_steps=st.integers(1, 60), warmup_steps=st.integers(0, 60), minimum=st.floats(0.0, 1.0))
def test_every_schedule_rises_then_falls_between_its_bounds(max_steps, warmup_steps, minimum):
    spec = ScheduleSpec(max_steps=max_steps, warmup_steps=warmup_steps, min_lr_ratio=minimum)
    factors = [lr_factor(step, spec) for step in range(max_steps)]
    warmup = factors[:warmup_steps]
    assert warmup == sorted(warmup)
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)
    assert factors[0] > 0 and max(factors) <= 1.0
    assert all(factor >= minimum - 1e-12 for factor in factors[warmup_steps:])


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match="counted from 0"):
        lr_factor(-1, CARD)


def test_fresh_optimizers_warm_up_wherever_a_run_begins():
    begun = [lr_factor(step, CARD, first_step=37_000) for step in range(37_000, 37_200)]
    assert begun[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert begun[100:] == [lr_factor(step, CARD) for step in range(37_100, 37_200)]
    assert [lr_factor(step, CARD, first_step=0) for step in range(300)] == [
        lr_factor(step, CARD) for step in range(300)
    ]


def test_a_torch_scheduler_can_use_it():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, CARD))
    seen = []
    for _ in range(3):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.02, 0.04, 0.06])


@pytest.mark.parametrize("norm", [0.5, 1.999, 2.001, 300.0])
def test_fixed_mode_equals_torch(norm):
    ours = parameters_with_norm(norm)
    theirs = copy.deepcopy(ours)
    for parameter, other in zip(ours, theirs, strict=True):
        other.grad = None if parameter.grad is None else parameter.grad.clone()
    outcome = AdaptiveClip(ScheduleSpec(clip_mode="fixed", clip_max_norm=2.0)).clip_(ours)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 2.0)
    assert outcome == ClipOutcome(
        pytest.approx(float(expected)), 2.0, clipped=norm > 2.0, finite=True
    )
    torch.testing.assert_close(flat_gradient(ours), flat_gradient(theirs))


def test_adaptive_threshold_follows_the_recurrence():
    """With Adam's bias correction as Adam writes it, in float64."""
    clip, ema, counted, threshold = AdaptiveClip(CARD), 0.0, 0, 64.0
    for norm in (2.0, 100.0, 1000.0, 30.0, 0.0, 5.0, 1e-3, 40.0, 0.0, 7.0):
        parameters = parameters_with_norm(norm)
        outcome = clip.clip_(parameters)
        assert outcome.threshold == pytest.approx(threshold) and outcome.clipped == (
            norm > threshold
        )
        assert float(flat_gradient(parameters).norm()) == pytest.approx(
            min(norm, threshold), rel=1e-5
        )
        if norm > 0:
            counted, ema = counted + 1, 0.9 * ema + 0.1 * min(norm, threshold)
            threshold = min(64.0, 2.0 * ema / (1 - 0.9**counted))
        assert clip.threshold == pytest.approx(threshold)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_a_constant_norm_has_twice_itself_as_threshold_from_its_first_step_on(beta):
    clip = AdaptiveClip(dataclasses.replace(CARD, clip_beta=beta))
    thresholds = [clip.clip_([], norm=1.0).threshold for _ in range(50)]
    assert thresholds == pytest.approx([64.0] + [2.0] * 49)


@pytest.mark.parametrize(("first", "after"), [(0.0, 2.0), (1e-6, 2.0), (1e6, 2.0)])
def test_no_first_norm_shuts_or_opens_the_clip_for_good(first, after):
    clip = AdaptiveClip(CARD)
    clip.clip_([], norm=first)
    assert clip.threshold == (64.0 if first != 1e-6 else 2e-6)
    for _ in range(500):
        clip.clip_([], norm=1.0)
    assert clip.threshold == pytest.approx(after, rel=1e-6)


def test_a_state_of_an_earlier_version_goes_on_as_it_was():
    """Its mean began at 32 and was not corrected."""
    clip, ema = AdaptiveClip(CARD), 29.0
    clip.load_state_dict({"norm_ema": ema})
    for norm in (3.0, 80.0, 1.0):
        threshold = min(64.0, 2.0 * ema)
        assert clip.clip_([], norm=norm).threshold == pytest.approx(threshold)
        ema = 0.9 * ema + 0.1 * min(norm, threshold)
    again = AdaptiveClip(CARD)
    again.load_state_dict(clip.state_dict())
    assert (
        again.clip_([], norm=2.0) == clip.clip_([], norm=2.0)
        and again.state_dict() == clip.state_dict()
    )


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30))
def test_no_history_lets_a_norm_pass_the_maximum_or_shuts_the_clip(norms):
    clip = AdaptiveClip(CARD)
    for norm in norms:
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([0.6, 0.8]) * norm
        outcome = clip.clip_([parameter])
        assert float(parameter.grad.norm()) <= min(64.0, outcome.threshold) * (1 + 1e-5)
    assert clip.threshold > 0


def test_off_measures_and_leaves_gradients_alone():
    parameters = parameters_with_norm(500.0)
    before = flat_gradient(parameters).clone()
    outcome = AdaptiveClip(ScheduleSpec(clip_mode="off")).clip_(parameters)
    assert outcome == ClipOutcome(pytest.approx(500.0), math.inf, clipped=False, finite=True)
    assert torch.equal(flat_gradient(parameters), before)


@pytest.mark.parametrize("mode", ["adaptive", "fixed", "off"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_norm_changes_nothing(mode, bad):
    clip = AdaptiveClip(ScheduleSpec(clip_mode=mode))
    clip.clip_(parameters_with_norm(3.0))
    parameters = parameters_with_norm(1000.0)
    parameters[1].grad[2] = bad
    before, state = flat_gradient(parameters).clone(), clip.state_dict()
    outcome = clip.clip_(parameters)
    assert not outcome.finite and not outcome.clipped and not math.isfinite(outcome.norm)
    assert torch.equal(flat_gradient(parameters), before) or math.isnan(bad)
    assert torch.equal(flat_gradient(parameters).nan_to_num(), before.nan_to_num())
    assert clip.state_dict() == state


@pytest.mark.parametrize("mode", ["adaptive", "fixed", "off"])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_changes_nothing_however_large_the_norm(mode, loss):
    clip = AdaptiveClip(ScheduleSpec(clip_mode=mode))
    clip.clip_(parameters_with_norm(3.0), loss=2.5)
    parameters = parameters_with_norm(1000.0)
    before, state = flat_gradient(parameters).clone(), clip.state_dict()
    outcome = clip.clip_(parameters, loss=loss)
    assert outcome == ClipOutcome(
        pytest.approx(1000.0), clip.threshold, clipped=False, finite=False
    )
    assert torch.equal(flat_gradient(parameters), before) and clip.state_dict() == state


def test_a_norm_whose_square_overflows_is_not_finite():
    parameters = parameters_with_norm(1e22)
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    assert not AdaptiveClip(ScheduleSpec(clip_mode="off")).clip_(parameters).finite
    optimizer.step()
    assert any(torch.isinf(state["exp_avg_sq"]).any() for state in optimizer.state.values())


@pytest.mark.parametrize("norm", [128.0, torch.tensor(128.0)], ids=["float", "tensor"])
def test_a_given_norm_takes_the_place_of_the_measured_one(norm):
    parameters = parameters_with_norm(16.0)
    outcome = AdaptiveClip(CARD).clip_(parameters, norm=norm)
    assert outcome.norm == 128.0 and outcome.clipped
    assert float(flat_gradient(parameters).norm()) == pytest.approx(8.0, rel=1e-5)


def test_without_gradients_the_norm_is_zero():
    outcome = AdaptiveClip(CARD).clip_([nn.Parameter(torch.zeros(2))])
    assert outcome == ClipOutcome(0.0, 64.0, clipped=False, finite=True)


def test_bfloat16_gradients_are_measured_in_full():
    parameter = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    outcome = AdaptiveClip(CARD).clip_([parameter])
    assert outcome.norm == pytest.approx(100.0, rel=1e-2) and outcome.clipped


def test_state_round_trip_continues_the_same_run():
    norms = [5.0, 80.0, 3.0, 60.0]
    whole, first = AdaptiveClip(CARD), AdaptiveClip(CARD)
    expected = [whole.clip_([], norm=norm) for norm in norms]
    actual = [first.clip_([], norm=norm) for norm in norms[:2]]
    second = AdaptiveClip(CARD)
    second.load_state_dict(first.state_dict())
    actual += [second.clip_([], norm=norm) for norm in norms[2:]]
    assert actual == expected


@pytest.mark.parametrize(
    "setting",
    [{"clip_mode": "auto"}, {"clip_max_norm": 0.0}, {"clip_coefficient": -1.0}, {"clip_beta": 1.0}],
    ids=str,
)
def test_bad_settings_are_refused(setting):
    with pytest.raises(ValueError, match=str(next(iter(setting.values())))):
        AdaptiveClip(ScheduleSpec(**setting))
