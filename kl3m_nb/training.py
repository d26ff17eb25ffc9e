"""The training loop: one optimizer step after another, logged, evaluated, clamped, checkpointed, and resumable at any step.

`train` is what notebooks and the shell call. It knows no plot and no widget: callbacks get the same rows that go to
metrics.jsonl. An interrupt (Ctrl-C, the notebook's stop button, SIGTERM) ends the current micro-batch, saves a checkpoint of
the last whole step and then raises KeyboardInterrupt; calling `train` again continues with the very next token.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kl3m_nb import checkpoints, evaluation, models, paths, profiles, roles
from kl3m_nb.clamping import SpectralClamp
from kl3m_nb.flops import flops_per_token
from kl3m_nb.metrics import MetricsLog, read_metrics
from kl3m_nb.objective import activation_penalty, chunked_objective
from kl3m_nb.packing import Batch, held_out_windows
from kl3m_nb.profiles import Profile
from kl3m_nb.runtime import choose_runtime, prepare_model
from kl3m_nb.schedule import AdaptiveClip, lr_factor
from kl3m_nb.streams import open_stream
from kl3m_nb.tokenizer import load_tokenizer

Callback = Callable[[Mapping], None]
MOST_SKIPS_IN_A_ROW = 10
RUN_FILE = "run.json"


class TrainingStopped(RuntimeError):
    """Training cannot go on: too many steps in a row were not finite. The last good state is saved."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `train` returns. `held_out_loss` is in nats per token, on the fixed held-out windows."""

    run_dir: Path
    checkpoint: Path
    step: int
    held_out_loss: float
    seconds: float  # spent in training steps over the whole run, evaluations and checkpoints not counted


def train(
    profile: Profile,
    run_dir: str | Path,
    init: str | Path | None = None,
    resume: str = "auto",
    callbacks: Iterable[Callback] = (),
) -> TrainResult:
    """Trains `profile` in the folder `run_dir` up to its max_steps and returns where the run stands.

    `init` names a checkpoint to start from with fresh optimizers; without it the weights are random. With `resume="auto"` a run
    folder that holds a checkpoint is continued (at once finished when it is complete); `resume="never"` refuses such a folder.
    Raises ValueError before anything is written when the pieces do not fit, TrainingStopped after ten non-finite steps in a row,
    KeyboardInterrupt after the checkpoint of an interrupted run is saved.
    """
    run_dir = paths.resolve(run_dir)
    if resume not in ("auto", "never"):
        raise ValueError(f"resume is {resume!r}; it accepts auto and never.")
    _check_run_folder(run_dir, profile, init)
    checkpoint = checkpoints.latest_checkpoint(run_dir)
    if checkpoint and resume == "never":
        raise ValueError(f"The run folder {run_dir} already holds {checkpoint.name}; use resume='auto' or another folder.")
    if checkpoint and checkpoints.checkpoint_step(checkpoint) >= profile.schedule.max_steps:
        return _finished_result(run_dir, checkpoint)
    run = _Run(profile, run_dir, init, checkpoint, list(callbacks))
    with _StopRequest() as stop:
        return run.to_the_end(stop)


def read_run_profile(run_dir: str | Path) -> Profile:
    """The profile a run folder was trained with. Raises ValueError when it is no run folder."""
    path = paths.resolve(run_dir) / RUN_FILE
    if not path.is_file():
        raise ValueError(f"{path.parent} is no run folder, it holds no {RUN_FILE}; train it first, or name another run.")
    return profiles.profile_from_dict(json.loads(path.read_text())["profile"])


def _check_run_folder(run_dir: Path, profile: Profile, init: str | Path | None) -> None:
    path = run_dir / RUN_FILE
    if not path.is_file():
        return
    record = json.loads(path.read_text())
    stored, given = record["profile"], profile.to_dict()
    for section, values in given.items():
        if section == "runtime" or values == stored[section]:
            continue
        if isinstance(values, dict):
            key = next(key for key in values if values[key] != stored[section].get(key))
            was, now = stored[section].get(key), values[key]
        else:
            key, was, now = section, stored[section], values
        raise ValueError(
            f"The run folder {run_dir} belongs to the profile {stored['name']} with {key} = {was!r}, now it is {now!r}; "
            "use the same settings or another run folder."
        )
    if record["init"] != _init_name(init):
        raise ValueError(
            f"The run folder {run_dir} was started from {record['init']}, now from {_init_name(init)}; use another run folder."
        )


