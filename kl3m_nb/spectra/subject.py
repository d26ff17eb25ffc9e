"""What a report on a checkpoint can compare it with: its run, the stack it was begun from, the
source of the stack.

The run folder is the truth: run.json names what a run was begun from, stack.json what a stack was
made of; an exported model has that of the stack it was trained from. Where neither stands beside a
checkpoint, the model that is given for comparison decides by its depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kl3m_nb.common import paths
from kl3m_nb.common.text import table_html
from kl3m_nb.model.folder import TRAINED_STEPS, ModelOrCheckpoint, read_stack, stack_source
from kl3m_nb.model.roles import ROLES
from kl3m_nb.profiles import ClampSpec, Profile
from kl3m_nb.runs import checkpoints
from kl3m_nb.runs.folder import RUN_FILE, read_run_init, read_run_profile
from kl3m_nb.runs.lineage import UNKNOWN_STEP, model_step
from kl3m_nb.runs.metrics import first_step
from kl3m_nb.spectra.history import trajectory
from kl3m_nb.spectra.matrices import (
    check_source_layers,
    find_matrices,
    layer_count,
    local_checkpoint,
    model_name,
)


@dataclass(frozen=True)
class Subject:
    """A checkpoint and what is known of its past.

    `source_layers` is the number of layers when it is no stack. `start` (same depth) and `source`
    (source_layers deep) are empty strings where nothing names them. `steps` holds the checkpoints
    of its run by step up to this one, and before them the start: at the step at which the run
    began, or at its own when it is not what the run was begun from. It is empty without a run or a
    start. `run_dir` and `profile` are those of the run it belongs to, if any; `clamp` is the run's,
    the kl3m-007 card's where there is no run. `order` and `noise` are those of the stack; copies
    of one that is not cyclic are not looked for. `name` is what a title calls it.
    """

    name: str
    checkpoint: Path
    layers: int
    source_layers: int
    clamp: ClampSpec = field(default_factory=ClampSpec)
    start: str = ""
    source: str = ""
    steps: Mapping[int, ModelOrCheckpoint] = field(default_factory=dict)
    run_dir: Path | None = None
    profile: Profile | None = None
    order: str = "cyclic"
    noise: float = 0.0

    @property
    def copies(self) -> int:
        """How often each source block is in the model."""
        return self.layers // self.source_layers

    @property
    def last_step(self) -> float:
        """The optimizer step of the checkpoint; infinite where its name does not say, so that all
        of its run counts.
        """
        step = model_step(self.checkpoint)
        return math.inf if step == UNKNOWN_STEP else step

    @property
    def steps_since_clamp(self) -> int:
        """Optimizer steps without a clamp that lie behind it; 0 right after one, where nothing is
        clamped or no step is known.
        """
        return (
            int(self.last_step % self.clamp.clamp_every)
            if self.ceilings and math.isfinite(self.last_step)
            else 0
        )

    @property
    def reference_ceilings(self) -> dict[str, float]:
        """max_condition by role as `clamp` has it, whether or not it was ever applied."""
        return {role: self.clamp.max_condition(role) for role in ROLES}

    @property
    def ceilings(self) -> dict[str, float]:
        """max_condition by role; empty where no run says that these weights were clamped."""
        return self.reference_ceilings if self.profile and self.clamp.clamp_every else {}

    def table(self) -> dict[str, object]:
        """What is analysed and compared, and whose ceilings are shown."""
        clamp, layers = self.clamp, self.source_layers
        if not self.profile:
            whose = "of the kl3m-007 card, for reference: no run clamped these weights"
        elif not clamp.clamp_every:
            whose = "of the run, for reference: its clamp was off"
        else:
            whose = f"of the run, every {clamp.clamp_every} steps, floor {clamp.sigma_floor:g}"
        return {
            "name": self.name,
            "checkpoint": self.checkpoint,
            "compared with": " and ".join(filter(None, (self.start, self.source))) or "nothing",
            "source blocks": f"{layers}: layer i is copy i // {layers} of block i mod {layers}",
            "checkpoints at the steps": ", ".join(map(str, self.steps)) or "unknown",
            "clamp ceilings": (
                f"attention {clamp.attention_max_condition:,.0f},"
                f" MLP {clamp.mlp_max_condition:,.0f},"
                f" LM head {clamp.lm_head_max_condition:,.0f} ({whose})"
            ),
        }

    def _repr_html_(self) -> str:
        return table_html(self.table())

    def left_out(self) -> list[str]:
        """Say in a sentence each what cannot be compared, and what is missing for it."""
        sentences = []
        if self.order != "cyclic":
            sentences.append(
                f"It was begun from an {self.order} stack: what compares copies is left out, since"
                " copies are known by their place in cyclic stacks only."
            )
        elif self.copies == 1:
            sentences.append(
                "No record says that it is a stack: what compares copies is left out unless"
                " source_layers says how deep the source is."
            )
        if not (self.start or self.source):
            init = read_run_init(self.run_dir) if self.run_dir else ""
            begun = f": {init}, which it was begun from, is no folder here" if init else ""
            sentences.append(
                f"There is no stack or source to compare it with{begun}; another checkpoint can be"
                " named."
            )
        if not self.run_dir:
            sentences.append(
                "It is in no run's folder: clamp events, earlier checkpoints and what needs"
                " held-out windows are left out."
            )
        return sentences


def find_subject(checkpoint: str | Path, against: str = "", source_layers: int = 0) -> Subject:
    """What `checkpoint` (run folder, checkpoint folder, .safetensors file, hub id) is and can be
    compared with.

    `against` names the stack at step 0 (as deep) or the source (less deep); empty: what run.json
    and stack.json name. `source_layers` 0: as those say, or the depth of a less deep `against`.
    Raises ValueError as `find_matrices`, for a model in `against` whose depth fits neither, and for
    source layers of a stack that is not cyclic.
    """
    place = local_checkpoint(checkpoint).absolute()
    name = (
        model_name(place) if place == paths.checkpoint_place(checkpoint).path else str(checkpoint)
    )  # a hub id is not its folder's name
    run_dir = _run_folder(place)
    start_step = (first_step(run_dir) or 0) if run_dir else 0
    if run_dir == place:
        place = checkpoints.require_checkpoint(run_dir)
    else:
        checkpoints.check_sound(place)
    layers = layer_count(find_matrices(place))
    profile = read_run_profile(run_dir) if run_dir else None
    start = _begun_from(run_dir) if run_dir else ""
    own = _record(place)
    if own and not own.get(TRAINED_STEPS):  # a fresh stack
        start = str(place)
    begun, source = start, ""
    if against:
        other = str(local_checkpoint(against))
        depth = layer_count(find_matrices(other))
        if depth == layers:
            if not (start and Path(other).samefile(start)):
                start, start_step = other, max(model_step(other), 0)
        elif layers % depth:
            raise ValueError(
                f"{against} has {depth} layers and {checkpoint} has {layers}; give the stack it was"
                " begun from, as deep as it, or the source, whose depth divides it."
            )
        else:
            source, source_layers = other, source_layers or depth
    record = next(
        (record for path in (start, begun) if path and (record := _record(Path(path)))), own
    )
    noise = record.get("noise", 0.0)
    if (order := record.get("order", "cyclic")) != "cyclic":
        if source_layers:
            raise ValueError(
                f"{checkpoint} was begun from an {order} stack; copies and sources are compared for"
                " cyclic stacks only."
            )
        source_layers = layers
    if not source and (made_of := stack_source(record)):
        source = str(made_of)
    if not source_layers:
        source_layers = record.get("source_layers", layers)
    check_source_layers(layers, source_layers)
    steps: dict[int, ModelOrCheckpoint] = {}
    if run_dir and start and place in checkpoints.whole_checkpoints(run_dir):
        here = checkpoints.checkpoint_step(place)
        steps = {
            step: folder
            for step, folder in trajectory(run_dir, start, start_step).items()
            if step <= here
        }
    clamp = profile.clamp if profile else ClampSpec()
    if run_dir:
        name = f"{run_dir.name}, {place.name}"
    return Subject(
        name,
        place,
        layers,
        source_layers,
        clamp,
        start,
        source,
        steps,
        run_dir,
        profile,
        order,
        noise,
    )


def _run_folder(place: Path) -> Path | None:
    folder = place.parent if place.is_file() else place
    return next(
        (path for path in (folder, *folder.absolute().parents[:2]) if (path / RUN_FILE).is_file()),
        None,
    )


def _begun_from(run_dir: Path) -> str:
    """The checkpoint folder a run was begun from, where it still lies; empty for random weights."""
    init = read_run_init(run_dir)
    place = paths.recorded_place(init) if init else None
    return place.name if place and place.is_here else ""


def _record(place: Path) -> dict:
    return read_stack(place.parent if place.is_file() else place)
