"""How long does the analysis of the 120-layer, 500M checkpoint take, is it right, and how does
WeightWatcher compare?

    python benchmarks/spectra.py [--folder FOLDER] [--peer-layers 20]

The checkpoint is `known_spectra.write_known_stack` at the real size: copies of known condition
(attention 2200 to 3300, MLP 4 to 5), turned and reshaped by known amounts, so every reported number
has one to be compared with. `--folder` keeps the 5 GB for the next call. Caches are removed before
what is timed, except for the second look. Memory is what the process allocates beyond what it held
before, sampled ten times a second; pages of the mapped file, which the system may drop at any time,
are not in it.

WeightWatcher (pip install weightwatcher, into an environment of its own) analyses the first
`--peer-layers` of the same checkpoint with its defaults, which leave out an LM head of more than
50,000 rows, and its first six. All layers have the same shapes, so the difference is what a matrix
costs, and the time for 120 layers follows without multiplying what it costs to begin; the table
says so. It wants the model in memory and gets it before its time is taken. It is compared with our
time for the same matrices, without the head, which includes reading the file.

Last the HTML page of the checkpoint is made by the command `spectra`, kernel and all, and its
tables and sentences are compared with what was put in. Its memory is the kernel's and not measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import known_spectra
import numpy as np
import pandas as pd
import torch
from _common import write_table
from transformers import AutoConfig, LlamaForCausalLM

from kl3m_nb import cli
from kl3m_nb.model.folder import SPECTRA_FOLDER
from kl3m_nb.model.roles import HEAD_LAYER, ROLES
from kl3m_nb.profiles import get_profile
from kl3m_nb.spectra import copies, findings, history, singular_values
from kl3m_nb.spectra.matrices import find_matrices

PROFILE = get_profile("kl3m-007-500m")
FEW_PEER_LAYERS = 6
PEER_COLUMNS = {
    "stable_rank": "stable_rank",
    "entropy": "entropy",
    "alpha": "alpha",
    "alpha_xmin": "xmin",
    "alpha_D": "D",
}


class Measurement:
    """Seconds and MiB of a call."""

    def __init__(self, work: Callable, *arguments, **options):
        before, self._peak, self._running = _allocated(), 0.0, True
        watch = threading.Thread(target=self._watch)
        watch.start()
        start = time.perf_counter()
        self.result = work(*arguments, **options)
        self.seconds = time.perf_counter() - start
        self._running = False
        watch.join()
        self.mebibytes = self._peak - before

    def _watch(self) -> None:
        while self._running:
            self._peak = max(self._peak, _allocated())
            time.sleep(0.1)

    def row(self, what: str, matrices: int) -> dict:
        return {
            "what": what,
            "matrices": matrices,
            "seconds": self.seconds,
            "ms a matrix": 1000 * self.seconds / matrices,
            "extra memory MiB": self.mebibytes,
        }


def _allocated() -> float:
    """MiB of this process's own memory, without mapped files."""
    status = Path("/proc/self/status").read_text()
    return (
        next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
        / 1024
    )


def forget(folder: Path) -> None:
    shutil.rmtree(folder / SPECTRA_FOLDER, ignore_errors=True)


def deviations(
    known: known_spectra.KnownStack,
    table: pd.DataFrame,
    divergence: pd.DataFrame,
    rmse: pd.DataFrame,
) -> list[dict]:
    """The largest difference between what was put in and what was found, for each quantity."""
    put_in = {
        "condition": lambda s: s[0] / s[-1],
        "stable_rank": lambda s: np.sum(s**2) / s[0] ** 2,
        "effective_rank": lambda s: np.exp(-np.sum(s / s.sum() * np.log(s / s.sum()))),
    }
    rows = []
    for column, formula in put_in.items():
        expected = [formula(known.spectra[row.layer, row.role]) for row in table.itertuples()]
        rows.append(_deviation(column, table[column], expected))
    key = ["role", "source_layer", "copy_a", "copy_b"]
    both = divergence.merge(
        known.divergence, on=key, suffixes=("", "_put_in"), validate="one_to_one"
    )
    for column in ("distance", "movement_cosine", "top_overlap", "bottom_overlap"):
        rows.append(_deviation(column, both[column], both[f"{column}_put_in"]))
    blocks = rmse[rmse["layer"] != HEAD_LAYER]
    rows.append(
        _deviation(
            "inheritance rmse",
            blocks["rmse"],
            [known.rmse[row.layer, row.role] for row in blocks.itertuples()],
        )
    )
    return rows


