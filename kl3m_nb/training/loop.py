"""The training loop: one optimizer step after another, logged, evaluated, clamped, checkpointed,
and resumable at any step.

`train` is what notebooks and the shell call. It knows no plot and no widget: callbacks get the same
rows that go to metrics.jsonl. An interrupt (Ctrl-C, the notebook's stop button, SIGTERM) ends the
current micro-batch, saves a checkpoint of the last whole step and then raises KeyboardInterrupt;
calling `train` again continues with the very next token. Under torchrun all ranks call it alike:
rank 0 logs and saves, and what one rank is asked for is agreed on between two steps.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import record_function
from transformers import PreTrainedTokenizerBase

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
from kl3m_nb.optim.schedule import AdaptiveClip, ClipOutcome, global_norm, lr_factor
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
    starting_model,
    why_not_finite,
)
from kl3m_nb.training.state import Counters, Losses, TrainingState

# Our choice: one bad batch is skipped, ten in a row are a fault that no later batch will mend.
MAX_SKIPS_IN_A_ROW = 10
# Our choice, in windows; it bounds the memory of an evaluation.
EVALUATION_BATCH = 8


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
        return Trainer(profile, run_dir, init, checkpoint, list(callbacks), lock).train()


@dataclass(frozen=True)
class _Gradients:
    """What forward and backward of one step have found; the gradients lie in the parameters."""

    norm: float  # 2-norm over all parameters and ranks, before the clip
    values: dict[str, float]  # the terms of the loss over the whole step, in nats per token
    expert_counts: torch.Tensor  # this rank's choices by layer and expert; empty without experts
    lr_factor: float  # of the peak learning rates


class Trainer:
    """Trains one run of `profile` in `run_dir`; `train` is what makes one and calls it.

    The constructor puts the pieces together: data, model, `state` (a `TrainingState`), run folder.
    It goes on from `checkpoint`, one of this run, or starts from `init`, or from random weights
    where both are None. `lock` is the lock of the run folder. `Trainer.train` trains to the end;
    `Trainer.step` does one optimizer step and all that is due after it. Under torchrun every rank
    has its own Trainer, and all call the same methods in the same order.

    Raises ValueError before anything is written when the pieces do not fit.
    """

    def __init__(
        self,
        profile: Profile,
        run_dir: Path,
        init: str | Path | None,
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

        # The data, then the model, then what trains it.
        self.tokenizer = self._read_tokenizer(checkpoint)
        stream = PrefetchedStream(
            open_stream(profile.data, self.tokenizer), profile.runtime.prefetch_batches
        )
        self.held_out = held_out_windows(profile.data, self.tokenizer)
        start = checkpoint or init
        self.model = starting_model(start, profile, self.tokenizer, self.runtime.attention)
        self.described = card.model_facts(self.model, self.tokenizer)
        self.parallel = self._parallel_model()
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.rules = role_table(self.model, profile)
        muon, aux = build_optimizers(self.model, self.rules, profile)
        clamp = SpectralClamp(clamp_targets(self.model, self.rules, profile))

        # The state, of the start or of the checkpoint.
        self.state = TrainingState(
            counters=Counters.carried_on(carried),
            losses=Losses(held_out_step=carried.step),
            stack={} if checkpoint else carried_stack(init, profile),
            muon=muon,
            aux=aux,
            clip=AdaptiveClip(profile.schedule),
            clamp=clamp,
            stream=stream,
        )
        if checkpoint:
            self._continue(checkpoint)
        if bad := first_bad_weight(self.model):
            raise ValueError(
                f"The weight {bad} of {start or 'the new model'} is not finite; start from an"
                " earlier checkpoint."
            )
        # Nothing is logged yet: neither is the evaluation of the start.
        self.begins = self.state.metrics_position == 0
        self.idle_experts = experts.IdleExperts()
        self.first_bad = ""  # what was not finite at the first of the present row of skipped steps

        # The run folder, once all is known to fit.
        identity = distributed.on_first_rank(self._open_folder)
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
        self.log = self._open_log() if self.world.is_first else None

    def train(self) -> TrainResult:
        """Trains from where the run stands to `max_steps` and returns the result. Raises as the
        function `train` does.
        """
        with StopRequest() as stop:
            self._tell_bounds("start", run=self.run_dir.name, runtime=self._described())
            try:
                self._catch_up()
                while self.state.counters.step < self.profile.schedule.max_steps:
                    if self._is_asked_to_stop(stop) or not self.step(stop):
                        self._save_and_wait()
                        raise interrupted(self.state.counters.step)
                checkpoint = self._save_and_wait()
                if any(self._requests(stop)[:1]):
                    raise interrupted(self.state.counters.step)
            except (TrainingStopped, CheckpointFailed):
                raise
            except Exception as error:  # whatever it is: hours of training are not to be lost
                self._save_what_is_whole(error)
                raise
            finally:
                self._close()
        counters, losses = self.state.counters, self.state.losses
        return TrainResult(
            self.run_dir, checkpoint, counters.step, losses.held_out_loss, counters.seconds
        )

    def step(self, stop: StopRequest) -> bool:
        """Does one optimizer step over all its micro-batches, and the clamp, evaluation and
        checkpoint that are due after it.

        Returns False when a stop was requested before the micro-batches were read and through; the
        weights and the state are then those of the step before.
        """
        began = time.perf_counter()
        share = self._take(stop)
        gradients = self._forward_and_backward(share, stop) if share else None
        if share is None or gradients is None:
            return False
        with self.state.changing_weights():
            clipped = self._clip(gradients)
            self._update(clipped)
            seconds = self._count(share, clipped, began)
        self._log_step(gradients, clipped, seconds)
        self._clamp_when_due()
        self._evaluate_when_due()
        self._give_up_when_stuck()
        self._save_when_due()
        return True

    # The parts of the constructor.

    def _read_tokenizer(self, checkpoint: Path | None) -> PreTrainedTokenizerBase:
        """Reads the tokenizer of `checkpoint`, else the one that the profile names.

        Text that was added to the source since would give another tokenizer, or the named one may
        be gone.
        """
        if checkpoint:
            return read_tokenizer(str(checkpoint))
        data, model = self.profile.data, self.profile.model
        return load_tokenizer(data.tokenizer, data.source, model.vocabulary)

    def _parallel_model(self) -> distributed.ParallelModel:
        """Holds the model as the profile says. FSDP2 shards it before it is moved, as it may be too
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

    def _continue(self, checkpoint: Path) -> None:
        """Loads the state of `checkpoint`; warns where its routers had another loss."""
        saved = checkpoints.load_state(checkpoint)
        experts.warn_of_another_loss(
            self.profile.model, saved.get("router_loss"), saved["counters"]["step"]
        )
        self.state.load_state_dict(saved)

    def _open_folder(self) -> str:
        """Locks the run folder where that is not done yet, and returns the identity of the run."""
        if not self.lock.held:
            self.lock.acquire()
            if checkpoints.latest_checkpoint(self.run_dir):
                raise ValueError(
                    f"Another process has trained in {self.run_dir} meanwhile; train again to go on"
                    " from there."
                )
        return folder.write_run_file(
            self.run_dir, self.profile, self.init, self._described(), self.state.counters.step
        )

    def _open_log(self) -> MetricsLog:
        """Opens metrics.jsonl and cuts it back to where the state stands."""
        state = self.state
        return MetricsLog(
            self.run_dir, state.metrics_position, state.counters.step, state.metrics_tail.encode()
        )

    def _described(self) -> str:
        """Returns device, precision and processes in words."""
        ranks = (
            f" · {self.world.size} processes, {self.profile.runtime.parallel}"
            if self.world.size > 1
            else ""
        )
        return self.runtime.describe() + ranks

    # Before the first step, between two steps, and at the end.

    def _catch_up(self) -> None:
        """Evaluates the start of a new run, or does what the last step of a continued run still
        lacks.
        """
        if self.state.counters.step > self.state.counters.first_step:
            self._clamp_when_due()
            self._evaluate_when_due()
        elif self.begins:
            self._evaluate()

    def _is_asked_to_stop(self, stop: StopRequest) -> bool:
        """Returns whether to stop; saves when a checkpoint was asked for."""
        stopping, saving = self._requests(stop)
        if saving:
            self.saver.save(self.state.counters.step, self._contents)
        return stopping

    def _requests(self, stop: StopRequest) -> tuple[bool, bool]:
        """Returns whether to stop, and whether to save now: what any rank was asked for by a
        signal, and rank 0 through the folder.
        """
        saving = self.world.is_first and self.saver.is_due(self.state.counters.step)
        stopping, saving = distributed.sum_over_ranks([stop.requested, saving])
        return bool(stopping), bool(saving)

    def _close(self) -> None:
        """Ends the threads and the log."""
        self.saver.close()
        self.state.stream.close()
        if self.log is not None:
            self.log.close()
        self._tell_bounds("end")

    # The parts of a step, in their order.

    def _take(self, stop: StopRequest) -> Share | None:
        """Takes this rank's micro-batches of the next step; None when a stop was requested before
        they came. Raises TrainingStopped when the data break off.
        """
        try:
            with record_function("kl3m_nb data"):
                return take_share(self.state.stream, self.profile.data, stop)
        except SourceBroke as broken:
            counters = self.state.counters
            reason = f"the data of step {counters.step + 1} could not be read ({broken})"
            if self.begins and counters.step == counters.first_step:
                stopped = TrainingStopped(
                    f"Training has not begun: {reason}. Another source takes another run folder."
                )
            else:
                stopped = self._stopped(reason)
            raise stopped from broken.__cause__

    def _forward_and_backward(self, share: Share, stop: StopRequest) -> _Gradients | None:
        """Adds up the gradients of all micro-batches; None when a stop was requested meanwhile.

        All micro-batches are divided by the labels of the whole step: a mean of means would weigh
        short ones too high.
        """
        factor = self._set_learning_rates()
        terms: dict[str, torch.Tensor] = {}
        for batch in share.micro_batches:
            # Several ranks have to agree first, which they do between steps.
            if stop.requested and self.world.size == 1:
                self._zero_gradients()
                return None
            with self.parallel.averaging_gradients(now=batch is share.micro_batches[-1]):
                values = self._forward_backward(batch, share)
            for name, value in values.items():
                terms[name] = terms[name] + value if name in terms else value
        expert_counts = terms.pop("expert_counts")
        gradients = [
            distributed.local(parameter.grad)
            for parameter in self.names
            if parameter.grad is not None
        ]
        # One transfer a step, after everything is queued: until here a GPU never waits for the
        # host, nor the host for it.
        *numbers, norm = torch.stack([*terms.values(), global_norm(gradients)]).tolist()
        sums = dict(zip(terms, distributed.sum_over_ranks(numbers), strict=True))
        norm = distributed.whole_norm(norm, list(self.names))
        return _Gradients(norm, sums, expert_counts, factor)

    def _set_learning_rates(self) -> float:
        """Sets the learning rates of the next step and returns their factor of the peak rates."""
        counters = self.state.counters
        factor = lr_factor(counters.step, self.profile.schedule, counters.first_step)
        for group in (*self.state.muon.param_groups, *self.state.aux.param_groups):
            group["lr"] = group["peak_lr"] * factor
        return factor

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
            # The mean over the ranks is then the sum of their parts.
            (total * self.world.size).backward()
        return values

    def _clip(self, gradients: _Gradients) -> ClipOutcome:
        """Clips the gradients to the threshold of the profile's clip."""
        return self.state.clip.clip_(self.names, gradients.norm, gradients.values["loss"])

    def _update(self, clipped: ClipOutcome) -> None:
        """Changes the weights, unless the step is to be skipped, and drops the gradients. Raises
        TrainingStopped when a weight is not finite.
        """
        if clipped.finite:
            with record_function("kl3m_nb optimizer"):
                self.state.muon.step()
                self.state.aux.step()
            bounds = self.state.muon.movement_bounds()
            self.state.clamp.note_movement(
                {self.names[parameter]: bound for parameter, bound in bounds.items()}
            )
            self.first_bad = ""
        else:
            self._require_finite_weights()  # no later step could be finite
            self.first_bad = self.first_bad or why_not_finite(self.model)
        self._zero_gradients()

    def _count(self, share: Share, clipped: ClipOutcome, began: float) -> float:
        """Counts the step as done, notes where the stream stands, and returns the step's
        seconds.
        """
        seconds = time.perf_counter() - began
        self.state.counters.add_step(
            self.profile.tokens_per_step, share.valid_tokens, seconds, clipped
        )
        self.state.note_stream()
        return seconds

    def _log_step(self, gradients: _Gradients, clipped: ClipOutcome, seconds: float) -> None:
        """Logs the step when its row is due or it was skipped, and the experts' shares with each
        evaluation.
        """
        state, counters, schedule = self.state, self.state.counters, self.profile.schedule
        is_due = counters.step % self.profile.runtime.log_every == 0
        if is_due or counters.step == schedule.max_steps or not clipped.finite:
            row = {
                "valid_tokens": counters.valid_tokens,
                **gradients.values,
                "lr_muon": self.profile.muon_lr * gradients.lr_factor,
                "lr_aux": self.profile.optimizer.aux_lr * gradients.lr_factor,
                "grad_norm": clipped.norm,
                "clip_threshold": clipped.threshold,
                "clipped": counters.clipped_since_row,
                "skipped": int(not clipped.finite),
                "tokens_per_second": self.profile.tokens_per_step / seconds,
                "epoch": state.stream.epoch,
            }
            self._record("train", row)
            counters.clipped_since_row = 0
        if clipped.finite:
            state.losses.cross_entropy = gradients.values["cross_entropy"]
        if gradients.expert_counts.numel() and self._evaluates_after(counters.step):
            self._log_experts(gradients.expert_counts)

    def _log_experts(self, expert_counts: torch.Tensor) -> None:
        """Logs how often all ranks chose each expert, and warns of idle ones."""
        counts = torch.tensor(distributed.sum_over_ranks(expert_counts.flatten().tolist())).view_as(
            expert_counts
        )
        self._record("experts", experts.expert_columns(counts))
        self.idle_experts.warn(counts, self.state.counters.step)

    def _clamp_when_due(self) -> None:
        """Clamps after the present step when that is due, and not done before the run was
        continued.
        """
        counters, every = self.state.counters, self.profile.clamp.clamp_every
        if every and counters.step % every == 0 and counters.clamped_step < counters.step:
            self._clamp()

    def _clamp(self) -> None:
        """Clamps the spectra and logs what was found."""
        state, began = self.state, time.perf_counter()
        with state.changing_weights(), record_function("kl3m_nb clamp"):
            events = state.clamp.clamp()
            state.counters.clamped_step = state.counters.step
        seconds = time.perf_counter() - began
        state.counters.seconds += seconds
        columns = clamp_columns(events, self.rules)
        self._record("clamp", {"clamp_seconds": seconds, **columns})
        state.conditions = ClampConditions.after({"step": state.counters.step, **columns})

    def _evaluate_when_due(self) -> None:
        """Evaluates after the present step when that is due, and not done before the run was
        continued.
        """
        step = self.state.counters.step
        if self._evaluates_after(step) and self.state.losses.held_out_step < step:
            self._evaluate()

    def _evaluates_after(self, step: int) -> bool:
        """Returns whether an evaluation is due after `step`."""
        return (
            step % self.profile.runtime.eval_every == 0 or step == self.profile.schedule.max_steps
        )

    def _evaluate(self) -> None:
        """Measures and logs the loss on the held-out windows."""
        state, counters = self.state, self.state.counters
        precision = torch.bfloat16 if self.runtime.precision == "bfloat16" else None
        held_out = self.parallel.evaluate(
            scoring.held_out_loss, self.model, self.held_out, EVALUATION_BATCH, precision
        )
        state.losses.held_out_loss, state.losses.held_out_step = held_out.loss, counters.step
        trained = dataclasses.replace(self.profile, model=self.described.spec)
        row = {
            "flops": run_flops(trained, counters.step, counters.tokens),
            "held_out_loss": held_out.loss,
            "held_out_entropy_bits": held_out.entropy_bits,
        }
        self._record("held_out", row)

    def _give_up_when_stuck(self) -> None:
        """Raises TrainingStopped after too many skipped steps in a row."""
        counters = self.state.counters
        if counters.skipped_in_a_row < MAX_SKIPS_IN_A_ROW:
            return
        reason = (
            f"{counters.skipped_in_a_row} steps in a row were not finite, first in"
            f" {self.first_bad}; see their data, or begin another run from a checkpoint of this one"
            " with a lower learning rate"
        )
        if newest := self._checkpoint_as_good_as_now():
            raise TrainingStopped(
                f"Training has stopped: {reason}. Nothing has been learned since {newest}."
            )
        counters.skipped_in_a_row = 0  # training again gets as many tries
        raise self._stopped(reason)

    def _save_when_due(self) -> None:
        """Begins the checkpoint that is due after the present step; the last one is for `train`."""
        step = self.state.counters.step
        if (
            step % self.profile.runtime.checkpoint_every == 0
            and step != self.profile.schedule.max_steps
            and not self._checkpoint_as_good_as_now()
        ):
            self.saver.save(step, self._contents)

    def _zero_gradients(self) -> None:
        self.state.muon.zero_grad(set_to_none=True)
        self.state.aux.zero_grad(set_to_none=True)

    def _require_finite_weights(self) -> None:
        """Ends the run when a weight is not finite, and saves nothing of it."""
        if bad := first_bad_weight(self.model):
            self.saver.close()
            earlier = distributed.on_first_rank(lambda: checkpoints.latest_checkpoint(self.run_dir))
            raise TrainingStopped(
                f"Training has stopped: the weight {bad} is not finite after step"
                f" {self.state.counters.step}, so nothing is saved; "
                + (
                    f"training again continues from {earlier}."
                    if earlier
                    else "there is no checkpoint, lower the learning rate."
                )
            )

    # Checkpoints, and errors that end with one.

    def _save_what_is_whole(self, error: Exception) -> None:
        """Raises TrainingStopped from an unexpected `error` between two steps, once the last whole
        one is saved.

        Returns where there is nothing to save: the weights may be half changed, no step was trained
        yet, or the other processes do not know of the error and would not take part.
        """
        counters, place = self.state.counters, traceback.extract_tb(error.__traceback__)[-1]
        is_untrained = counters.step == counters.first_step
        if not self.state.is_whole or is_untrained or self.world.size > 1:
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
        """Saves the last whole step and returns the error to end with."""
        checkpoint = self._save_and_wait()
        return TrainingStopped(
            f"Training has stopped: {reason}. The last good state is in {checkpoint}; training"
            " again continues there."
        )

    def _checkpoint_as_good_as_now(self) -> Path | None:
        """Returns the newest checkpoint if every step since was skipped: another would only push
        out an earlier one.
        """
        step, skipped = self.state.counters.step, self.state.counters.skipped_in_a_row
        newest = distributed.on_first_rank(lambda: self.saver.newest(step)) if skipped else None
        return newest if newest and checkpoints.checkpoint_step(newest) >= step - skipped else None

    def _save_and_wait(self) -> Path:
        """Saves the last whole step, with the stream as it was before the one that was not, and
        returns the checkpoint.
        """
        return self.saver.save_and_wait(self.state.counters.step, self._contents)

    def _contents(self) -> tuple[dict, str]:
        """Returns what a checkpoint holds beside the weights, and its card. Raises TrainingStopped
        when a weight is not finite.
        """
        self._require_finite_weights()
        self._keep_lock()
        if self.log is not None:
            self.state.note_metrics(self.log)
        return self.state.state_dict(), card.model_card(
            self.profile, self._card_facts(), self.described
        )

    def _card_facts(self) -> card.CardFacts:
        """Returns what the card says of the run."""
        counters = self.state.counters
        return card.CardFacts(
            counts=lineage.Counts(counters.step, counters.tokens, counters.valid_tokens),
            init=folder.init_name(self.init),
            runtime=self._described(),
            **dataclasses.asdict(self.state.losses),
            conditions=self.state.conditions,
            stack=self.state.stack,
        )

    # Rows.

    def _record_checkpoint(self, counters: dict, waited_seconds: float) -> None:
        """Logs a checkpoint that is on the disk, with the `counters` in it."""
        if self.log is not None:
            self.log.vouched(self.state.metrics_position)
        progress = Counters(**counters).progress()
        self._write({"kind": "checkpoint", **progress, "waited_seconds": waited_seconds})

    def _record(self, kind: str, columns: Mapping) -> None:
        """Logs `columns` of the present step."""
        self._write({"kind": kind, **self.state.counters.progress(), **columns})

    def _write(self, row: Mapping) -> None:
        """Appends `row` to the log and gives it to the callbacks."""
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
                f"Training has stopped after step {self.state.counters.step}, and this process"
                f" writes no more: its lock was removed, and another process goes on with the run."
                f" {busy}"
            ) from busy

    def _tell_bounds(self, kind: str, **more: str) -> None:
        """Tells the callbacks where the run stands at its `start` or `end`; the log has no such
        rows.
        """
        step, max_steps = self.state.counters.step, self.profile.schedule.max_steps
        self._tell({"kind": kind, "step": step, "max_steps": max_steps, **more})

    def _tell(self, row: Mapping) -> None:
        if self.world.is_first:
            tell(self.callbacks, row)
