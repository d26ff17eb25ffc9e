"""What does one layer of kl3m-007 cost, forward and backward, as transformers computes it and as
this project does?

    python benchmarks/layer.py [--layers 12] [--micro-batches 5 10]

Blocks alone, without head and optimizer, so that a variant is compared in seconds: milliseconds a
layer and micro-batch, best of three. "fused" takes query, key and value, and gate and up, as one
product each; "FlashAttention 4" is left out where it does not load. Without a GPU two small layers
go the same way, uncompiled, which shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse

import torch
from _common import now, write_table
from throughput import peer_model

from kl3m_nb.model import decoder, flash_attention
from kl3m_nb.model.runtime import choose_runtime, prepare_model
from kl3m_nb.profiles import Profile, get_profile

ON_GPU = torch.cuda.is_available()
SMALL = {
    "layers": 2,
    "hidden": 64,
    "mlp": 128,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 16,
    "seq_len": 128,
}
REPEATS = 4
PEER = "transformers"


def variants() -> dict[str, str]:
    """What is measured, and the attention that it takes."""
    with_flash = (
        {"fused, FlashAttention 4": flash_attention.IMPLEMENTATION}
        if ON_GPU and flash_attention.loads()
        else {}
    )
    return {PEER: "sdpa", "fused": "sdpa"} | with_flash


def milliseconds(profile: Profile, variant: str, attention: str) -> float:
    """Of one layer and micro-batch, forward and backward."""
    torch._dynamo.reset()
    runtime = choose_runtime(profile)
    if variant == PEER:
        model = peer_model(profile, runtime, runtime.compile_blocks)
    else:
        model = prepare_model(decoder.build_model(profile, attention=attention), runtime)
    tokens = torch.randint(
        profile.model.vocabulary,
        (profile.data.micro_batch, profile.data.seq_len),
        device=runtime.device,
    )
    best = float("inf")
    for _ in range(4):  # the first compiles
        began = now()
        for _ in range(REPEATS):
            with runtime.autocast():
                residual = decoder.forward_body(model, tokens).residual
            residual.backward(torch.ones_like(residual) / residual.numel())
        best = min(best, now() - began)
    return 1000 * best / REPEATS / profile.model.layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12, help="on a GPU")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[5, 10] if ON_GPU else [1])
    arguments = parser.parse_args()
    shape = (
        {"layers": arguments.layers, "growth_factor": 1}
        if ON_GPU
        else {"growth_factor": 1, **SMALL}
    )
    rows = []
    for micro_batch in arguments.micro_batches:
        profile = get_profile("kl3m-007-500m", vocabulary=4096, micro_batch=micro_batch, **shape)
        for variant, attention in variants().items():
            taken = milliseconds(profile, variant, attention)
            rows.append(
                {
                    "micro-batch": f"{micro_batch} x {profile.data.seq_len}",
                    "blocks": variant,
                    "ms a layer": taken,
                }
            )
    write_table(f"layer_{'cuda' if ON_GPU else 'cpu'}", rows)


if __name__ == "__main__":
    main()
