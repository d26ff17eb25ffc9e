"""What a run holds beside its weights, and what a checkpoint keeps of it so that training goes on
bit for bit.

`TrainingState` describes the run behind its last whole step: counters, losses, optimizers, clip,
clamp, place in the data and in the metrics. The state of the random generators belongs to the
process; it is read when a checkpoint is made and set when one is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from kl3m_nb.common import distributed
from kl3m_nb.data.loader import PrefetchedStream
from kl3m_nb.model.experts import ROUTER_LOSS
from kl3m_nb.optim.model_clamp import ClampConditions, SpectralClamp
from kl3m_nb.optim.muon import Muon
from kl3m_nb.optim.schedule import AdaptiveClip, ClipOutcome
from kl3m_nb.runs.lineage import Counts
from kl3m_nb.runs.metrics import MetricsLog


@dataclass
class Counters:
    """Counts of a run up to its last whole step.

    Steps are optimizer steps, those of the start included. `seconds` are spent in steps and clamps,
    over all resumptions; evaluations and checkpoints are not counted.
    """

    first_step: int = 0  # behind the start; the warmup of fresh optimizers begins there
    step: int = 0
    tokens: int = 0
    valid_tokens: int = 0  # tokens that are labels
    seconds: float = 0.0
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    clipped_since_row: int = 0  # steps with a clipped gradient since the last row of the metrics
    clamped_step: int = 0  # of the last clamp

    @classmethod
    def carried_on(cls, counts: Counts) -> Counters:
        """Returns the counters of a run that begins behind `counts` of its start."""
        step = counts.step
        return cls(step, step, counts.tokens, counts.valid_tokens, clamped_step=step)

    def add_step(self, tokens: int, valid_tokens: int, seconds: float, clip: ClipOutcome) -> None:
        """Counts one step over `tokens` tokens that took `seconds`; `clip` says how it ended."""
        self.step += 1
        self.tokens += tokens
        self.valid_tokens += valid_tokens
        self.seconds += seconds
        self.skipped += not clip.finite
        self.skipped_in_a_row = 0 if clip.finite else self.skipped_in_a_row + 1
        self.clipped_since_row += clip.clipped

    def progress(self) -> dict[str, float]:
        """Returns the columns that every row of the metrics has: `step`, `tokens`, `seconds`."""
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}


@dataclass
class Losses:
    """The newest losses in nats per token; NaN before the first."""

    held_out_loss: float = float("nan")
    held_out_step: int = 0  # of the last evaluation
    cross_entropy: float = float("nan")  # of the last logged step that was not skipped


@dataclass
class TrainingState:
    """The state of a run beside its weights; the loop works on its parts.

    `stack` says how the start was grown, `conditions` what the last clamp left. `metrics_position`,
    in bytes, and `metrics_tail` describe metrics.jsonl as of the newest checkpoint, as `MetricsLog`
    takes them. `is_whole` is False while the weights change, and stays so when an error comes then.
    """

    counters: Counters
    losses: Losses
    stack: dict
    muon: Muon
    aux: torch.optim.AdamW
    clip: AdaptiveClip
    clamp: SpectralClamp
    stream: PrefetchedStream
    conditions: ClampConditions = field(default_factory=ClampConditions)
    metrics_position: int = 0
    metrics_tail: str = ""
    is_whole: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.note_stream()

    @contextlib.contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Marks the state as no whole step until the block has ended without an error."""
        self.is_whole = False
        yield
        self.is_whole = True

    def note_stream(self) -> None:
        """Notes where the stream stands, as the end of a step: a checkpoint goes on from there,
        also when the batch of the next step was taken already.
        """
        self._stream_state = self.stream.state_dict()

    def note_metrics(self, log: MetricsLog) -> None:
        """Notes where `log` stands, for the checkpoint that is made now."""
        self.metrics_position, self.metrics_tail = log.position, log.tail.decode()

    def state_dict(self) -> dict:
        """Returns what a checkpoint holds beside the weights: numbers, strings, tensors, dicts and
        lists. `router_loss` names the formula that the loss of a mixture's routers has.
        """
        return {
            "counters": dataclasses.asdict(self.counters),
            "losses": dataclasses.asdict(self.losses),
            "conditions": dataclasses.asdict(self.conditions),
            "stack": self.stack,
            "muon": self.muon.state_dict(),
            "aux": self.aux.state_dict(),
            "clip": self.clip.state_dict(),
            "clamp": self.clamp.state_dict(),
            "router_loss": ROUTER_LOSS,
            "stream": self._stream_state,
            "random": random_state(),
            "metrics_position": self.metrics_position,
            "metrics_tail": self.metrics_tail,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a `state_dict`, which is used up; the random generators are set too."""
        # Earlier versions kept neither the steps of the last clamp and evaluation, which they had
        # always done, nor the stack.
        step = state["counters"]["step"]
        self.counters = Counters(**{"clamped_step": step, **state["counters"]})
        self.losses = Losses(**{"held_out_step": step, **state.get("losses", {})})
        self.conditions = ClampConditions.from_state(state["conditions"])
        self.stack = state.get("stack", {})
        # What has a state of its own.
        distributed.load_optimizer_state(self.muon, state["muon"])
        distributed.load_optimizer_state(self.aux, state["aux"])
        self.clip.load_state_dict(state["clip"])
        self.clamp.load_state_dict(state["clamp"])
        self.stream.load_state_dict(state["stream"])
        self.note_stream()
        set_random_state(state["random"])
        self.metrics_position = state["metrics_position"]
        self.metrics_tail = state.get("metrics_tail", "")


def random_state() -> dict:
    """Returns the state of the generators of Python, numpy, torch and this process's GPU, as
    numbers, lists and tensors.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict) -> None:
    """Sets what `random_state` returned; a machine without a GPU passes over the GPU's part."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
