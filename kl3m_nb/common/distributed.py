"""Several processes, one run: ranks, sums over them, work shared out among them, and the model as
DDP or FSDP2 holds it.

Everything is torch.distributed under torchrun; without torchrun there is one rank and every
function here is the identity. Small things (counts, flags, certificates) travel as CPU tensors over
gloo, gradients and weights on a GPU over NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

# A rank that dies is noticed at once: gloo and torchrun see its connections close. This bounds the
# wait for one that hangs, and must outlast what rank 0 does alone, such as writing the last
# checkpoint.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one rank that logs, saves and talks."""
        return self.rank == 0


def world() -> World:
    """The ranks of the run this process belongs to; one without torchrun."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


@contextlib.contextmanager
def process_group() -> Iterator[World]:
    """Joins the ranks that torchrun has started; does nothing elsewhere, or when they are joined
    already.

    What DDP or FSDP2 holds has to be out of scope at the end of the with block.
    """
    if not is_under_torchrun() or dist.is_initialized():
        yield world()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_own_gpu())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    dist.init_process_group(
        backend,
        store=_of_this_attempt(store),
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    yield world()  # after an error nothing more is asked of the peers, which may be dead
    # a DDP reducer that outlives the group frees it while it holds the GIL, and gloo's threads then
    # wait for ever
    gc.collect()
    dist.destroy_process_group()


def _own_gpu() -> int:
    """The number of this process's GPU. Raises ValueError when torchrun has started more processes
    here than there are GPUs.
    """
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(
            f"torchrun has started {os.environ['LOCAL_WORLD_SIZE']} processes on"
            f" {socket.gethostname()}, where {gpus} GPUs are seen; start it with --nproc-per-node"
            f" {gpus}."
        )
    return local_rank


def _of_this_attempt(store: dist.Store) -> dist.Store:
    """`store` without what the ranks before a restart have left in it: one that met the address of
    a dead rank would wait for it.

    Torchrun keeps its store over restarts (pytorch issue 135712). With agents on several machines,
    which count their restarts each for itself, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes it use a
    new one.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return store
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def is_under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_torchelastic_launched()


def torchrun_rank() -> int:
    """The rank that torchrun gave this process, also when no group is open; 0 without torchrun."""
    return int(os.environ["RANK"]) if is_under_torchrun() else 0


