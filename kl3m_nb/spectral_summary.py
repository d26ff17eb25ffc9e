"""What the numbers of an analysis say, in sentences: computed, never written by hand, and which matrices deserve a page.

Every sentence stands on one column of one table and names its numbers, so it can be checked against the CSV beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from kl3m_nb.history import ABOVE_CEILING, AT_CEILING
from kl3m_nb.matrices import HEAD_LAYER
from kl3m_nb.profiles import ATTENTION_ROLES, MLP_ROLES

GROUPS = {"attention": ATTENTION_ROLES, "MLP": MLP_ROLES}
_OUTLIER_METRICS = {"condition": "condition", "sigma_max": "σ₁"}
_OUTLIER_SPREADS = 6.0  # deviations, in units of the role's own, from which a matrix stands out
_OUTLIER_FACTOR = 4.0  # and by so much at least: 120 equal layers have no spread to speak of


def ill_matrices(table: pd.DataFrame, ceilings: Mapping[str, float]) -> pd.DataFrame:
    """The rows of `table` (from `spectra.model_spectra`) that need a look, with columns `reason` and `metric`, worst first.

    In this order: not finite; zero or singular; above its clamp ceiling (`ceilings` by role, 0 for none); condition or σ₁ far
    from what is usual in its role (6 times the median deviation of its logarithm and a factor of 4). Sitting at the ceiling is
    what the clamp is for and no reason.
    """
    usual = {role: _usual(of_role) for role, of_role in table.groupby("role")}
    findings = [_finding(row, ceilings, usual[row.role]) for row in table.itertuples()]
    severities, metrics, reasons = zip(*findings, strict=True)
    found = table.assign(severity=severities, metric=metrics, reason=reasons)
    found = found[found["severity"] > 0].sort_values("severity", ascending=False, kind="stable")
    return found.drop(columns="severity").reset_index(drop=True)


def _usual(of_role: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Median and median deviation of the logarithms of condition and σ₁, as far as they have one."""
    usual = {}
    for column in _OUTLIER_METRICS:
        logs = np.log(of_role[column].where((of_role[column] > 0) & np.isfinite(of_role[column])).dropna())
        usual[column] = logs.median(), (logs - logs.median()).abs().median()
    return usual


def _finding(row, ceilings: Mapping[str, float], usual: Mapping[str, tuple[float, float]]) -> tuple[float, str, str]:
    """How bad it is (0: not at all), the metric that shows it, and why in words."""
    if not row.finite:
        return np.inf, "condition", "holds NaN or infinite values"
    if row.sigma_max == 0:
        return 1e300, "sigma_max", "is all zero"
    smaller_side = min(row.rows, row.cols)
    if row.matrix_rank < smaller_side:
        return 1e299, "condition", f"is singular: rank {row.matrix_rank:,.0f} of {smaller_side:,}"
    ceiling = ceilings.get(row.role, 0.0)
    if ceiling and row.condition > ABOVE_CEILING * ceiling:
        reason = f"is above its ceiling: condition {row.condition:,.0f}, allowed {ceiling:,.0f}"
        return 1e6 * row.condition / ceiling, "condition", reason
    for column, name in _OUTLIER_METRICS.items():
        (median, spread), value = usual[column], getattr(row, column)
        distance = abs(np.log(value) - median)
        if distance > max(_OUTLIER_SPREADS * spread, np.log(_OUTLIER_FACTOR)):
            return distance, column, f"stands out in its role: {name} {value:,.3g}, usual is {np.exp(median):,.3g}"
    return 0.0, "", ""


def describe_model(table: pd.DataFrame, ceilings: Mapping[str, float]) -> list[str]:
    """Sentences on one checkpoint: what it is made of, what cannot be trusted, ceilings, conditions, ranks, ill matrices."""
    blocks = table[table["layer"] != HEAD_LAYER]
    layers = blocks["layer"].nunique()
    dtypes = ", ".join(sorted(table["dtype"].unique()))
    copies = blocks["copy"].max() + 1
    made = f", {copies} copies of {layers // copies} source blocks" if copies > 1 else ""
    sentences = [f"{layers} layers{made}: {len(table):,} matrices in {dtypes}."]
    if not (unreliable := table[table["finite"] & ~table["condition_reliable"]]).empty:
        sentences.append(
            f"The weights of {len(unreliable):,} matrices are 16-bit: their condition numbers and smallest singular values are "
            "those of the rounded copy, not of the model that was trained."
        )
    for group, roles in GROUPS.items():
        sentences += _describe_group(group, blocks[blocks["role"].isin(roles)], ceilings, layers)
    for head in table[table["layer"] == HEAD_LAYER].itertuples():
        if head.finite:
            sentences.append(f"The LM head has condition {head.condition:,.0f} and effective rank {head.effective_rank:,.0f}.")
    ill = ill_matrices(table, ceilings)
    if ill.empty:
        sentences.append("No matrix is ill.")
    for row in ill.head(5).itertuples():
        name = matrix_name(row)
        sentences.append(f"{name[0].upper()}{name[1:]} {row.reason}.")
    if len(ill) > 5:
        sentences.append(f"{len(ill) - 5:,} more matrices stand out; the table names them.")
    return sentences


