"""What the numbers of an analysis say, in sentences: computed, never written by hand, and which
matrices deserve a page.

Every sentence stands on one column of one table and names its numbers, so it can be checked against
the CSV beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from kl3m_nb.model.roles import HEAD_LAYER
from kl3m_nb.profiles import ATTENTION_ROLES, MLP_ROLES
from kl3m_nb.spectra.history import AT_CEILING, FAR_ABOVE_CEILING
from kl3m_nb.spectra.singular_values import spectrum_key

GROUPS = {"attention": ATTENTION_ROLES, "MLP": MLP_ROLES}


_COLUMNS_TO_READ = (
    "layer source_layer copy role expert condition sigma_max sigma_min stable_rank effective_rank"
    " participation_ratio entropy max_over_median mp_edge alpha alpha_D dtype ill"
).split()


_OUTLIER_METRICS = {"condition": "condition", "sigma_max": "σ₁"}


_OUTLIER_SPREADS = 6.0  # deviations, in units of the role's own, from which a matrix stands out


_OUTLIER_FACTOR = 4.0  # and by so much at least: 120 equal layers have no spread to speak of


def ill_matrices(
    table: pd.DataFrame, ceilings: Mapping[str, float], since_clamp: int = 0
) -> pd.DataFrame:
    """The rows of `table` (from `spectra.model_spectra`) that need a look, with columns `reason`
    and `metric`, worst first.

    In this order: not finite; zero or singular; more than 15% above its clamp ceiling (`ceilings`
    by role, 0 for none); condition or σ₁ far from what is usual in its role (6 times the median
    deviation of its logarithm and a factor of 4). Sitting at the ceiling is what the clamp is for
    and no reason, nor is a condition that cannot be trusted. Nor is one above it with `since_clamp`
    steps behind it in which there was no clamp: conditions drift until the next.
    """
    if since_clamp:
        ceilings = {}
    usual = {role: _usual(of_role) for role, of_role in table.groupby("role")}
    findings = [_finding(row, ceilings, usual[row.role]) for row in table.itertuples()]
    severities, metrics, reasons = zip(*findings, strict=True)
    found = table.assign(severity=severities, metric=metrics, reason=reasons)
    found = found[found["severity"] > 0].sort_values("severity", ascending=False, kind="stable")
    return found.drop(columns="severity").reset_index(drop=True)


def mark_ill(table: pd.DataFrame, ill: pd.DataFrame) -> pd.DataFrame:
    """The columns of `table` that are worth reading, a row per matrix, with the reason of `ill`
    (from `ill_matrices`) in a column of that name.

    Of 16-bit weights condition and sigma_min are NaN; without experts there is no such column.
    """
    key = ["layer", "role", "expert"]
    marked = table.merge(ill[[*key, "reason"]].rename(columns={"reason": "ill"}), "left", on=key)
    marked["ill"] = marked["ill"].fillna("")
    marked.loc[~marked["condition_reliable"], ["condition", "sigma_min"]] = np.nan
    unread = set() if (table["expert"] >= 0).any() else {"expert"}
    return marked[[name for name in _COLUMNS_TO_READ if name in {*marked} - unread]]


def most_diverged(divergence: pd.DataFrame) -> tuple[str, int] | None:
    """(role as in `spectrum_key`, source block) with the largest mean distance of its copies in a
    table of `copies.copy_divergence`; None where no pair can be compared.
    """
    known = divergence.dropna(subset=["distance"])
    if known.empty:
        return None
    means = known.groupby(["source_layer", "role", "expert"])["distance"].mean()
    block, role, expert = means.idxmax()
    return spectrum_key(block, role, expert)[1], block


def _usual(of_role: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Median and median deviation of the logarithms of condition and σ₁, as far as
    they have one.
    """
    usual = {}
    for column in _OUTLIER_METRICS:
        known = (
            (of_role[column] > 0)
            & np.isfinite(of_role[column])
            & (of_role["condition_reliable"] | (column != "condition"))
        )
        logs = np.log(of_role.loc[known, column])
        usual[column] = logs.median(), (logs - logs.median()).abs().median()
    return usual


