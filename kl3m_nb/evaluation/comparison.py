"""Checkpoints side by side: one table, paired differences with intervals, and whether other figures
rank them as the loss does.

Two models are compared document by document, so that what makes a text hard cancels out; the
interval of the difference is far narrower than the two intervals of the models, and those
overlapping says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats

from kl3m_nb.common.intervals import Interval, mean_interval, verdict
from kl3m_nb.evaluation.documents import Prediction


def summary_table(predictions: Mapping[str, Prediction]) -> pd.DataFrame:
    """A row per model, the best first, with the figures of `Prediction.summary`."""
    table = pd.DataFrame({name: prediction.summary() for name, prediction in predictions.items()}).T
    return (
        table.rename_axis("model")
        .sort_values("bits_per_byte")
        .astype({"documents": int, "tokens": int})
    )


def side_by_side(table: pd.DataFrame, decimals: int = 3) -> pd.DataFrame:
    """`table` turned to read: a column per row of it, as text. Columns of whole numbers stay whole,
    NaN is a dash.
    """

    def told(column: pd.Series) -> pd.Series:
        form = "{:,}" if pd.api.types.is_integer_dtype(column) else f"{{:,.{decimals}f}}"
        return column.map(lambda value: "–" if pd.isna(value) else form.format(value))

    return table.apply(told).T


def steps_table(predictions: Mapping[int, Prediction]) -> pd.DataFrame:
    """A row per step, on the documents that all `predictions` have: `bits_per_byte`, and
    `difference` from the first step's.

    The difference is paired by document, with its 95% interval, `low` to `high`, and its
    `effective` number of families. Documents that share an identifier are left out.
    """
    tables = {
        step: prediction.documents.drop_duplicates("identifier", keep=False).set_index("identifier")
        for step, prediction in sorted(predictions.items())
    }
    shared = set.intersection(*(set(documents.index) for documents in tables.values()))
    rows, first = [], None
    for step, documents in tables.items():
        documents = documents[documents.index.isin(shared)]
        bits = documents["bits_per_byte"]
        first = bits if first is None else first
        mean = float(np.average(bits, weights=documents["bytes"]))
        difference = mean_interval(
            bits - first[bits.index], documents["bytes"], documents["family"]
        )
        rows.append((step, len(documents), mean, *difference))
    return pd.DataFrame(
        rows,
        columns=["step", "documents", "bits_per_byte", "difference", "low", "high", "effective"],
    )


def paired_difference(first: Prediction, second: Prediction) -> Interval:
    """Bits per byte of `first` minus those of `second` on the same documents, with its 95%
    interval.

    Below 0, `first` is better. Bits per byte compare between tokenizers. Raises ValueError when the
    documents are not the same.
    """
    if (
        first.documents[["identifier", "bytes"]].to_numpy().tolist()
        != second.documents[["identifier", "bytes"]].to_numpy().tolist()
    ):
        raise ValueError(
            "Two models can only be paired on the same documents in the same order; evaluate both"
            " on one list."
        )
    difference = first.documents["bits_per_byte"] - second.documents["bits_per_byte"]
    return mean_interval(difference, first.documents["bytes"], first.documents["family"])


def differences_table(predictions: Mapping[str, Prediction], reference: str) -> pd.DataFrame:
    """A row per other model: `difference` in bits per byte from `reference`, `low`, `high`,
    `effective`, `better_on`, `verdict`.

    `effective` is the effective number of families that the 95% interval rests on, `better_on` the
    share of documents on which the model beats the reference. The verdict is better or worse where
    the interval excludes 0, else "not resolved". Raises ValueError when there is no model of that
    name.
    """
    if reference not in predictions:
        raise ValueError(
            f"There is no model {reference!r} to compare with; the models are"
            f" {', '.join(predictions)}."
        )
    rows = []
    for name, prediction in predictions.items():
        if name == reference:
            continue
        difference = paired_difference(prediction, predictions[reference])
        better = (
            prediction.documents["bits_per_byte"]
            < predictions[reference].documents["bits_per_byte"]
        )
        rows.append(
            {
                "model": name,
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "effective": difference.effective,
                "better_on": float(better.mean()),
                "verdict": verdict(difference),
            }
        )
    return pd.DataFrame(rows)


def rank_agreement(
    figures: pd.DataFrame, by: str, lower_is_better: Mapping[str, bool]
) -> pd.DataFrame:
    """Does each figure rank the models as `by` does? A row per figure: its `ranking`, worst first,
    `tau` and `by_chance`.

    `figures` has a row per model and a column per figure; `lower_is_better` says for each figure to
    be judged, and for `by`, which way is better. `tau` is Kendall's tau-b with `by`: 1 for the same
    order, −1 for the opposite one. `by_chance` is the probability that a random order of the models
    has at least this tau: 1/6 for the same order of three. Both are NaN with fewer than two models,
    for a figure that is missing for one, and for one that is the same for all. They are NaN for
    `by` too, which agrees with itself by construction. Raises ValueError
    for a column that is not there.
    """
    if missing := [
        name
        for name in (by, *lower_is_better)
        if name not in figures.columns or name not in lower_is_better
    ]:
        raise ValueError(
            f"rank_agreement lacks the figure {missing[0]!r} or which way it is better; name both."
        )
    signs = {name: 1 if lower else -1 for name, lower in lower_is_better.items()}
    rows = []
    for name in lower_is_better:
        own, reference = figures[name] * signs[name], figures[by] * signs[by]
        order = own.sort_values(kind="stable").index
        tau = by_chance = math.nan
        if name != by:
            tau, by_chance = _kendall_tau(
                own.to_numpy(dtype=float), reference.to_numpy(dtype=float)
            )
        rows.append(
            {
                "figure": name,
                "ranking": " < ".join(reversed(order)),
                "tau": tau,
                "by_chance": by_chance,
            }
        )
    return pd.DataFrame(rows)


def _kendall_tau(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """tau-b, and the share of all orders of `first` (of 9,999 drawn ones beyond seven models) whose
    tau is as high.
    """
    if any(np.isnan(values).any() or len(np.unique(values)) < 2 for values in (first, second)):
        return math.nan, math.nan
    test = stats.permutation_test(
        (first,),
        lambda order: stats.kendalltau(order, second).statistic,
        permutation_type="pairings",
        alternative="greater",
        n_resamples=9999,
        rng=0,
    )
    return float(test.statistic), float(test.pvalue)