def _deviation(what: str, found, expected) -> dict:
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    if not np.array_equal(np.isnan(found), np.isnan(expected)):
        raise ValueError(f"{what} is defined elsewhere than it was put in.")
    known = ~np.isnan(expected)
    return {
        "quantity": what,
        "values": int(known.sum()),
        "smallest put in": expected[known].min(),
        "largest put in": expected[known].max(),
        "largest difference": np.abs(found - expected)[known].max(),
    }


def peer(folder: Path, layers: int) -> tuple[Measurement, pd.DataFrame]:
    """WeightWatcher on the blocks of the first `layers` layers, loaded before its time is taken."""
    import weightwatcher

    logging.disable(logging.WARNING)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    blocks = LlamaForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32
    ).model.layers
    measured = Measurement(weightwatcher.WeightWatcher(model=blocks).analyze)
    return measured, measured.result


def agreement(table: pd.DataFrame, theirs: pd.DataFrame) -> list[dict]:
    """Largest relative difference of the shared metrics, matrix by matrix, in the order of the
    layers.
    """
    theirs = theirs.assign(sigma_max=np.sqrt(theirs["spectral_norm"]))
    names = theirs["longname"].str.extract(r"(?P<layer>\d+)\.\w+\.(?P<role>\w+_proj)")
    theirs = theirs.assign(layer=names["layer"].astype(int), role=names["role"])
    both = table.merge(
        theirs, on=["layer", "role"], suffixes=("", "_theirs"), validate="one_to_one"
    )
    rows = []
    for ours, name in ({"sigma_max": "sigma_max"} | PEER_COLUMNS).items():
        other = both[f"{name}_theirs"] if f"{name}_theirs" in both else both[name]
        difference = (both[ours] / other - 1).abs()
        rows.append(
            {"metric": ours, "matrices": len(both), "largest relative difference": difference.max()}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints are kept (default: a temporary folder)"
    )
    parser.add_argument(
        "--peer-layers", type=int, default=20, help="layers that WeightWatcher analyses"
    )
    parser.add_argument("--only-write", action="store_true", help="write the checkpoints and stop")
    arguments = parser.parse_args()
    if not FEW_PEER_LAYERS < arguments.peer_layers <= PROFILE.model.layers:
        parser.error(f"--peer-layers takes {FEW_PEER_LAYERS + 1} to {PROFILE.model.layers}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        known = known_spectra.write_known_stack(folder, PROFILE.model, PROFILE.growth_factor)
        if not arguments.only_write:
            measure(known, arguments.peer_layers)


def measure(known: known_spectra.KnownStack, peer_layers: int) -> None:
    rows = []
    for what, alpha in (("without alpha", False), ("with alpha", True)):
        forget(known.trained)
        measured = Measurement(
            singular_values.model_spectra, known.trained, known.source_layers, fit_alpha=alpha
        )
        rows.append(measured.row(f"spectra, {what}", len(measured.result)))
    table = measured.result
    again = Measurement(
        singular_values.model_spectra, known.trained, known.source_layers, fit_alpha=True
    )
    rows.append(again.row("second look, with alpha", len(table)))
    blocks = find_matrices(known.trained)[:-1]
    ours = Measurement(
        singular_values.on_every_core,
        lambda matrix: singular_values.spectrum_of(matrix.read()),
        blocks,
    )
    rows.append(ours.row("the blocks only, with alpha", len(blocks)))
    divergence = Measurement(
        copies.copy_divergence, known.trained, known.source_layers, known.stack
    )
    rows.append(divergence.row("divergence of the copies", len(blocks)))
    with tempfile.TemporaryDirectory() as folder:
        rows.append(report(known, Path(folder)).row("the HTML report, all of it", len(table)))
    rows = [row | {"WeightWatcher / ours": ""} for row in rows]
    write_table("spectra", rows)  # a long comparison that breaks off leaves this
    if importlib.util.find_spec("weightwatcher"):
        rows.append(compare(known, table, ours.seconds, peer_layers))
    else:
        rows.append({key: "" for key in rows[0]} | {"what": "WeightWatcher: not installed here"})
    write_table("spectra", rows)


def report(known: known_spectra.KnownStack, folder: Path) -> Measurement:
    """Writes the report into `folder`; raises ValueError where a table or sentence is not what was
    put in.
    """
    forget(known.trained)
    top_k = min(16, min(len(values) for values in known.spectra.values()) // 4)
    given = [str(known.trained), "--against", str(known.stack), "--top-k", str(top_k)]
    measured = Measurement(cli.main, ["spectra", *given, "-o", str(folder)])
    if measured.result:
        raise ValueError(f"The report ended with exit code {measured.result}.")
    spectra = pd.read_csv(folder / "spectra.csv")
    spectra = spectra[spectra["model"] == "trained"]
    drawn = (
        pd.read_csv(folder / "figures" / f"{name}.csv") for name in ("divergence", "inheritance")
    )
    tables = (spectra, *drawn)
    found = deviations(known, *tables)
    write_table("spectra_exactness", found)
    if far := [
        row["quantity"] for row in found if row["largest difference"] > 1e-4 * row["largest put in"]
    ]:
        raise ValueError(f"The report's {', '.join(far)} differ from what was put in.")
    copies_apart = f"lie {known.divergence['distance'].mean():.1%} of their norm apart"
    if copies_apart not in (folder / "spectra.html").read_text():
        raise ValueError(f"The report does not say that copies {copies_apart}.")
    conditions = {key: values[0] / values[-1] for key, values in known.spectra.items()}
    ceilings = {role: PROFILE.clamp.max_condition(role) for role in ROLES}
    at = {
        layer
        for (layer, role), value in conditions.items()
        if value >= history.AT_CEILING * ceilings[role]
    } - {HEAD_LAYER}
    put_in = f"sits at or above the ceiling in {len(at)} of {PROFILE.model.layers} layers"
    if not any(put_in in said for said in findings.describe_model(spectra, ceilings)):
        raise ValueError(f"The findings of a model that is clamped do not say: {put_in}.")
    return measured


def compare(
    known: known_spectra.KnownStack, table: pd.DataFrame, ours: float, peer_layers: int
) -> dict:
    """The row of WeightWatcher; `ours` is our time for the blocks in seconds."""
    few, _ = peer(known.trained, FEW_PEER_LAYERS)
    many, theirs = peer(known.trained, peer_layers)
    write_table("spectra_agreement", agreement(table, theirs))
    a_layer = (many.seconds - few.seconds) / (peer_layers - FEW_PEER_LAYERS)
    layers = PROFILE.model.layers
    seconds = many.seconds + (layers - peer_layers) * a_layer
    what = f"WeightWatcher, the blocks only, from {FEW_PEER_LAYERS} and {peer_layers} layers"
    row = many.row(what, len(theirs)) | {
        "seconds": seconds,
        "ms a matrix": 1000 * seconds / (len(table) - 1),
    }
    return row | {
        "extra memory MiB": "the model, loaded before",
        "WeightWatcher / ours": seconds / ours,
    }


if __name__ == "__main__":
    main()
