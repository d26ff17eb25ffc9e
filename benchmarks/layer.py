"""What does one layer of kl3m-007 cost, forward and backward, as transformers computes it and as this project does?

    python benchmarks/layer.py [--layers 12] [--micro-batches 5 10]

Blocks alone, without head and optimizer, so that a variant is compared in seconds: milliseconds a layer and micro-batch, best of
three. "joint" takes query, key and value, and gate and up, as one product each; "FlashAttention 4" is left out where it does not
load. Without a GPU two small layers go the same way, uncompiled, which shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import time

import torch
from _common import write_table
from transformers import PreTrainedModel

from kl3m_nb import flash_attention, models
from kl3m_nb.profiles import Profile, get_profile
from kl3m_nb.runtime import Runtime, choose_runtime, prepare_model

ON_GPU = torch.cuda.is_available()
SMALL = {"layers": 2, "hidden": 64, "mlp": 128, "heads": 4, "kv_heads": 2, "head_size": 16, "seq_len": 128}
REPEATS = 4


def variants() -> dict[str, str]:
    """What is measured, and the attention that it takes."""
    with_flash = {"joint, FlashAttention 4": flash_attention.IMPLEMENTATION} if ON_GPU and flash_attention.loads() else {}
    return {"transformers": "sdpa", "joint": "sdpa"} | with_flash


def build(profile: Profile, runtime: Runtime, variant: str) -> PreTrainedModel:
    model = models.build_model(profile, attention=variants()[variant])
    if variant != "transformers" or not ON_GPU:
        return prepare_model(model, runtime)
    model.to(runtime.device)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return model


def milliseconds(profile: Profile, variant: str) -> float:
    """Of one layer and micro-batch, forward and backward."""
    torch._dynamo.reset()
    runtime = choose_runtime(profile)
    model = build(profile, runtime, variant)
    tokens = torch.randint(profile.model.vocabulary, (profile.data.micro_batch, profile.data.seq_len), device=runtime.device)
    best = float("inf")
    for _ in range(4):  # the first compiles
        began = now()
        for _ in range(REPEATS):
            with runtime.autocast():
                residual = models.forward_body(model, tokens).residual
            residual.backward(torch.ones_like(residual) / residual.numel())
        best = min(best, now() - began)
    return 1000 * best / REPEATS / profile.model.layers


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="on a GPU")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[5, 10] if ON_GPU else [1])
    arguments = parser.parse_args()
    shape = {"layers": arguments.layers, "growth_factor": 1} if ON_GPU else {"growth_factor": 1, **SMALL}
    rows = []
    for micro_batch in arguments.micro_batches:
        profile = get_profile("kl3m-007-500m", vocabulary=4096, micro_batch=micro_batch, **shape)
        for variant in variants():
            taken = milliseconds(profile, variant)
            rows.append({"micro-batch": f"{micro_batch} x {profile.data.seq_len}", "blocks": variant, "ms a layer": taken})
    write_table(f"layer_{'cuda' if ON_GPU else 'cpu'}", rows)


if __name__ == "__main__":
    main()
