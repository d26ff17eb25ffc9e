"""The report on checkpoints whose spectra are known, and on one that is broken: read back from
page, tables and figures.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
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

from kl3m_nb import cli
from kl3m_nb.figures import style
from kl3m_nb.jupyter import report_page, spectral_report
from kl3m_nb.profiles import ModelSpec
from kl3m_nb.spectra.subject import find_subject

SPEC = ModelSpec(
    layers=8, hidden=32, mlp=48, heads=2, kv_heads=1, head_size=16, vocabulary=80, context=32
)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return known_spectra.write_known_stack(tmp_path_factory.mktemp("known"), SPEC, copies=4)


@pytest.fixture(scope="module")
def report(known, tmp_path_factory):
    """The folder of a report that was made by the command, and its page."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.STYLE, "savefig.dpi", 40)  # nobody looks at them
        code = cli.main(
            [
                "spectra",
                str(known.trained),
                "--against",
                str(known.stack),
                "-o",
                str(folder),
                "--top-k",
                "4",
            ]
        )
    assert code == 0
    return folder, BeautifulSoup((folder / "spectra.html").read_text(), "html.parser")


@pytest.fixture
def unsaved(monkeypatch) -> list[str]:
    """The names of the figures, which are drawn and not rendered: that takes most of a report's
    time.
    """
    names = []

    def note(figure, folder, name, data):
        names.append(name)
        (folder / "empty.png").parent.mkdir(exist_ok=True)
        (folder / "empty.png").write_bytes(b"")
        return folder / "empty.png"

    monkeypatch.setattr(report_page, "save_figure", note)
    return names


def test_the_summary_is_what_was_put_in(known, report):
    _, page = report
    text = page.find("ul").text
    assert "8 layers, 4 copies of 2 source blocks: 57 matrices in float32." in text
    worst = max(
        values[0] / values[-1]
        for (_, role), values in known.spectra.items()
        if role in ("q_proj", "k_proj", "o_proj")
    )
    assert f"the largest {worst:,.0f}" in text
    assert (
        f"Two copies of a block lie {known.divergence.distance.mean():.1%} of their norm apart"
        in text
    )
    moved = known.divergence.movement_cosine.mean()
    assert f"the cosine between their movements is {moved:.2g} on average" in text
    top, bottom = known.divergence.top_overlap.mean(), known.divergence.bottom_overlap.mean()
    assert (
        f"leading directions overlap by {top:.2f} and their trailing directions overlap by"
        f" {bottom:.2f} on average" in text
    )
    assert "ceiling" not in text and "No matrix is ill." in text  # no run says that it was clamped