def _finding(
    row, ceilings: Mapping[str, float], usual: Mapping[str, tuple[float, float]]
) -> tuple[float, str, str]:
    """How bad it is (0: not at all), the metric that shows it, and why in words."""
    if not row.finite:
        return np.inf, "condition", "holds NaN or infinite values"
    if row.sigma_max == 0:
        return 1e300, "sigma_max", "is all zero"
    smaller_side = min(row.rows, row.cols)
    if row.matrix_rank < smaller_side:
        return 1e299, "condition", f"is singular: rank {row.matrix_rank:,.0f} of {smaller_side:,}"
    ceiling = ceilings.get(row.role, 0.0)
    if ceiling and row.condition_reliable and row.condition > FAR_ABOVE_CEILING * ceiling:
        reason = f"is above its ceiling: condition {row.condition:,.0f}, allowed {ceiling:,.0f}"
        return 1e6 * row.condition / ceiling, "condition", reason
    for column, name in _OUTLIER_METRICS.items():
        if column == "condition" and not row.condition_reliable:
            continue
        (median, spread), value = usual[column], getattr(row, column)
        distance = abs(np.log(value) - median)
        if distance > max(_OUTLIER_SPREADS * spread, np.log(_OUTLIER_FACTOR)):
            return (
                distance,
                column,
                (
                    f"stands out in its role: {name} {size_text(value)}, usual is"
                    f" {size_text(np.exp(median))}"
                ),
            )
    return 0.0, "", ""


def describe_model(
    table: pd.DataFrame, ceilings: Mapping[str, float], since_clamp: int = 0
) -> list[str]:
    """Sentences on one checkpoint: what it is made of, what cannot be trusted, ceilings,
    conditions, ranks, ill matrices.

    ceilings, since_clamp: as for `ill_matrices`.
    """
    blocks = table[table["layer"] != HEAD_LAYER]
    layers = blocks["layer"].nunique()
    dtypes = ", ".join(sorted(table["dtype"].unique()))
    copies = blocks["copy"].max() + 1
    made = f", {copies} copies of {layers // copies} source blocks" if copies > 1 else ""
    sentences = [f"{layers} layers{made}: {len(table):,} matrices in {dtypes}."]
    if not (unreliable := table[table["finite"] & ~table["condition_reliable"]]).empty:
        sentences.append(
            f"The values of {len(unreliable):,} matrices are 16-bit: their condition numbers and"
            " smallest singular values are those of a rounded copy, not of the model that was"
            " trained, and are not judged."
        )
    for group, roles in GROUPS.items():
        sentences += _describe_group(group, blocks[blocks["role"].isin(roles)], ceilings, layers)
    for head in table[table["layer"] == HEAD_LAYER].itertuples():
        if head.finite:
            condition = (
                f"condition {size_text(head.condition)} and " if head.condition_reliable else ""
            )
            share = head.effective_rank / min(head.rows, head.cols)
            sentences.append(
                f"The LM head has {condition}an effective rank of {share:.0%} of its shorter side."
            )
    limits = table["role"].map(ceilings).where(lambda limit: limit > 0)  # 0 is no ceiling
    if since_clamp and (table["condition"] > limits)[table["condition_reliable"]].any():
        sentences.append(
            f"{since_clamp:,} step{'s' * (since_clamp > 1)} without a clamp lie behind it; what has"
            " drifted above its ceiling is put back by the next."
        )
    ill = ill_matrices(table, ceilings, since_clamp)
    if ill.empty:
        judged = len(table) - len(unreliable)
        some = f" of the {judged:,} that are judged" if len(unreliable) else ""
        sentences.append(f"No matrix{some} is ill.")
    for row in ill.head(5).itertuples():
        sentences.append(f"{headline(row)}.")
    if len(ill) > 5:
        sentences.append(f"{len(ill) - 5:,} more matrices stand out; the table names them.")
    return sentences


