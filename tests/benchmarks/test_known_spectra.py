"""The whole analysis of a stack whose copies were given known perturbations: what is reported is
what was put in.
"""

from __future__ import annotations

import known_spectra
import numpy as np
import pytest

from kl3m_nb.model.roles import BLOCK_ROLES
from kl3m_nb.profiles import ModelSpec
from kl3m_nb.spectra import copies, singular_values

SPEC = ModelSpec(
    layers=12, hidden=64, mlp=160, heads=4, kv_heads=2, head_size=16, vocabulary=300, context=64
)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return known_spectra.write_known_stack(tmp_path_factory.mktemp("known"), SPEC, copies=4)


def test_conditions_ranks_and_entropies_are_those_put_in(known):
    table = singular_values.model_spectra(known.trained, known.source_layers)
    assert len(table) == 12 * 7 + 1 and table.condition_reliable.all()
    for row in table.itertuples():
        values = known.spectra[row.layer, row.role]
        share = values / values.sum()
        # float32 storage moves every singular value by about 1e-8·σ₁.
        assert row.condition == pytest.approx(
            values[0] / values[-1], rel=1e-7 * values[0] / values[-1]
        )
        assert row.stable_rank == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=1e-6)
        assert row.effective_rank == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-6)
        assert row.matrix_rank == min(row.rows, row.cols)


def test_divergence_is_that_put_in(known):
    found = copies.copy_divergence(
        known.trained, known.source_layers, reference=known.stack, top_k=4
    )
    found = found.set_index(["role", "source_layer", "copy_a", "copy_b"]).sort_index()
    expected = known.divergence.set_index(["role", "source_layer", "copy_a", "copy_b"]).sort_index()
    assert len(found) == 7 * 3 * 6
    for column in expected:
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-5, err_msg=column)
    assert (
        expected.bottom_overlap < expected.top_overlap
    ).all()  # so that the one cannot pass for the other
    assert found.distance.max() > 0.05 and found.movement_cosine.notna().sum() == 7 * 3 * 3


def test_inheritance_is_that_put_in(known):
    found = copies.inheritance(known.trained, known.source)
    blocks = found[found.layer >= 0]
    assert list(blocks.rmse) == pytest.approx(
        [known.rmse[row.layer, row.role] for row in blocks.itertuples()], rel=1e-3, abs=1e-5
    )
    assert found[found.role == "lm_head"].rmse.item() == 0
    at_start = copies.inheritance(known.stack, known.source)
    assert at_start.rmse.max() == 0 and set(at_start.role) == {*BLOCK_ROLES, "lm_head"}