def test_the_page_needs_no_network_and_runs_only_its_own_script(report):
    folder, page = report
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    [script] = page.find_all("script")
    digest = base64.b64encode(hashlib.sha256(script.string.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert all(
        image["src"].startswith("data:image/png") and image["alt"] for image in page.find_all("img")
    )
    assert not re.search(r"(src|href)=\"https?:", (folder / "spectra.html").read_text())


def test_every_matrix_is_a_row_that_can_be_sorted(known, report):
    _, page = report
    table = page.find("table", class_="sortable")
    heads = [head.text for head in table.find_all("th")]
    rows = table.find("tbody").find_all("tr")
    assert len(rows) == 57
    cells = [row.find_all("td") for row in rows]
    place = {name: heads.index(name) for name in ("layer", "role", "condition")}
    for row in cells:
        values = known.spectra[int(row[place["layer"]]["data-value"]), row[place["role"]].text]
        assert float(row[place["condition"]]["data-value"]) == pytest.approx(
            values[0] / values[-1], rel=1e-3
        )


def test_every_figure_lies_beside_it_in_three_forms(report):
    folder, page = report
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert {
        "condition",
        "divergence",
        "inheritance",
        "ridgeline_q_proj",
        "ridgeline_down_proj",
    } <= names
    assert all(
        (folder / "figures" / f"{name}.{kind}").is_file()
        for name in names
        for kind in ("png", "pdf", "csv")
    )
    assert len(page.find_all("figure")) == len(names)
    assert len(pd.read_csv(folder / "spectra.csv")) == 57


def test_the_settings_are_on_the_page(known, report):
    _, page = report
    text = page.text
    assert (
        f"{known.stack} and {known.source}" in text
        and "for reference: no run says that" in text
        and "torch 2" in text
    )
    assert "4 largest and 4 smallest singular values" in text


def test_ill_matrices_get_a_page_each_and_do_not_stop_the_rest(known, tmp_path, unsaved):
    broken = shutil.copytree(
        known.trained, tmp_path / "broken", ignore=shutil.ignore_patterns(".spectra")
    )
    [path] = broken.glob("*.safetensors")
    weights = load_file(path)
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] = torch.nan
    weights["model.layers.5.self_attn.o_proj.weight"][0] = 0
    weights["model.layers.6.self_attn.q_proj.weight"] = torch.zeros(32, 32)
    save_file(weights, path)
    subject = find_subject(broken, against=str(known.source))
    calls = []
    page = spectral_report.write_report(
        subject,
        tmp_path / "report",
        fit_alpha=False,
        progress=lambda label: lambda *numbers: calls.append((label, *numbers)),
    )
    text = page.read_text()
    for words in (
        "Layer 3, up_proj holds NaN",
        "Layer 6, q_proj is all zero",
        "Layer 5, o_proj is singular: rank 31 of 32",
    ):
        assert words in text
    assert {"matrix_3_up_proj", "matrix_5_o_proj", "matrix_6_q_proj"} <= set(unsaved)
    assert ("spectra", 57, 57) in calls and "power-law tail</td><td>not fitted" in text


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


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            "",
            [
                "Layer 0, q_proj holds NaN",
                "52 more matrices stand out",
                "84 of 84 pairs of copies",
                "57 of 57 matrices",
            ],
        ),
        (
            "q_proj",
            [
                "Layer 0, q_proj holds NaN",
                "3 more matrices stand out",
                "12 of 84 pairs",
                "8 of 57 matrices",
            ],
        ),
        (
            "layers.7.",
            [
                "Layer 7, q_proj holds NaN",
                "2 more matrices stand out",
                "21 of 84 pairs",
                "7 of 57 matrices",
            ],
        ),
    ],
)
def test_nan_wherever_it_is_gives_a_page_that_says_so(known, tmp_path, unsaved, part, words):
    broken = spoilt(known, tmp_path / "broken", part)
    subject = find_subject(broken, against=str(known.stack))
    text = spectral_report.write_report(
        subject, tmp_path / "report", fit_alpha=False, top_k=4
    ).read_text()
    assert [word for word in words if word not in text] == []
    table = pd.read_csv(tmp_path / "report" / "spectra.csv")
    assert (
        "condition" in table
        and (~table.finite).sum() == {"": 57, "q_proj": 8, "layers.7.": 7}[part]
    )


def test_nan_in_the_source_is_no_fault_of_the_model(known, tmp_path, unsaved):
    source = spoilt(known, tmp_path / "source", "layers.1.self_attn", "source")
    subject = find_subject(known.trained, against=str(source))
    text = spectral_report.write_report(
        subject, tmp_path / "report", fit_alpha=False, top_k=4
    ).read_text()
    assert (
        "16 of 57 matrices, or their source&#x27;s, are zero or not finite" in text
        and "No matrix is ill." in text
    )
    assert pd.read_csv(tmp_path / "report" / "inheritance.csv").rmse.isna().sum() == 16


def test_the_checkpoints_of_a_run_are_drawn_over_its_steps(known, tmp_path, unsaved):
    subject = find_subject(known.trained, against=str(known.stack))
    subject = dataclasses.replace(subject, steps={0: known.stack, 40: known.trained})
    labels = []

    def bar(label):
        labels.append(label)
        return lambda *_: None

    text = spectral_report.write_report(
        subject, tmp_path / "report", fit_alpha=False, top_k=4, progress=bar
    ).read_text()
    assert {"divergence_over_training", "inheritance_over_training"} <= set(unsaved)
    assert labels == ["spectra", "source", "copies over the run", "spectra over the run"]
    assert (
        f"lie {known.divergence.distance.mean():.1%} of their norm apart" in text
    )  # at the last step


