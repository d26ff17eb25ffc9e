"""What a run continues from: its newest sound checkpoint, the state of the random generators, the
starting model.

Weights and gradients that are not finite are found here by name, before a checkpoint is kept or
when a step cannot be used.
"""

from __future__ import annotations

import os
import random
import socket
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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

SEEN_SECONDS = 60  # so long a network file system may show one machine what another has written


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `train` returns. `held_out_loss` is in nats per token, on the fixed
    held-out windows.
    """

    run_dir: Path
    checkpoint: Path
    step: int
    held_out_loss: float
    seconds: (
        float  # spent in training steps over the whole run, evaluations and checkpoints not counted
    )


def check_start(profile: Profile, run_dir: Path, init: str | Path | None) -> None:
    """Refuses what `train` with these arguments would refuse, as far as that shows without loading
    weights or text, downloading or writing.

    A run that has begun needs neither its start nor the named tokenizer any more. Raises ValueError
    or FileNotFoundError.
    """
    init = paths.located(init) if init else None
    folder.check_run_folder(run_dir, profile, init)
    corpus.check_source(profile.data.source)
    if (run_dir / folder.RUN_FILE).exists():
        return
    if init and not os.path.exists(paths.find(init)) and not paths.is_hub_id(init):
        raise ValueError(
            f"There is no checkpoint {init} to begin with; make or name one, or begin with random"
            " weights (init random)."
        )
    decoder.profile_of_start(profile, init)
    check_tokenizer(profile.data, profile.model.vocabulary)


def find_checkpoint(
    run_dir: Path, profile: Profile, init: str | Path | None, resume: str, lock: RunLock
) -> Path | None:
    """The checkpoint to go on from. A folder with work to do is locked; damaged checkpoints are set
    aside.

    Warns of a run that is to end before its warmup.
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
    if not run_dir.exists():
        return None  # made, and locked, once the pieces are known to fit
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
    """Raises ValueError, on all ranks, when one does not see rank 0's `file` of the run folder as
    it is.

    From another machine's disk it could not go on with the run, today or after the next stop.
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
    try:
        return file.read_bytes() == content
    except OSError:
        return False


def starting_model(
    start: str | Path | None, profile: Profile, tokenizer: PreTrainedTokenizerBase, attention: str
) -> PreTrainedModel:
    """The model of the checkpoint `start`, or one with random weights when None, with the special
    ids of `tokenizer`.

    Raises ValueError where `profile` asks for another, or the tokenizer names no end-of-text token.
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
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().flatten().view(torch.uint8).numpy(), checksum)
    return checksum


def is_complete(run_dir: Path, checkpoint: Path, profile: Profile) -> bool:
    """Whether nothing of the run is left to do; an error may have kept it from its
    last evaluation.
    """
    step, evaluated = checkpoints.checkpoint_step(checkpoint), read_metrics(run_dir, "held_out")
    return step >= profile.schedule.max_steps and (
        evaluated.empty or evaluated.step.iloc[-1] >= step
    )


def finished_result(run_dir: Path, checkpoint: Path) -> TrainResult:
    """The result of a run that is complete with `checkpoint`, from what it logged."""
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
    """The name of the first weight that is not finite on any rank, the same on all; None when every
    weight is.

    Then it costs one reduction over the model and one number read back from the device.
    """
    norm = global_norm([distributed.local(parameter.detach()) for parameter in model.parameters()])
    if not any(distributed.sum_over_ranks([not torch.isfinite(norm)])):
        return None
    bad = _first({name: parameter.detach() for name, parameter in model.named_parameters()})
    return next(filter(None, distributed.gather(bad)), None)


def why_not_finite(model: nn.Module) -> str:
    """Where a step went wrong, in words: the first gradient that is not finite, else the loss. All
    ranks have to call.
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
    return next(
        (
            name
            for name, tensor in tensors.items()
            if not torch.isfinite(distributed.whole(tensor)).all()
        ),
        None,
    )


def random_state() -> dict:
    """Of Python, numpy, torch and this process's GPU: numbers, lists and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict) -> None:
    """Inverse of `random_state`; a GPU's part is passed over on a machine without one."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
