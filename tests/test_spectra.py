"""Spectra against matrices whose spectrum was put in, NumPy's float64 SVD, known laws, and copies moved by known amounts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kl3m_nb import spectra
from kl3m_nb.matrices import BLOCK_ROLES, HEAD_LAYER

SHAPE = dict(
    hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, vocab_size=40, max_position_embeddings=32
)  # fmt: skip


def orthonormal(rows, cols, rng) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, cols)))[0]


def with_spectrum(values, rows, cols, rng) -> np.ndarray:
    """A float64 matrix (rows, cols) with the given singular values."""
    n = min(rows, cols)
    return orthonormal(rows, n, rng) * np.asarray(values) @ orthonormal(cols, n, rng).T


def llama(layers=4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE))


class TestSingularValues:
    @pytest.mark.parametrize("shape", [(48, 48), (30, 70), (70, 30)])
    @pytest.mark.parametrize("condition", [1.0, 50.0, 3e3, 9e3, 2e4, 1e6, 1e8])
    def test_are_those_put_in(self, shape, condition):
        values = np.geomspace(condition, 1.0, min(shape)) * 0.01
        found = spectra.singular_values(with_spectrum(values, *shape, np.random.default_rng(1)))
        assert found.dtype == np.float64
        # Building the matrix rounds every value by about eps·σ₁, so that is the most a relative error can be asked to be.
        assert np.abs(found / values - 1).max() < 1e-7 + 1e-14 * condition

    def test_of_float32_weights_are_numpys(self):
        weight = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
        expected = np.linalg.svd(weight.numpy().astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(spectra.singular_values(weight), expected, rtol=1e-10)

    @pytest.mark.parametrize("condition", [10.0, 1e6])
    def test_do_not_depend_on_the_pieces_a_long_matrix_is_read_in(self, condition, monkeypatch):
        values = np.geomspace(condition, 1.0, 12)
        weight = with_spectrum(values, 100, 12, np.random.default_rng(2))
        monkeypatch.setattr(spectra, "_CHUNK_ROWS", 17)
        np.testing.assert_allclose(spectra.singular_values(weight), values, rtol=1e-7)

    @pytest.mark.parametrize("scale", [1e-200, 1e-40, 1e150])
    def test_survive_values_whose_squares_leave_the_range(self, scale):
        weight = np.random.default_rng(3).standard_normal((10, 20))
        np.testing.assert_allclose(spectra.singular_values(weight * scale), spectra.singular_values(weight) * scale, rtol=1e-9)

    def test_of_a_singular_and_of_a_zero_matrix(self):
        rng = np.random.default_rng(4)
        rank_three = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 15))
        values = spectra.singular_values(rank_three)
        assert (values[:3] > 0.1).all() and (values[3:] < 1e-13 * values[0]).all()
        assert np.array_equal(spectra.singular_values(torch.zeros(4, 6)), np.zeros(4))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_of_a_non_finite_matrix_are_refused(self, bad):
        weight = torch.ones(3, 3)
        weight[1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            spectra.singular_values(weight)

    @pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3)])
    def test_of_what_is_no_matrix_are_refused(self, shape):
        with pytest.raises(ValueError, match="non-empty matrix"):
            spectra.singular_values(torch.zeros(shape))


class TestMetrics:
    def test_of_an_orthogonal_matrix(self):
        metrics = spectra.spectrum_of(3 * orthonormal(40, 25, np.random.default_rng(0)))
        expected = {
            "sigma_max": 3, "sigma_min": 3, "condition": 1, "stable_rank": 25, "effective_rank": 25, "entropy": math.log(25),
            "participation_ratio": 25, "max_over_median": 1,
        }  # fmt: skip
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)

    def test_of_two_values(self):
        metrics = spectra.spectrum_of(np.diag([3.0, 1.0]), fit_alpha=False)
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        assert metrics == pytest.approx(
            {
                "sigma_max": 3, "sigma_min": 1, "condition": 3, "stable_rank": 10 / 9, "effective_rank": math.exp(entropy),
                "entropy": entropy, "participation_ratio": 100 / 82, "max_over_median": 1.5, "mp_edge": math.sqrt(2.5 * 8),
            }
        )  # fmt: skip

    def test_of_rank_one_and_of_zero(self):
        one = spectra.spectrum_of(np.outer(np.arange(1.0, 6), np.ones(4)))
        assert one["stable_rank"] == pytest.approx(1) and one["effective_rank"] == pytest.approx(1) and one["condition"] > 1e14
        zero = spectra.spectrum_of(np.zeros((3, 5)))
        assert zero["sigma_max"] == 0 and math.isnan(zero["condition"]) and math.isnan(zero["alpha"])

    @given(st.floats(1e-6, 1e6), st.booleans(), st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_only_the_sizes_scale_with_the_matrix(self, factor, transposed, seed):
        weight = np.random.default_rng(seed).standard_normal((9, 14))
        before = spectra.spectrum_of(weight)
        after = spectra.spectrum_of(factor * (weight.T if transposed else weight))
        powers = {"sigma_max": 1, "sigma_min": 1, "mp_edge": 1, "alpha_xmin": 2}
        for name, value in before.items():
            assert after[name] == pytest.approx(value * factor ** powers.get(name, 0), rel=1e-7), name

    def test_the_marchenko_pastur_edge_bounds_noise_and_not_a_signal(self):
        rng = np.random.default_rng(5)
        noise = 0.02 * rng.standard_normal((300, 700))
        metrics = spectra.spectrum_of(noise, fit_alpha=False)
        assert metrics["sigma_max"] == pytest.approx(metrics["mp_edge"], rel=0.03)
        signal = spectra.spectrum_of(noise + 3 * np.outer(orthonormal(300, 1, rng), orthonormal(700, 1, rng)), fit_alpha=False)
        assert signal["sigma_max"] > 2 * signal["mp_edge"]


def power_law_tail_by_definition(x):
    """Clauset, Shalizi and Newman, section 3: one candidate after another, in powers rather than logarithms."""
    x = np.sort(x)
    fits = []
    for i in range(len(x) - 1):
        tail = x[i:]
        alpha = 1 + len(tail) / np.log(tail / x[i]).sum()
        theory = 1 - (tail / x[i]) ** (1 - alpha)
        fits.append((np.abs(theory - np.arange(len(tail)) / len(tail)).max(), alpha, x[i]))
    distance, alpha, xmin = min(fits)
    return alpha, xmin, distance


class TestPowerLawTail:
    @pytest.mark.parametrize("alpha", [2.0, 2.7, 4.5])
    def test_finds_the_exponent_of_a_pareto_law(self, alpha):
        sample = 0.3 * (1 - np.random.default_rng(6).random(4000)) ** (-1 / (alpha - 1))
        found, _, distance = spectra.power_law_tail(sample)
        assert found == pytest.approx(alpha, rel=0.06) and distance < 0.03

    def test_finds_where_the_tail_begins(self):
        rng = np.random.default_rng(7)
        tail = (1 - rng.random(1500)) ** (-1 / 2)  # alpha 3 from 1 on
        alpha, xmin, _ = spectra.power_law_tail(np.concatenate([rng.random(1500), tail]))
        assert alpha == pytest.approx(3, rel=0.1) and 0.9 < xmin < 1.4

    @pytest.mark.parametrize("total", [2, 3, 50, 1700])  # the longest is worked off in several pieces
    def test_is_what_the_definition_says(self, total):
        sample = np.random.default_rng(total).lognormal(size=total)
        with np.errstate(over="raise", invalid="raise"):
            found = spectra.power_law_tail(sample)
        assert found == pytest.approx(power_law_tail_by_definition(sample), rel=1e-9)

    def test_passes_over_zeros_and_needs_two_values(self):
        sample = np.random.default_rng(8).lognormal(size=30)
        assert spectra.power_law_tail(np.append(sample, [0.0, 0.0])) == spectra.power_law_tail(sample)
        assert all(math.isnan(value) for value in spectra.power_law_tail(np.array([0.0, 2.0])))

    def test_copes_with_equal_values(self):
        alpha, xmin, distance = spectra.power_law_tail(np.array([1.0, 2.0, 2.0, 2.0]))
        assert xmin == 1.0 and alpha == pytest.approx(1 + 4 / (3 * math.log(2))) and 0 < distance <= 1


class TestModelSpectra:
    def test_a_row_per_matrix_with_numpys_values(self):
        model = llama()
        frame, values = spectra.analyse_model(model, source_layers=2)
        assert len(frame) == 4 * 7 + 1 == len(values)
        weights = {
            **{(i, role): layer.get_submodule(("mlp." if role in BLOCK_ROLES[4:] else "self_attn.") + role).weight
               for i, layer in enumerate(model.model.layers) for role in BLOCK_ROLES},
            (HEAD_LAYER, "lm_head"): model.lm_head.weight,
        }  # fmt: skip
        for row in frame.itertuples():
            expected = np.linalg.svd(weights[row.layer, row.role].detach().double().numpy(), compute_uv=False)
            np.testing.assert_allclose(values[row.layer, row.role], expected, rtol=1e-9)
            assert row.condition == pytest.approx(expected[0] / expected[-1], rel=1e-8)
            assert (row.rows, row.cols) == tuple(weights[row.layer, row.role].shape)

    def test_layers_are_copies_in_cyclic_order(self):
        frame = spectra.model_spectra(llama(), source_layers=2)
        blocks = frame[frame.layer >= 0].drop_duplicates("layer")
        assert list(blocks.source_layer) == [0, 1, 0, 1] and list(blocks["copy"]) == [0, 0, 1, 1]
        head = frame[frame.role == "lm_head"].iloc[0]
        assert list(head[["layer", "source_layer", "copy"]]) == [HEAD_LAYER] * 3

    def test_a_model_is_its_own_source_unless_told(self):
        frame = spectra.model_spectra(llama())
        assert (frame.source_layer == frame.layer).all() and (frame["copy"][frame.layer >= 0] == 0).all()

    def test_alpha_only_when_asked_for(self):
        assert "alpha" not in spectra.model_spectra(llama(layers=1))
        assert spectra.model_spectra(llama(layers=1), fit_alpha=True)["alpha"].gt(1).all()

    def test_a_16_bit_checkpoint_is_flagged(self, tmp_path):
        llama().to(torch.bfloat16).save_pretrained(tmp_path)
        frame = spectra.model_spectra(tmp_path)
        assert set(frame.dtype) == {"bfloat16"} and not frame.condition_reliable.any() and frame.finite.all()
        assert spectra.model_spectra(llama()).condition_reliable.all()

    def test_a_non_finite_matrix_is_a_marked_row(self):
        model = llama()
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[3, 4] = math.nan
        frame, values = spectra.analyse_model(model)
        [ill] = frame[~frame.finite].to_dict("records")
        assert (ill["layer"], ill["role"]) == (2, "up_proj") and math.isnan(ill["condition"]) and not ill["condition_reliable"]
        assert (2, "up_proj") not in values and frame[frame.finite].condition.notna().all()

    def test_experts_are_rows_of_their_own(self):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, num_local_experts=3, **SHAPE))
        frame, values = spectra.analyse_model(model)
        assert len(frame) == 2 * (4 + 9) + 1
        assert sorted(frame[(frame.layer == 1) & (frame.role == "up_proj")].expert) == [0, 1, 2]
        assert set(frame[frame.role == "q_proj"].expert) == {-1}
        gate = model.model.layers[1].mlp.experts.gate_up_proj[2, :24].detach().double().numpy()
        np.testing.assert_allclose(values[1, "gate_proj[2]"], np.linalg.svd(gate, compute_uv=False), rtol=1e-9)

    def test_progress_counts_every_matrix(self):
        calls = []
        spectra.model_spectra(llama(), progress=lambda done, total: calls.append((done, total)))
        assert calls == [(done, 29) for done in range(1, 30)]

    @pytest.mark.parametrize("source_layers", [0, 3, 5])
    def test_impossible_source_layers_are_refused(self, source_layers):
        with pytest.raises(ValueError, match="is not made of copies"):
            spectra.model_spectra(llama(), source_layers=source_layers)

    def test_a_model_is_named_after_its_folder_file_or_class(self, tmp_path):
        model = llama(layers=1)
        model.save_pretrained(tmp_path / "step-000010")
        names = [
            spectra.model_spectra(place).model.unique().tolist()
            for place in (model, tmp_path / "step-000010", tmp_path / "step-000010" / "model.safetensors")
        ]
        assert names == [["LlamaForCausalLM"], ["step-000010"], ["model"]]


HIDDEN, MLP, KV = 16, 24, 8
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}  # fmt: skip


def save_blocks(path, weight_of, layers):
    """A checkpoint in float64 whose matrix of `layer` and `role` is `weight_of(layer, role, shape)`."""
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.from_numpy(np.ascontiguousarray(weight_of(layer, name.split(".")[1], shape)))
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }
    save_file({"model.embed_tokens.weight": torch.eye(HIDDEN, dtype=torch.float64), **tensors}, path)
    return path


def random_weight(*seed):
    return lambda shape: np.random.default_rng(seed).standard_normal(shape)


def seed_of(role):
    return BLOCK_ROLES.index(role)


class TestCopyDivergence:
    def start(self, layer, role, shape):
        return random_weight(layer % 2, seed_of(role))(shape)

    def test_fresh_copies_are_equal(self, tmp_path):
        stack = save_blocks(tmp_path / "stack.safetensors", self.start, layers=6)
        frame = spectra.copy_divergence(stack, source_layers=2, reference=stack, top_k=4)
        assert len(frame) == 7 * 2 * 3  # roles, source blocks, pairs of three copies
        assert (frame.distance == 0).all() and frame.movement_cosine.isna().all()
        np.testing.assert_allclose(frame[["top_overlap", "bottom_overlap"]], 1, rtol=1e-9)

    def test_distance_and_direction_are_those_put_in(self, tmp_path):
        angle = 0.7

        def trained(layer, role, shape):
            start = self.start(layer, role, shape)
            first, second = random_weight(90, seed_of(role))(shape), random_weight(91, seed_of(role))(shape)
            first /= np.linalg.norm(first)
            second -= (first * second).sum() * first
            second /= np.linalg.norm(second)
            return start + (0.1 * first if layer < 2 else 0.3 * (math.cos(angle) * first + math.sin(angle) * second))

        stack = save_blocks(tmp_path / "stack.safetensors", self.start, layers=4)
        moved = save_blocks(tmp_path / "moved.safetensors", trained, layers=4)
        frame = spectra.copy_divergence(moved, source_layers=2, reference=stack, top_k=3)
        np.testing.assert_allclose(frame.movement_cosine, math.cos(angle), rtol=1e-9)
        apart = math.sqrt(0.1**2 + 0.3**2 - 2 * 0.1 * 0.3 * math.cos(angle))
        for row in frame.itertuples():
            shape = next(shape for name, shape in SHAPES.items() if name.endswith(row.role))
            norms = [np.linalg.norm(trained(row.source_layer + 2 * copy, row.role, shape)) for copy in (0, 1)]
            assert row.distance == pytest.approx(apart / np.mean(norms), rel=1e-9)

    def test_overlap_counts_the_directions_that_were_kept(self, tmp_path):
        def turned(layer, role, shape):
            """On the shorter side, copy 1 has lost one of the four top and one of the four bottom directions of copy 0."""
            rng = np.random.default_rng(seed_of(role))
            n = min(shape)
            left, right = orthonormal(n, n, rng), orthonormal(max(shape), n, rng)
            order = np.arange(n)
            if layer == 1:
                order[[3, 4]] = [4, 3]
                if n > 8:
                    order[[n - 5, n - 4]] = [n - 4, n - 5]
            weight = left[:, order] * np.geomspace(8, 1, n) @ right.T
            return weight if shape[0] == n else weight.T

        frame = spectra.copy_divergence(save_blocks(tmp_path / "a.safetensors", turned, layers=2), source_layers=1, top_k=4)
        np.testing.assert_allclose(frame[["top_overlap", "bottom_overlap"]], 0.75, rtol=1e-7)

    def test_random_copies_overlap_by_chance(self, tmp_path):
        path = save_blocks(tmp_path / "a.safetensors", lambda layer, role, shape: random_weight(layer, seed_of(role))(shape), 12)
        frame = spectra.copy_divergence(path, source_layers=1, top_k=4)
        assert set(frame.chance_overlap) == {4 / HIDDEN, 4 / KV}
        means = frame.groupby("role")[["top_overlap", "bottom_overlap", "chance_overlap"]].mean()
        np.testing.assert_allclose(means.top_overlap, means.chance_overlap, rtol=0.12)
        np.testing.assert_allclose(means.bottom_overlap, means.chance_overlap, rtol=0.12)
        np.testing.assert_allclose(frame.groupby("role").distance.mean(), math.sqrt(2), rtol=0.05)

    def test_a_non_finite_copy_leaves_the_others_measured(self):
        model = llama()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[0, 0] = math.nan
        frame = spectra.copy_divergence(model, source_layers=2, top_k=4)
        ill = (frame.role == "q_proj") & (frame.source_layer == 0)
        assert frame[ill].distance.isna().all() and frame[ill].top_overlap.isna().all()
        assert frame[~ill].notna().all(axis=None)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"source_layers": 4}, "no copies to compare"),
            ({"source_layers": 3}, "is not made of copies"),
            ({"source_layers": 2, "top_k": 9}, "k_proj of 8 × 16 takes 1 to 8"),
            ({"source_layers": 2, "top_k": 0}, "takes 1 to"),
        ],
    )
    def test_bad_questions_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            spectra.copy_divergence(llama(), **arguments)

    def test_a_reference_of_another_depth_is_refused(self):
        with pytest.raises(ValueError, match="in layer 2; give the stack at step 0"):
            spectra.copy_divergence(llama(), source_layers=2, reference=llama(layers=2), top_k=4)


class TestInheritance:
    def test_a_stack_has_its_sources_spectra(self, tmp_path):
        def weight(layer, role, shape):
            return random_weight(layer % 2, seed_of(role))(shape)

        source = save_blocks(tmp_path / "source.safetensors", weight, layers=2)
        stack = save_blocks(tmp_path / "stack.safetensors", lambda *a: 5 * weight(*a), layers=6)  # size is not shape
        frame = spectra.inheritance(stack, source)
        assert len(frame) == 6 * 7 + 1
        np.testing.assert_allclose(frame.rmse, 0, atol=1e-9)
        assert list(frame[frame.role == "q_proj"].source_layer) == [0, 1] * 3

    def test_a_spectrum_raised_to_a_power_is_that_far_away(self):
        before = {(0, "q_proj"): np.geomspace(5, 0.01, 30), (-1, "lm_head"): np.geomspace(3, 1, 30)}
        after = {
            (0, "q_proj"): before[0, "q_proj"] ** 1.2,
            (1, "q_proj"): before[0, "q_proj"] ** 0.5,
            (-1, "lm_head"): before[-1, "lm_head"],
        }
        frame = spectra.inheritance(after, before).set_index(["layer", "role"])
        logs = np.log(before[0, "q_proj"] / 5)
        expected = math.sqrt(np.mean(logs**2))
        assert frame.loc[(0, "q_proj"), "rmse"] == pytest.approx(0.2 * expected)
        assert frame.loc[(1, "q_proj"), "rmse"] == pytest.approx(0.5 * expected)
        assert frame.loc[(-1, "lm_head"), "rmse"] == 0 and frame.loc[(1, "q_proj"), "copy"] == 1

    def test_zeros_are_left_out(self):
        before, after = {(0, "q_proj"): np.array([4.0, 2.0, 0.0])}, {(0, "q_proj"): np.array([4.0, 1.0, 0.5])}
        [rmse] = spectra.inheritance(after, before).rmse
        assert rmse == pytest.approx(math.log(2) / math.sqrt(2))

    def test_a_foreign_source_is_refused(self):
        other = {(0, "q_proj"): np.ones(5)}
        with pytest.raises(ValueError, match="give the model it was grown from"):
            spectra.inheritance({(0, "q_proj"): np.ones(6)}, other)
        with pytest.raises(ValueError, match="is not made of copies"):
            spectra.inheritance({(2, "q_proj"): np.ones(5)}, {(1, "q_proj"): np.ones(5)})
