"""Spectra against matrices whose spectrum was put in, NumPy's float64 SVD, WeightWatcher's figures
and known laws.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kl3m_nb.model.roles import BLOCK_ROLES, HEAD_LAYER
from kl3m_nb.spectra import singular_values

SHAPE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
    max_position_embeddings=32,
)


def orthonormal(rows, cols, rng) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, cols)))[0]


def with_spectrum(values, rows, cols, rng) -> np.ndarray:
    """A float64 matrix (rows, cols) with the given singular values."""
    n = min(rows, cols)
    return orthonormal(rows, n, rng) * np.asarray(values) @ orthonormal(cols, n, rng).T


def tolerance(condition: float) -> float:
    """Relative error that a singular value σ₁/condition may have: about eps·σ₁, and up to 5000 that
    of a Gram matrix, eps·σ₁².
    """
    return 1e-14 * (1 + condition) + (4e-16 * condition**2 if condition < 5e3 else 0.0)


def llama(layers=4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE)
    )


class TestSingularValues:
    @pytest.mark.parametrize("shape", [(48, 48), (30, 70), (70, 30)])
    @pytest.mark.parametrize("condition", [1.0, 50.0, 3e3, 9e3, 2e4, 1e6, 1e8])
    def test_are_those_put_in(self, shape, condition):
        values = np.geomspace(condition, 1.0, min(shape)) * 0.01
        found = singular_values.singular_values(
            with_spectrum(values, *shape, np.random.default_rng(1))
        )
        assert found.dtype == np.float64
        # Building the matrix rounds every value by about eps·σ₁, so that is the most a relative
        # error can be asked to be.
        assert np.abs(found / values - 1).max() < tolerance(condition)
        if condition > 1e3:  # where a Gram matrix would tell the smallest too roughly
            assert found[-1] / values[-1] == pytest.approx(1, rel=1e-14 * condition)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(96, 96), (90, 160), (300, 80)])
    @pytest.mark.parametrize("condition", [1.2e3, 3e3, 4.8e3, 1e5])
    @pytest.mark.parametrize("kind", ["even", "clamped", "one large", "nearly equal", "two small"])
    def test_are_numpys_whatever_lies_beside_the_smallest(self, kind, condition, shape, dtype):
        n = min(shape)
        values = np.linspace(condition, 1.0, n)
        match kind:
            case "clamped":  # as `clamp` leaves them
                values = np.maximum(np.geomspace(50 * condition, 1.0, n) / 50, 1.0)
            case "one large":
                values[1:] = 1.0
            case "nearly equal":  # closer than the error of a Gram matrix, in part
                values[-40:] = 1.0 + np.geomspace(1e-5, 1e-12, 40)
            case "two small":
                values = np.geomspace(condition, condition / 10, n)
                values[-2:] = 1.0 + 1e-10, 1.0
        weight = torch.from_numpy(with_spectrum(values, *shape, np.random.default_rng(9))).to(dtype)
        expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
        found = singular_values.singular_values(weight)
        rounded = expected[0] / expected[-1]  # to 16 bits the smallest values are others
        assert (np.diff(found) <= 0).all()
        assert np.abs(found / expected - 1).max() < tolerance(rounded)
        if (
            rounded > 1e3
        ):  # nearly equal values slow an inverse iteration down, until it rests a little early
            assert found[-1] / expected[-1] == pytest.approx(
                1, rel=(1e-13 if kind == "nearly equal" else 3e-15) * rounded
            )

    @pytest.mark.parametrize("shape", [(96, 96), (90, 160)])
    def test_below_a_ceiling_take_no_svd(self, shape, monkeypatch):
        monkeypatch.delattr(singular_values, "_by_svd")
        values = np.maximum(np.geomspace(3e5, 1.0, min(shape)) / 100, 1.0)
        found = singular_values.singular_values(
            with_spectrum(values, *shape, np.random.default_rng(10))
        )
        np.testing.assert_allclose(found, values, rtol=tolerance(3e3))

    @pytest.mark.parametrize(
        ("name", "value"), [("_STEPS", 1), ("_SHIFT", -1e9)]
    )  # never at rest; no Cholesky factor
    def test_are_those_of_an_svd_where_the_smallest_is_not_found(self, name, value, monkeypatch):
        monkeypatch.setattr(singular_values, name, value)
        values = np.geomspace(3e3, 1.0, 60)
        found = singular_values.singular_values(
            with_spectrum(values, 60, 60, np.random.default_rng(11))
        )
        np.testing.assert_allclose(found, values, rtol=1e-14 * 3e3)

    @pytest.mark.parametrize("entry", [-2.5, 1e-60, 3e60, 0.0])
    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
    def test_of_a_single_column_are_its_length(self, entry, shape):
        found = singular_values.singular_values(np.full(shape, entry))
        np.testing.assert_allclose(found, [abs(entry) * math.sqrt(max(shape))], rtol=1e-14)

    def test_of_float32_weights_are_numpys(self):
        weight = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
        expected = np.linalg.svd(weight.numpy().astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(singular_values.singular_values(weight), expected, rtol=1e-11)

    @pytest.mark.parametrize(
        ("condition", "rtol"), [(10.0, 1e-13), (3e3, tolerance(3e3)), (1e6, 1e-8)]
    )
    def test_do_not_depend_on_the_pieces_a_long_matrix_is_read_in(
        self, condition, rtol, monkeypatch
    ):
        values = np.geomspace(condition, 1.0, 12)
        weight = with_spectrum(values, 100, 12, np.random.default_rng(2))
        monkeypatch.setattr(singular_values, "_CHUNK_ROWS", 17)
        np.testing.assert_allclose(singular_values.singular_values(weight), values, rtol=rtol)

    @pytest.mark.parametrize("scale", [1e-200, 1e-60, 1e-40, 1e60, 1e150])
    @pytest.mark.parametrize("condition", [5.0, 3e3, 1e5])
    def test_survive_values_whose_squares_leave_the_range(self, condition, scale):
        weight = with_spectrum(np.geomspace(condition, 1.0, 20), 20, 24, np.random.default_rng(3))
        np.testing.assert_allclose(
            singular_values.singular_values(weight * scale),
            singular_values.singular_values(weight) * scale,
            rtol=1e-9,
        )

    @pytest.mark.parametrize("rows", [20, 60])
    def test_of_a_singular_and_of_a_zero_matrix(self, rows):
        rng = np.random.default_rng(4)
        rank_three = rng.standard_normal((rows, 3)) @ rng.standard_normal((3, 15))
        values = singular_values.singular_values(rank_three)
        assert (values[:3] > 0.1).all() and (values[3:] < 1e-13 * values[0]).all()
        assert np.array_equal(singular_values.singular_values(torch.zeros(4, 6)), np.zeros(4))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_of_a_non_finite_matrix_are_refused(self, bad):
        weight = torch.ones(3, 3)
        weight[1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            singular_values.singular_values(weight)

    @pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3)])
    def test_of_what_is_no_matrix_are_refused(self, shape):
        with pytest.raises(ValueError, match="non-empty matrix"):
            singular_values.singular_values(torch.zeros(shape))


class TestMetrics:
    def test_of_an_orthogonal_matrix(self):
        metrics = singular_values.spectrum_of(3 * orthonormal(40, 25, np.random.default_rng(0)))
        expected = {
            "sigma_max": 3,
            "sigma_min": 3,
            "condition": 1,
            "stable_rank": 25,
            "matrix_rank": 25,
            "effective_rank": 25,
            "entropy": 1,
            "sigma_entropy": math.log(25),
            "participation_ratio": 25,
            "max_over_median": 1,
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)

    def test_of_two_values(self):
        metrics = singular_values.spectrum_of(np.diag([3.0, 1.0]), fit_alpha=False)
        sigma_entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
        assert metrics == pytest.approx(
            {
                "sigma_max": 3,
                "sigma_min": 1,
                "condition": 3,
                "stable_rank": 10 / 9,
                "matrix_rank": 2,
                "effective_rank": math.exp(sigma_entropy),
                "entropy": entropy,
                "sigma_entropy": sigma_entropy,
                "participation_ratio": 100 / 82,
                "max_over_median": 1.5,
                "mp_edge": math.sqrt(2.5 * 8),
            }
        )

    @pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
    def test_of_less_than_full_rank_entropy_is_relative_to_the_rank(self, shape):
        values = np.array([3.0, 1.0, 1.0, 0.0, 0.0])
        metrics = singular_values.spectrum_of(
            with_spectrum(values, *shape, np.random.default_rng(3))
        )
        p = np.array([9, 1, 1]) / 11
        assert (
            metrics["matrix_rank"] == 3
            and metrics["condition"] == math.inf
            and metrics["sigma_min"] == 0
        )
        assert metrics["entropy"] == pytest.approx(-(p * np.log(p)).sum() / math.log(3))
        even = singular_values.spectrum_of(
            with_spectrum([2, 2, 2, 0, 0], *shape, np.random.default_rng(4))
        )
        assert even["entropy"] == pytest.approx(1)

    def test_of_rank_one_and_of_zero(self):
        one = singular_values.spectrum_of(np.outer(np.arange(1.0, 6), np.ones(4)))
        assert (
            one["stable_rank"] == pytest.approx(1)
            and one["effective_rank"] == pytest.approx(1)
            and one["condition"] > 1e14
        )
        assert one["matrix_rank"] == 1 and math.isnan(
            one["entropy"]
        )  # shared among one, entropy has no scale
        zero = singular_values.spectrum_of(np.zeros((3, 5)))
        assert (
            zero["sigma_max"] == 0 and math.isnan(zero["condition"]) and math.isnan(zero["alpha"])
        )

    @given(st.floats(1e-6, 1e6), st.booleans(), st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_only_the_sizes_scale_with_the_matrix(self, factor, transposed, seed):
        weight = np.random.default_rng(seed).standard_normal((9, 14))
        before = singular_values.spectrum_of(weight, fit_alpha=False)
        after = singular_values.spectrum_of(
            factor * (weight.T if transposed else weight), fit_alpha=False
        )
        powers = {"sigma_max": 1, "sigma_min": 1, "mp_edge": 1}
        for name, value in before.items():
            assert after[name] == pytest.approx(value * factor ** powers.get(name, 0), rel=1e-7), (
                name
            )

    def test_the_marchenko_pastur_edge_bounds_noise_and_not_a_signal(self):
        rng = np.random.default_rng(5)
        noise = 0.02 * rng.standard_normal((300, 700))
        metrics = singular_values.spectrum_of(noise, fit_alpha=False)
        assert metrics["sigma_max"] == pytest.approx(metrics["mp_edge"], rel=0.03)
        signal = singular_values.spectrum_of(
            noise + 3 * np.outer(orthonormal(300, 1, rng), orthonormal(700, 1, rng)),
            fit_alpha=False,
        )
        assert signal["sigma_max"] > 2 * signal["mp_edge"]


# weightwatcher 0.7.7 (numpy 2.4.6, torch 2.13.0): WeightWatcher(model=...).analyze() of one
# torch.nn.Linear that holds `watched_matrix(kind).astype(float32)`. sigma_max and sigma_min are its
# sv_max and sv_min, sigma_max² its spectral_norm.
WEIGHT_WATCHER = {
    "gaussian": {
        "sigma_max": 1.0275910885948931,
        "sigma_min": 0.22697691408545498,
        "stable_rank": 24.149536258934944,
        "entropy": 0.9515376819047493,
        "matrix_rank": 64,
        "alpha": 4.84899784676251,
        "alpha_xmin": 0.5574726255051808,
        "alpha_D": 0.1445534221808349,
    },
    "heavy": {
        "sigma_max": 7.054126993985307,
        "sigma_min": 0.30136433361664483,
        "stable_rank": 3.6477878454184083,
        "entropy": 0.7129840829770979,
        "matrix_rank": 64,
        "alpha": 1.9047231823967374,
        "alpha_xmin": 0.9020557111210428,
        "alpha_D": 0.06403202612960757,
    },
    "geometric": {
        "sigma_max": 4.000000000834997,
        "sigma_min": 0.0016000001519939013,
        "stable_rank": 6.5847469892643735,
        "entropy": 0.6144700841067434,
        "matrix_rank": 96,
        "alpha": 1.1411867052206155,
        "alpha_xmin": 1.1273544607486434e-05,
        "alpha_D": 0.15743089271337585,
    },
    "deficient": {
        "sigma_max": 12.472841365827957,
        "stable_rank": 8.843131051424987,
        "entropy": 0.733532012240395,
        "matrix_rank": 60,
        "alpha": 2.359418069575012,
        "alpha_xmin": 35.003564687228,
        "alpha_D": 0.16493693843491863,
    },
}


def watched_matrix(kind: str) -> np.ndarray:
    """Noise, a heavy tail, condition 2500 with eigenvalues below WeightWatcher's threshold, and
    rank 30 of 60.
    """
    rng = np.random.default_rng(1 + list(WEIGHT_WATCHER).index(kind))
    match kind:
        case "gaussian":
            return 0.05 * rng.standard_normal((64, 160))
        case "heavy":
            return 0.05 * rng.standard_normal((160, 64)) * (1 - rng.random(64)) ** -0.7
        case "geometric":
            return with_spectrum(np.geomspace(4, 4 / 2500, 96), 96, 96, rng)
        case _:
            return 0.1 * rng.standard_normal((80, 30)) @ rng.standard_normal((30, 60))


@pytest.mark.parametrize("kind", WEIGHT_WATCHER)
def test_shared_metrics_are_weight_watchers(kind):
    found = singular_values.spectrum_of(watched_matrix(kind).astype(np.float32))
    # rel: WeightWatcher adds 1e-10 to every share of its entropy.
    assert {name: found[name] for name in WEIGHT_WATCHER[kind]} == pytest.approx(
        WEIGHT_WATCHER[kind], rel=1e-6
    )


def power_law_tail_by_definition(x):
    """Clauset, Shalizi and Newman, section 3: one candidate after another, in powers rather than
    logarithms.
    """
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
        found, _, distance = singular_values.power_law_tail(sample)
        assert found == pytest.approx(alpha, rel=0.06) and distance < 0.03

    def test_finds_where_the_tail_begins(self):
        rng = np.random.default_rng(7)
        tail = (1 - rng.random(1500)) ** (-1 / 2)  # alpha 3 from 1 on
        alpha, xmin, _ = singular_values.power_law_tail(np.concatenate([rng.random(1500), tail]))
        assert alpha == pytest.approx(3, rel=0.1) and 0.9 < xmin < 1.4

    @pytest.mark.parametrize(
        "total", [2, 3, 50, 1700]
    )  # the longest is worked off in several pieces
    def test_is_what_the_definition_says(self, total):
        sample = np.random.default_rng(total).lognormal(size=total)
        with np.errstate(over="raise", invalid="raise"):
            found = singular_values.power_law_tail(sample)
        assert found == pytest.approx(power_law_tail_by_definition(sample), rel=1e-9)

    @given(st.floats(1e-12, 1e12), st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_only_xmin_scales_with_the_sample(self, factor, seed):
        sample = np.random.default_rng(seed).lognormal(size=40)
        alpha, xmin, distance = singular_values.power_law_tail(sample)
        assert singular_values.power_law_tail(factor * sample) == pytest.approx(
            (alpha, factor * xmin, distance), rel=1e-7
        )

    def test_passes_over_zeros_and_needs_two_values(self):
        sample = np.random.default_rng(8).lognormal(size=30)
        assert singular_values.power_law_tail(
            np.append(sample, [0.0, 0.0])
        ) == singular_values.power_law_tail(sample)
        assert all(
            math.isnan(value) for value in singular_values.power_law_tail(np.array([0.0, 2.0]))
        )

    def test_copes_with_equal_values(self):
        alpha, xmin, distance = singular_values.power_law_tail(np.array([1.0, 2.0, 2.0, 2.0]))
        assert (
            xmin == 1.0 and alpha == pytest.approx(1 + 4 / (3 * math.log(2))) and 0 < distance <= 1
        )


class TestModelSpectra:
    def test_a_row_per_matrix_with_numpys_values(self):
        model = llama()
        frame, values = singular_values.analyse_model(model, source_layers=2)
        assert len(frame) == 4 * 7 + 1 == len(values)
        weights = {
            **{
                (i, role): (
                    layer.get_submodule(
                        ("mlp." if role in BLOCK_ROLES[4:] else "self_attn.") + role
                    ).weight
                )
                for i, layer in enumerate(model.model.layers)
                for role in BLOCK_ROLES
            },
            (HEAD_LAYER, "lm_head"): model.lm_head.weight,
        }
        for row in frame.itertuples():
            expected = np.linalg.svd(
                weights[row.layer, row.role].detach().double().numpy(), compute_uv=False
            )
            np.testing.assert_allclose(values[row.layer, row.role], expected, rtol=1e-9)
            assert row.condition == pytest.approx(expected[0] / expected[-1], rel=1e-8)
            assert (row.rows, row.cols) == tuple(weights[row.layer, row.role].shape)

    def test_layers_are_copies_in_cyclic_order(self):
        frame = singular_values.model_spectra(llama(), source_layers=2)
        blocks = frame[frame.layer >= 0].drop_duplicates("layer")
        assert list(blocks.source_layer) == [0, 1, 0, 1] and list(blocks["copy"]) == [0, 0, 1, 1]
        head = frame[frame.role == "lm_head"].iloc[0]
        assert list(head[["layer", "source_layer", "copy"]]) == [HEAD_LAYER] * 3

    def test_a_model_is_its_own_source_unless_told(self):
        frame = singular_values.model_spectra(llama())
        assert (frame.source_layer == frame.layer).all() and (
            frame["copy"][frame.layer >= 0] == 0
        ).all()

    def test_alpha_only_when_asked_for(self):
        assert "alpha" not in singular_values.model_spectra(llama(layers=1))
        assert singular_values.model_spectra(llama(layers=1), fit_alpha=True)["alpha"].gt(1).all()

    def test_a_16_bit_checkpoint_is_flagged(self, tmp_path):
        llama().to(torch.bfloat16).save_pretrained(tmp_path)
        frame = singular_values.model_spectra(tmp_path)
        assert (
            set(frame.dtype) == {"bfloat16"}
            and not frame.condition_reliable.any()
            and frame.finite.all()
        )
        assert singular_values.model_spectra(llama()).condition_reliable.all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_rounded_copy_saved_as_float32_is_flagged(self, dtype):
        model = llama()
        with torch.no_grad():
            for parameter in model.model.layers[1].parameters():
                parameter.copy_(parameter.to(dtype))
            model.model.layers[
                2
            ].self_attn.o_proj.weight.zero_()  # as a grown block begins: not a rounded one
            model.model.layers[1].mlp.up_proj.weight[23, 15] += 1e-6
        frame = singular_values.model_spectra(model)
        flagged = frame[~frame.condition_reliable]
        assert set(flagged.layer) == {1} and set(flagged.role) == {*BLOCK_ROLES} - {"up_proj"}

    def test_a_singular_matrix_has_an_infinite_condition(self):
        weight = np.random.default_rng(0).standard_normal((20, 30))
        weight[3] = weight[4]
        metrics = singular_values.spectrum_of(weight)
        assert metrics["matrix_rank"] == 19 and metrics["condition"] == math.inf

    def test_a_non_finite_matrix_is_a_marked_row(self):
        model = llama()
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[3, 4] = math.nan
        frame, values = singular_values.analyse_model(model)
        [ill] = frame[~frame.finite].to_dict("records")
        assert (
            (ill["layer"], ill["role"]) == (2, "up_proj")
            and math.isnan(ill["condition"])
            and not ill["condition_reliable"]
        )
        assert np.isnan(values[2, "up_proj"]).all() and len(values[2, "up_proj"]) == 16
        assert frame[frame.finite].condition.notna().all()

    def test_a_model_that_is_not_finite_at_all_has_every_column(self):
        broken = llama()
        with torch.no_grad():
            for parameter in broken.parameters():
                parameter.fill_(math.nan)
        frame = singular_values.model_spectra(broken, fit_alpha=True)
        assert (
            list(frame) == list(singular_values.model_spectra(llama(), fit_alpha=True))
            and not frame.finite.any()
        )
        assert frame.loc[:, "sigma_max":].isna().all(axis=None)

    def test_experts_are_rows_of_their_own(self):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, num_local_experts=3, **SHAPE))
        frame, values = singular_values.analyse_model(model)
        assert len(frame) == 2 * (4 + 9) + 1
        assert sorted(frame[(frame.layer == 1) & (frame.role == "up_proj")].expert) == [0, 1, 2]
        assert set(frame[frame.role == "q_proj"].expert) == {-1}
        gate = model.model.layers[1].mlp.experts.gate_up_proj[2, :24].detach().double().numpy()
        np.testing.assert_allclose(
            values[1, "gate_proj[2]"], np.linalg.svd(gate, compute_uv=False), rtol=1e-9
        )

    def test_progress_counts_every_matrix(self):
        calls = []
        singular_values.model_spectra(llama(), progress=lambda *numbers: calls.append(numbers))
        assert calls == [(done, 29) for done in range(1, 30)]

    @pytest.mark.parametrize("source_layers", [0, 3, 5])
    def test_impossible_source_layers_are_refused(self, source_layers):
        with pytest.raises(ValueError, match="is not made of copies"):
            singular_values.model_spectra(llama(), source_layers=source_layers)

    def test_a_model_is_named_after_its_folder_file_or_class(self, tmp_path):
        model = llama(layers=1)
        model.save_pretrained(tmp_path / "step-000010")
        names = [
            singular_values.model_spectra(place).model.unique().tolist()
            for place in (
                model,
                tmp_path / "step-000010",
                tmp_path / "step-000010" / "model.safetensors",
            )
        ]
        assert names == [["LlamaForCausalLM"], ["step-000010"], ["model"]]
