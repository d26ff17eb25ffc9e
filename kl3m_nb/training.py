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
from torch.profiler import record_function

from kl3m_nb import cards, checkpoints, evaluation, models, paths, profiles, roles
from kl3m_nb.clamping import SpectralClamp
from kl3m_nb.flops import flops_per_token
from kl3m_nb.metrics import MetricsLog, read_metrics
from kl3m_nb.objective import activation_penalty, chunked_objective
from kl3m_nb.packing import PackedStream, held_out_windows
from kl3m_nb.profiles import Profile
from kl3m_nb.runtime import choose_runtime, prepare_model
from kl3m_nb.schedule import AdaptiveClip, global_norm, lr_factor
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

    `init` names a checkpoint to start from with fresh optimizers; without it the weights are random. One of the family, a folder
    or hub id whose name ends in -stepN, is continued: steps and tokens are counted on from its card, the schedule goes on there
    after a warmup of its own, and the data begins anew. With `resume="auto"` a run
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
        self.runtime = choose_runtime(profile)
        carried = cards.carried_counts(init)
        if not checkpoint and carried.step >= profile.schedule.max_steps:
            raise ValueError(
                f"{init} has {carried.step:,} steps behind it and max_steps is {profile.schedule.max_steps:,}; raise max_steps."
            )
        self.tokenizer = load_tokenizer(profile.data.tokenizer, profile.data.source, profile.model.vocabulary)
        self.stream = PackedStream(profile.data, self.tokenizer)
        self.held_out = held_out_windows(profile.data, self.tokenizer)
        start = checkpoint or init
        if start is None:
            model = models.build_model(profile, attention=self.runtime.attention)
        else:
            model = models.load_model(start, attention=self.runtime.attention)
            models.check_fits(model.config.to_dict(), profile, start)
        self.model = prepare_model(model, self.runtime)
        self.parameters = list(self.model.parameters())
        rules = roles.role_table(self.model, profile)
        self.muon, self.aux = roles.build_optimizers(self.model, rules, profile)
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.clamp = SpectralClamp(roles.clamp_targets(self.model, rules, profile))
        self.rules = {rule.name: rule for rule in rules}
        self.clip = AdaptiveClip(profile.schedule)
        self.flops_per_token = flops_per_token(profile.model, profile.data.seq_len)
        self.counters = {
            "first_step": carried.step, "step": carried.step, "tokens": carried.tokens, "valid_tokens": carried.valid_tokens,
            "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0,
        }  # fmt: skip
        self.last_held_out = self.last_cross_entropy = float("nan")
        self.conditions: dict = {"step": 0, "by_role": {}}
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
            if self.counters["step"] == self.counters["first_step"] and self.log.position == 0:
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
                if self._evaluates_after(step):
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
        with record_function("kl3m_nb data"):
            windows = self.stream.next_batch(data.micro_batch * data.grad_accumulation)
        inputs, labels = windows[:, :-1], windows[:, 1:]
        # All micro-batches are divided by the labels of the whole step: a mean of means would weigh short ones too high.
        valid_tokens = int((labels != -100).sum())
        factor = self._lr_factor(step)
        for group in (*self.muon.param_groups, *self.aux.param_groups):
            group["lr"] = group["peak_lr"] * factor
        terms: dict[str, torch.Tensor] = {}
        for micro_inputs, micro_labels in zip(inputs.split(data.micro_batch), labels.split(data.micro_batch), strict=True):
            if stop.requested:
                self._zero_gradients()
                return False
            for name, value in self._forward_backward(micro_inputs, micro_labels, valid_tokens).items():
                terms[name] = terms[name] + value if name in terms else value
        expert_counts = terms.pop("expert_counts")
        # One transfer a step, after everything is queued: until here a GPU never waits for the host, nor the host for it.
        norm = global_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        *numbers, norm = torch.stack([*terms.values(), norm]).tolist()
        values = dict(zip(terms, numbers, strict=True))
        clipped = self.clip.clip_(self.parameters, norm)
        usable = clipped.finite and np.isfinite(values["loss"])
        if usable:
            with record_function("kl3m_nb optimizer"):
                self.muon.step()
                self.aux.step()
            bounds = self.muon.movement_bounds()
            self.clamp.note_movement({self.names[parameter]: bound for parameter, bound in bounds.items()})
        bad = None if usable else self._first_bad_tensor()
        self._zero_gradients()
        seconds = time.perf_counter() - began
        counters = self.counters
        counters["step"] += 1
        counters["tokens"] += labels.numel()
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
                    "skipped": not usable, "tokens_per_second": labels.numel() / seconds, "epoch": self.stream.epoch,
                }
            )  # fmt: skip
        self.last_cross_entropy = values["cross_entropy"]
        if expert_counts.numel() and self._evaluates_after(counters["step"]):
            self._record_experts(expert_counts)
        if counters["skipped_in_a_row"] >= MOST_SKIPS_IN_A_ROW:
            checkpoint = self._save()
            raise TrainingStopped(
                f"{MOST_SKIPS_IN_A_ROW} steps in a row were not finite, first in {bad}; "
                f"the last good weights are in {checkpoint}: lower the learning rate or look at the data of these steps."
            )
        return True

    def _forward_backward(self, inputs: torch.Tensor, labels: torch.Tensor, valid_tokens: int) -> dict[str, torch.Tensor]:
        """inputs, labels int64 [micro_batch, seq_len], e.g. [8, 256]. Adds to the gradients, returns the terms of the loss."""
        spec = self.profile.objective
        inputs = inputs.to(self.runtime.device, non_blocking=True)
        labels = labels.to(self.runtime.device, non_blocking=True)
        with record_function("kl3m_nb forward"), self.runtime.autocast():
            body = models.forward_body(self.model, inputs)
            head = self.model.get_output_embeddings().weight
            terms = chunked_objective(
                body.hidden, head, labels, spec, num_valid=valid_tokens, compiled=self.runtime.compile_blocks
            )
            activation = activation_penalty(body.residual, labels, spec.activation_norm, valid_tokens)
            # the router's loss is a mean over its tokens: weighted by their share, micro-batches add up to the mean
            router = self.profile.model.router_aux_loss * body.router_loss * ((labels != -100).sum() / valid_tokens)
            total = terms.total + activation + router
        with record_function("kl3m_nb backward"):
            total.backward()
        values = {
            "loss": total.detach(),
            "cross_entropy": terms.cross_entropy,
            "entropy_bits": terms.entropy_bits,
            "label_smoothing": terms.label_smoothing,
            "entropy_bonus": terms.entropy_bonus,
            "entropy_target": terms.entropy_target,
            "activation_norm": activation.detach(),
            "expert_counts": body.expert_counts,
        }
        return {**values, "router_loss": router.detach()} if self.profile.model.experts else values

    def _lr_factor(self, step: int) -> float:
        """The schedule's factor, below a warmup of its own where a run with fresh optimizers begins far from step 0."""
        schedule = self.profile.schedule
        begun = step - self.counters["first_step"] + 1
        return min(lr_factor(step, schedule), begun / max(1, schedule.warmup_steps))

    def _evaluates_after(self, step: int) -> bool:
        return step % self.profile.runtime.eval_every == 0 or step == self.profile.schedule.max_steps

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
        with record_function("kl3m_nb clamp"):
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
        self.conditions = {"step": self.counters["step"], "by_role": _conditions(row)}

    def _record_experts(self, counts: torch.Tensor) -> None:
        """counts [layers, experts]: of the step's tokens that chose each expert. Logged as shares of a layer's choices."""
        shares = (counts / counts.sum(1, keepdim=True)).tolist()
        row: dict = {"kind": "experts", **self._progress()}
        row["layer"] = [layer for layer, of_layer in enumerate(shares) for _ in of_layer]
        row["expert"] = [expert for of_layer in shares for expert in range(len(of_layer))]
        row["share"] = [round(share, 5) for of_layer in shares for share in of_layer]
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
            "last_cross_entropy": self.last_cross_entropy,
            "conditions": self.conditions,
            "muon": self.muon.state_dict(),
            "aux": self.aux.state_dict(),
            "clip": self.clip.state_dict(),
            "clamp": self.clamp.state_dict(),
            "stream": self.stream.state_dict(),
            "rng": _rng_state(),
            "metrics_position": self.log.position,
        }
        checkpoint = checkpoints.save_checkpoint(
            self.run_dir, self.counters["step"], self.model, self.tokenizer, state, self.profile.runtime.keep_checkpoints,
            cards.model_card(self.profile, self._card_facts()),
        )  # fmt: skip
        self._tell({"kind": "checkpoint", "step": self.counters["step"], "path": str(checkpoint)})
        return checkpoint

    def _card_facts(self) -> cards.CardFacts:
        counts = cards.Counts(*(self.counters[key] for key in ("step", "tokens", "valid_tokens")))
        return cards.CardFacts(
            counts=counts,
            init=_init_name(self.init),
            runtime=self.runtime.describe(),
            held_out_loss=self.last_held_out,
            cross_entropy=self.last_cross_entropy,
            conditions=self.conditions["by_role"],
            conditions_step=self.conditions["step"],
            stack=cards.read_stack(self.init),
        )

    def _load_state(self, state: dict) -> None:
        self.counters = dict(state["counters"])
        self.last_held_out = state["last_held_out"]
        self.last_cross_entropy, self.conditions = state["last_cross_entropy"], state["conditions"]
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


def _conditions(clamped: Mapping) -> dict[str, tuple[float, float]]:
    """Median and maximum of σ₁/σ_min over attention, MLP and head, from a row of the clamp."""
    groups: dict[str, list[float]] = {}
    for role, sigma_max, sigma_min in zip(clamped["role"], clamped["sigma_max"], clamped["sigma_min"], strict=True):
        group = "attention" if role in profiles.ATTENTION_ROLES else "MLP" if role in profiles.MLP_ROLES else "LM head"
        if sigma_min > 0:
            groups.setdefault(group, []).append(sigma_max / sigma_min)
    return {group: (float(np.median(values)), max(values)) for group, values in groups.items()}


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
