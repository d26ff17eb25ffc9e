"""The training loop: one optimizer step after another, logged, evaluated, clamped, checkpointed,
and resumable at any step.

`train` is what notebooks and the shell call. It knows no plot and no widget: callbacks get the same
rows that go to metrics.jsonl. An interrupt (Ctrl-C, the notebook's stop button, SIGTERM) ends the
current micro-batch, saves a checkpoint of the last whole step and then raises KeyboardInterrupt;
calling `train` again continues with the very next token. Under torchrun all ranks call it alike:
rank 0 logs and saves, and what one rank is asked for is agreed on between two steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch.profiler import record_function

from kl3m_nb import profiles
from kl3m_nb.common import distributed, paths
from kl3m_nb.common.stopping import StopRequest, interrupted
from kl3m_nb.data import windows
from kl3m_nb.data.loader import PrefetchedStream, Share, SourceBroke, open_stream, take_share
from kl3m_nb.data.tokenizer import load_tokenizer, read_tokenizer
from kl3m_nb.data.windows import Batch, held_out_windows
from kl3m_nb.model import experts, scoring
from kl3m_nb.model.costs import run_flops
from kl3m_nb.model.runtime import choose_runtime, prepare_model
from kl3m_nb.optim.loss import training_loss
from kl3m_nb.optim.model_clamp import ClampConditions, SpectralClamp
from kl3m_nb.optim.rules import build_optimizers, clamp_columns, clamp_targets, role_table
from kl3m_nb.optim.schedule import AdaptiveClip, global_norm, lr_factor
from kl3m_nb.profiles import Profile
from kl3m_nb.runs import card, checkpoints, folder, lineage
from kl3m_nb.runs.checkpoints import CheckpointFailed
from kl3m_nb.runs.folder import RunIsBusy, RunLock
from kl3m_nb.runs.lineage import carried_stack
from kl3m_nb.runs.metrics import Callback, MetricsLog, tell
from kl3m_nb.runs.saver import CheckpointSaver
from kl3m_nb.training.resume import (
    TrainResult,
    check_shared,
    find_checkpoint,
    finished_result,
    first_bad_weight,
    is_complete,
    random_state,
    set_random_state,
    starting_model,
    why_not_finite,
)

MOST_SKIPS_IN_A_ROW = 10


class TrainingStopped(RuntimeError):
    """Training cannot go on: steps or weights are not finite, the data broke off, or an unexpected
    error came between two steps. The newest checkpoint is a good one.
    """


def train(
    profile: Profile,
    run_dir: str | Path,
    init: str | Path | None = None,
    resume: str = "auto",
    callbacks: Iterable[Callback] = (),
) -> TrainResult:
    """Trains `profile` in the folder `run_dir` up to its max_steps and returns where the run
    stands.

    `init` names a checkpoint to start from with fresh optimizers; without it the weights are
    random. One of the family, a folder or hub id whose name ends in -stepN, is continued: steps and
    tokens are counted on from its card, the schedule goes on there after a warmup of its own, and
    the data begins anew. With `resume="auto"` a run folder that holds a checkpoint is continued, at
    once finished when it is complete; `resume="never"` refuses such a folder.

    Raises ValueError before anything is written when the pieces do not fit, a weight is not finite
    or another process trains there, TrainingStopped when steps or weights are not finite, the data
    breaks off or an unexpected error comes between two steps, CheckpointFailed when the last
    checkpoint cannot be written, KeyboardInterrupt after the checkpoint of an interrupted run is
    saved.
    """
    run_dir, init = paths.resolve(run_dir), paths.checkpoint_place(init).name if init else None
    if resume not in ("auto", "never"):
        raise ValueError(f"resume is {resume!r}; it accepts auto and never.")
    with distributed.process_group(), RunLock(run_dir) as lock:
        distributed.check_alike({**profiles.fields_of(profile), "init": init, "resume": resume})
        checkpoint = distributed.on_first_rank(
            lambda: find_checkpoint(run_dir, profile, init, resume, lock)
        )
        if checkpoint and distributed.on_first_rank(
            lambda: is_complete(run_dir, checkpoint, profile)
        ):
            return finished_result(run_dir, checkpoint)
        if checkpoint:
            check_shared(checkpoint / checkpoints.MANIFEST)
        return _Run(profile, run_dir, init, checkpoint, list(callbacks), lock).to_the_end()


class _Run:
    """Everything one run holds between its steps."""

    def __init__(
        self,
        profile: Profile,
        run_dir: Path,
        init,
        checkpoint: Path | None,
        callbacks: list[Callback],
        lock: RunLock,
    ):
        self.profile, self.run_dir, self.init, self.callbacks = profile, run_dir, init, callbacks
        self.lock = lock
        self.world = distributed.world()
        windows.check_shares(
            profile.data.micro_batch * profile.data.grad_accumulation, self.world.size
        )
        self.runtime = choose_runtime(profile)
        distributed.check_alike(
            {"device": self.runtime.device.type, "precision": self.runtime.precision}
        )
        carried = lineage.Counts() if checkpoint else lineage.carried_counts(init)
        if carried.step >= profile.schedule.max_steps:
            raise ValueError(
                f"{init} has {carried.step:,} steps behind it and max_steps is"
                f" {profile.schedule.max_steps:,}; raise max_steps."
            )
        named = profile.data.tokenizer, profile.data.source, profile.model.vocabulary
        # The checkpoint's own: text that was added to the source since would give another, or the
        # named one may be gone.
        self.tokenizer = read_tokenizer(str(checkpoint)) if checkpoint else load_tokenizer(*named)
        self.stream = PrefetchedStream(
            open_stream(profile.data, self.tokenizer), profile.runtime.prefetch_batches
        )
        self.held_out = held_out_windows(profile.data, self.tokenizer)
        start = checkpoint or init
        self.model = starting_model(start, profile, self.tokenizer, self.runtime.attention)
        self.described = card.model_facts(self.model, self.tokenizer)
        self.parallel = self._parallel_model()
        self.parameters = list(self.model.parameters())
        self.rules = rules = role_table(self.model, profile)
        self.muon, self.aux = build_optimizers(self.model, rules, profile)
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.clamp = SpectralClamp(clamp_targets(self.model, rules, profile))
        self.clip = AdaptiveClip(profile.schedule)
        self.counters = {
            "first_step": carried.step,
            "step": carried.step,
            "tokens": carried.tokens,
            "valid_tokens": carried.valid_tokens,
            "seconds": 0.0,
            "skipped": 0,
            "skipped_in_a_row": 0,
            "clipped_since_row": 0,
            "clamped_step": carried.step,
        }
        self.first_bad = ""  # what was not finite at the first of the present row of skipped steps
        self.losses = {
            "held_out_loss": float("nan"),
            "held_out_step": carried.step,
            "cross_entropy": float("nan"),
        }
        self.conditions, self.idle_experts = ClampConditions(), experts.IdleExperts()
        self.stack = {} if checkpoint else carried_stack(init, profile)
        state = checkpoints.load_state(checkpoint) if checkpoint else None
        if state:
            self._load_state(state)
        if bad := first_bad_weight(self.model):
            raise ValueError(
                f"The weight {bad} of {start or 'the new model'} is not finite; start from an"
                " earlier checkpoint."
            )
        self._is_whole, self._stream_state = (
            True,
            self.stream.state_dict(),
        )  # behind the last whole step
        self._begins = state is None or state["metrics_position"] == 0
        identity = distributed.on_first_rank(lambda: self._open_folder(init))
        check_shared(run_dir / folder.RUN_FILE)
        self.saver = CheckpointSaver(
            run_dir,
            identity,
            self.model,
            self.tokenizer,
            profile.runtime,
            checkpoint,
            self._record_checkpoint,
        )
        position, tail = (
            (state["metrics_position"], state.get("metrics_tail", "")) if state else (0, "")
        )
        self.log = (
            MetricsLog(run_dir, position, self.counters["step"], tail.encode())
            if self.world.is_first
            else None
        )
        self._saved_position = position  # in the log, of the checkpoint that is being written

    def to_the_end(self) -> TrainResult:
        with StopRequest() as stop:
            return self._to_the_end(stop)

    def _to_the_end(self, stop: StopRequest) -> TrainResult:
        runtime, schedule = self.profile.runtime, self.profile.schedule
        self._tell(
            {
                "kind": "start",
                "step": self.counters["step"],
                "max_steps": schedule.max_steps,
                "run": self.run_dir.name,
                "runtime": self._described(),
            }
        )
        try:
            if self.counters["step"] > self.counters["first_step"]:
                self._finish_step()
            elif self._begins:
                self._evaluate()
            while self.counters["step"] < schedule.max_steps:
                stopping, saving = self._requests(stop)
                if saving:
                    self.saver.save(self.counters["step"], self._contents)
                try:
                    whole_step = not stopping and self._step(stop)
                except SourceBroke as broken:
                    reason = (
                        f"the data of step {self.counters['step'] + 1} could not be read ({broken})"
                    )
                    if self._begins and self.counters["step"] == self.counters["first_step"]:
                        stopped = TrainingStopped(
                            f"Training has not begun: {reason}. Another source takes another run"
                            " folder."
                        )
                    else:
                        stopped = self._stopped(reason)
                    raise stopped from broken.__cause__
                if not whole_step:
                    self._save_and_wait()
                    raise interrupted(self.counters["step"])
                step, is_last = self.counters["step"], self.counters["step"] == schedule.max_steps
                self._finish_step()
                if self.counters["skipped_in_a_row"] >= MOST_SKIPS_IN_A_ROW:
                    raise self._given_up()
                if (
                    step % runtime.checkpoint_every == 0
                    and not is_last
                    and not self._checkpoint_as_good_as_now()
                ):
                    self.saver.save(step, self._contents)
            checkpoint = self._save_and_wait()
            if any(self._requests(stop)[:1]):
                raise interrupted(self.counters["step"])
        except (TrainingStopped, CheckpointFailed):
            raise
        except Exception as error:  # whatever it is: hours of training are not to be lost with it
            self._save_what_is_whole(error)
            raise
        finally:
            self.saver.close()
            self.stream.close()
            if self.log is not None:
                self.log.close()
            self._tell(
                {"kind": "end", "step": self.counters["step"], "max_steps": schedule.max_steps}
            )
        return TrainResult(
            self.run_dir,
            checkpoint,
            self.counters["step"],
            self.losses["held_out_loss"],
            self.counters["seconds"],
        )

    def _parallel_model(self) -> distributed.ParallelModel:
        """The model, held as the profile says. FSDP2 shards it before it is moved, as it may be too
        large for one device.
        """
        runtime, blocks = self.profile.runtime, self.model.model.layers
        sharded = (
            distributed.ParallelModel(self.model, blocks, "fsdp")
            if runtime.parallel == "fsdp"
            else None
        )
        prepare_model(self.model, self.runtime)
        return sharded or distributed.ParallelModel(self.model, blocks, "ddp")

    def _open_folder(self, init: str | Path | None) -> str:
        if not self.lock.held:
            self.lock.acquire()
            if checkpoints.latest_checkpoint(self.run_dir):
                raise ValueError(
                    f"Another process has trained in {self.run_dir} meanwhile; train again to go on"
                    " from there."
                )
        return folder.write_run_file(
            self.run_dir, self.profile, init, self._described(), self.counters["step"]
        )

    def _described(self) -> str:
        ranks = (
            f" · {self.world.size} processes, {self.profile.runtime.parallel}"
            if self.world.size > 1
            else ""
        )
        return self.runtime.describe() + ranks

    def _requests(self, stop: StopRequest) -> tuple[bool, bool]:
        """Whether to stop, and whether to save now: what any rank was asked for by a signal, and
        rank 0 through the folder.
        """
        saving = self.world.is_first and self.saver.is_due(self.counters["step"])
        stopping, saving = distributed.sum_over_ranks([stop.requested, saving])
        return bool(stopping), bool(saving)

    def _step(self, stop: StopRequest) -> bool:
        """One optimizer step over all its micro-batches. False when a stop was requested before
        they were read and through.
        """
        began = time.perf_counter()
        # All micro-batches are divided by the labels of the whole step: a mean of means would weigh
        # short ones too high.
        with record_function("kl3m_nb data"):
            share = take_share(self.stream, self.profile.data, stop)
        if share is None:
            return False
        factor = lr_factor(
            self.counters["step"], self.profile.schedule, self.counters["first_step"]
        )
        for group in (*self.muon.param_groups, *self.aux.param_groups):
            group["lr"] = group["peak_lr"] * factor
        terms: dict[str, torch.Tensor] = {}
        for batch in share.micro_batches:
            if (
                stop.requested and self.world.size == 1
            ):  # several ranks have to agree first, which they do between steps
                self._zero_gradients()
                return False
            with self.parallel.averaging_gradients(now=batch is share.micro_batches[-1]):
                values = self._forward_backward(batch, share)
            for name, value in values.items():
                terms[name] = terms[name] + value if name in terms else value
        expert_counts = terms.pop("expert_counts")
        norm = global_norm(
            [
                distributed.local(parameter.grad)
                for parameter in self.parameters
                if parameter.grad is not None
            ]
        )
        # One transfer a step, after everything is queued: until here a GPU never waits for the
        # host, nor the host for it.
        *numbers, norm = torch.stack([*terms.values(), norm]).tolist()
        values = dict(zip(terms, distributed.sum_over_ranks(numbers), strict=True))
        with self._changing_weights():
            clipped = self.clip.clip_(
                self.parameters, distributed.whole_norm(norm, self.parameters), values["loss"]
            )
            if clipped.finite:
                with record_function("kl3m_nb optimizer"):
                    self.muon.step()
                    self.aux.step()
                bounds = self.muon.movement_bounds()
                self.clamp.note_movement(
                    {self.names[parameter]: bound for parameter, bound in bounds.items()}
                )
                self.first_bad = ""
            else:
                self._require_finite_weights()  # no later step could be finite
                self.first_bad = self.first_bad or why_not_finite(self.model)
            self._zero_gradients()
            seconds = time.perf_counter() - began
            counters = self.counters
            counters["step"] += 1
            counters["tokens"] += self.profile.tokens_per_step
            counters["valid_tokens"] += share.valid_tokens
            counters["seconds"] += seconds
            counters["skipped"] += not clipped.finite
            counters["skipped_in_a_row"] = 0 if clipped.finite else counters["skipped_in_a_row"] + 1
            counters["clipped_since_row"] += clipped.clipped
            self._stream_state = self.stream.state_dict()
        is_last = counters["step"] == self.profile.schedule.max_steps
        if counters["step"] % self.profile.runtime.log_every == 0 or is_last or not clipped.finite:
            self._record(
                {
                    "kind": "train",
                    **_progress(self.counters),
                    "valid_tokens": counters["valid_tokens"],
                    **values,
                    "lr_muon": self.profile.muon_lr * factor,
                    "lr_aux": self.profile.optimizer.aux_lr * factor,
                    "grad_norm": clipped.norm,
                    "clip_threshold": clipped.threshold,
                    "clipped": counters["clipped_since_row"],
                    "skipped": int(not clipped.finite),
                    "tokens_per_second": self.profile.tokens_per_step / seconds,
                    "epoch": self.stream.epoch,
                }
            )
            counters["clipped_since_row"] = 0
        if clipped.finite:
            self.losses["cross_entropy"] = values["cross_entropy"]
        if expert_counts.numel() and self._evaluates_after(counters["step"]):
            counts = torch.tensor(
                distributed.sum_over_ranks(expert_counts.flatten().tolist())
            ).view_as(expert_counts)
            self._record(
                {"kind": "experts", **_progress(self.counters), **experts.expert_columns(counts)}
            )
            self.idle_experts.warn(counts, counters["step"])
        return True

    @contextlib.contextmanager
    def _changing_weights(self) -> Iterator[None]:
        """What is in memory is no whole step until the block has ended; an error inside leaves it
        so.
        """
        self._is_whole = False
        yield
        self._is_whole = True

    def _save_what_is_whole(self, error: Exception) -> None:
        """Raises TrainingStopped from an unexpected `error` between two steps, once the last whole
        one is saved.

        Returns where there is nothing to save: the weights may be half changed, no step was trained
        yet, or the other processes do not know of the error and would not take part.
        """
        step, place = self.counters["step"], traceback.extract_tb(error.__traceback__)[-1]
        if not self._is_whole or step == self.counters["first_step"] or self.world.size > 1:
            return
        reason = (
            f"{type(error).__name__}: {str(error).rstrip('.')} ({Path(place.filename).name}, line"
            f" {place.lineno})"
        )
        try:
            stopped = self._stopped(reason)
        except CheckpointFailed as failed:
            stopped = TrainingStopped(f"Training has stopped: {reason}. {failed}")
        raise stopped from error

    def _stopped(self, reason: str) -> TrainingStopped:
        """The error to end with, once the last whole step is saved."""
        checkpoint = self._save_and_wait()
        return TrainingStopped(
            f"Training has stopped: {reason}. The last good state is in {checkpoint}; training"
            " again continues there."
        )

    def _given_up(self) -> TrainingStopped:
        """The error after too many bad steps in a row."""
        reason = (
            f"{self.counters['skipped_in_a_row']} steps in a row were not finite, first in"
            f" {self.first_bad}; see their data, or begin another run from a checkpoint of this one"
            " with a lower learning rate"
        )
        if newest := self._checkpoint_as_good_as_now():
            return TrainingStopped(
                f"Training has stopped: {reason}. Nothing has been learned since {newest}."
            )
        self.counters["skipped_in_a_row"] = 0  # training again gets as many tries
        return self._stopped(reason)

    def _checkpoint_as_good_as_now(self) -> Path | None:
        """The newest checkpoint, if every step since was skipped: another would only push out an
        earlier one.
        """
        step, skipped = self.counters["step"], self.counters["skipped_in_a_row"]
        newest = distributed.on_first_rank(lambda: self.saver.newest(step)) if skipped else None
        return newest if newest and checkpoints.checkpoint_step(newest) >= step - skipped else None

    def _forward_backward(self, batch: Batch, share: Share) -> dict[str, torch.Tensor]:
        """Adds the gradients of one micro-batch, returns its terms of the loss."""
        with record_function("kl3m_nb forward"), self.runtime.autocast():
            total, values = self.parallel(
                training_loss,
                self.model,
                batch.to(self.runtime.device),
                share.valid_tokens,
                share.routed_tokens,
                self.profile,
                self.runtime.recompute,
                self.runtime.compile_blocks,
            )
        with record_function("kl3m_nb backward"):
            (
                total * self.world.size
            ).backward()  # the mean over the ranks is then the sum of their parts
        return values

    def _finish_step(self) -> None:
        """The clamp and the evaluation that are due after the present step, unless the run was
        continued behind them.
        """
        step, every = self.counters["step"], self.profile.clamp.clamp_every
        if every and step % every == 0 and self.counters["clamped_step"] < step:
            self._clamp()
        if self._evaluates_after(step) and self.losses["held_out_step"] < step:
            self._evaluate()

    def _evaluates_after(self, step: int) -> bool:
        return (
            step % self.profile.runtime.eval_every == 0 or step == self.profile.schedule.max_steps
        )

    def _zero_gradients(self) -> None:
        self.muon.zero_grad(set_to_none=True)
        self.aux.zero_grad(set_to_none=True)

    def _require_finite_weights(self) -> None:
        """Ends the run when a weight is not finite, and saves nothing of it."""
        if bad := first_bad_weight(self.model):
            self.saver.close()
            earlier = distributed.on_first_rank(lambda: checkpoints.latest_checkpoint(self.run_dir))
            raise TrainingStopped(
                f"Training has stopped: the weight {bad} is not finite after step"
                f" {self.counters['step']}, so nothing is saved; "
                + (
                    f"training again continues from {earlier}."
                    if earlier
                    else "there is no checkpoint, lower the learning rate."
                )
            )

    def _clamp(self) -> None:
        began = time.perf_counter()
        with self._changing_weights(), record_function("kl3m_nb clamp"):
            events = self.clamp.clamp()
            self.counters["clamped_step"] = self.counters["step"]
        seconds = time.perf_counter() - began
        self.counters["seconds"] += seconds
        row = {
            "kind": "clamp",
            **_progress(self.counters),
            "clamp_seconds": seconds,
            **clamp_columns(events, self.rules),
        }
        self._record(row)
        self.conditions = ClampConditions.after(row)

    def _evaluate(self) -> None:
        precision = torch.bfloat16 if self.runtime.precision == "bfloat16" else None
        held_out = self.parallel.evaluate(
            scoring.held_out_loss, self.model, self.held_out, 8, precision
        )
        self.losses |= {"held_out_loss": held_out.loss, "held_out_step": self.counters["step"]}
        operations = run_flops(
            dataclasses.replace(self.profile, model=self.described.spec),
            self.counters["step"],
            self.counters["tokens"],
        )
        self._record(
            {
                "kind": "held_out",
                **_progress(self.counters),
                "flops": operations,
                "held_out_loss": held_out.loss,
                "held_out_entropy_bits": held_out.entropy_bits,
            }
        )

    def _save_and_wait(self) -> Path:
        """The checkpoint of the last whole step, with the stream as it was before the one that was
        not.
        """
        return self.saver.save_and_wait(self.counters["step"], self._contents)

    def _contents(self) -> tuple[dict, str]:
        """What a checkpoint holds beside the weights, and its card. Raises TrainingStopped when a
        weight is not finite.
        """
        self._require_finite_weights()
        self._keep_lock()
        self._saved_position = self.log.position if self.log else 0
        state = {
            "counters": dict(self.counters),
            "losses": dict(self.losses),
            "conditions": dataclasses.asdict(self.conditions),
            "stack": self.stack,
            "muon": self.muon.state_dict(),
            "aux": self.aux.state_dict(),
            "clip": self.clip.state_dict(),
            "clamp": self.clamp.state_dict(),
            "router_loss": experts.ROUTER_LOSS,
            "stream": self._stream_state,
            "random": random_state(),
            "metrics_position": self._saved_position,
            "metrics_tail": self.log.tail.decode() if self.log else "",
        }
        return state, card.model_card(self.profile, self._card_facts(), self.described)

    def _card_facts(self) -> card.CardFacts:
        counts = lineage.Counts(*(self.counters[key] for key in ("step", "tokens", "valid_tokens")))
        return card.CardFacts(
            counts=counts,
            init=folder.init_name(self.init),
            runtime=self._described(),
            **self.losses,
            conditions=self.conditions,
            stack=self.stack,
        )

    def _load_state(self, state: dict) -> None:
        # Earlier versions kept neither the steps of the last clamp and evaluation, which they had
        # always done, nor the stack.
        step = state["counters"]["step"]
        self.counters |= {"clamped_step": step} | state["counters"]
        self.losses |= {"held_out_step": step} | state.get("losses", {})
        self.conditions, self.stack = (
            ClampConditions.from_state(state["conditions"]),
            state.get("stack", {}),
        )
        distributed.load_optimizer_state(self.muon, state["muon"])
        distributed.load_optimizer_state(self.aux, state["aux"])
        self.clip.load_state_dict(state["clip"])
        experts.warn_of_another_loss(
            self.profile.model, state.get("router_loss"), self.counters["step"]
        )
        self.clamp.load_state_dict(state["clamp"])
        self.stream.load_state_dict(state["stream"])
        set_random_state(state["random"])

    def _record_checkpoint(self, counters: dict, waited_seconds: float) -> None:
        if self.log is not None:
            self.log.vouched(self._saved_position)
        self._record(
            {"kind": "checkpoint", **_progress(counters), "waited_seconds": waited_seconds}
        )

    def _record(self, row: dict) -> None:
        self._keep_lock()
        if self.log is not None:
            self.log.append(row)
        self._tell(row)

    def _keep_lock(self) -> None:
        """Raises TrainingStopped when another process has the run folder, because somebody removed
        this one's lock.
        """
        try:
            self.lock.keep()
        except RunIsBusy as busy:
            if self.log is not None:
                self.log.abandon()
                self.log = None
            raise TrainingStopped(
                f"Training has stopped after step {self.counters['step']}, and this process writes"
                f" no more: its lock was removed, and another process goes on with the run. {busy}"
            ) from busy

    def _tell(self, row: Mapping) -> None:
        if self.world.is_first:
            tell(self.callbacks, row)


def _progress(counters: Mapping) -> dict:
    return {key: counters[key] for key in ("step", "tokens", "seconds")}
