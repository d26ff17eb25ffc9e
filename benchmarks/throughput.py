"""How fast does a profile train, where does the time go, and how do Hugging Face's Trainer and a plain loop compare?

    python benchmarks/throughput.py [--profiles tiny tiny-moe] [--steps 20] [--rounds 3] [--threads 2]

Without a GPU the tiny profiles are measured, with one the real models too. Every case trains the same model on the same batches
in a process of its own: `warmup` steps, then `steps` that count; cases take turns, and the best of the rounds is kept.

* kl3m_nb: `training.train` itself, with Muon, clipping, the regularised objective, metrics and data; its evaluations and
  checkpoints are not counted. Its clamp is: one is timed and counted with the profile's cadence.
* Trainer: transformers' Trainer with fused AdamW and its own loss, also with each block compiled. It does less: plain
  cross-entropy, no Muon, no clamp.
* plain loop: forward, backward, AdamW, with the same loss as Trainer.

Tokens are synthetic (uniform over the vocabulary, from a parquet file) or real (licence texts). The real models' own tokenizers
are on the hub; here all text goes through one of 4,096 entries, trained on the spot, unless --tokenizer names another. MFU is
relative to the data sheet of the GPU, in two conventions: causal attention counted exactly, and PaLM's 6N + 12LHT. Needs
`accelerate`, which Trainer does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from _common import write_table
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments

from kl3m_nb import flops, models, training
from kl3m_nb.estimate import GPUS, estimate
from kl3m_nb.metrics import read_metrics
from kl3m_nb.packing import PackedStream
from kl3m_nb.profiles import PROFILES, Profile, get_profile
from kl3m_nb.runtime import choose_runtime, prepare_model
from kl3m_nb.tokenizer import load_tokenizer

TEXT = "package:licensedcode-data"
CASES = ("kl3m_nb", "Trainer", "Trainer, blocks compiled", "plain loop")
PARTS = ("data", "forward", "backward", "optimizer", "clamp")


def settings(arguments: argparse.Namespace, folder: Path) -> Profile:
    """The profile as it is trained here; what a short run cannot show (evaluations, checkpoints) comes at its end only."""
    steps = arguments.warmup + arguments.steps
    own = get_profile(arguments.profile)
    accumulation = min(arguments.grad_accumulation or own.data.grad_accumulation, own.data.grad_accumulation)
    return get_profile(
        arguments.profile, max_steps=steps, warmup_steps=1, clamp_every=steps, eval_every=steps, checkpoint_every=steps,
        held_out_windows=1, grad_accumulation=accumulation, tokenizer=arguments.tokenizer or str(own_tokenizer(folder)),
        source=TEXT if arguments.tokens == "real" else f"files:{synthetic_tokens(folder, own)}",
    )  # fmt: skip


def own_tokenizer(folder: Path) -> Path:
    load_tokenizer("corpus", TEXT, 4096).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def synthetic_tokens(folder: Path, own: Profile) -> Path:
    """Documents of uniformly drawn tokens, in the family's schema."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(13, own.model.vocabulary, (200, 4 * own.data.seq_len), generator=generator)
    table = pyarrow.table({"identifier": [str(number) for number in range(len(drawn))], "tokens": drawn.tolist()})
    pyarrow.parquet.write_table(table, folder / "synthetic.parquet")
    return folder / "synthetic.parquet"


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = settings(arguments, folder)
        if arguments.case == "kl3m_nb":
            return measure_ours(arguments, chosen, folder)
        batches = windows_of(chosen, arguments.warmup + arguments.steps)
        if arguments.case == "plain loop":
            return measure_plain_loop(arguments, chosen, batches)
        return measure_trainer(arguments, chosen, batches, folder, compiled="compiled" in arguments.case)


def measure_ours(arguments: argparse.Namespace, chosen: Profile, folder: Path) -> dict[str, float]:
    training.train(chosen, folder / "run")
    train, clamp = read_metrics(folder / "run", "train"), read_metrics(folder / "run", "clamp")
    counted = train.iloc[arguments.warmup :]
    seconds = (counted.seconds.iloc[-1] - train.seconds.iloc[arguments.warmup - 1]) / len(counted)
    cadence = get_profile(arguments.profile).clamp.clamp_every
    seconds += clamp.clamp_seconds.iloc[-1] / cadence
    result = {"seconds": seconds, "peak": peak_bytes(), "clamp": clamp.clamp_seconds.iloc[-1] / cadence}
    return result | time_by_part(arguments, chosen, folder)


def time_by_part(arguments: argparse.Namespace, chosen: Profile, folder: Path) -> dict[str, float]:
    """Seconds of a step that each part takes, from a second run under torch's profiler; on a GPU those of its kernels."""
    steps = 4
    short = dataclasses.replace(chosen, schedule=dataclasses.replace(chosen.schedule, max_steps=steps))
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        training.train(short, folder / "profiled")
    totals = {}
    for event in profiled.key_averages():
        if event.key.startswith("kl3m_nb "):
            spent = event.device_time_total if on_gpu else event.cpu_time_total
            totals[event.key.removeprefix("kl3m_nb ")] = spent / 1e6 / steps
    return {part: totals[part] for part in PARTS if part in totals and part != "clamp"}


def windows_of(chosen: Profile, steps: int) -> torch.Tensor:
    tokenizer = load_tokenizer(chosen.data.tokenizer, chosen.data.source, chosen.model.vocabulary)
    count = steps * chosen.data.micro_batch * chosen.data.grad_accumulation
    return PackedStream(chosen.data, tokenizer).next_batch(count)[:, :-1].contiguous()


