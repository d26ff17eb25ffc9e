"""The clamp of a whole model: every matrix of its targets, of which few need a decomposition. In
this order:

1. *Certificate.* An interval that held all singular values at the last clamp, and a bound on how
   far the weight has moved since (Weyl's inequality), may prove that nothing is to be done. Costs
   nothing; see `SpectralClamp.note_movement`.
2. *Test.* Cholesky factorisations of shifted Gram matrices prove that every σ > τ. A Gram matrix
   squares the condition number: in float32 it can prove only well-conditioned matrices healthy, the
   others get one in float64. For small matrices the eigenvalues themselves cost no more.
   `common.linalg` has the proofs, which allow for their own rounding errors.
3. *Repair* of what is left, by its exact spectrum: `clamp`.

On a CPU a matrix is the work of one thread, as small factorisations gain little from more. On a GPU
the tests run in batches of one shape, and only the Gram matrices of what fails go to threads of the
CPU.

A certificate spares a healthy matrix from being looked at, so a clamp does not know every
condition. What it does not know is counted and never filled in by a bound.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kl3m_nb.common import distributed
from kl3m_nb.common.linalg import Proof, as_wide, gram_matrix, prove_healthy, useful_precisions
from kl3m_nb.optim.clamp import check_clampable, clamp_exactly_
from kl3m_nb.profiles import ATTENTION_ROLES, MLP_ROLES

LOOKED_AT = (
    "tested",
    "decomposed",
    "repaired",
)  # routes of a `ClampEvent` that measure σ₁ and σ_min


_ONE_THREAD_ELEMENTS = 2**23  # a larger matrix gets all threads to itself


_BATCHED = ("cuda",)  # types of device on which matrices of one shape are tested together


_GPU_BATCH_ELEMENTS = 2**24  # a batch of square float64 matrices then works in 1 GiB


@dataclass(frozen=True)
class ClampEvent:
    """One matrix at one clamp: the fields of `ClampOutcome`, and the `route` that says how sharp
    they are.

    * `"repaired"`, `"decomposed"` (nothing to raise): exact to 1e-9·σ₁, as are all values of
      `raised`.
    * `"tested"`: nothing to raise. `sigma_max` and `sigma_min` are Ritz values, good to some
      percent: the spectrum reaches at least from the one to the other. `tau` is an upper bound of
      the true τ, and σ_min is proven to lie above it.
    * `"certified"`: nothing to raise, and the weight was not looked at. `sigma_max` and `tau` are
      upper bounds, `sigma_min` is a lower bound.
    * `"zero"`, `"not_finite"`: left untouched.
    """

    name: str
    sigma_max: float
    sigma_min: float
    tau: float
    raised: int
    route: str


@dataclass(frozen=True)
class ClampTarget:
    """A parameter to clamp: (rows, cols), e.g. [1536, 576], or (experts, rows, cols), where each
    expert is clamped on its own.

    `fused` = 2 says that rows holds gate above up; they are clamped as two matrices. ValueError for
    any other shape, a dtype other than float32 and float64 (a bfloat16 copy has another condition
    number than its master), or unusable bounds.
    """

    name: str
    parameter: Tensor
    max_condition: float
    sigma_floor: float
    fused: int = 1

    def __post_init__(self) -> None:
        shape = tuple(self.parameter.shape)
        if self.parameter.dim() not in (2, 3):
            raise ValueError(
                f"{self.name} has the shape {shape}; a clamp takes (rows, cols) or (experts, rows,"
                " cols)."
            )
        if self.fused not in (1, 2) or shape[-2] % self.fused:
            raise ValueError(
                f"{self.name} {shape} has fused = {self.fused}; use 1, or 2 where the number of"
                " rows is even."
            )
        check_clampable(self.name, self.parameter, self.max_condition, self.sigma_floor)

    def matrices(self, weight: Tensor | None = None) -> list[tuple[str, Tensor]]:
        """Names and views of the matrices: `name`, or `name[expert]`, with `.gate` or `.up` added
        when fused.

        `weight`, of the parameter's shape, stands for the parameter: the whole of one that is held
        in shards.
        """
        weight = self.parameter.detach() if weight is None else weight
        experts = (
            [(f"{self.name}[{i}]", matrix) for i, matrix in enumerate(weight)]
            if weight.dim() == 3
            else [(self.name, weight)]
        )
        if self.fused == 1:
            return experts
        return [
            (name + half, part)
            for name, both in experts
            for half, part in zip((".gate", ".up"), both.chunk(2), strict=True)
        ]


class SpectralClamp:
    """Clamps the matrices of `targets` and remembers, as certificates, what is known of their
    spectra.

    As many matrices are worked on at a time on the CPU as torch has threads, beside a GPU as this
    rank has cores. `decompose_on`: where the Gram matrices of what fails the test on a GPU are
    decomposed, "cpu" (copied there: beside an H200, 16 cores took 0.96 s for a first clamp of all
    matrices of kl3m-007, the GPU 1.13) or "device". The weights themselves stay where they are.
    """

    def __init__(self, targets: Iterable[ClampTarget], decompose_on: str = "cpu") -> None:
        self.targets = tuple(targets)
        if decompose_on not in ("cpu", "device"):
            raise ValueError(f"decompose_on is {decompose_on!r}; it accepts 'cpu' and 'device'.")
        self._decompose_on_device = decompose_on == "device"
        shapes = {
            target.name: torch.empty(target.parameter.shape, device="meta")
            for target in self.targets
        }
        self._names = {
            target.name: [name for name, _ in target.matrices(shapes[target.name])]
            for target in self.targets
        }
        if len(self._names) < len(self.targets) or len(
            {id(target.parameter) for target in self.targets}
        ) < len(self.targets):
            raise ValueError(
                "Two clamp targets share a name or a parameter; list every parameter once."
            )
        self._intervals: dict[
            str, tuple[float, float]
        ] = {}  # matrix -> bounds of all its singular values, now

    def note_movement(self, bounds: Mapping[str, tuple[float, float]]) -> None:
        """Widen the certificates by one optimizer step; call it after every step.

        `bounds[target name]` = (additive, relative) promises ‖ΔW‖₂ ≤ additive + relative·‖W‖₂ for
        every matrix of the target, W being the weight before the step; the float32 rounding of the
        step is added here. A target that is not named loses its certificates; names that are no
        target are ignored. ValueError for a bound that is negative or NaN.
        """
        for target in self.targets:
            movement = bounds.get(target.name)
            if movement is None:
                for name in self._names[target.name]:
                    self._intervals.pop(name, None)
                continue
            additive, relative = movement
            if not (additive >= 0 and relative >= 0):
                raise ValueError(
                    f"The movement of {target.name} is bounded by {movement}; both bounds must be"
                    " at least 0."
                )
            short = min(target.parameter.shape[-2] // target.fused, target.parameter.shape[-1])
            # Up to four roundings an element (decay, scale, update, sum), and ‖rounding‖₂ ≤
            # eps/2·‖W‖_F ≤ eps/2·√short·‖W‖₂.
            rounding = 2 * torch.finfo(target.parameter.dtype).eps * math.sqrt(short)
            for name in self._names[target.name]:
                if name in self._intervals:
                    lower, upper = self._intervals[name]
                    moved = additive + relative * upper
                    moved += rounding * (upper + moved)
                    self._intervals[name] = (lower - moved, upper + moved)

    @torch.no_grad()
    def clamp(self) -> list[ClampEvent]:
        """Clamp every matrix and return an event for each, in the order of the targets. The
        optimizer's state is not touched.

        Under torch.distributed all ranks call it with equal weights; each works on a part of the
        targets, all get the result.
        """
        events: dict[str, ClampEvent | None] = {}
        for target in self.targets:
            for name in self._names[target.name]:
                events[name] = self._certified(name, target)
        uncertain = [
            target
            for target in self.targets
            if any(events[name] is None for name in self._names[target.name])
        ]
        owners = distributed.balanced_owners(
            [_cost(target.parameter.shape) for target in uncertain]
        )
        weights: dict[str, Tensor] = {}
        groups: dict[tuple, list[_Job]] = defaultdict(list)
        for target, owner in zip(uncertain, owners, strict=True):
            weight = distributed.whole(target.parameter.detach())
            if owner == distributed.world().rank:
                weights[target.name] = weight
                for name, matrix in target.matrices(weight):
                    if events[name] is None:
                        job = _Job(name, matrix, target.max_condition, target.sigma_floor)
                        groups[job.kind].append(job)
        for result in itertools.chain(
            *distributed.gather(self._clamp_groups(list(groups.values())))
        ):
            name = result.event.name
            events[name] = result.event
            self._intervals.pop(name, None)
            if result.interval is not None:
                self._intervals[name] = result.interval
        for target, owner in zip(uncertain, owners, strict=True):
            if any(events[name].raised for name in self._names[target.name]):
                _hand_over(target.parameter.detach(), weights.get(target.name), owner)
        return list(events.values())

    def state_dict(self) -> dict[str, dict[str, tuple[float, float]]]:
        """The certificates as plain numbers; they hold for the weights as they are now."""
        return {"intervals": dict(self._intervals)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Take over certificates saved together with the present weights. ValueError for a matrix
        that is no target's.
        """
        known = {name for names in self._names.values() for name in names}
        unknown = sorted(set(state["intervals"]) - known)
        if unknown:
            raise ValueError(
                f"The saved certificates name {unknown[0]}, which is no clamp target; load the"
                " state of the same model."
            )
        self._intervals = {
            name: (float(lower), float(upper))
            for name, (lower, upper) in state["intervals"].items()
        }

    def _certified(self, name: str, target: ClampTarget) -> ClampEvent | None:
        lower, upper = self._intervals.get(name, (0.0, math.inf))
        tau = max(target.sigma_floor, upper / target.max_condition)
        return ClampEvent(name, upper, lower, tau, 0, "certified") if lower >= tau else None

    def _clamp_groups(self, groups: list[list[_Job]]) -> list[_Result]:
        """Test and repair. The jobs of a group differ in nothing but their names and values."""
        results: list[_Result] = []
        for_workers: list[tuple[list[_Job], tuple[torch.dtype, ...]]] = []
        suspects: list[tuple[_Job, Tensor]] = []
        for jobs in groups:
            matrix = jobs[0].matrix
            if matrix.device.type in _BATCHED:
                on_device = self._decompose_on_device
                healthy, failed = _test_in_batches(
                    jobs, matrix.device if on_device else torch.device("cpu")
                )
                results += healthy
                if on_device:
                    results += [_decompose(*suspect) for suspect in failed]
                else:
                    suspects += failed
            elif matrix.numel() > _ONE_THREAD_ELEMENTS:
                results += [_clamp_on_cpu(job, useful_precisions(matrix)) for job in jobs]
            else:
                for_workers.append((jobs, useful_precisions(matrix)))
        if for_workers or suspects:
            with _single_threaded_workers(_worker_count(groups[0][0].matrix.device)) as workers:
                decomposed = (
                    workers.map(_decompose, *zip(*suspects, strict=True)) if suspects else []
                )
                firsts = [
                    workers.submit(_clamp_on_cpu, jobs[0], precisions)
                    for jobs, precisions in for_workers
                ]
                for (jobs, precisions), first in zip(for_workers, firsts, strict=True):
                    # Matrices of one shape and ceiling are alike: what float32 could not prove for
                    # the first is not tried again.
                    if first.result().proven_in != torch.float32:
                        precisions = precisions[-1:]
                    results += [
                        first.result(),
                        *workers.map(_clamp_on_cpu, jobs[1:], itertools.repeat(precisions)),
                    ]
                results += decomposed
        return results