def _init_name(init: str | Path | None) -> str:
    if init is None:
        return "random weights"
    path = paths.resolve(init)
    return str(path.relative_to(paths.project_root())) if path.is_relative_to(paths.project_root()) else str(init)


def _finished_result(run_dir: Path, checkpoint: Path) -> TrainResult:
    last = read_metrics(run_dir, "held_out").iloc[-1]
    return TrainResult(
        run_dir, checkpoint, checkpoints.checkpoint_step(checkpoint), float(last.held_out_loss), float(last.seconds)
    )


class _StopRequest:
    """Turns SIGINT and SIGTERM into a request that the loop honours between micro-batches; a later one interrupts at once.

    A supervisor may signal the whole group of processes, and a runner then passes its own signal on: what arrives within a few
    seconds of the first is the same request.
    """

    _SAME_REQUEST_SECONDS = 5.0

    def __init__(self):
        self.requested = False
        self._requested_at = 0.0
        self._previous = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there Python lets anyone catch signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
        elif time.monotonic() - self._requested_at > self._SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt


class _Run:
    """Everything one run holds between its steps."""

    def __init__(self, profile: Profile, run_dir: Path, init, checkpoint: Path | None, callbacks: list[Callback]):
        self.profile, self.run_dir, self.init, self.callbacks = profile, run_dir, init, callbacks
        self.runtime = choose_runtime(profile.runtime)
        self.tokenizer = load_tokenizer(profile.data.tokenizer, profile.data.source, profile.model.vocabulary)
        self.stream = open_stream(profile.data, self.tokenizer, profile.runtime.prefetch_batches)
        self.held_out = held_out_windows(profile.data, self.tokenizer)
        start = checkpoint or init
        if start is None:
            model = models.build_model(profile, attention=self.runtime.attention)
        else:
            model = models.load_model(start, attention=self.runtime.attention)
            models.check_fits(model.config.to_dict(), profile, start)
        self.model = prepare_model(model, self.runtime, profile.runtime.gradient_checkpointing)
        self.parameters = list(self.model.parameters())
        rules = roles.role_table(self.model, profile)
        self.muon, self.aux = roles.build_optimizers(self.model, rules, profile)
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.clamp = SpectralClamp(roles.clamp_targets(self.model, rules, profile))
        self.rules = {rule.name: rule for rule in rules}
        self.clip = AdaptiveClip(profile.schedule)
        self.flops_per_token = flops_per_token(profile.model, profile.data.seq_len)
        self.counters = {"step": 0, "tokens": 0, "valid_tokens": 0, "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0}
        self.last_held_out = float("nan")
        self._started = time.monotonic()
        state = checkpoints.load_state(checkpoint) if checkpoint else None
        if state:
            self._load_state(state)
        self._write_run_file()
        self.log = MetricsLog(run_dir, state["metrics_position"] if state else 0)

    def to_the_end(self, stop: _StopRequest) -> TrainResult:
        runtime, schedule = self.profile.runtime, self.profile.schedule
        self._tell({"kind": "start", "step": self.counters["step"], "max_steps": schedule.max_steps, "run": self.run_dir.name,
                    "runtime": self.runtime.describe()})  # fmt: skip
        try:
            if self.counters["step"] == 0 and self.log.position == 0:
                self._evaluate()
            saved_at = self.counters["step"]
            while self.counters["step"] < schedule.max_steps:
                before = self.stream.state_dict()
                if not self._step(stop):
                    self.stream.load_state_dict(before)
                    self._save()
                    raise KeyboardInterrupt
                step, is_last = self.counters["step"], self.counters["step"] == schedule.max_steps
                if self.profile.clamp.clamp_every and step % self.profile.clamp.clamp_every == 0:
                    self._clamp()
                if step % runtime.eval_every == 0 or is_last:
                    self._evaluate()
                if step % runtime.checkpoint_every == 0 or is_last:
                    self._save()
                    saved_at = step
                if stop.requested:
                    if saved_at != step:
                        self._save()
                    raise KeyboardInterrupt
        finally:
            self.log.close()
            self._tell({"kind": "end", "step": self.counters["step"], "max_steps": schedule.max_steps})
        checkpoint = checkpoints.require_checkpoint(self.run_dir)
        return TrainResult(self.run_dir, checkpoint, self.counters["step"], self.last_held_out, self.counters["seconds"])

    def _step(self, stop: _StopRequest) -> bool:
        """One optimizer step over all its micro-batches. False when a stop was requested before they were through."""
        began = time.perf_counter()
        data, step = self.profile.data, self.counters["step"]
        batch = self.stream.take(data.micro_batch * data.grad_accumulation)
        # All micro-batches are divided by the labels of the whole step: a mean of means would weigh short ones too high.
        valid_tokens = batch.valid_tokens
        factor = lr_factor(step, self.profile.schedule)
        for group in (*self.muon.param_groups, *self.aux.param_groups):
            group["lr"] = group["peak_lr"] * factor
        terms: dict[str, torch.Tensor] = {}
        for micro_batch in batch.split(data.micro_batch):
            if stop.requested:
                self._zero_gradients()
                return False
            for name, value in self._forward_backward(micro_batch, valid_tokens).items():
                terms[name] = terms[name] + value if name in terms else value
        values = {name: value.item() for name, value in terms.items()}
        clipped = self.clip.clip_(self.parameters)
        usable = clipped.finite and np.isfinite(values["loss"])
        if usable:
            self.muon.step()
            self.aux.step()
            bounds = self.muon.movement_bounds()
            self.clamp.note_movement({self.names[parameter]: bound for parameter, bound in bounds.items()})
        bad = None if usable else self._first_bad_tensor()
        self._zero_gradients()
        seconds = time.perf_counter() - began
        counters = self.counters
        counters["step"] += 1
        counters["tokens"] += batch.labels.numel()
        counters["valid_tokens"] += valid_tokens
        counters["seconds"] += seconds
        counters["skipped"] += not usable
        counters["skipped_in_a_row"] = 0 if usable else counters["skipped_in_a_row"] + 1
        if counters["step"] % self.profile.runtime.log_every == 0 or not usable:
            self._record(
                {
                    "kind": "train", **self._progress(), "valid_tokens": counters["valid_tokens"], **values,
                    "lr_muon": self.profile.muon_lr * factor, "lr_aux": self.profile.optimizer.aux_lr * factor,
                    "grad_norm": clipped.norm, "clip_threshold": clipped.threshold, "clipped": clipped.clipped,
                    "skipped": not usable, "tokens_per_second": batch.labels.numel() / seconds, "epoch": self.stream.epoch,
                }
            )  # fmt: skip
        if counters["skipped_in_a_row"] >= MOST_SKIPS_IN_A_ROW:
            checkpoint = self._save()
            raise TrainingStopped(
                f"{MOST_SKIPS_IN_A_ROW} steps in a row were not finite, first in {bad}; "
                f"the last good weights are in {checkpoint}: lower the learning rate or look at the data of these steps."
            )
        return True

    def _forward_backward(self, batch: Batch, valid_tokens: int) -> dict[str, torch.Tensor]:
        """Adds the gradients of one micro-batch, returns its terms of the loss."""
        spec = self.profile.objective
        batch = batch.to(self.runtime.device)
        labels = batch.labels
        with self.runtime.autocast():
            body = models.forward_body(self.model, batch.input_ids, batch.attention_mask, batch.position_ids)
            head = self.model.get_output_embeddings().weight
            terms = chunked_objective(body.hidden, head, labels, spec, num_valid=valid_tokens)
            activation = activation_penalty(body.residual, labels, spec.activation_norm, valid_tokens)
            # the router's loss is a mean over its tokens: weighted by their share, micro-batches add up to the mean
            router = self.profile.model.router_aux_loss * body.router_loss * ((labels != -100).sum() / valid_tokens)
            total = terms.total + activation + router
        total.backward()
        values = {
            "loss": total.detach(),
            "cross_entropy": terms.cross_entropy,
            "entropy_bits": terms.entropy_bits,
            "label_smoothing": terms.label_smoothing,
            "entropy_bonus": terms.entropy_bonus,
            "entropy_target": terms.entropy_target,
            "activation_norm": activation.detach(),
        }
        return {**values, "router_loss": router.detach()} if self.profile.model.experts else values

    def _zero_gradients(self) -> None:
        self.muon.zero_grad(set_to_none=True)
        self.aux.zero_grad(set_to_none=True)

    def _first_bad_tensor(self) -> str:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the weight {name}"
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return f"the gradient of {name}"
        return "the loss"

    def _clamp(self) -> None:
        began = time.perf_counter()
        events = self.clamp.clamp()
        self.counters["seconds"] += time.perf_counter() - began
        row: dict = {"kind": "clamp", **self._progress(), "clamp_seconds": time.perf_counter() - began}
        for column in ("name", "sigma_max", "sigma_min", "tau", "raised", "route"):
            row[column] = [getattr(event, column) for event in events]
        parents = [next(rule for name, rule in self.rules.items() if event.name.startswith(name)) for event in events]
        row["role"] = [rule.role for rule in parents]
        row["layer"] = [_layer(rule.name) for rule in parents]
        row["max_condition"] = [rule.max_condition for rule in parents]
        self._record(row)

    def _evaluate(self) -> None:
        precision = torch.bfloat16 if self.runtime.precision == "bfloat16" else None
        held_out = evaluation.held_out_loss(self.model, self.held_out, autocast=precision)
        self.last_held_out = held_out.loss
        self._record(
            {
                "kind": "held_out", **self._progress(), "flops": self.counters["tokens"] * self.flops_per_token,
                "held_out_loss": held_out.loss, "held_out_entropy_bits": held_out.entropy_bits,
            }
        )  # fmt: skip

    def _save(self) -> Path:
        state = {
            "counters": dict(self.counters),
            "last_held_out": self.last_held_out,
            "muon": self.muon.state_dict(),
            "aux": self.aux.state_dict(),
            "clip": self.clip.state_dict(),
            "clamp": self.clamp.state_dict(),
            "stream": self.stream.state_dict(),
            "rng": _rng_state(),
            "metrics_position": self.log.position,
        }
        checkpoint = checkpoints.save_checkpoint(
            self.run_dir, self.counters["step"], self.model, self.tokenizer, state, self.profile.runtime.keep_checkpoints
        )
        self._tell({"kind": "checkpoint", "step": self.counters["step"], "path": str(checkpoint)})
        return checkpoint

    def _load_state(self, state: dict) -> None:
        self.counters = dict(state["counters"])
        self.last_held_out = state["last_held_out"]
        self.muon.load_state_dict(state["muon"])
        self.aux.load_state_dict(state["aux"])
        self.clip.load_state_dict(state["clip"])
        self.clamp.load_state_dict(state["clamp"])
        self.stream.load_state_dict(state["stream"])
        _set_rng_state(state["rng"])

    def _write_run_file(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        record = {"profile": self.profile.to_dict(), "init": _init_name(self.init), "runtime": self.runtime.describe()}
        temporary = self.run_dir / f".{RUN_FILE}"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(self.run_dir / RUN_FILE)

    def _progress(self) -> dict:
        return {key: self.counters[key] for key in ("step", "tokens", "seconds")}

    def _record(self, row: dict) -> None:
        self.log.append(row)
        self._tell(row)

    def _tell(self, row: Mapping) -> None:
        for callback in self.callbacks:
            callback(row)


def _layer(name: str) -> int:
    """The block a parameter belongs to; -1 for embedding, head and final norm."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _rng_state() -> dict:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state: dict) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
