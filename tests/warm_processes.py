"""A warm interpreter that forks processes for the tests: torch imported anew in each would take
most of their time.

`WarmProcesses` starts this file as a script and sends it one job a line. The server computes with a
single thread, so that what it forks finds none of a matrix library's half dead.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from kl3m_nb.common import distributed as common_distributed
from kl3m_nb.optim import loss

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60  # within which a job has ended, also one that lost a rank


class WarmProcesses:
    """Runs jobs of this file in forked processes."""

    def __init__(self):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def call(self, job: str, **arguments):
        """What the function `job` returned in the server."""
        print(json.dumps([job, arguments]), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def train(
        self, ranks: int, run_dir: Path, profile: dict, fault: dict | None = None, **options
    ) -> list[int]:
        """Exit codes of `ranks` processes that train `small_profile(**profile)` in `run_dir`;
        negative for a signal.
        """
        arguments = dict(run_dir=str(run_dir), profile=profile, fault=fault, **options)
        return self.call("run_ranks", ranks=ranks, work="train", arguments=arguments)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


def run_ranks(ranks: int, work: str, arguments: dict, agent=None, attempt: int = 0) -> list[int]:
    """Forks `ranks` processes with the environment that torchrun gives, and waits for them; what
    they print goes to RUN.log.

    `agent` is the store that torchrun keeps over its attempts.
    """
    agent = agent or _agent_store()
    common = {
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": agent.port,
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": attempt,
    }
    log = Path(arguments["run_dir"]).with_suffix(".log")
    environments = [
        {**common, "RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {} for rank in range(ranks)
    ]
    children = [_fork(work, arguments, environment, log) for environment in environments]
    deadline = time.monotonic() + SECONDS
    codes: dict[int, int] = {}
    while len(codes) < ranks and time.monotonic() < deadline:
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - codes.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        codes[child] = 999  # it did not end by itself
    return [codes[child] for child in children]


def kill_at_random(kills: int, seed: int, run_dir: str, profile: dict) -> dict:
    """Trains in one process after another, killed at random moments `kills` times and then left
    alone.

    Half of the processes are killed soon after they begin, half soon after they have saved a
    checkpoint. Gives the steps reached.
    """
    from kl3m_nb.runs.checkpoints import latest_checkpoint
    from kl3m_nb.runs.metrics import read_metrics

    rng, reached = random.Random(seed), []
    for number in range(kills):
        before = latest_checkpoint(run_dir)
        child = _fork(
            "train", dict(run_dir=run_dir, profile=profile), {}, Path(run_dir).with_suffix(".log")
        )
        deadline = time.monotonic() + SECONDS
        while number % 2 and latest_checkpoint(run_dir) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.05 if number % 2 else 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            return {"reached": reached, "code": os.waitstatus_to_exitcode(status)}
        rows = read_metrics(run_dir, "train")
        reached.append(int(rows.step.max()) if len(rows) else 0)
    return {
        "reached": reached,
        "code": run_ranks(1, "train", dict(run_dir=run_dir, profile=profile))[0],
    }


def join_again(attempts: int, run_dir: str) -> list[list[int]]:
    """Exit codes of two ranks that join, attempt after attempt as torchrun restarts them; in turn
    one of them comes late.
    """
    agent = _agent_store()
    return [
        run_ranks(2, "join", dict(run_dir=run_dir, late=number % 2), agent, number)
        for number in range(attempts)
    ]


def join(run_dir: str, late: int) -> None:
    from kl3m_nb.common.distributed import process_group, sum_over_ranks

    if int(os.environ["RANK"]) == late:
        time.sleep(0.15)
    with process_group():
        assert sum_over_ranks([1]) == [2]


def train(
    run_dir: str,
    profile: dict,
    fault: dict | None = None,
    count_reductions: bool = False,
    places: list[str] = (),
    **options,
) -> None:
    """Trains; `fault` has the `rank`, the micro-batch `call` of that rank and the `kind`: kill,
    stop, stall, nan or error.

    `places`: the folder of each rank, which is /proc/self/cwd there. `last_rank`: settings of the
    last rank alone.
    """
    from kl3m_nb.training import loop, resume
    from tests.conftest import small_profile

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if fault and rank == fault["rank"]:
        _plant(fault["call"], fault["kind"], loss)
    if count_reductions:
        _count_reductions(Path(run_dir), common_distributed)
    if places:
        os.chdir(places[rank])
        resume.SEEN_SECONDS = 0  # nothing here shows late
    changes = options.get("last_rank", {}) if rank == ranks - 1 else {}
    loop.train(
        small_profile(**{**profile, **changes}),
        options.get("seen_run_dir", run_dir),
        options.get("init"),
    )


def command(run_dir: str, words: list[str], places: list[str]) -> int:
    """The exit code of `python -m kl3m_nb` with `words`; `places` as in `train`."""
    from kl3m_nb import cli

    os.chdir(places[int(os.environ["RANK"])])
    return cli.main(words)


def _plant(call: int, kind: str, training_loss) -> None:
    from kl3m_nb.data.windows import PackedStream

    original, calls = training_loss.activation_penalty, []

    def faulty(residual, *rest):
        calls.append(1)
        penalty = original(residual, *rest)
        if len(calls) != call:
            return penalty
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if (
            kind == "stall"
        ):  # the data do not come any more, and the rank is asked to stop while it waits for them
            PackedStream.take = lambda *_: time.sleep(2 * SECONDS)
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if kind == "error":
            raise MemoryError("no memory for the activations")
        return penalty * math.nan if kind == "nan" else penalty

    training_loss.activation_penalty = faulty


def _count_reductions(run_dir: Path, distributed) -> None:
    """A line in RUN.reductions-RANK for every bucket of gradients that DDP reduces."""
    import torch
    import torch.distributed as dist

    def averaged(rank, bucket):
        with open(run_dir.with_suffix(f".reductions-{rank}"), "a") as file:
            file.write("1\n")
        dist.all_reduce(bucket.buffer().div_(dist.get_world_size()))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    class Counted(distributed.DistributedDataParallel):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.register_comm_hook(dist.get_rank(), averaged)

    distributed.DistributedDataParallel = Counted


def _fork(work: str, arguments: dict, environment: dict, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr.flush()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.dump_traceback_later(SECONDS - 10)  # where it hangs, if it does
        os.environ.update({key: str(value) for key, value in environment.items()})
        code = globals()[work](**arguments) or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _agent_store():
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, multi_tenant=True, wait_for_workers=False)


def serve() -> None:
    """Trains once, so that all that every job needs is imported and read, then takes jobs until
    standard input ends.
    """
    from kl3m_nb.training import loop
    from tests.conftest import small_profile

    with tempfile.TemporaryDirectory() as folder:
        loop.train(small_profile(max_steps=2), Path(folder) / "run")
    for line in sys.stdin:
        job, arguments = json.loads(line)
        print(json.dumps(globals()[job](**arguments)), flush=True)


if __name__ == "__main__":
    serve()
