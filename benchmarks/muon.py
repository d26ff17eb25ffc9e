"""What does a Muon step cost, all matrices of one shape together, against `torch.optim.Muon`, which
takes one at a time?

    python benchmarks/muon.py [--threads 2] [--repeats 3]

On a CPU: the matrices of 12 layers of hidden 128 and of 4 layers of hidden 576. Where there is a
GPU: the 840 of the real 120 layers. Both optimizers get the same gradients and settings; the best
time after a warm-up step counts. "difference" compares the weights' movement over the warm-up step:
torch iterates in bfloat16 everywhere, ours in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from _common import now, write_table
from torch import nn

from kl3m_nb.optim.muon import Muon
from kl3m_nb.profiles import ModelSpec, get_profile

REAL = get_profile("kl3m-007-500m")
MODELS = {
    "cpu": {
        "12 layers x 128": get_profile("tiny").model,
        "4 layers x 576": dataclasses.replace(REAL.model, layers=4),
    },
    "cuda": {"120 layers x 576": REAL.model},
}
SETTINGS = {
    "lr": REAL.muon_lr,
    "momentum": REAL.optimizer.momentum,
    "weight_decay": REAL.optimizer.weight_decay,
}


def block_matrices(model: ModelSpec, device: str) -> list[nn.Parameter]:
    """The weights of all blocks, with gradients, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    queries, keys = model.heads * model.head_size, model.kv_heads * model.head_size
    shapes = [
        (queries, model.hidden),
        (keys, model.hidden),
        (keys, model.hidden),
        (model.hidden, queries),
        (model.mlp, model.hidden),
        (model.mlp, model.hidden),
        (model.hidden, model.mlp),
    ]
    parameters = []
    for shape in shapes * model.layers:
        parameter = nn.Parameter(
            torch.randn(shape, generator=generator, device=device) * model.initializer_range
        )
        parameter.grad = torch.randn(shape, generator=generator, device=device)
        parameters.append(parameter)
    return parameters


def measure(
    kind: type[torch.optim.Optimizer], model: ModelSpec, device: str, repeats: int
) -> tuple[float, torch.Tensor]:
    """Seconds of one step, and the movement of all weights in the first."""
    parameters = block_matrices(model, device)
    start = torch.cat([parameter.detach().flatten() for parameter in parameters])
    optimizer = kind(parameters, **SETTINGS)
    optimizer.step()
    movement = torch.cat([parameter.detach().flatten() for parameter in parameters]) - start
    seconds = []
    for _ in range(repeats):
        begin = now()
        optimizer.step()
        seconds.append(now() - begin)
    return min(seconds), movement


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=MODELS,
        default=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"],
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for device in arguments.devices:
        rows = []
        for name, model in MODELS[device].items():
            seconds, movement = measure(Muon, model, device, arguments.repeats)
            torch_seconds, torch_movement = measure(
                torch.optim.Muon, model, device, arguments.repeats
            )
            rows.append(
                {
                    "matrices": name,
                    "count": 7 * model.layers,
                    "ours s": seconds,
                    "torch.optim.Muon s": torch_seconds,
                    "torch / ours": torch_seconds / seconds,
                    "difference": (
                        ((movement - torch_movement).norm() / torch_movement.norm()).item()
                    ),
                }
            )
        write_table(f"muon_{device}", rows)


if __name__ == "__main__":
    main()
