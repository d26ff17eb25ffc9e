"""Kept spectra: used again only for the very same bytes, never trusted when damaged, never a reason
to fail.
"""

from __future__ import annotations

import known_spectra
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from kl3m_nb.model.folder import SPECTRA_FOLDER
from kl3m_nb.profiles import ModelSpec
from kl3m_nb.spectra import singular_values
from kl3m_nb.spectra.matrices import content_hash, find_matrices
from kl3m_nb.spectra.singular_values import SpectrumCache
from tests.conftest import files_up_to

SPEC = ModelSpec(
    layers=4, hidden=32, mlp=48, heads=2, kv_heads=1, head_size=16, vocabulary=80, context=32
)


@pytest.fixture
def known(tmp_path):
    return known_spectra.write_known_stack(tmp_path, SPEC, copies=2)


def counting(monkeypatch) -> list:
    """The shapes of the matrices that are decomposed from now on."""
    decomposed, decompose = [], singular_values.singular_values
    monkeypatch.setattr(
        singular_values,
        "singular_values",
        lambda weight: decomposed.append(tuple(weight.shape)) or decompose(weight),
    )
    return decomposed


def test_a_second_look_decomposes_nothing_and_finds_the_same(known, monkeypatch):
    first, values = singular_values.analyse_model(known.trained, fit_alpha=True)
    decomposed = counting(monkeypatch)
    second, again = singular_values.analyse_model(known.trained, fit_alpha=True)
    assert decomposed == [] and first.equals(second)
    assert all(np.array_equal(values[key], again[key]) for key in values)


def test_only_the_changed_matrix_is_decomposed_again(known, monkeypatch):
    singular_values.model_spectra(known.trained)
    [path] = known.trained.glob("*.safetensors")
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(weights, path)
    decomposed = counting(monkeypatch)
    table = singular_values.model_spectra(known.trained)
    assert decomposed == [(48, 32)]
    changed = table[(table.layer == 1) & (table.role == "up_proj")].sigma_max.item()
    assert changed == pytest.approx(2 * known.spectra[1, "up_proj"][0], rel=1e-6)


def test_equal_copies_are_decomposed_once(known, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # two workers may meet at one content
    decomposed = counting(monkeypatch)
    singular_values.model_spectra(known.stack)
    assert len(decomposed) == 2 * 7 + 1


def test_an_interrupted_analysis_keeps_what_it_has_done(known, monkeypatch):
    def stop(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        singular_values.model_spectra(known.trained, progress=stop)
    decomposed = counting(monkeypatch)
    singular_values.model_spectra(known.trained)
    assert 0 < len(decomposed) <= len(find_matrices(known.trained)) - 10


def test_a_damaged_cache_is_computed_anew(known):
    before = singular_values.model_spectra(known.trained)
    [kept] = (known.trained / SPECTRA_FOLDER).iterdir()
    kept.write_bytes(kept.read_bytes()[:-50])
    assert singular_values.model_spectra(known.trained).equals(before)
    assert len(SpectrumCache(kept)._values) == len(before)


@pytest.mark.parametrize(
    "forged",
    [
        lambda values: values * 1.01,
        lambda values: values[::-1].copy(),
        lambda values: values[:-1].copy(),
        lambda values: values[None],
        lambda values: values.astype(np.float32),
        lambda values: np.full_like(values, np.nan),
        lambda values: -values,
        lambda values: np.zeros(0),
        lambda values: values.astype(np.int64),
    ],
)
def test_kept_values_that_cannot_be_the_matrixs_are_computed_anew(known, forged):
    before = singular_values.model_spectra(known.trained)
    [kept] = (known.trained / SPECTRA_FOLDER).iterdir()
    save_numpy({key: forged(values) for key, values in load_numpy(kept).items()}, kept)
    assert singular_values.model_spectra(known.trained).equals(before)
    assert SpectrumCache(kept)._values.keys() == load_numpy(kept).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_kept_values_of_a_type_that_numpy_lacks_are_computed_anew(known, dtype):
    before = singular_values.model_spectra(known.trained)
    [kept] = (known.trained / SPECTRA_FOLDER).iterdir()
    save_file(
        {key: torch.tensor(values).to(dtype) for key, values in load_numpy(kept).items()}, kept
    )
    assert singular_values.model_spectra(known.trained).equals(before)


def test_a_disk_that_is_full_is_a_warning(known):
    with files_up_to(1000), pytest.warns(UserWarning, match="are not kept: .* cannot be written"):
        assert len(singular_values.model_spectra(known.trained)) == 4 * 7 + 1


def test_who_may_read_the_checkpoint_may_read_its_spectra(known):
    singular_values.model_spectra(known.trained)
    assert (
        SpectrumCache.beside(known.trained).path.stat().st_mode
        == (known.trained / "config.json").stat().st_mode
    )


def test_a_file_in_the_place_of_the_folder_is_a_warning(known):
    (known.trained / SPECTRA_FOLDER).write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(singular_values.model_spectra(known.trained)) == 4 * 7 + 1


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / SPECTRA_FOLDER / "values"
    first, second = SpectrumCache(path), SpectrumCache(path)
    first.add("a", np.ones(2))
    second.add("b", np.zeros(3))
    first.save()
    second.save()
    both = SpectrumCache(path)
    assert both.get("a").tolist() == [1, 1] and both.get("b").tolist() == [0, 0, 0]


def test_the_hash_knows_bytes_shape_and_dtype():
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    others = [
        weight.T,
        weight.reshape(3, 2),
        weight.double(),
        weight.bfloat16(),
        weight + 1e-6,
        -weight,
    ]
    assert (
        content_hash(weight)
        == content_hash(weight.clone())
        == content_hash(torch.cat([weight, weight])[:2])
    )
    assert len({content_hash(tensor) for tensor in (weight, *others)}) == 7
