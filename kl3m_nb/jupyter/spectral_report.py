"""The spectra of a checkpoint as one HTML page that needs no network: summary, figures, a sortable
table, the settings.

Everything on the page is written beside it too: each figure as PNG and PDF with its data as CSV,
every table as CSV.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from kl3m_nb.common.files import replace_text
from kl3m_nb.data.tokenizer import read_tokenizer
from kl3m_nb.data.windows import sampled_windows
from kl3m_nb.figures import matrices, spectra, training
from kl3m_nb.jupyter.progress import ProgressBar
from kl3m_nb.jupyter.report_page import ReportPage
from kl3m_nb.model import decoder, runtime
from kl3m_nb.model.roles import BLOCK_ROLES, HEAD_LAYER
from kl3m_nb.runs.folder import read_run_init
from kl3m_nb.spectra import block_function, copies, findings, history, singular_values
from kl3m_nb.spectra.singular_values import spectrum_key
from kl3m_nb.spectra.subject import Subject

PAGE = "spectra.html"


MOST_PAGES = 8  # figures of single matrices; the table marks every ill one


_TABLE_COLUMNS = (
    "layer",
    "source_layer",
    "copy",
    "role",
    "expert",
    "condition",
    "sigma_max",
    "sigma_min",
    "stable_rank",
    "effective_rank",
    "participation_ratio",
    "entropy",
    "max_over_median",
    "mp_edge",
    "alpha",
    "alpha_D",
    "dtype",
    "ill",
)


def write_report(
    subject: Subject,
    folder: str | Path,
    fit_alpha: bool = True,
    top_k: int = 16,
    windows: int = 0,
    progress: Callable[[str], singular_values.Progress] = ProgressBar,
) -> Path:
    """Analyses `subject` and writes page, figures and tables into `folder`; returns the path of the
    page.

    `top_k` is the size of the compared subspaces (lowered to the smallest matrix). `windows` is the
    number of held-out windows of the subject's run on which CKA and the loss of swapped copies are
    measured; 0 leaves them out, since they run the model. `progress` makes a progress bar from a
    label. Raises ValueError as `find_matrices`, for a `top_k` below 1, for `windows` below 0, and
    for `windows` without a run.
    """
    if windows < 0:
        raise ValueError(
            f"windows is {windows}; it is the number of held-out windows for CKA and swapped"
            " copies, 0 for none."
        )
    if top_k < 1:
        raise ValueError(
            f"top_k is {top_k}; it is the number of singular directions that are compared, 1 at"
            " least."
        )
    if windows and not (subject.profile and subject.copies > 1):
        raise ValueError(
            "CKA and swapped copies need the held-out windows of a run of a stacked model;"
            f" {subject.checkpoint} is not in one."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = ReportPage(folder)
    table, values = singular_values.analyse_model(
        subject.checkpoint, subject.source_layers, fit_alpha, progress("spectra")
    )
    table["model"] = subject.name
    replace_text(folder / "spectra.csv", table.to_csv(index=False))
    ceilings = subject.ceilings
    page.sentences += findings.describe_model(table, ceilings, subject.steps_since_clamp)
    if subject.order != "cyclic":
        page.sentences.append(
            f"It was begun from an {subject.order} stack; copies are compared for cyclic stacks"
            " only."
        )
    if (
        subject.run_dir
        and not (subject.start or subject.source)
        and (init := read_run_init(subject.run_dir))
    ):
        page.sentences.append(
            f"What it was begun from, {init}, is no folder here; --against names one to compare it"
            " with."
        )
    before = subject.source or subject.start
    compared = bool(before) and Path(before) != subject.checkpoint
    sources = singular_values.model_singular_values(before, progress("source")) if compared else {}
    _add_model(page, table, values, subject)
    top_k = min(top_k, int(table[["rows", "cols"]].min(axis=None)))
    if subject.copies > 1:
        _add_copies(page, values, subject, top_k, progress)
    if sources:
        _add_inheritance(page, values, sources, subject, progress)
    if subject.run_dir:
        _add_clamp(page, subject)
    if windows:
        _add_function(page, subject, windows, progress)
    ill = findings.ill_matrices(table, ceilings, subject.steps_since_clamp)
    _add_ill(page, ill, table, values, ceilings, sources)
    settings = _settings(subject) | {
        "compared subspaces": f"{top_k} largest and {top_k} smallest singular values",
        "power-law tail": "fitted" if fit_alpha else "not fitted",
        "held-out windows": windows or "none: CKA and swapped copies were not asked for",
        "versions": runtime.versions(),
    }
    page.heading("Every matrix")
    page.sections.append(
        f'<p>Click a column to sort by it.</p><div class="tall">{_sortable(table, ill)}</div>'
    )
    return page.write(folder / PAGE, f"Spectra of {subject.name}", settings, _SORT)


def _add_model(page: ReportPage, table: pd.DataFrame, values: dict, subject: Subject) -> None:
    page.heading("Condition by layer and role")
    caption = (
        "Condition number of every"
        f" matrix{'; borders of copies are blue' if subject.copies > 1 else ''}. "
    )
    caption += (
        "Cells at their clamp ceiling and far above it are marked."
        if subject.ceilings
        else (
            "No run says that these weights were clamped: the ceilings are for reference, and"
            " nothing is marked."
        )
    )
    figure = spectra.plot_condition_heatmap(
        table, subject.reference_ceilings, enforced=bool(subject.ceilings)
    )
    page.figure(figure, "condition", caption, table)
    page.heading("Spectra over depth")
    present = {role for _, role in values}
    for role in sorted(
        present - {"lm_head"}, key=lambda role: BLOCK_ROLES.index(role.partition("[")[0])
    ):
        if not any(values[layer, name][0] > 0 for layer, name in values if name == role):
            continue
        data = singular_values.spectra_frame(values, role)
        page.figure(
            spectra.plot_ridgeline(values, role),
            f"ridgeline_{role}",
            f"{role}: density of ln σ, by layer.",
            data,
        )


def _add_copies(
    page: ReportPage,
    values: dict,
    subject: Subject,
    top_k: int,
    progress: Callable[[str], singular_values.Progress],
) -> None:
    page.heading("Are the copies diverging?")
    reference = subject.start or None
    if len(subject.steps) > 1:
        over_time = history.over_checkpoints(
            subject.steps,
            copies.copy_divergence,
            subject.source_layers,
            reference,
            top_k,
            progress=progress("copies over the run"),
        )
        divergence = over_time[over_time["step"] == over_time["step"].max()].drop(columns="step")
        caption = (
            "Over training: means over pairs of copies and source blocks; dashes mark what chance"
            " gives."
        )
        page.figure(
            spectra.plot_divergence(over_time), "divergence_over_training", caption, over_time
        )
    else:
        divergence = copies.copy_divergence(
            subject.checkpoint, subject.source_layers, reference, top_k, progress("copies")
        )
    replace_text(page.folder / "divergence.csv", divergence.to_csv(index=False))
    page.sentences += findings.describe_divergence(divergence)
    caption = (
        f"By source block: means over pairs of copies; subspaces of the {top_k} largest and"
        " smallest singular values."
    )
    page.figure(spectra.plot_divergence(divergence), "divergence", caption, divergence)
    if divergence["distance"].notna().any() and subject.copies <= spectra.MOST_COPIES:
        role, block = _most_diverged(divergence)
        caption = (
            f"The copies of source block {block}, whose {role} has diverged most, beside their"
            " mean."
        )
        figure = spectra.plot_copies(values, role, block, subject.source_layers)
        data = singular_values.spectra_frame(values, role)
        page.figure(
            figure,
            f"copies_{role}_{block}",
            caption,
            data[data["layer"] % subject.source_layers == block],
        )


def _most_diverged(divergence: pd.DataFrame) -> tuple[str, int]:
    """(role as in `spectrum_key`, source block) with the largest mean distance of its copies."""
    block, role, expert = (
        divergence.groupby(["source_layer", "role", "expert"])["distance"].mean().idxmax()
    )
    return spectrum_key(block, role, expert)[1], block


def _add_inheritance(
    page: ReportPage,
    values: dict,
    sources: dict,
    subject: Subject,
    progress: Callable[[str], singular_values.Progress],
) -> None:
    page.heading("Was the conditioning inherited?")
    inherited = copies.inheritance(values, sources)
    replace_text(page.folder / "inheritance.csv", inherited.to_csv(index=False))
    page.sentences += findings.describe_inheritance(inherited)
    if len(subject.steps) > 1:
        over_time = history.over_checkpoints(
            subject.steps, copies.inheritance, sources, progress=progress("spectra over the run")
        )
        caption = (
            "Over training: distance of the spectra from the source's; zero for the fresh stack by"
            " construction."
        )
        page.figure(
            spectra.plot_inheritance(over_time), "inheritance_over_training", caption, over_time
        )
    page.figure(spectra.plot_inheritance(inherited), "inheritance", "By layer and role.", inherited)


def _add_clamp(page: ReportPage, subject: Subject) -> None:
    clamps = history.clamp_history(subject.run_dir, subject.source_layers, subject.last_step)
    if clamps.empty:
        return
    page.heading("What the clamp does")
    page.sentences += findings.describe_clamp(clamps)
    page.figure(
        training.plot_clamp_events(clamps),
        "clamp_events",
        "Condition before each clamp, and how much it raised.",
        clamps,
    )
    page.figure(
        matrices.plot_clamp_map(clamps),
        "clamp_map",
        "Where and when singular values were raised.",
        clamps,
    )


def _add_function(
    page: ReportPage,
    subject: Subject,
    count: int,
    progress: Callable[[str], singular_values.Progress],
) -> None:
    held_out, families = sampled_windows(
        subject.profile.data, read_tokenizer(str(subject.checkpoint)), count
    )
    model = decoder.load_model(subject.checkpoint)
    similarity = block_function.block_similarity(model, held_out, subject.source_layers)
    swaps = block_function.swap_loss(
        model, held_out, subject.source_layers, families, progress=progress("swapped copies")
    )
    page.heading("Do the copies still do the same?")
    page.sentences += findings.describe_function(similarity, swaps)
    caption = (
        f"On {len(held_out)} held-out windows. CKA 1: the same up to rotation and scale. Bars: 95%"
        f" over the families of their documents, {swaps['effective'].iloc[0]:.1f} in effect."
    )
    data = similarity.merge(swaps, on=["source_layer", "copy_a", "copy_b"])
    page.figure(matrices.plot_block_function(similarity, swaps), "block_function", caption, data)


def _add_ill(
    page: ReportPage,
    ill: pd.DataFrame,
    table: pd.DataFrame,
    values: dict,
    ceilings: dict,
    sources: dict,
) -> None:
    if ill.empty:
        return
    page.heading("Ill matrices")
    depth = 1 + max((layer for layer, _ in sources), default=0)
    for _, row in ill.head(MOST_PAGES).iterrows():
        layer, role = spectrum_key(row["layer"], row["role"], row["expert"])
        before = sources.get((layer % depth if layer != HEAD_LAYER else HEAD_LAYER, role))
        figure = matrices.plot_matrix_page(
            table, values, row, ceilings.get(row["role"], 0.0), before
        )
        data = pd.DataFrame({"sigma": values[layer, role]})
        name = f"matrix_{'head' if layer == HEAD_LAYER else layer}_{role}"
        page.figure(figure, name, f"{findings.headline(row)}.", data)


def _settings(subject: Subject) -> dict[str, object]:
    clamp = subject.clamp
    if not subject.profile:
        whose = "of the kl3m-007 card, for reference: no run says that these weights were clamped"
    elif not clamp.clamp_every:
        whose = "of the run, for reference: its clamp was off"
    else:
        whose = (
            f"of the run, applied every {clamp.clamp_every} steps with the floor"
            f" {clamp.sigma_floor:g}"
        )
    return {
        "checkpoint": subject.checkpoint,
        "compared with": " and ".join(filter(None, (subject.start, subject.source))) or "nothing",
        "source blocks": (
            f"{subject.source_layers} (layer i is copy i // {subject.source_layers} of block i mod "
            f"{subject.source_layers})"
        ),
        "clamp ceilings": (
            f"attention {clamp.attention_max_condition:,.0f}, MLP {clamp.mlp_max_condition:,.0f}, "
            f"LM head {clamp.lm_head_max_condition:,.0f} ({whose})"
        ),
    }


def _sortable(table: pd.DataFrame, ill: pd.DataFrame) -> str:
    key = ["layer", "role", "expert"]
    marked = table.merge(
        ill[[*key, "reason"]].rename(columns={"reason": "ill"}), on=key, how="left"
    )
    marked["ill"] = marked["ill"].fillna("")
    marked.loc[~marked["condition_reliable"], ["condition", "sigma_min"]] = np.nan
    columns = [
        name
        for name in _TABLE_COLUMNS
        if name in marked and not (name == "expert" and (marked[name] < 0).all())
    ]
    head = "".join(f"<th scope='col'>{escape(name.replace('_', ' '))}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(map(_cell, row))}</tr>"
        for row in marked[columns].itertuples(index=False, name=None)
    )
    return f"<table class='sortable'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    if isinstance(value, float):
        shown = (
            "–"
            if np.isnan(value)
            else (
                "∞"
                if np.isinf(value)
                else f"{value:,.0f}"
                if abs(value) >= 1000
                else f"{value:.4g}"
            )
        )
        return f"<td data-value='{value}'>{shown}</td>"
    return f"<td data-value='{value}'>{value}</td>"


_SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("th")], body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column], value = cell.dataset.value;
    if (value === undefined) return cell.textContent;
    return value === "nan" ? -Infinity : value === "inf" ? Infinity : Number(value);
  };
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const rows = [...body.rows].map(row => [key(row, column), row]);
    rows.sort(([a], [b]) => sign * (a < b ? -1 : a > b ? 1 : 0));
    body.append(...rows.map(([, row]) => row));
  }));
}
"""