def _describe_group(group: str, rows: pd.DataFrame, ceilings: Mapping[str, float], layers: int) -> list[str]:
    rows = rows[rows["finite"]]
    if rows.empty:
        return []
    limits = rows["role"].map(ceilings).fillna(0.0)
    share = (rows["condition"] / limits).where(limits > 0)
    title = group[0].upper() + group[1:]
    sentences = []
    if limits.any():
        at = rows[(share >= AT_CEILING) & (share <= ABOVE_CEILING)]
        above = rows[share > ABOVE_CEILING]
        where = f"in {at['layer'].nunique()} of {layers} layers" if len(at) else "in no layer"
        roles = ", ".join(f"{role} {count}" for role, count in at["role"].value_counts().items())
        sentences.append(f"{title} sits at the ceiling {where}{f' ({roles})' if roles else ''}.")
        if len(above):
            sentences.append(f"{title} is above the ceiling in {above['layer'].nunique()} of {layers} layers.")
    worst = rows.loc[rows["condition"].idxmax()]
    sentences.append(
        f"The median condition of the {group} is {_number(rows['condition'].median())}, the largest "
        f"{_number(worst['condition'])} ({matrix_name(worst)}); the effective rank is {rows['effective_rank'].median():,.0f} "
        f"of {np.minimum(rows['rows'], rows['cols']).median():,.0f} in the median."
    )
    return sentences


def describe_divergence(divergence: pd.DataFrame) -> list[str]:
    """Sentences on a table of `copies.copy_divergence` at one checkpoint."""
    distance = divergence["distance"]
    if (distance == 0).all():
        return ["All copies of every source block are still equal."]
    by_role = divergence.groupby("role")["distance"].median().sort_values()
    sentences = [
        f"Two copies of a block lie {distance.median():.1%} of their norm apart in the median (independent matrices: 141%); "
        f"{by_role.index[-1]} has moved most ({by_role.iloc[-1]:.1%}), {by_role.index[0]} least ({by_role.iloc[0]:.1%})."
    ]
    if "movement_cosine" in divergence and divergence["movement_cosine"].notna().any():
        cosine = divergence["movement_cosine"].median()
        kind = "much the same way" if cosine > 0.5 else "partly the same way" if cosine > 0.1 else "independent ways"
        if cosine < -0.1:
            kind = "opposite ways"
        sentences.append(f"They moved {kind}: the cosine between their movements is {cosine:.2f} in the median.")
    chance = divergence["chance_overlap"].median()
    sentences.append(
        f"Their leading directions overlap by {divergence['top_overlap'].median():.2f}, the trailing ones by "
        f"{divergence['bottom_overlap'].median():.2f} (1 is the same subspace, chance is {chance:.2f})."
    )
    return sentences


def describe_inheritance(inherited: pd.DataFrame) -> list[str]:
    """Sentences on a table of `copies.inheritance` at one checkpoint."""
    rmse = inherited["rmse"]
    if rmse.max() < 1e-9:
        return ["Every spectrum is exactly its source's, as it is right after stacking by construction."]
    most = inherited.loc[rmse.idxmax()]
    return [
        f"A singular value has moved by {np.expm1(rmse.median()):.1%} against its source's, relative to σ₁, in the median "
        f"matrix; most in {matrix_name(most)} ({np.expm1(most['rmse']):.1%})."
    ]


def describe_clamp(history: pd.DataFrame) -> list[str]:
    """Sentences on a table of `history.clamp_history`."""
    if history.empty:
        return []
    raised = history[history["raised"] > 0]
    steps = f"In {history['step'].nunique()} clamps up to step {history['step'].max():,}"
    if raised.empty:
        return [f"{steps} the clamp raised nothing."]
    by_role = raised.groupby("role")["raised"].sum().sort_values(ascending=False)
    share = history["route"].value_counts(normalize=True).get("certified", 0.0)
    return [
        f"{steps} it raised {int(raised['raised'].sum()):,} singular values in {raised['name'].nunique()} of "
        f"{history['name'].nunique()} matrices, most in {by_role.index[0]} ({int(by_role.iloc[0]):,}); a certificate spared "
        f"{share:.0%} of the matrices from being looked at."
    ]


def describe_function(similarity: pd.DataFrame, swaps: pd.DataFrame) -> list[str]:
    """Sentences on the tables of `block_function.block_similarity` and `block_function.swap_loss`."""
    worst = swaps.loc[swaps["change"].idxmax()]
    return [
        f"What two copies add to the residual stream has a linear CKA of {similarity['update_cka'].median():.2f} in the median "
        f"(unrelated positions: {similarity['update_chance'].median():.2f}).",
        f"Swapping two copies changes the held-out loss of {swaps['loss'].iloc[0]:.3f} by {swaps['change'].median():+.3f} nats "
        f"in the median and by {worst['change']:+.3f} at most (source block {int(worst['source_layer'])}, copies "
        f"{int(worst['copy_a'])} and {int(worst['copy_b'])}).",
    ]


def matrix_name(row) -> str:
    """ "layer 7, k_proj", with the expert of a mixture; "the LM head". `row` is a row of a table, as tuple or series."""
    if row.layer == HEAD_LAYER:
        return "the LM head"
    expert = getattr(row, "expert", -1)
    return f"layer {row.layer}, {row.role}" + (f" of expert {expert}" if expert >= 0 else "")


def _number(value: float) -> str:
    return "infinite" if np.isinf(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
