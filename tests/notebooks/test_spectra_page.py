"""Notebook 03 on one checkpoint: of known spectra, broken, of no run, of a run; and the page that
`spectra` makes of it.
"""

from __future__ import annotations

import json
import re
import shutil

import known_spectra
import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from safetensors.torch import load_file, save_file

from kl3m_nb import cli, figures
from kl3m_nb.common.text import Sentences
from kl3m_nb.profiles import ModelSpec
from tests.conftest import execute_notebook

SPEC = ModelSpec(
    layers=8, hidden=32, mlp=48, heads=2, kv_heads=1, head_size=16, vocabulary=80, context=32
)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return known_spectra.write_known_stack(tmp_path_factory.mktemp("known"), SPEC, copies=4)


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Runs notebook 03 on a checkpoint in this process: what it defined, the sentences it showed,
    and the names of its figures, which are drawn and not rendered.
    """

    def look(checkpoint, **parameters):
        names, shown = [], []
        monkeypatch.setattr(figures, "save_figure", lambda *given: names.append(given[2]))
        given = {"trained": str(checkpoint), "folder": str(tmp_path / "page"), "role": ""}
        given |= {"windows": 0, "top_k": 4, "fit_alpha": False}
        given |= {"display": lambda *objects: shown.extend(objects), **parameters}
        told = execute_notebook("03_spectral_analysis", given)
        return told, "\n".join(str(text) for text in shown if isinstance(text, Sentences)), names

    return look


def spoilt(known, folder, part: str, kind="trained"):
    """A copy of a checkpoint whose tensors with `part` in their name are NaN."""
    shutil.copytree(getattr(known, kind), folder, ignore=shutil.ignore_patterns(".spectra"))
    [path] = folder.glob("*.safetensors")
    weights = load_file(path)
    for name, tensor in weights.items():
        if part in name:
            tensor.fill_(torch.nan)
    save_file(weights, path)
    return folder


def test_the_command_makes_one_page_that_needs_no_network_of_what_was_put_in(known, tmp_path):
    given = [str(known.trained), "--against", str(known.stack), "--top-k", "4", "--no-alpha"]
    assert cli.main(["spectra", *given, "-o", str(tmp_path)]) == 0
    text = (tmp_path / "spectra.html").read_text()
    page = BeautifulSoup(text, "html.parser")
    assert not re.search(r"(src|href)=\"https?:", text)
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert len(page.find_all("script")) == policy.count("script-src 'sha256-") == 1
    images = page.find_all("img")
    assert all(image["src"].startswith("data:image/png") and image["alt"] for image in images)
    table = page.find("table", class_="sortable")
    heads = [head.text for head in table.find_all("th")]
    rows = [[cell.text for cell in row.find_all("td")] for row in table.tbody.find_all("tr")]
    assert len(rows) == 57
    for row in (dict(zip(heads, cells, strict=True)) for cells in rows):
        values = known.spectra[int(row["layer"]), row["role"]]
        assert float(row["condition"].replace(",", "")) == pytest.approx(
            values[0] / values[-1], 1e-4
        )
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"condition_trained", "divergence", "inheritance", "ridgeline_down_proj"} <= names
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "pdf", "csv")
    }
    assert len(images) == len(names) + 1  # and the explorer's


def test_the_sentences_are_what_was_put_in(known, look):
    told, text, _ = look(known.trained, stack=str(known.stack))
    assert "8 layers, 4 copies of 2 source blocks: 57 matrices in float32." in text
    worst = max(
        s[0] / s[-1] for (_, role), s in known.spectra.items() if role in "q_proj k_proj o_proj"
    )
    found = known.divergence
    for words in (
        f"the largest {worst:,.0f}",
        f"lie {found.distance.mean():.1%} of their norm apart",
        f"mean cosine between their movements is {found.movement_cosine.mean():.2g}, from",
        f"directions overlap by {found.top_overlap.mean():.2f}",
        f"trailing directions overlap by {found.bottom_overlap.mean():.2f}",
        "No matrix is ill.",
    ):
        assert words in text, words
    assert "ceiling" not in text  # no run says that it was clamped
    assert told["subject"].table()["compared with"] == f"{known.stack} and {known.source}"
    blocks = told["inherited"][told["inherited"].layer >= 0]
    expected = [known.rmse[row.layer, row.role] for row in blocks.itertuples()]
    assert blocks.rmse.to_numpy() == pytest.approx(np.array(expected), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_checkpoint_alone_leaves_out_what_needs_another(known, look, tmp_path, kind):
    [weights] = known.trained.glob("*.safetensors")
    place = tmp_path / "alone.safetensors"
    shutil.copy(weights, place)
    told, text, names = look(known.trained if kind == "folder" else place)
    assert list(told["folders"]) == ["trained"] and len(told["subject"].left_out()) == 3
    assert all(sentence in text for sentence in told["subject"].left_out())
    assert "condition_trained" in names and not {"divergence", "inheritance"} & {*names}


@pytest.mark.parametrize(
    ("part", "more", "pairs", "matrices"),
    [("", 52, 84, 57), ("q_proj", 3, 12, 8), ("layers.7.", 2, 21, 7)],
)
def test_nan_wherever_it_is_gives_a_page_that_says_so(
    known, look, tmp_path, part, more, pairs, matrices
):
    told, text, names = look(spoilt(known, tmp_path / "broken", part), stack=str(known.stack))
    layer = 7 if part == "layers.7." else 0
    for words in (
        f"Layer {layer}, q_proj holds NaN",
        f"{more} more matrices stand out",
        f"{pairs} of 84 pairs of copies",
        f"{matrices} of 57 matrices",
    ):
        assert words in text, words
    assert (~told["tables"]["trained"].finite).sum() == matrices
    assert f"matrix_{layer}_q_proj" in names


def test_nan_in_the_source_is_no_fault_of_the_model(known, look, tmp_path):
    source = spoilt(known, tmp_path / "source", "layers.1.self_attn", "source")
    told, text, _ = look(known.trained, source=str(source))
    assert "16 of 57 matrices" in text and "No matrix is ill." in text
    assert told["inherited"].rmse.isna().sum() == 16


def test_ill_matrices_get_a_page_each_and_do_not_stop_the_rest(known, look, tmp_path):
    broken = spoilt(known, tmp_path / "broken", "layers.3.mlp.up_proj")
    [path] = broken.glob("*.safetensors")
    weights = load_file(path)
    weights["model.layers.5.self_attn.o_proj.weight"][0] = 0
    weights["model.layers.6.self_attn.q_proj.weight"].zero_()
    save_file(weights, path)
    _, text, names = look(broken, source=str(known.source))
    for words in ("3, up_proj holds NaN", "6, q_proj is all zero", "o_proj is singular: rank 31"):
        assert words in text
    assert {"matrix_3_up_proj", "matrix_5_o_proj", "matrix_6_q_proj", "inheritance"} <= {*names}


def test_16_bit_conditions_are_flagged_and_not_shown(known, look, tmp_path):
    path = tmp_path / "half.safetensors"
    [trained] = known.trained.glob("*.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(trained).items()}, path)
    told, text, _ = look(path)
    assert "The values of 57 matrices are 16-bit" in text
    marked = told["spectra"].mark_ill(told["tables"]["trained"], told["ill"])
    assert marked.condition.isna().all()
    saved = pd.read_csv(tmp_path / "page" / "spectra.csv")
    assert not saved.condition_reliable.any() and np.isfinite(saved.condition).all()


def test_a_stack_that_was_not_trained_and_one_that_is_not_cyclic(known, look, tmp_path):
    told, text, _ = look(known.stack)
    assert list(told["folders"]) == ["source", "trained"] and "are still equal" in text
    stack = shutil.copytree(known.stack, tmp_path / "stack")
    record = json.loads((stack / "stack.json").read_text())
    (stack / "stack.json").write_text(json.dumps(record | {"order": "interpolated"}))
    _, text, names = look(stack)
    assert "begun from an interpolated stack" in text
    assert "divergence" not in names and "condition_trained" in names


def test_a_run_is_asked_what_its_copies_compute_and_what_its_clamp_did(trained_run, look):
    told, text, names = look(trained_run[0], source_layers=1, windows=2)
    assert {"block_function", "clamp_events", "clamp_map"} <= {*names}
    assert "clamps up to step 6" in text and "sits at or above the ceiling" in text
    assert len(told["swaps"]) and "of the run, every" in told["subject"].table()["clamp ceilings"]


def test_an_earlier_checkpoint_knows_the_clamps_until_then(trained_run, look):
    _, text, _ = look(trained_run[0] / "checkpoints" / "step-000003")
    assert "In 1 clamp up to step 2" in text


@pytest.mark.parametrize(("init", "named"), [("random weights", 0), ("runs/moved/checkpoint", 1)])
def test_a_start_that_is_gone_is_named(trained_run, look, tmp_path, init, named):
    run_dir = shutil.copytree(trained_run[0], tmp_path / "run")
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(record | {"init": init}))
    told, text, _ = look(run_dir)
    assert text.count("runs/moved/checkpoint") == named
    assert told["subject"].name.startswith("run, step-000006")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "There is no "),
        (["owner/none"], "There is no "),
        (["{known}", "--top-k", "0"], "top_k is 0"),
        (["{known}", "--windows", "-1"], "windows is -1"),
        (["{known}", "--windows", "4"], "need the held-out windows of a run"),
        (["{known}", "--source-layers", "3"], "is not made of copies of 3"),
        (["{cut}"], "is not a whole"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence_before_anything_is_written(
    known, tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cut = shutil.copytree(known.trained, tmp_path / "cut")
    [path] = cut.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    given = [text.format(known=known.trained, cut=cut) for text in arguments]
    assert cli.main(["spectra", *given, "-o", str(tmp_path / "page")]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and not (tmp_path / "page").exists()