def reports_errors(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, whose error torchrun will name as the reason when this process is the first to
    fail.
    """
    return record(function) if is_under_torchrun() else function


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element by element the sum of every rank's `values`, in float64; the same on all ranks."""
    if world().size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather_numbers(values: Sequence[float]) -> list[list[float]]:
    """Every rank's `values`, as many on each, in the order of the ranks and in float64; much faster
    than `gather`.
    """
    if world().size == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    everywhere = [torch.empty_like(mine) for _ in range(world().size)]
    dist.all_gather(everywhere, mine)
    return [numbers.tolist() for numbers in everywhere]


def gather(value: T) -> list[T]:
    """Every rank's `value`, a picklable object, in the order of the ranks."""
    if world().size == 1:
        return [value]
    values: list = [None] * world().size
    dist.all_gather_object(values, value)
    return values


def check_alike(settings: Mapping[str, object]) -> None:
    """Raises ValueError, on all ranks, for the first of `settings`, by name, that is not the same
    on every rank.
    """
    first, *others = gather(dict(settings))
    for rank, theirs in enumerate(others, start=1):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                raise ValueError(
                    f"{name} is {first.get(name)!r} in process 0 and {theirs.get(name)!r} in"
                    f" process {rank}; start all processes with the same command, on machines that"
                    " are alike."
                )


def on_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, where alone it runs. ValueErrors, OSErrors and RuntimeErrors
    are raised on every rank.
    """
    if world().size == 1:
        return work()
    outcome: list = [None, None]
    if world().is_first:
        try:
            outcome[0] = work()
        except (ValueError, OSError, RuntimeError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_rank(work: Callable[[], T]) -> T:
    """What `work` returns on this rank. When it raises a ValueError or OSError on one, every rank
    raises that or a ValueError.
    """
    if world().size == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failure = error
    reasons = gather(failure and str(failure))
    if failure:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise ValueError(f"process {rank}: {reason}")
    return result


def shared_out(function: Callable[[Tensor], Tensor], batch: Tensor, dtype: torch.dtype) -> Tensor:
    """`function(batch)` where each rank computes a part. `batch` [n, ...], e.g. [240, 576, 576], is
    the same on every rank.

    `function` treats the first dimension entry by entry, keeps the shape and returns tensors of
    `dtype`.
    """
    ranks = world()
    if ranks.size == 1:
        return function(batch)
    part = -(
        -len(batch) // ranks.size
    )  # every rank sends as much: the last ones fill up with zeros
    mine = batch[ranks.rank * part : (ranks.rank + 1) * part]
    padded = torch.zeros(part, *batch.shape[1:], dtype=dtype, device=batch.device)
    if len(mine):
        padded[: len(mine)] = function(mine)
    whole = padded.new_empty(part * ranks.size, *batch.shape[1:])
    dist.all_gather(list(whole.chunk(ranks.size)), padded)
    return whole[: len(batch)]


def balanced_owners(costs: Sequence[float]) -> list[int]:
    """A rank for each of `costs`, so that the sums of the ranks are about equal: the dearest first,
    to whoever has least.
    """
    loads = [0.0] * world().size
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[index]] += costs[index]
    return owners


def broadcast_(tensor: Tensor, source: int) -> None:
    """Fills `tensor`, contiguous and of one shape on all ranks, with that of the rank `source`."""
    if world().size > 1:
        dist.broadcast(tensor, source)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`: its shard, sharing memory, under FSDP2; else `tensor`
    itself.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, gathered from every rank under FSDP2 (all must call); else
    `tensor` itself.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_of(shard: Tensor, like: Tensor) -> Tensor:
    """The tensor of which `shard` is this rank's part, laid out as `like` is."""
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
        run_check=False,
    ).full_tensor()


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `tensor`, which all ranks hold, laid out as `like` is."""
    return _laid_out(tensor, like).to_local() if isinstance(like, DTensor) else tensor


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads a `state_dict` of whole tensors, which all ranks hold; each keeps its shards of them.
    `state` is used up.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = _laid_out(value, parameters[index])
    optimizer.load_state_dict(state)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which all ranks hold, as a tensor sharded like `like`; nothing is sent."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


class _Forward(nn.Module):
    """A function of the model, run as this module's forward, which is where DDP and FSDP2 do their
    part.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable, *arguments):
        return work(*arguments)


class ParallelModel:
    """`model` held by all ranks: whole on each (`ddp`) or in shards (`fsdp`, FSDP2 by blocks). One
    rank alone holds it as it is.

    FSDP2 replaces the parameters, so optimizers are built afterwards.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], mode: str):
        self._root: nn.Module = _Forward(model)
        self._is_sharded = mode == "fsdp" and world().size > 1
        if self._is_sharded:
            for module in (*blocks, self._root):
                fully_shard(module)
        elif world().size > 1:
            on_gpu = next(model.parameters()).is_cuda
            devices = [torch.cuda.current_device()] if on_gpu else None
            with warnings.catch_warnings(
                action="ignore", category=FutureWarning
            ):  # of 2.13: its new name is not in 2.11
                self._root = DistributedDataParallel(
                    self._root, devices, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    def __call__(self, work: Callable[..., T], *arguments) -> T:
        """`work(*arguments)`, which may use the whole model."""
        return self._root(work, *arguments)

    def evaluate(self, work: Callable[..., T], *arguments) -> T:
        """Like a call, for work without gradients that all ranks do alike."""
        with torch.no_grad():
            result = self._root(work, *arguments)
        if self._is_sharded:
            self._root.reshard()
        return result

    @contextlib.contextmanager
    def averaging_gradients(self, now: bool) -> Iterator[None]:
        """Forward and backward inside average the gradients over the ranks when `now`, or only add
        to this rank's own.
        """
        if self._is_sharded:
            self._root.set_requires_gradient_sync(now)
            yield
        elif isinstance(self._root, DistributedDataParallel) and not now:
            with self._root.no_sync():
                yield
        else:
            yield


def whole_norm(norm: float, parameters: Sequence[nn.Parameter]) -> float:
    """2-norm over the gradients of all ranks, from this rank's `norm` over what it holds of them:
    each shard counts once.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return sum_over_ranks([norm * norm])[0] ** 0.5
    return norm