def _worker_count(device: torch.device) -> int:
    """Threads for matrices on `device`: torch's own number, beside a GPU this rank's share of the
    cores.

    torchrun gives every rank one thread, which is meant for ranks that compute on the CPU. A
    scheduler may have given the job fewer cores than the machine has, which only Linux tells.
    """
    if device.type != "cuda":
        return torch.get_num_threads()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _cost(shape: torch.Size) -> int:
    """Proportional to the work of the Gram matrices of a weight [..., rows, cols]."""
    return shape.numel() * min(shape[-2:])


def _hand_over(parameter: Tensor, clamped: Tensor | None, owner: int) -> None:
    """Give every rank the weight that its `owner` has clamped; None on the ranks that do not have
    it.
    """
    if distributed.world().size == 1:
        return
    if clamped is None:
        clamped = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    distributed.broadcast_(clamped, owner)
    shard = distributed.local(parameter)
    if shard.data_ptr() != clamped.data_ptr():
        shard.copy_(distributed.shard_of(clamped, parameter))


@dataclass(frozen=True)
class _Job:
    name: str
    matrix: Tensor
    max_condition: float
    sigma_floor: float

    @property
    def kind(self) -> tuple:
        """Jobs of one kind can be tested in one batch."""
        return (
            self.matrix.device,
            self.matrix.dtype,
            as_wide(self.matrix).shape,
            self.max_condition,
            self.sigma_floor,
        )