def measure_plain_loop(arguments: argparse.Namespace, chosen: Profile, windows: torch.Tensor) -> dict[str, float]:
    runtime = choose_runtime(chosen)
    uncompiled = dataclasses.replace(runtime, compile_blocks=False)
    model = prepare_model(models.build_model(chosen, attention=runtime.attention), uncompiled)
    if runtime.recompute:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=runtime.device.type == "cuda")
    micro_batches = iter(windows.split(chosen.data.micro_batch))
    for step in range(arguments.warmup + arguments.steps):
        if step == arguments.warmup:
            began = now()
        for _ in range(chosen.data.grad_accumulation):
            inputs = next(micro_batches).to(runtime.device)
            with runtime.autocast():
                loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
            (loss / chosen.data.grad_accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": (now() - began) / arguments.steps, "peak": peak_bytes()}


class Clock(TrainerCallback):
    """Notes when the steps that count begin and end."""

    def __init__(self, warmup: int):
        self.warmup, self.began, self.ended = warmup, 0.0, 0.0

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.warmup:
            self.began = now()
        if state.global_step == state.max_steps:
            self.ended = now()


def measure_trainer(
    arguments: argparse.Namespace, chosen: Profile, windows: torch.Tensor, folder: Path, compiled: bool
) -> dict[str, float]:
    runtime = choose_runtime(chosen)
    model = prepare_model(
        models.build_model(chosen, attention=runtime.attention), dataclasses.replace(runtime, compile_blocks=compiled)
    )
    on_gpu = runtime.device.type == "cuda"
    options = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=arguments.warmup + arguments.steps, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=chosen.data.micro_batch, gradient_accumulation_steps=chosen.data.grad_accumulation,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch", bf16=runtime.precision == "bfloat16", use_cpu=not on_gpu,
        gradient_checkpointing=runtime.recompute, tf32=True if on_gpu else None, save_strategy="no",
        logging_strategy="no", dataloader_num_workers=2 if on_gpu else 0,
    )  # fmt: skip
    clock = Clock(arguments.warmup)
    rows = [{"input_ids": window, "labels": window} for window in windows]
    Trainer(model=model, args=options, train_dataset=rows, callbacks=[clock]).train()
    return {"seconds": (clock.ended - clock.began) / arguments.steps, "peak": peak_bytes()}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_operations() -> float:
    """Of this GPU's data sheet, 0 without a GPU or for one that is not listed."""
    if not torch.cuda.is_available():
        return 0.0
    found = [gpu.products for key, gpu in GPUS.items() if key.upper() in torch.cuda.get_device_name()]
    return found[0] if found else 0.0


def in_a_process(arguments: argparse.Namespace, name: str, tokens: str, case: str) -> dict[str, float]:
    command = [
        sys.executable, __file__, "--measure", "--profile", name, "--tokens", tokens, "--case", case,
        *(word for key in ("steps", "warmup", "threads", "grad_accumulation", "tokenizer")
          for word in (f"--{key.replace('_', '-')}", str(getattr(arguments, key)))),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{name}, {tokens} tokens, {case} failed:\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def rows_of(arguments: argparse.Namespace, name: str, tokens: str) -> tuple[list[dict], dict]:
    best: dict[str, dict] = {}
    for _ in range(arguments.rounds):
        for case in arguments.cases:
            result = in_a_process(arguments, name, tokens, case)
            if case not in best or result["seconds"] < best[case]["seconds"]:
                best[case] = result
    chosen = get_profile(name)
    accumulation = min(arguments.grad_accumulation or chosen.data.grad_accumulation, chosen.data.grad_accumulation)
    tokens_per_step = chosen.data.micro_batch * accumulation * chosen.data.seq_len
    ours = tokens_per_step / best["kl3m_nb"]["seconds"]
    rows = []
    for case, result in best.items():
        rate, peak = tokens_per_step / result["seconds"], peak_operations()
        exact = flops.flops_per_token(chosen.model, chosen.data.seq_len)
        palm = flops.palm_flops_per_token(chosen.model, chosen.data.seq_len)
        rows.append(
            {
                "profile": name,
                "tokens": tokens,
                "case": case,
                "tokens/s": rate,
                "ours / this": ours / rate,
                "MFU causal": f"{rate * exact / peak:.1%}" if peak else "",
                "MFU PaLM": f"{rate * palm / peak:.1%}" if peak else "",
                "peak GB": result["peak"] / 1e9,
            }
        )
    parts = {part: best["kl3m_nb"].get(part, 0.0) for part in PARTS}
    total = sum(parts.values())
    shares = {f"{part} %": f"{100 * spent / total:.1f}" for part, spent in parts.items()}
    estimated = estimate(dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, grad_accumulation=accumulation)))
    return rows, {"profile": name, "tokens": tokens, **shares, "tokens/s": ours, "estimated": estimated.tokens_per_second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = ["tiny", "tiny-moe"]
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES) if torch.cuda.is_available() else small)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=[case for case in CASES if torch.cuda.is_available() or "comp" not in case]
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--grad-accumulation", type=int, default=4, help="at most; a step of the real profiles has 32 micro-batches"
    )
    parser.add_argument("--tokenizer", default="", help="hub id or folder, for the real tokens")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--profile", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    measured = [rows_of(arguments, name, tokens) for name in arguments.profiles for tokens in ("synthetic", "real")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_table(f"throughput_{device}", [row for rows, _ in measured for row in rows])
    write_table(f"throughput_parts_{device}", [parts for _, parts in measured])


if __name__ == "__main__":
    main()