def test_counts_that_cannot_be_meant_are_refused_before_any_work(known, tmp_path):
    with pytest.raises(ValueError, match="top_k is 0"):
        spectral_report.write_report(find_subject(known.trained), tmp_path / "report", top_k=0)
    with pytest.raises(ValueError, match="windows is -1"):
        spectral_report.write_report(find_subject(known.trained), tmp_path / "report", windows=-1)
    assert not (tmp_path / "report").exists()


def test_a_stack_that_is_not_cyclic_has_a_page_without_its_copies(known, tmp_path, unsaved):
    stack = shutil.copytree(known.stack, tmp_path / "stack")
    record = json.loads((stack / "stack.json").read_text())
    (stack / "stack.json").write_text(json.dumps(record | {"order": "interpolated"}))
    text = spectral_report.write_report(
        find_subject(stack), tmp_path / "report", fit_alpha=False
    ).read_text()
    assert "begun from an interpolated stack" in text and "Are the copies diverging" not in text
    assert "divergence" not in unsaved and "condition" in unsaved


@pytest.mark.parametrize("name", ["nowhere", "owner/none"])
def test_what_is_no_checkpoint_is_one_sentence_and_exit_code_2(name, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["spectra", name]) == 2
    assert capsys.readouterr().err.startswith("kl3m_nb: There is no ")


def test_windows_need_a_run(known, tmp_path):
    with pytest.raises(ValueError, match="need the held-out windows of a run"):
        spectral_report.write_report(find_subject(known.stack), tmp_path, windows=4)


def test_a_16_bit_file_is_flagged(known, tmp_path, unsaved):
    path = tmp_path / "half.safetensors"
    [trained] = known.trained.glob("*.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(trained).items()}, path)
    page = spectral_report.write_report(find_subject(path), tmp_path / "report", fit_alpha=False)
    assert "The values of 57 matrices are 16-bit" in page.read_text()
    soup = BeautifulSoup(page.read_text(), "html.parser").find("table", class_="sortable")
    place = [head.text for head in soup.find_all("th")].index("condition")
    assert {row.find_all("td")[place].text for row in soup.find("tbody").find_all("tr")} == {"–"}
    assert not pd.read_csv(tmp_path / "report" / "spectra.csv").condition_reliable.any()
    assert np.isfinite(pd.read_csv(tmp_path / "report" / "spectra.csv").condition).all()


def test_a_run_is_asked_what_its_copies_compute_and_what_its_clamp_did(
    trained_run, tmp_path, unsaved
):
    run_dir, _ = trained_run
    page = spectral_report.write_report(
        find_subject(run_dir, source_layers=1), tmp_path, fit_alpha=False, top_k=4, windows=2
    )
    text = page.read_text()
    assert {"block_function", "clamp_events", "clamp_map"} <= set(unsaved)
    assert "has a linear CKA of" in text and "Swapping two copies changes the held-out loss" in text
    assert (
        "clamps up to step 6" in text
        and "of the run, applied every" in text
        and "held-out windows</td><td>2" in text
    )
    assert "sits at or above the ceiling" in text


def test_of_an_earlier_checkpoint_the_clamps_until_then_are_told(trained_run, tmp_path, unsaved):
    subject = find_subject(trained_run[0] / "checkpoints" / "step-000003")
    text = spectral_report.write_report(subject, tmp_path, fit_alpha=False).read_text()
    assert "In 1 clamp up to step 2" in text


def test_a_start_that_is_gone_is_told(trained_run, tmp_path, unsaved):
    run_dir = shutil.copytree(trained_run[0], tmp_path / "run")
    record = json.loads((run_dir / "run.json").read_text())
    for init, told in (("random weights", False), ("runs/moved/checkpoint", True)):
        (run_dir / "run.json").write_text(json.dumps(record | {"init": init}))
        text = spectral_report.write_report(
            find_subject(run_dir), tmp_path / "page", fit_alpha=False
        ).read_text()
        assert (f"What it was begun from, {init}, is no folder here" in text) is told
        assert "borders of copies" not in text