@dataclass(frozen=True)
class _Result:
    event: ClampEvent
    interval: tuple[float, float] | None
    proven_in: torch.dtype | None = None


@torch.no_grad()
def _clamp_on_cpu(job: _Job, precisions: Sequence[torch.dtype]) -> _Result:
    """Test in each of `precisions` until one succeeds, else decompose, on whatever device the
    weight is.
    """
    here = dataclasses.replace(job, matrix=job.matrix.cpu())
    gram = None
    for precision in precisions:
        [proof], [gram] = _test([here], precision)
        if proof.holds:
            return _tested(job, proof, precision)
    result = _decompose(here, gram)
    if result.event.raised and here.matrix is not job.matrix:
        job.matrix.copy_(here.matrix)
    return result


def _test_in_batches(
    jobs: list[_Job], decompose_on: torch.device
) -> tuple[list[_Result], list[tuple[_Job, Tensor]]]:
    """Results of the jobs whose matrices are proven healthy on their own device; the others with
    their Gram matrices.
    """
    size = max(1, _GPU_BATCH_ELEMENTS // jobs[0].matrix.numel())
    healthy, suspects = [], []
    for batch in (jobs[start : start + size] for start in range(0, len(jobs), size)):
        proofs, grams = _test(batch, torch.float64)
        failed = [index for index, proof in enumerate(proofs) if not proof.holds]
        suspects += zip(
            [batch[index] for index in failed], grams[failed].to(decompose_on), strict=True
        )
        healthy += [
            _tested(job, proof, torch.float64)
            for job, proof in zip(batch, proofs, strict=True)
            if proof.holds
        ]
    return healthy, suspects


def _test(jobs: list[_Job], precision: torch.dtype) -> tuple[list[Proof], Tensor]:
    """Proofs for the matrices of `jobs`, all of one shape, and the Gram matrices they were read
    from.
    """
    wides = [as_wide(job.matrix) for job in jobs]
    wides = (
        torch.stack(wides) if len(wides) > 1 else wides[0].unsqueeze(0)
    )  # one alone may be large: not copied
    grams = gram_matrix(wides, precision)
    return prove_healthy(grams, wides.shape[-1], jobs[0].max_condition, jobs[0].sigma_floor), grams


def _tested(job: _Job, proof: Proof, precision: torch.dtype) -> _Result:
    event = ClampEvent(job.name, proof.ritz_max, proof.ritz_min, proof.tau, 0, "tested")
    return _Result(event, (proof.lower, proof.upper), precision)


@torch.no_grad()
def _decompose(job: _Job, gram: Tensor | None) -> _Result:
    """Clamp the matrix of `job` by its exact spectrum; `gram` is what a failed test has left, None
    where there was no test.
    """
    suspect = gram is not None
    gram = gram if suspect else gram_matrix(as_wide(job.matrix), torch.float64)
    outcome, interval = clamp_exactly_(
        job.matrix, gram, job.max_condition, job.sigma_floor, suspect
    )
    if interval is None:
        route = "zero" if outcome.finite else "not_finite"
    else:
        route = "repaired" if outcome.raised else "decomposed"
    return _Result(
        ClampEvent(
            job.name, outcome.sigma_max, outcome.sigma_min, outcome.tau, outcome.raised, route
        ),
        interval,
    )


@contextmanager
def _single_threaded_workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Workers whose matrix library uses one thread each."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)


_COLUMNS = ("route", "sigma_max", "sigma_min", "tau")


_GROUPS = {"attention": ATTENTION_ROLES, "MLP": MLP_ROLES, "LM head": ("lm_head",)}


@dataclass(frozen=True)
class GroupConditions:
    """`measured` of `matrices` were looked at; `median` and `maximum` are of σ₁/σ_min of these, NaN
    when there are none.

    `estimated` of the measured were tested: their values are estimates from below, good to some
    percent. `certified` matrices were proved to be below their ceiling without being looked at.
    What remains is all zero and has no condition.
    """

    matrices: int
    measured: int
    estimated: int
    certified: int
    median: float = float("nan")
    maximum: float = float("nan")

    @property
    def zero(self) -> int:
        """How many matrices are all zero."""
        return self.matrices - self.measured - self.certified


@dataclass(frozen=True)
class ClampConditions:
    """The groups that the clamp at `step` walked, by name; none before the first clamp."""

    step: int = 0
    groups: dict[str, GroupConditions] = field(default_factory=dict)

    @classmethod
    def after(cls, row: Mapping) -> ClampConditions:
        """From a clamp's row of the metrics: its `step` and the columns of
        `rules.clamp_columns`.
        """
        groups = {}
        for name, roles in _GROUPS.items():
            places = [place for place, role in enumerate(row["role"]) if role in roles]
            if places:
                groups[name] = _group(
                    *([row[column][place] for place in places] for column in _COLUMNS)
                )
        return cls(row["step"], groups)

    @classmethod
    def from_state(cls, state: Mapping) -> ClampConditions:
        """From what `dataclasses.asdict` made of one for a training state."""
        if (
            "groups" not in state
        ):  # an earlier version mixed values from before the repair with bounds
            return cls()
        return cls(
            state["step"],
            {name: GroupConditions(**group) for name, group in state["groups"].items()},
        )


def _group(
    routes: list[str], sigma_max: list[float], sigma_min: list[float], tau: list[float]
) -> GroupConditions:
    left = [
        # The clamp has raised to τ what was below: σ_min of a repaired matrix, and σ₁ where the
        # floor lies above it.
        max(largest, raised_to) / max(smallest, raised_to)
        for route, largest, smallest, raised_to in zip(
            routes, sigma_max, sigma_min, tau, strict=True
        )
        if route in LOOKED_AT
    ]
    counts = len(routes), len(left), routes.count("tested"), routes.count("certified")
    return (
        GroupConditions(*counts, statistics.median(left), max(left))
        if left
        else GroupConditions(*counts)
    )
