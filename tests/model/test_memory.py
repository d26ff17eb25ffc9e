from __future__ import annotations

import pytest
import torch

from kl3m_nb.model import costs, decoder
from kl3m_nb.model.experts import use_grouped_experts
from kl3m_nb.optim.rules import role_table
from kl3m_nb.profiles import PROFILES, get_profile
from tests.conftest import small_profile


@pytest.mark.parametrize("name", PROFILES)
def test_parameters_by_arithmetic_are_those_of_the_model(name):
    profile = get_profile(name)
    rules = role_table(decoder.build_model(profile, device="meta"), profile)
    count = costs.count_parameters(profile.model)
    assert count.total == sum(torch.Size(rule.shape).numel() for rule in rules)
    assert count.muon == sum(
        torch.Size(rule.shape).numel() for rule in rules if rule.optimizer == "muon"
    )


def test_the_published_number_of_active_parameters():
    assert costs.count_parameters(get_profile("kl3m-002-520m").model).active == 318_866_432
    dense = costs.count_parameters(get_profile("kl3m-007-500m").model)
    assert dense.active == dense.total == 500_309_568


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", [0, 4])
def test_activations_are_the_tensors_that_autograd_keeps(experts, precision, attention):
    settings = dict(
        hidden=64,
        head_size=16,
        mlp=128,
        experts=experts,
        active_experts=experts // 2,
        sliding_window=16 if experts else 0,
        attention=attention,
    )
    kept = {}
    for layers in (1, 3):
        for windows in (2, 4):
            profile = small_profile(layers=layers, micro_batch=windows, **settings)
            predicted = costs.step_memory(
                profile, precision, compiled=False, recompute=False
            ).activations
            kept[layers, windows] = torch.tensor([_bytes_kept(profile, precision), predicted])
    # Two blocks and two windows more: what stands outside the blocks, and the weights' own copies,
    # cancel.
    measured, predicted = (kept[3, 4] - kept[1, 4] - kept[3, 2] + kept[1, 2]).tolist()
    assert predicted == pytest.approx(measured, rel=0.04 if attention == "sdpa" else 0.06)


def _bytes_kept(profile, precision):
    model = decoder.build_model(profile, attention=profile.runtime.attention)
    if precision == "bfloat16":
        use_grouped_experts(model)
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tensors = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensors.append(tensor) or tensor, lambda tensor: tensor
        ),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        output = decoder.forward_body(model, torch.randint(0, 512, (profile.data.micro_batch, 32)))
    del output
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(size for place, size in sizes.items() if place not in ours)


def test_the_largest_micro_batch_is_the_last_that_fits():
    profile = get_profile("kl3m-007-500m")
    for gigabytes in (16, 80, 141):
        for recompute in (False, True):
            windows = costs.largest_micro_batch(
                profile, gigabytes * 10**9, "bfloat16", True, recompute
            )
            totals = [
                (
                    costs.step_memory(
                        get_profile("kl3m-007-500m", micro_batch=count), "bfloat16", True, recompute
                    ).total
                    if count
                    else 0
                )
                for count in (windows, windows + 1)
            ]
            assert totals[0] <= costs.USABLE * gigabytes * 10**9 < totals[1]
    assert costs.largest_micro_batch(profile, 10**9, "bfloat16", True, True) == 0


def test_eight_shards_hold_what_one_process_holds_and_what_they_gather():
    profile = get_profile("kl3m-007-500m")
    whole, shard = (
        costs.step_memory(profile, "bfloat16", True, False, shards) for shards in (1, 8)
    )
    assert 8 * shard.optimizer_states == pytest.approx(whole.optimizer_states, rel=1e-6)
    embedding = 4 * profile.model.vocabulary * profile.model.hidden
    for part in ("weights", "gradients"):
        gathered = getattr(shard, part) - getattr(whole, part) / 8
        assert embedding < gathered < 1.1 * embedding  # and one of 120 blocks
    assert (shard.activations, shard.logits) == (whole.activations, whole.logits)


def test_the_500m_is_what_is_known_of_it():
    profile = get_profile("kl3m-007-500m")
    compiled = costs.step_memory(profile, "bfloat16", compiled=True, recompute=False)
    assert compiled.weights + compiled.gradients + compiled.optimizer_states == pytest.approx(
        6.3e9, rel=0.05
    )
    assert compiled.activations == pytest.approx(42e9, rel=0.1)
    assert (
        costs.step_memory(profile, "bfloat16", True, recompute=True).activations
        < compiled.activations / 6
    )


def test_the_objectives_buffers_are_what_a_gpu_was_seen_to_allocate():
    """2.23 GB beside the inputs of 20,480 tokens, in chunks of 2,048: the head's gradient, the head
    in bfloat16, buffers.
    """
    of_head = 6 * 131_072 * 576

    def buffers(compiled, **overrides):
        return costs.step_memory(
            get_profile("kl3m-007-500m", **overrides), "bfloat16", compiled, recompute=False
        ).logits

    assert buffers(True, chunk_tokens=2048) + of_head == pytest.approx(2.23e9, rel=0.1)
    assert buffers(False) > buffers(True)
    assert buffers(True) + of_head < 4e9
