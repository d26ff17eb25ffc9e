"""What do the head and the loss cost with backward: in chunks with closed-form gradients, in plain
torch, as cross-entropy alone?

    python benchmarks/objective.py [--threads 2] [--repeats 2] [--rounds 3]

On a CPU in float32: 2,048 tokens, hidden 576, vocabulary 131,072. Where there is a GPU, also 20,480
tokens under bfloat16 autocast. "plain torch" is the same loss as one would write it: logits,
`F.cross_entropy` with label smoothing, `log_softmax` and an explicit entropy. "F.cross_entropy" has
no regularisers, so it does less than the other two. "compiled" is ours as a run with `compile on`
has it, which on a CPU needs a C++ compiler. Every case runs in a process of its own, cases take
turns, and the best time after a warm-up counts; memory is the most above what the inputs took
(gradients of both inputs included).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _common import now, write_table
from torch import Tensor

from kl3m_nb.optim.objective import chunked_objective
from kl3m_nb.profiles import ObjectiveSpec, get_profile

MODEL = get_profile("kl3m-007-500m").model
TOKENS = {"cpu": 2_048, "cuda": 20_480}


def plain_torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    spec = ObjectiveSpec()
    logits = hidden @ weight.t()
    smoothed = F.cross_entropy(logits, labels, label_smoothing=spec.label_smoothing)
    log_p = F.log_softmax(logits, dim=-1)
    bits = -(log_p.exp() * log_p).sum(-1) / math.log(2)
    target = spec.entropy_target_weight * (bits - spec.entropy_target_bits).square()
    return smoothed - spec.entropy_bonus * bits.mean() + target.mean()


def cross_entropy_alone(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), labels)


def ours(chunk_tokens: int, compiled: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    spec = ObjectiveSpec(chunk_tokens=chunk_tokens)
    return lambda hidden, weight, labels: (
        chunked_objective(hidden, weight, labels, spec, compiled=compiled).total
    )


CASES: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "cpu": {
        "ours": ours(1024),
        "ours, compiled": ours(1024, compiled=True),
        "plain torch": plain_torch,
        "F.cross_entropy": cross_entropy_alone,
    },
    "cuda": {
        "ours": ours(1024),
        "ours, compiled": ours(1024, compiled=True),
        "ours, compiled, chunks of 2048": ours(2048, compiled=True),
        "ours, compiled, chunks of 4096": ours(4096, compiled=True),
        "plain torch": plain_torch,
        "F.cross_entropy": cross_entropy_alone,
    },
}


def measure(device: str, case: str, repeats: int) -> dict[str, float]:
    """Seconds and extra peak bytes of one forward and backward."""
    torch.manual_seed(0)
    loss_of = CASES[device][case]
    # In place, so that no temporary of the set-up hides in the peak.
    weight = (
        torch.empty(MODEL.vocabulary, MODEL.hidden, device=device)
        .normal_(0.0, 0.02)
        .requires_grad_()
    )
    hidden = torch.empty(TOKENS[device], MODEL.hidden, device=device).normal_().requires_grad_()
    labels = torch.randint(MODEL.vocabulary, (TOKENS[device],), device=device)
    used_before = peak_bytes(device)
    seconds = []
    for _ in range(repeats + 1):
        weight.grad = hidden.grad = None
        start = now()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(hidden, weight, labels)
        loss.backward()
        seconds.append(now() - start)
        del loss
    return {"seconds": min(seconds[1:]), "extra": peak_bytes(device) - used_before}


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_a_process(device: str, case: str, threads: int, repeats: int) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(threads),
        "--repeats",
        str(repeats),
        "--measure",
        device,
        case,
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=CASES,
        default=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"],
    )
    parser.add_argument(
        "--measure", nargs=2, metavar=("DEVICE", "CASE"), help="one case, printed as JSON"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments.repeats)))
        return
    for device in arguments.devices:
        results: dict[str, dict[str, float]] = {}
        for _ in range(arguments.rounds):
            for case in CASES[device]:
                result = in_a_process(device, case, arguments.threads, arguments.repeats)
                results[case] = min(
                    result, results.get(case, result), key=lambda measured: measured["seconds"]
                )
        rows = [
            {
                "case": case,
                "tokens": TOKENS[device],
                "seconds": result["seconds"],
                "time / ours": result["seconds"] / results["ours"]["seconds"],
                "extra peak GB": result["extra"] / 1e9,
                "memory / ours": result["extra"] / results["ours"]["extra"],
            }
            for case, result in results.items()
        ]
        write_table(f"objective_{device}", rows)


if __name__ == "__main__":
    main()
