"""What a run continues from: its newest sound checkpoint, or the model it starts with.

Two functions name a weight or a gradient that is not finite: `first_bad_weight` before a checkpoint
is kept, `why_not_finite` when a step cannot be used.
"""

from __future__ import annotations

import socket
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.common import distributed, paths
from kl3m_nb.data import corpus
from kl3m_nb.data.special_ids import adopt_special_ids, check_tokenizer, special_ids
from kl3m_nb.data.tokenizer import check_same_entries
from kl3m_nb.model import decoder
from kl3m_nb.optim.schedule import global_norm
from kl3m_nb.profiles import Profile, warmup_remark
from kl3m_nb.runs import checkpoints, folder
from kl3m_nb.runs.folder import RunLock
from kl3m_nb.runs.metrics import FILE_NAME, read_metrics

# A file that one machine wrote may show late on another. By default NFS caches attributes for up
# to 60 s (acregmax and acdirmax in nfs(5)).
SEEN_SECONDS = 60


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `train` returns.

    `held_out_loss` is in nats per token, on the fixed held-out windows. `seconds` were spent in
    training steps and clamps over the whole run; evaluations and checkpoints are not counted.
    """

    run_dir: Path
    checkpoint: Path
    step: int
    held_out_loss: float
    seconds: float


def check_start(profile: Profile, run_dir: Path, init: str | Path | None) -> None:
    """Refuses what `train` with these arguments would refuse, as far as that shows without loading
    weights or text, downloading or writing.

    A run that has begun needs neither its start nor the named tokenizer any more. Raises ValueError
    or FileNotFoundError.
    """
    place = paths.checkpoint_place(init) if init else None
    init = place.name if place else None
    folder.check_run_folder(run_dir, profile, init)
    corpus.check_source(profile.data.source)
    if (run_dir / folder.RUN_FILE).exists():
        return
    if place and place.kind == "nothing":
        raise ValueError(
            f"There is no checkpoint {init} to begin with; make or name one, or begin with random"
            " weights (init random)."
        )
    decoder.profile_of_start(profile, init)
    check_tokenizer(profile.data, profile.model.vocabulary)


def find_checkpoint(
    run_dir: Path, profile: Profile, init: str | Path | None, resume: str, lock: RunLock
) -> Path | None:
    """Returns the checkpoint to go on from; None when the run begins.

    Locks a run folder that exists, unless the run is complete, and sets damaged checkpoints aside
    with a warning. Warns when the run will end before its warmup does. Raises ValueError when the
    folder belongs to another run, has lost its checkpoints or holds no sound one.
    """
    folder.check_run_folder(run_dir, profile, init)
    newest, identity = checkpoints.latest_checkpoint(run_dir), folder.run_identity(run_dir)
    if not folder.has_checkpoints(run_dir) and len(saved := read_metrics(run_dir, "checkpoint")):
        raise ValueError(
            f"The run {run_dir} has saved step {saved.step.max()} and no checkpoint is there any"
            f" more; put its checkpoints back, or move {run_dir / FILE_NAME} away to start over."
        )
    if newest is None and init is not None:
        checkpoints.check_sound(paths.checkpoint_place(init).path)
    if newest and resume == "never":
        raise ValueError(
            f"The run folder {run_dir} already holds {newest.name}; use resume='auto' or another"
            " folder."
        )
    if (
        newest
        and is_complete(run_dir, newest, profile)
        and not checkpoints.flaw_of(newest, identity)
    ):
        return newest
    if remark := warmup_remark(profile.schedule):
        warnings.warn(remark, stacklevel=2)
    # A new folder is made and locked later, once the pieces are known to fit.
    if not run_dir.exists():
        return None
    lock.acquire()
    checkpoints.remove_leftovers(run_dir)
    checkpoint, flaws = checkpoints.newest_sound_checkpoint(run_dir, identity)
    if flaws and checkpoint is None:
        raise ValueError(
            f"No checkpoint of {run_dir} can be loaded ({'; '.join(flaws.values())}); "
            "put a whole one there, or move these away to start over."
        )
    for path, flaw in flaws.items():
        warnings.warn(
            f"{flaw}; it is passed over and kept as {checkpoints.set_aside(path).name}.",
            stacklevel=2,
        )
    return checkpoint


def check_shared(file: Path) -> None:
    """Raises ValueError on all ranks when one of them does not see `file` as rank 0 does.

    `file` lies in the run folder. A rank that sees another disk could not go on with the run, now
    or after the next stop.
    """
    content = distributed.on_first_rank(lambda: (file, file.read_bytes()))
    deadline = time.monotonic() + SEEN_SECONDS
    while not (seen := _reads(*content)) and time.monotonic() < deadline:
        time.sleep(1)
    for rank, (sees, host) in enumerate(distributed.gather((seen, socket.gethostname()))):
        if not sees:
            raise ValueError(
                f"Process {rank} on {host} does not see {content[0]} as process 0 does; "
                "put the run folder where all machines have it under the same path."
            )


def _reads(file: Path, content: bytes) -> bool:
    """Returns whether `file` can be read here and holds `content`."""
    try:
        return file.read_bytes() == content
    except OSError:
        return False


def starting_model(
    start: str | Path | None, profile: Profile, tokenizer: PreTrainedTokenizerBase, attention: str
) -> PreTrainedModel:
    """Returns the model of the checkpoint `start`, with the special ids of `tokenizer`. Without a
    `start` its weights are random.

    Raises ValueError when `profile` describes another model, or the tokenizer names no end-of-text
    token.
    """
    if start is None:
        model = decoder.build_model(profile, attention=attention, special=special_ids(tokenizer))
        adopt_special_ids(model, tokenizer)
        return model
    model = decoder.load_model(start, attention=attention)
    decoder.check_fits(model.config.to_dict(), profile, start)
    check_same_entries(tokenizer, start)
    adopt_special_ids(model, tokenizer)
    if profile.model.experts:  # what it is trained with
        model.config.router_aux_loss_coef = profile.model.router_aux_loss
    if distributed.world().size > 1:  # FSDP2 would make one model of the shards of several
        distributed.check_alike({f"the checksum of the weights in {start}": _checksum(model)})
    return model


def _checksum(model: PreTrainedModel) -> int:
    """Returns the CRC-32 of all weights, in their order."""
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().flatten().view(torch.uint8).numpy(), checksum)
    return checksum


def is_complete(run_dir: Path, checkpoint: Path, profile: Profile) -> bool:
    """Returns whether nothing of the run is left to do. The last evaluation is still to do when an
    error came before it.
    """
    step, evaluated = checkpoints.checkpoint_step(checkpoint), read_metrics(run_dir, "held_out")
    return step >= profile.schedule.max_steps and (
        evaluated.empty or evaluated.step.iloc[-1] >= step
    )


def finished_result(run_dir: Path, checkpoint: Path) -> TrainResult:
    """Returns the result of a complete run from its log; `checkpoint` is its last."""
    rows = read_metrics(run_dir, "held_out")
    loss, seconds = (
        (rows.held_out_loss.iloc[-1], rows.seconds.iloc[-1])
        if len(rows)
        else (float("nan"), float("nan"))
    )
    return TrainResult(
        run_dir, checkpoint, checkpoints.checkpoint_step(checkpoint), float(loss), float(seconds)
    )


def first_bad_weight(model: nn.Module) -> str | None:
    """Returns the name of the first weight that is not finite on any rank, the same on all ranks;
    None when every weight is finite.

    A model that is finite costs one reduction over its weights and one number read back from the
    device.
    """
    norm = global_norm([distributed.local(parameter.detach()) for parameter in model.parameters()])
    if not any(distributed.sum_over_ranks([not torch.isfinite(norm)])):
        return None
    bad = _first({name: parameter.detach() for name, parameter in model.named_parameters()})
    return next(filter(None, distributed.gather(bad)), None)


def why_not_finite(model: nn.Module) -> str:
    """Says where a step went wrong: in the first gradient that is not finite, else in the loss. All
    ranks must call it.
    """
    bad = _first(
        {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    )
    return f"the gradient of {bad}" if bad else "the loss"


def _first(tensors: dict[str, torch.Tensor]) -> str | None:
    """Returns the first name whose tensor is not finite."""
    return next(
        (
            name
            for name, tensor in tensors.items()
            if not torch.isfinite(distributed.whole(tensor)).all()
        ),
        None,
    )
