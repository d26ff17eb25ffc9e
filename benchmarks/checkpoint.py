"""How long does training wait for a checkpoint of the 500M model, written in the background, and
how long for one that is not?

The state of kl3m-007-500m is real in size: weights, Muon's momentum, AdamW's moments. Measured
here: the copy to host memory, which training waits for, and the writing, which goes on meanwhile.
The share of the time is against the interval between checkpoints of the profile at the speed named
by `--tokens-per-second`. Writes benchmarks/results/checkpoint.csv.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from _common import write_table

from kl3m_nb import profiles
from kl3m_nb.data.tokenizer import load_tokenizer
from kl3m_nb.model import decoder
from kl3m_nb.optim import rules
from kl3m_nb.runs import checkpoints


def measure(profile: profiles.Profile, folder: Path, tokens_per_second: float) -> dict:
    """Seconds of the copy and of the writing, and what they are of the time between two
    checkpoints.
    """
    model = decoder.build_model(profile)
    muon, aux = rules.build_optimizers(model, rules.role_table(model, profile), profile)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in muon.param_groups:  # its momentum is made without the time of a step
        for parameter in group["params"]:
            muon.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    aux.step()
    for parameter in model.parameters():
        parameter.grad = None
    state = {"muon": muon.state_dict(), "aux": aux.state_dict()}
    began = time.perf_counter()
    snapshot = checkpoints.take_snapshot(1, model, state)
    copied = time.perf_counter()
    tokenizer = load_tokenizer("corpus", "package:licensedcode-data", 4096)
    writing = time.perf_counter()
    checkpoints.write_checkpoint(
        folder, snapshot, model, tokenizer, card="", identity="benchmark", keep=1
    )
    written = time.perf_counter()
    interval = profile.runtime.checkpoint_every * profile.tokens_per_step / tokens_per_second
    return {
        "profile": profile.name,
        "gigabytes": snapshot.bytes / 1e9,
        "copy_seconds": copied - began,
        "write_seconds": written - writing,
        "seconds_between_checkpoints": interval,
        "waiting_percent": 100 * (copied - began) / interval,
        "waiting_percent_in_the_foreground": 100 * (copied - began + written - writing) / interval,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="kl3m-007-500m")
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        default=75_000,
        help="of training (default: the aim on one H200)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_table(
            "checkpoint",
            [
                measure(
                    profiles.get_profile(options.profile),
                    Path(directory),
                    options.tokens_per_second,
                )
            ],
        )
