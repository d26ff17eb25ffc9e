"""CKA against its kernel form and its invariances; swapped copies against a model that was built
swapped.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kl3m_nb.model.scoring import held_out_loss
from kl3m_nb.spectra import block_function

WINDOWS = torch.randint(0, 60, (6, 17), generator=torch.Generator().manual_seed(0))


def stacked(copies=2, noise=0.0) -> LlamaForCausalLM:
    """Two source blocks, each `copies` times; with noise the copies differ."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2 * copies,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=60,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
    )
    layers = model.model.layers
    for index in range(2, len(layers)):
        layers[index].load_state_dict(layers[index % 2].state_dict())
    with torch.no_grad():
        for parameter in layers.parameters() if noise else ():
            parameter += noise * torch.randn_like(parameter)
    return model


def hsic_form(x, y) -> float:
    """Kornblith et al., equation 3, by the Gram matrices of the samples instead of
    the features'.
    """
    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, m = centre @ x.double() @ x.double().T @ centre, centre @ y.double() @ y.double().T @ centre
    return float((k * m).sum() / (k.norm() * m.norm()))


class TestLinearCka:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    y = x @ torch.randn(8, 12, generator=torch.Generator().manual_seed(2)) + torch.randn(50, 12)

    def test_is_the_kernel_form(self):
        assert block_function.linear_cka(self.x, self.y) == pytest.approx(
            hsic_form(self.x, self.y), rel=1e-9
        )

    def test_does_not_see_rotation_scale_and_shift(self):
        turned = 3 * self.x.double() @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q + 5
        assert block_function.linear_cka(self.x, turned) == pytest.approx(1, rel=1e-6)
        before = block_function.linear_cka(self.x, self.y)
        assert block_function.linear_cka(turned, self.y) == pytest.approx(before, rel=1e-6)

    def test_chance_is_the_mean_over_random_pairings(self):
        rng = torch.Generator().manual_seed(3)
        drawn = [
            block_function.linear_cka(self.x, self.y[torch.randperm(50, generator=rng)])
            for _ in range(1000)
        ]
        assert block_function.chance_cka(self.x, self.y) == pytest.approx(
            sum(drawn) / 1000, rel=0.02
        )

    def test_chance_does_not_know_how_the_samples_lie(self):
        """Of features that repeat after half the samples, those moved by half their number are the
        same once more.
        """
        x, y = (torch.cat([features, features]) for features in (self.x, self.y))
        alike = block_function.linear_cka(x, y)
        assert block_function.linear_cka(x, y.roll(50, 0)) == pytest.approx(alike)
        assert block_function.chance_cka(x, y) < 0.3 * alike

    def test_of_unrelated_and_of_constant_features(self):
        many = torch.randn(5000, 4), torch.randn(5000, 4)
        assert block_function.linear_cka(*many) < 0.01
        assert math.isnan(block_function.linear_cka(torch.ones(5, 3), torch.randn(5, 3)))


class TestBlockSimilarity:
    def test_is_the_cka_of_what_the_layers_hand_on(self):
        model = stacked(copies=2, noise=0.1)
        found = block_function.block_similarity(model, WINDOWS, source_layers=2, batch_windows=4)
        with torch.no_grad():
            states = model.model(WINDOWS[:, :-1], output_hidden_states=True).hidden_states
        flat = [
            state.flatten(0, 1) for state in states
        ]  # the last is normed: layer 3 has no output here
        assert list(
            found[["source_layer", "copy_a", "copy_b"]].itertuples(index=False, name=None)
        ) == [(0, 0, 1), (1, 0, 1)]
        assert found.output_cka[0] == pytest.approx(hsic_form(flat[1], flat[3]), rel=1e-5)
        assert found.update_cka[0] == pytest.approx(
            hsic_form(flat[1] - flat[0], flat[3] - flat[2]), rel=1e-5
        )
        assert (found.update_chance < found.update_cka).all()

    def test_takes_its_samples_evenly_whatever_the_batches(self):
        model = stacked(noise=0.1)
        few = [
            block_function.block_similarity(model, WINDOWS, 2, batch, samples=20)
            for batch in (1, 4, 6)
        ]
        for other in few[1:]:
            torch.testing.assert_close(
                torch.tensor(other.to_numpy()),
                torch.tensor(few[0].to_numpy()),
                rtol=1e-4,
                atol=1e-5,
            )

    def test_leaves_no_hook_behind(self):
        model = stacked()
        block_function.block_similarity(model, WINDOWS, 2)
        assert not any(layer._forward_hooks for layer in model.model.layers)


class TestSwapLoss:
    def test_equal_copies_change_nothing(self):
        swaps = block_function.swap_loss(stacked(copies=3), WINDOWS, source_layers=2)
        assert len(swaps) == 2 * 3 and (swaps[["change", "low", "high"]] == 0).all(axis=None)
        assert swaps.effective.tolist() == pytest.approx([len(WINDOWS)] * 6)

    def test_windows_of_one_family_are_one(self):
        model = stacked(noise=0.2)
        swaps = block_function.swap_loss(model, WINDOWS, 2, [*"aabbcc"])
        apart = block_function.swap_loss(model, WINDOWS, 2)
        assert swaps.effective.tolist() == pytest.approx(
            [3, 3]
        ) and swaps.change.tolist() == pytest.approx(apart.change.tolist())
        assert (
            block_function.swap_loss(model, WINDOWS, 2, ["a"] * 6)[["low", "high"]]
            .isna()
            .all(axis=None)
        )

    def test_is_the_loss_of_a_model_built_that_way(self):
        model = stacked(noise=0.2)
        before = copy.deepcopy(model.state_dict())
        other = stacked(noise=0.2)
        layers = other.model.layers
        first, last = copy.deepcopy(layers[1].state_dict()), copy.deepcopy(layers[3].state_dict())
        layers[1].load_state_dict(last)
        layers[3].load_state_dict(first)
        calls = []
        swaps = block_function.swap_loss(
            model, WINDOWS, 2, progress=lambda *numbers: calls.append(numbers)
        )
        expected = (
            held_out_loss(other, WINDOWS).loss - held_out_loss(stacked(noise=0.2), WINDOWS).loss
        )
        assert swaps.change[1] == pytest.approx(expected, rel=1e-6) and abs(expected) > 1e-4
        assert (
            (swaps.low <= swaps.change).all()
            and (swaps.change <= swaps.high).all()
            and calls == [(1, 2), (2, 2)]
        )
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_an_error_leaves_the_model_as_it_was(self):
        model = stacked()
        order = [id(layer) for layer in model.model.layers]
        with (
            pytest.raises(RuntimeError, match="stopped"),
            block_function._swapped(model.model.layers, 0, 2),
        ):
            raise RuntimeError("stopped")
        assert [id(layer) for layer in model.model.layers] == order

    @pytest.mark.parametrize(
        ("source_layers", "message"), [(4, "no copies to compare"), (3, "is not made of copies")]
    )
    def test_a_model_without_copies_is_refused(self, source_layers, message):
        with pytest.raises(ValueError, match=message):
            block_function.swap_loss(stacked(), WINDOWS, source_layers)