def _describe_group(
    group: str, rows: pd.DataFrame, ceilings: Mapping[str, float], layers: int
) -> list[str]:
    known = rows[rows["condition_reliable"] & rows["condition"].notna()]
    limits = pd.Series(
        [ceilings.get(role, 0.0) for role in known["role"]], known.index, dtype=float
    )
    share = (known["condition"] / limits).where(limits > 0)
    sentences = []
    if limits.any():
        at = known[share >= AT_CEILING]
        counts = at["role"].value_counts().items()
        roles = ", ".join(
            f"{count} {role} matri{'x' if count == 1 else 'ces'}" for role, count in counts
        )
        where = (
            f"in {at['layer'].nunique()} of {layers} layers ({roles})" if roles else "in no layer"
        )
        far = known[share > FAR_ABOVE_CEILING]["layer"].nunique()
        above = (
            f", more than {FAR_ABOVE_CEILING - 1:.0%} above it in {far} of these layers"
            if far
            else ""
        )
        sentences.append(
            f"{group[0].upper()}{group[1:]} sits at or above the ceiling {where}{above}."
        )
    if not known.empty:
        worst = known.loc[known["condition"].idxmax()]
        sentences.append(
            f"The median condition of the {group} is {size_text(known['condition'].median())}, the"
            f" largest {size_text(worst['condition'])} ({matrix_name(worst)})."
        )
    ranks = (rows["effective_rank"] / rows[["rows", "cols"]].min(axis=1)).dropna()
    if not ranks.empty:
        sentences.append(
            f"The effective rank of the {group} is {ranks.median():.0%} of a matrix's shorter side"
            " in the median."
        )
    return sentences


def describe_divergence(divergence: pd.DataFrame) -> list[str]:
    """Sentences on a table of `copies.copy_divergence` at one checkpoint: means, as
    `figures.plot_divergence` draws.
    """
    known = divergence.dropna(subset=["distance"])
    sentences = []
    if len(known) < len(divergence):
        lost = len(divergence) - len(known)
        sentences.append(
            f"{lost:,} of {len(divergence):,} pairs of copies hold NaN or infinite values and"
            " cannot be compared."
        )
    if known.empty:
        return sentences
    distance = known["distance"]
    if (distance == 0).all():
        return [*sentences, "All copies of every source block are still equal."]
    by_role = known.groupby("role")["distance"].mean().sort_values()
    least, most = (_percent(by_role.iloc[place]) for place in (0, -1))
    extremes = (
        f"; those of {by_role.index[-1]} lie furthest apart ({most}), those of {by_role.index[0]}"
        f" least ({least})"
    )
    sentences.append(
        f"Two copies of a block lie {_percent(distance.mean())} of their norm apart on average"
        f" (independent matrices: 141%){extremes if most != least else ''}."
    )
    if "movement_cosine" in known and known["movement_cosine"].notna().any():
        cosine, chance = known["movement_cosine"].mean(), 3 * known["chance_cosine"].mean()
        low, high = known["movement_cosine"].min(), known["movement_cosine"].max()
        beyond = known["movement_cosine"].abs() > 3 * known["chance_cosine"]
        kind = (
            "much the same way"
            if cosine > 0.5
            else "partly the same way"
            if cosine > chance
            else "independent ways"
        )
        if cosine < -chance:
            kind = "opposite ways" if cosine < -0.5 else "partly opposite ways"
        # A mean near 0 is also that of pairs that moved together and pairs that moved apart.
        if abs(cosine) <= chance and beyond.mean() > 0.05:
            kind = "no common way"
        sentences.append(
            f"They moved {kind} on average: the mean cosine between their movements is"
            f" {cosine:.2g}, from {low:.2g} to {high:.2g} over the pairs; {beyond.mean():.0%} of"
            f" the pairs lie beyond what independent movements have (±{chance:.1g})."
        )
    sides = {"leading": known["top_overlap"].dropna(), "trailing": known["bottom_overlap"].dropna()}
    told = [
        f"their {side} directions overlap by {overlap.mean():.2f}"
        for side, overlap in sides.items()
        if len(overlap)
    ]
    if told:
        low, high = known["chance_overlap"].min(), known["chance_overlap"].max()
        chance = f"{low:.2f}" + (f" to {high:.2f}" if high > low else "")
        text = f"{' and '.join(told)} on average (1 is the same subspace, chance is {chance})."
        sentences.append(text[0].upper() + text[1:])
    for side, overlap in sides.items():
        if len(overlap) < len(known):
            sentences.append(
                f"In {len(known) - len(overlap):,} of {len(known):,} pairs the {side} directions"
                " are not distinct from the next and not compared: singular values there differ by"
                " less than 0.1%, as where the clamp has raised several to one."
            )
    return sentences


