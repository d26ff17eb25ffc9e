"""What does the spectral clamp cost on all matrices of the 120-layer model, against a full SVD of
each of them?

    python benchmarks/clamping.py [--share 1.0] [--repeats 2]

Spectra as in the model cards: attention near its ceiling (condition 2200 to 3300, the ceiling is
3000), MLP at 4 to 5. The cards give neither the head's condition (taken as 500) nor any σ₁ (taken
as 20: about what leaves a certificate of the MLP valid for a few clamps at the peak learning rate;
the table says for how many).

The reference is the plain way: `torch.linalg.svd` in float32 with all threads, and a product where
something is below τ. "first clamp" knows nothing of the weights; "later clamp" comes 100 Muon steps
at the peak rate after it, with the attention matrices put back to where they were, so that as many
have to be repaired again.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _common import now, write_table
from torch import Tensor

from kl3m_nb.optim.model_clamp import ClampTarget, SpectralClamp
from kl3m_nb.optim.muon import singular_value_bound
from kl3m_nb.profiles import get_profile

PROFILE = get_profile("kl3m-007-500m")
TOKENS_PER_SECOND = 75_000  # the aim for one H200
LARGEST_UPDATE = singular_value_bound(
    PROFILE.optimizer.ns_steps, PROFILE.optimizer.ns_coefficients, torch.bfloat16
)
SIGMA_MAX = 20.0


@dataclass(frozen=True)
class Group:
    """Matrices of one shape, with the range of their conditions; `learning_rate` 0 stands for
    AdamW, which gives no bound.
    """

    label: str
    role: str
    rows: int
    cols: int
    count: int
    conditions: tuple[float, float]
    learning_rate: float

    def generate(self, share: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        short = min(self.rows, self.cols)
        left, right = (
            [
                torch.linalg.qr(torch.randn(size, short, generator=generator))[0]
                for _ in range(1 if size > 10_000 else 4)
            ]
            for size in (self.rows, self.cols)
        )
        matrices = []
        for i in range(max(1, round(self.count * share))):
            low, high = self.conditions
            condition = (
                low + (high - low) * torch.rand(1, generator=generator, dtype=torch.float64).item()
            )
            sigma = SIGMA_MAX * condition ** -torch.linspace(0, 1, short)
            matrices.append((left[i % len(left)] * sigma) @ right[i // len(left) % len(right)].T)
        return matrices

    @property
    def ceiling(self) -> float:
        return PROFILE.clamp.max_condition(self.role)

    def clamp_of(self, matrices: list[Tensor], **options: str) -> SpectralClamp:
        floor = PROFILE.clamp.sigma_floor
        return SpectralClamp(
            [ClampTarget(f"{i}", m, self.ceiling, floor) for i, m in enumerate(matrices)], **options
        )

    def note_steps(self, clamp: SpectralClamp) -> None:
        """As many Muon steps as lie between two clamps."""
        step = self.learning_rate * max(1.0, self.rows / self.cols) ** 0.5 * LARGEST_UPDATE
        decay = self.learning_rate * PROFILE.optimizer.weight_decay
        bounds = (
            {target.name: (step, decay) for target in clamp.targets} if self.learning_rate else {}
        )
        for _ in range(PROFILE.clamp.clamp_every):
            clamp.note_movement(bounds)


def groups() -> list[Group]:
    model, optimizer, lr = PROFILE.model, PROFILE.optimizer, PROFILE.muon_lr
    queries, keys = model.heads * model.head_size, model.kv_heads * model.head_size
    outer, inner, mlp = (
        lr * m
        for m in (
            optimizer.attention_outer_multiplier,
            optimizer.attention_inner_multiplier,
            optimizer.mlp_multiplier,
        )
    )
    attention, healthy = (2200.0, 3300.0), (4.0, 5.0)
    return [
        Group("q, o", "q_proj", queries, model.hidden, 2 * model.layers, attention, outer),
        Group("k, v", "k_proj", keys, model.hidden, 2 * model.layers, attention, inner),
        Group("gate, up", "up_proj", model.mlp, model.hidden, 2 * model.layers, healthy, mlp),
        Group("down", "down_proj", model.hidden, model.mlp, model.layers, healthy, mlp),
        Group("head", "lm_head", model.vocabulary, model.hidden, 1, (500.0, 500.0), 0.0),
    ]


def svd_pass(matrices: list[Tensor], max_condition: float) -> None:
    for matrix in matrices:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        tau = torch.clamp(sigma[0] / max_condition, min=PROFILE.clamp.sigma_floor)
        if sigma[-1] < tau:
            matrix.copy_((left * torch.maximum(sigma, tau)) @ right)


def timed(work: Callable, *arguments) -> tuple[float, object]:
    """Seconds that the call took, and what it returned."""
    start = now()
    result = work(*arguments)
    return now() - start, result


def restore(matrices: list[Tensor], originals: list[Tensor]) -> None:
    for matrix, original in zip(matrices, originals, strict=True):
        matrix.copy_(original)


def measure(group: Group, device: str, share: float, repeats: int, **options: str) -> dict:
    """One line of the table; every time is the best of `repeats`, scaled up from `share` to all
    matrices of the group.
    """
    originals = [matrix.to(device) for matrix in group.generate(share)]
    scale = group.count / len(originals)
    svd_pass([originals[0].clone()], group.ceiling)
    group.clamp_of([originals[0].clone()], **options).clamp()
    times = {"svd": [], "first": [], "later": []}
    for _ in range(repeats):
        matrices = [matrix.clone() for matrix in originals]
        times["svd"].append(timed(svd_pass, matrices, group.ceiling)[0])
        restore(matrices, originals)
        clamp = group.clamp_of(matrices, **options)
        times["first"].append(timed(clamp.clamp)[0])
        restore(matrices, originals)
        group.note_steps(clamp)
        elapsed, events = timed(clamp.clamp)
        times["later"].append(elapsed)
    routes = Counter(event.route for event in events)
    lasts = 0
    while events[0].route == "certified":
        lasts += 1
        group.note_steps(clamp)
        events = clamp.clamp()
    svd, first, later = (scale * min(times[key]) for key in ("svd", "first", "later"))
    return {
        "matrices": group.label,
        "shape": f"{group.rows}x{group.cols}",
        "count": group.count,
        "timed": len(originals),
        "full SVD s": svd,
        "first clamp s": first,
        "ratio": svd / first,
        "later clamp s": later,
        "ratio later": svd / later,
        "later routes": " ".join(f"{route} {count}" for route, count in routes.items()),
        "certificate lasts, clamps": lasts,
    }


def with_total(label: str, rows: list[dict]) -> list[dict]:
    """`rows` for one device and their sum."""
    svd, first, later = (
        sum(row[key] for row in rows) for key in ("full SVD s", "first clamp s", "later clamp s")
    )
    total = rows[0] | {
        "matrices": "all",
        "shape": "",
        "count": sum(row["count"] for row in rows),
        "timed": sum(row["timed"] for row in rows),
        "full SVD s": svd,
        "first clamp s": first,
        "ratio": svd / first,
        "later clamp s": later,
        "ratio later": svd / later,
        "later routes": "",
        "certificate lasts, clamps": "",
    }
    interval = PROFILE.clamp.clamp_every * PROFILE.tokens_per_step / TOKENS_PER_SECOND
    return [
        {"where": label}
        | row
        | {
            "% of training, first": 100 * row["first clamp s"] / interval,
            "% later": 100 * row["later clamp s"] / interval,
        }
        for row in [*rows, total]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="share of the matrices of each shape that is timed, scaled up",
    )
    parser.add_argument("--repeats", type=int, default=2, help="the best of so many runs counts")
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=available)
    arguments = parser.parse_args()
    rows = []
    if "cpu" in arguments.devices:
        rows += with_total(
            "cpu", [measure(group, "cpu", arguments.share, arguments.repeats) for group in groups()]
        )
    if "cuda" in arguments.devices:
        for route in ("cpu", "device"):
            timed = [
                measure(group, "cuda", arguments.share, arguments.repeats, decompose_on=route)
                for group in groups()
            ]
            rows += with_total(f"gpu, decomposed on {route}", timed)
    write_table(f"clamping_{'_'.join(arguments.devices)}", rows)


if __name__ == "__main__":
    main()
