"""Divergence and inheritance against copies that were moved, turned and reshaped by
known amounts.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kl3m_nb.model.roles import BLOCK_ROLES
from kl3m_nb.spectra import copies
from kl3m_nb.spectra.singular_values import model_spectra

HIDDEN, MLP, KV = 16, 24, 8
SHAPE = dict(
    hidden_size=HIDDEN,
    intermediate_size=MLP,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
    max_position_embeddings=32,
)


def orthonormal(rows, cols, rng) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, cols)))[0]


def llama(layers=4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE)
    )


SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}


def save_blocks(path, weight_of, layers):
    """A checkpoint in float64 whose matrix of `layer` and `role` is `weight_of(layer, role,
    shape)`.
    """
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.from_numpy(
            np.ascontiguousarray(weight_of(layer, name.split(".")[1], shape))
        )
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }
    save_file(
        {"model.embed_tokens.weight": torch.eye(HIDDEN, dtype=torch.float64), **tensors}, path
    )
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
        frame = copies.copy_divergence(stack, source_layers=2, reference=stack, top_k=4)
        assert len(frame) == 7 * 2 * 3  # roles, source blocks, pairs of three copies
        assert (frame.distance == 0).all() and frame.movement_cosine.isna().all()
        np.testing.assert_allclose(frame[["top_overlap", "bottom_overlap"]], 1, rtol=1e-9)

    def test_distance_and_direction_are_those_put_in(self, tmp_path):
        angle = 0.7

        def trained(layer, role, shape):
            start = self.start(layer, role, shape)
            first, second = (
                random_weight(90, seed_of(role))(shape),
                random_weight(91, seed_of(role))(shape),
            )
            first /= np.linalg.norm(first)
            second -= (first * second).sum() * first
            second /= np.linalg.norm(second)
            return start + (
                0.1 * first
                if layer < 2
                else 0.3 * (math.cos(angle) * first + math.sin(angle) * second)
            )

        stack = save_blocks(tmp_path / "stack.safetensors", self.start, layers=4)
        moved = save_blocks(tmp_path / "moved.safetensors", trained, layers=4)
        frame = copies.copy_divergence(moved, source_layers=2, reference=stack, top_k=3)
        np.testing.assert_allclose(frame.movement_cosine, math.cos(angle), rtol=1e-9)
        assert set(frame.chance_cosine) == {
            1 / math.sqrt(rows * cols) for rows, cols in SHAPES.values()
        }
        apart = math.sqrt(0.1**2 + 0.3**2 - 2 * 0.1 * 0.3 * math.cos(angle))
        for row in frame.itertuples():
            shape = next(shape for name, shape in SHAPES.items() if name.endswith(row.role))
            norms = [
                np.linalg.norm(trained(row.source_layer + 2 * copy, row.role, shape))
                for copy in (0, 1)
            ]
            assert row.distance == pytest.approx(apart / np.mean(norms), rel=1e-9)

    def test_overlap_counts_the_directions_that_were_kept(self, tmp_path):
        def turned(layer, role, shape):
            """On the shorter side, copy 1 has lost one of the three top and two of the three bottom
            directions of copy 0.
            """
            rng = np.random.default_rng(seed_of(role))
            n = min(shape)
            left, right = orthonormal(n, n, rng), orthonormal(max(shape), n, rng)
            order = np.arange(n)
            if layer == 1:
                order[[2, 3]] = [3, 2]
                order[[n - 5, n - 4, n - 3, n - 2]] = [n - 3, n - 2, n - 5, n - 4]
            weight = left[:, order] * np.geomspace(8, 1, n) @ right.T
            return weight if shape[0] == n else weight.T

        frame = copies.copy_divergence(
            save_blocks(tmp_path / "a.safetensors", turned, layers=2), source_layers=1, top_k=3
        )
        wide = frame[frame.role.isin(["k_proj", "v_proj"])]
        np.testing.assert_allclose(
            frame.drop(wide.index)[["top_overlap", "bottom_overlap"]],
            [[2 / 3, 1 / 3]] * 5,
            rtol=1e-7,
        )
        for row in frame.itertuples():
            n = KV if row.role in ("k_proj", "v_proj") else HIDDEN
            assert [row.top_gap, row.bottom_gap] == pytest.approx(
                [1 - 8 ** (-1 / (n - 1))] * 2, rel=1e-7
            )

    @pytest.mark.parametrize("raised", [2, 3, 4])
    def test_where_the_clamp_raised_more_or_fewer_values_to_one_there_is_no_overlap(
        self, tmp_path, raised
    ):
        def clamped(layer, role, shape):
            """Copies whose last `raised` directions, all of one singular value, are mixed at
            random.
            """
            rng = np.random.default_rng(seed_of(role))
            n = min(shape)
            left, right = orthonormal(n, n, rng), orthonormal(max(shape), n, rng)
            values = np.geomspace(8, 1, n)
            values[:2], values[n - raised :] = 8, 0.5
            if layer:
                mixed = orthonormal(raised, raised, np.random.default_rng(layer))
                left[:, n - raised :] = left[:, n - raised :] @ mixed
            weight = left * values @ right.T
            return weight if shape[0] == n else weight.T

        frame = copies.copy_divergence(
            save_blocks(tmp_path / "a.safetensors", clamped, layers=2), source_layers=1, top_k=3
        )
        np.testing.assert_allclose(frame.top_overlap, 1, rtol=1e-6)
        if raised > 3:
            assert frame.bottom_overlap.isna().all() and (frame.bottom_gap < 1e-6).all()
        else:
            np.testing.assert_allclose(frame.bottom_overlap, 1, rtol=1e-6)
            assert (frame.bottom_gap > 1e-2).all()

    def test_zeros_are_one_value_too_and_a_subspace_of_all_directions_is_whole(self, tmp_path):
        def singular(layer, role, shape):
            weight = random_weight(seed_of(role), layer)(shape)
            weight[:, 2:] = 0
            return weight

        path = save_blocks(tmp_path / "a.safetensors", singular, layers=2)
        frame = copies.copy_divergence(path, source_layers=1, top_k=4)
        assert (frame[["top_gap", "bottom_gap"]] == 0).all(
            axis=None
        ) and frame.bottom_overlap.isna().all()
        whole = copies.copy_divergence(path, source_layers=1, top_k=8).query(
            "role in ('k_proj', 'v_proj')"
        )
        assert (whole[["top_gap", "bottom_gap"]] == 1).all(axis=None)
        np.testing.assert_allclose(whole[["top_overlap", "bottom_overlap"]], 1, rtol=1e-9)

    def test_equal_copies_are_decomposed_once(self, tmp_path, monkeypatch):
        stack = save_blocks(tmp_path / "stack.safetensors", self.start, layers=6)
        decompose, calls = copies._extreme_subspaces, []
        monkeypatch.setattr(
            copies, "_extreme_subspaces", lambda *a: calls.append(1) or decompose(*a)
        )
        copies.copy_divergence(stack, source_layers=2, top_k=4)
        assert len(calls) == 7 * 2

    def test_random_copies_overlap_by_chance(self, tmp_path):
        path = save_blocks(
            tmp_path / "a.safetensors",
            lambda layer, role, shape: random_weight(layer, seed_of(role))(shape),
            12,
        )
        frame = copies.copy_divergence(path, source_layers=1, top_k=4)
        assert set(frame.chance_overlap) == {4 / HIDDEN, 4 / KV}
        means = frame.groupby("role")[["top_overlap", "bottom_overlap", "chance_overlap"]].mean()
        assert (
            frame.top_overlap.isna().mean() < 0.02
        )  # neighbours repel each other, and are seldom one value
        np.testing.assert_allclose(means.top_overlap, means.chance_overlap, rtol=0.12)
        np.testing.assert_allclose(means.bottom_overlap, means.chance_overlap, rtol=0.12)
        np.testing.assert_allclose(frame.groupby("role").distance.mean(), math.sqrt(2), rtol=0.05)

    def test_a_non_finite_copy_leaves_the_others_measured(self):
        model = llama()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[0, 0] = math.nan
        frame = copies.copy_divergence(model, source_layers=2, top_k=4)
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
            copies.copy_divergence(llama(), **arguments)

    def test_a_reference_of_another_depth_is_refused(self):
        with pytest.raises(ValueError, match="in layer 2; give the stack at step 0"):
            copies.copy_divergence(llama(), source_layers=2, reference=llama(layers=2), top_k=4)


class TestInheritance:
    def test_a_stack_has_its_sources_spectra(self, tmp_path):
        def weight(layer, role, shape):
            return random_weight(layer % 2, seed_of(role))(shape)

        source = save_blocks(tmp_path / "source.safetensors", weight, layers=2)
        stack = save_blocks(
            tmp_path / "stack.safetensors", lambda *a: 5 * weight(*a), layers=6
        )  # size is not shape
        frame = copies.inheritance(stack, source)
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
        frame = copies.inheritance(after, before).set_index(["layer", "role"])
        logs = np.log(before[0, "q_proj"] / 5)
        expected = math.sqrt(np.mean(logs**2))
        assert frame.loc[(0, "q_proj"), "rmse"] == pytest.approx(0.2 * expected)
        assert frame.loc[(1, "q_proj"), "rmse"] == pytest.approx(0.5 * expected)
        assert frame.loc[(-1, "lm_head"), "rmse"] == 0 and frame.loc[(1, "q_proj"), "copy"] == 1

    def test_zeros_are_left_out(self):
        before, after = (
            {(0, "q_proj"): np.array([4.0, 2.0, 0.0])},
            {(0, "q_proj"): np.array([4.0, 1.0, 0.5])},
        )
        [rmse] = copies.inheritance(after, before).rmse
        assert rmse == pytest.approx(math.log(2) / math.sqrt(2))

    def test_zeros_are_those_that_lower_the_rank(self, tmp_path):
        """What is rounding on a matrix's longer side (24), and would not be on its shorter (16), is
        zero here and there.
        """
        rng = np.random.default_rng(5)
        values = np.geomspace(1, 0.1, HIDDEN)
        left, right = orthonormal(MLP, HIDDEN, rng), orthonormal(HIDDEN, HIDDEN, rng)

        def weight_of(smallest):
            values[-1] = smallest
            up = left * values @ right.T
            return lambda layer, role, shape: (
                up if role == "up_proj" else random_weight(seed_of(role))(shape)
            )

        eps = np.finfo(np.float64).eps
        before = save_blocks(tmp_path / "before.safetensors", weight_of(20 * eps), layers=1)
        after = save_blocks(tmp_path / "after.safetensors", weight_of(0.1), layers=1)
        table = model_spectra(before).set_index("role")
        assert table.matrix_rank["up_proj"] == HIDDEN - 1
        assert copies.inheritance(after, before).set_index("role").rmse["up_proj"] == pytest.approx(
            0, abs=1e-9
        )

    def test_what_is_not_finite_has_no_rmse_and_leaves_the_depth_as_it_is(self):
        sigma, unknown = np.geomspace(5, 1, 4), np.full(4, np.nan)
        model = {
            (0, "q_proj"): sigma,
            (1, "q_proj"): sigma,
            (2, "q_proj"): sigma,
            (3, "q_proj"): unknown,
        }
        assert copies.inheritance(
            model, {(0, "q_proj"): sigma, (1, "q_proj"): sigma}
        ).rmse.tolist()[:3] == [0, 0, 0]
        rmse = copies.inheritance(model, {(0, "q_proj"): sigma, (1, "q_proj"): unknown}).rmse
        assert list(rmse.isna()) == [False, True, False, True]

    def test_a_foreign_source_is_refused(self):
        other = {(0, "q_proj"): np.ones(5)}
        with pytest.raises(ValueError, match="give the model it was grown from"):
            copies.inheritance({(0, "q_proj"): np.ones(6)}, other)
        with pytest.raises(ValueError, match="is not made of copies"):
            copies.inheritance({(2, "q_proj"): np.ones(5)}, {(1, "q_proj"): np.ones(5)})