def describe_inheritance(inherited: pd.DataFrame) -> list[str]:
    """Sentences on a table of `copies.inheritance` at one checkpoint."""
    known = inherited.dropna(subset=["rmse"])
    sentences = []
    if len(known) < len(inherited):
        sentences.append(
            f"{len(inherited) - len(known):,} of {len(inherited):,} matrices, or their source's,"
            " are zero or not finite: they have no spectrum to compare."
        )
    if known.empty:
        return sentences
    if known["rmse"].max() < 1e-9:
        return [
            *sentences,
            (
                "Every spectrum is its source's within 1e-9, as it is by construction until a"
                " stack is trained."
            ),
        ]
    most = known.loc[known["rmse"].idxmax()]
    return [
        *sentences,
        (
            "Relative to σ₁, singular values differ from their source's by a factor of"
            f" {_factor(known['rmse'].median())} (root mean square of the logarithm) in the median"
            f" matrix, most in {matrix_name(most)} (a factor of {_factor(most['rmse'])})."
        ),
    ]


def _factor(rmse: float) -> str:
    """exp(rmse) with two digits of what it differs from 1."""
    return f"{math.exp(rmse):.{max(2, math.ceil(1 - math.log10(rmse)))}f}" if rmse > 1e-9 else "1"


def describe_clamp(history: pd.DataFrame) -> list[str]:
    """Sentences on a table of `history.clamp_history`."""
    if history.empty:
        return []
    raised = history[history["raised"] > 0]
    count = history["step"].nunique()
    steps = f"In {count} clamp{'s' if count > 1 else ''} up to step {history['step'].max():,}"
    if raised.empty:
        return [f"{steps} the clamp raised nothing."]
    by_role = raised.groupby("role")["raised"].sum().sort_values(ascending=False)
    share = history["route"].value_counts(normalize=True).get("certified", 0.0)
    return [
        f"{steps} it raised {int(raised['raised'].sum()):,} singular values in"
        f" {raised['name'].nunique()} of {history['name'].nunique()} matrices, most in"
        f" {by_role.index[0]} ({int(by_role.iloc[0]):,} of them); a certificate spared {share:.0%}"
        " of the matrices from being looked at."
    ]


def describe_function(similarity: pd.DataFrame, swaps: pd.DataFrame) -> list[str]:
    """Sentences on the tables of `block_function.block_similarity` and
    `block_function.swap_loss`.
    """
    sentences = []
    if similarity["update_cka"].notna().any():
        sentences.append(
            "What two copies add to the residual stream has a linear CKA of "
            f"{similarity['update_cka'].median():.2f} in the median (unrelated positions: "
            f"{similarity['update_chance'].median():.2f})."
        )
    known = swaps.dropna(subset=["change"])
    if known.empty:
        return [*sentences, "The held-out loss is not finite, so swapping copies tells nothing."]
    most = known.loc[known["change"].abs().idxmax()]
    effective = known["effective"].iloc[0]
    excluded = ((known["low"] > 0) | (known["high"] < 0)).sum()
    rest = (
        f"The 95% interval excludes 0 in {excluded:,} of {len(known):,} pairs; by chance about one"
        f" in 20 would. The intervals rest on {effective:.1f} document families in effect."
        if effective > 1
        else "One family: no intervals."
    )
    return [
        *sentences,
        (
            f"Swapping two copies changes the held-out loss of {known['loss'].iloc[0]:.3f} by"
            f" {known['change'].median():+.3f} nats in the median; the largest change is"
            f" {most['change']:+.3f} (source block {int(most['source_layer'])}, copies"
            f" {int(most['copy_a'])} and {int(most['copy_b'])})."
        ),
        rest,
    ]


def _percent(share: float) -> str:
    """ "15.0%", "0.0035%"."""
    return f"{share:.1%}" if share >= 0.01 else f"{100 * share:.2g}%"


def matrix_name(row) -> str:
    """Name a matrix, such as "layer 7, k_proj", with the expert of a mixture, or "the LM head".

    `row` is a row of a table, as tuple or series.
    """
    if row.layer == HEAD_LAYER:
        return "the LM head"
    expert = getattr(row, "expert", -1)
    return f"layer {row.layer}, {row.role}" + (f" of expert {expert}" if expert >= 0 else "")


def headline(row) -> str:
    """ "Layer 7, k_proj", and what is the matter with it where `row` is one of `ill_matrices`."""
    name, reason = matrix_name(row), getattr(row, "reason", "")
    return f"{name[0].upper()}{name[1:]} {reason}".rstrip()


def size_text(value: float) -> str:
    """A condition number or σ₁ as it is written in a sentence: "2,208", "4.58" or "infinite"."""
    return "infinite" if np.isinf(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
