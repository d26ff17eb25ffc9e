"""How fast does a profile train, where does the time go, and how do Hugging Face's Trainer and a
plain loop compare?

    pip install -e '.[bench]'
    python benchmarks/throughput.py [--profiles tiny tiny-moe] [--steps 20] [--rounds 3]

Without a GPU the tiny profiles are measured, in half an hour; with one the real models too. Every
case trains the same model on the same dense windows in a process of its own: `warmup` steps, in
which graphs are compiled and batches made ahead, then `steps` that count; cases take turns, and the
best of the rounds is kept. A case that fails says so in its row, and the others go on.

* kl3m_nb: `training.train` itself, with Muon, clipping, the regularised objective, metrics and
  data; its evaluations and checkpoints are not counted. Its clamp is: one is timed and counted with
  the profile's cadence.
* kl3m_nb, padded segments: the same with the data of a profile that pads (kl3m-002, instruction
  pairs included), on real text. Counted are the tokens that have a label, so this row is no
  comparison.
* Trainer: transformers' Trainer with fused AdamW and its own loss, also with each block compiled.
  It does less: plain cross-entropy, no Muon, no clamp.
* plain loop: forward, backward, AdamW, with the same loss as Trainer.

The last two take `scaled_dot_product_attention`, whatever is installed.

Tokens are synthetic (uniform over the tokenizer, from a parquet file) or real (licence texts). The
real models' own tokenizers are on the hub; here all text goes through one of 4,096 entries, trained
on the spot, unless --tokenizer names another. The time by part is from further steps, in which the
device is waited for at both ends of every part; "other" is the rest of those steps.

MFU and HFU are relative to the data sheet of the GPU. MFU counts what the model needs, three times
forward with causal attention; HFU what is computed, with the scores that attention's backward pass
computes again, and gradient checkpointing; MFU PaLM is 6N + 12LHT, as published figures often are.

Trainer needs `accelerate`, which the extra `bench` installs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import resource
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import torch
from _common import now, write_table
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from kl3m_nb.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from kl3m_nb.data.windows import PackedStream
from kl3m_nb.model import costs, decoder
from kl3m_nb.model.estimate import data_sheet, estimate
from kl3m_nb.model.runtime import Runtime, choose_runtime, prepare_model
from kl3m_nb.profiles import PROFILES, Profile, get_profile
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop

TEXT = "package:licensedcode-data"
TOKENS = ("synthetic", "real")
CASES = ("kl3m_nb", "Trainer", "Trainer, blocks compiled", "plain loop")
PADDED = "kl3m_nb, padded segments"
PARTS = ("data", "forward", "backward", "optimizer", "other", "clamp")
ON_GPU = torch.cuda.is_available()


def settings(
    arguments: argparse.Namespace, folder: Path, name: str, tokens: str, padded: bool
) -> Profile:
    """The profile as it is trained here; what a short run cannot show (evaluations, checkpoints)
    comes at its end only.
    """
    steps = arguments.warmup + arguments.steps
    own = get_profile(name)
    tokenizer = arguments.tokenizer or str(own_tokenizer(folder))
    packing = {} if padded else {"packing": "dense", "p_sft": 0.0}
    return get_profile(
        name,
        max_steps=steps,
        warmup_steps=1,
        clamp_every=steps,
        eval_every=steps,
        checkpoint_every=steps,
        held_out_windows=1,
        tokenizer=tokenizer,
        **batch(arguments, own),
        source=TEXT if tokens == "real" else f"files:{synthetic_tokens(folder, own, tokenizer)}",
        **packing,
    )


def batch(arguments: argparse.Namespace, own: Profile) -> dict[str, int]:
    """The micro-batch that is asked for or the profile's own, and at most as many of them as make
    up a step of the profile.
    """
    micro_batch = arguments.micro_batch or own.data.micro_batch
    in_a_step = own.data.micro_batch * own.data.grad_accumulation // micro_batch
    return {
        "micro_batch": micro_batch,
        "grad_accumulation": max(1, min(arguments.grad_accumulation, in_a_step)),
    }


def own_tokenizer(folder: Path) -> Path:
    load_tokenizer("corpus", TEXT, 4096).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def synthetic_tokens(folder: Path, own: Profile, tokenizer: str) -> Path:
    """Documents of uniformly drawn tokens, in the family's schema."""
    entries = len(
        load_tokenizer(tokenizer, TEXT, own.model.vocabulary)
    )  # the model may have room for more
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(
        len(SPECIAL_TOKENS), entries, (200, 4 * own.data.seq_len), generator=generator
    )
    table = pyarrow.table(
        {"identifier": [str(number) for number in range(len(drawn))], "tokens": drawn.tolist()}
    )
    pyarrow.parquet.write_table(table, folder / "synthetic.parquet")
    return folder / "synthetic.parquet"


def measure(arguments: argparse.Namespace, name: str, tokens: str, case: str) -> dict[str, float]:
    """Tokens per second and peak bytes of one case; of ours also the seconds a step spends in each
    part.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chosen = settings(arguments, folder, name, tokens, padded=case == PADDED)
        recompute = choose_runtime(chosen).recompute
        if case in (CASES[0], PADDED):
            return measure_ours(arguments, chosen, folder, padded=case == PADDED) | {
                "recompute": recompute
            }
        batches = windows_of(chosen, arguments.warmup + arguments.steps)
        if case == "plain loop":
            seconds = measure_plain_loop(arguments, chosen, batches)
        else:
            seconds = measure_trainer(
                arguments, chosen, batches, folder, compiled="compiled" in case
            )
        return {
            "rate": chosen.tokens_per_step / seconds,
            "peak": peak_bytes(),
            "recompute": recompute,
        }


def measure_ours(
    arguments: argparse.Namespace, chosen: Profile, folder: Path, padded: bool
) -> dict[str, float]:
    loop.train(chosen, folder / "run")
    peak = peak_bytes()
    train, clamp = read_metrics(folder / "run", "train"), read_metrics(folder / "run", "clamp")
    before, last = train.iloc[arguments.warmup - 1], train.iloc[-1]
    clamping = clamp.clamp_seconds.iloc[-1] / get_profile(chosen.name).clamp.clamp_every
    seconds = (last.seconds - before.seconds) / arguments.steps + clamping
    rate = (last.valid_tokens - before.valid_tokens) / arguments.steps / seconds
    result = {"rate": rate, "peak": peak, "clamp": clamping}
    return (
        result
        if padded or not arguments.part_steps
        else result | time_by_part(arguments, chosen, folder)
    )


class PartClock:
    """Stands in for the `record_function` of `training`: seconds by part, the device idle at both
    ends.

    Kernels that a part has queued then count for it, those of the backward pass too, which another
    thread launches.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = now()
        yield
        self.seconds[name.removeprefix("kl3m_nb ")] += now() - began


def time_by_part(arguments: argparse.Namespace, chosen: Profile, folder: Path) -> dict[str, float]:
    """Seconds of a step that each part takes, from a run of its own; compilation falls into its
    warm-up.
    """
    steps = arguments.warmup + arguments.part_steps
    short = dataclasses.replace(
        chosen, schedule=dataclasses.replace(chosen.schedule, max_steps=steps)
    )
    clock = PartClock()

    def begin_anew(row) -> None:
        if row["kind"] == "train" and row["step"] == arguments.warmup:
            clock.seconds.clear()

    with mock.patch.object(loop, "record_function", clock):
        loop.train(short, folder / "by_part", callbacks=[begin_anew])
    seconds = read_metrics(folder / "by_part", "train").seconds
    clock.seconds["other"] = (
        seconds.iloc[-1] - seconds.iloc[arguments.warmup - 1] - sum(clock.seconds.values())
    )
    return {part: clock.seconds[part] / arguments.part_steps for part in PARTS if part != "clamp"}


def windows_of(chosen: Profile, steps: int) -> torch.Tensor:
    tokenizer = load_tokenizer(chosen.data.tokenizer, chosen.data.source, chosen.model.vocabulary)
    count = steps * chosen.data.micro_batch * chosen.data.grad_accumulation
    return PackedStream(chosen.data, tokenizer).next_batch(count)[:, :-1].contiguous()


def peer_model(profile: Profile, runtime: Runtime, compiled: bool) -> PreTrainedModel:
    """The model as transformers computes it, without our fused projections and attention; blocks
    compiled as its users do.
    """
    model = prepare_model(
        decoder.build_model(profile), dataclasses.replace(runtime, compile_blocks=False)
    )
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model


def measure_plain_loop(
    arguments: argparse.Namespace, chosen: Profile, windows: torch.Tensor
) -> float:
    """Seconds of a step."""
    runtime = choose_runtime(chosen)
    model = peer_model(chosen, runtime, compiled=False)
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
    return (now() - began) / arguments.steps


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
    arguments: argparse.Namespace,
    chosen: Profile,
    windows: torch.Tensor,
    folder: Path,
    compiled: bool,
) -> float:
    """Seconds of a step."""
    runtime = choose_runtime(chosen)
    model = peer_model(chosen, runtime, compiled)
    on_gpu = runtime.device.type == "cuda"
    options = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=arguments.warmup + arguments.steps,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=chosen.data.micro_batch,
        gradient_accumulation_steps=chosen.data.grad_accumulation,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=runtime.precision == "bfloat16",
        use_cpu=not on_gpu,
        gradient_checkpointing=runtime.recompute,
        tf32=True if on_gpu else None,
        save_strategy="no",
        logging_strategy="no",
        dataloader_num_workers=2 if on_gpu else 0,
    )
    clock = Clock(arguments.warmup)
    rows = [{"input_ids": window, "labels": window} for window in windows]
    Trainer(model=model, args=options, train_dataset=rows, callbacks=[clock]).train()
    return (clock.ended - clock.began) / arguments.steps


def peak_bytes() -> int:
    if ON_GPU:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def in_a_process(arguments: argparse.Namespace, name: str, tokens: str, case: str) -> dict:
    """What `measure` returns, or why it failed."""
    command = [
        sys.executable,
        __file__,
        "--measure",
        name,
        tokens,
        case,
        *(
            word
            for key in (
                "steps",
                "warmup",
                "part_steps",
                "threads",
                "micro_batch",
                "grad_accumulation",
                "tokenizer",
            )
            for word in (f"--{key.replace('_', '-')}", str(getattr(arguments, key)))
        ),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        print(f"{name}, {tokens} tokens, {case} failed:\n{ended.stderr}", file=sys.stderr)
        return {
            "failed": (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        }
    return json.loads(ended.stdout.splitlines()[-1])


def results_of(arguments: argparse.Namespace, name: str, tokens: str) -> dict[str, dict]:
    """The best of the rounds by case; a case that has failed is not tried again."""
    pads = get_profile(name).data.packing == "segments" and tokens == "real"
    best: dict[str, dict] = {case: {} for case in (*arguments.cases, *([PADDED] if pads else []))}
    for _ in range(arguments.rounds):
        for case, known in best.items():
            if "failed" not in known:
                result = in_a_process(arguments, name, tokens, case)
                if result.get("rate", math.inf) > known.get("rate", 0.0):
                    known.update(result)
    return best


def rows_of(chosen: Profile, tokens: str, results: dict[str, dict]) -> tuple[list[dict], dict]:
    """The table's rows of one profile and one kind of tokens, and the row of the time by part."""
    gpu = data_sheet(torch.cuda.get_device_name()) if ON_GPU else None
    shape = chosen.model, chosen.data.seq_len
    ours = results.get(CASES[0], {})
    rows = []
    for case, result in results.items():
        rate = result.get("rate", 0.0)
        compared = rate and case != PADDED
        counted = {
            "MFU": costs.model_flops_per_token(*shape),
            "HFU": costs.flops_per_token(*shape, recompute=result.get("recompute", False)),
            "MFU PaLM": costs.palm_flops_per_token(*shape),
        }
        rows.append(
            {
                "profile": chosen.name,
                "tokens": tokens,
                "micro-batch": f"{chosen.data.micro_batch} x {chosen.data.seq_len}",
                "case": case,
                "tokens/s": rate or "",
                "ours / this": ours["rate"] / rate if compared and "rate" in ours else "",
                **{
                    name: f"{rate * operations / gpu.products:.1%}" if compared and gpu else ""
                    for name, operations in counted.items()
                },
                "peak GB": result["peak"] / 1e9 if rate else "",
                "failed": result.get("failed", ""),
            }
        )
    parts = {part: ours[part] for part in PARTS if part in ours}
    if list(parts) == ["clamp"]:  # with --part-steps 0 nothing is known that it could be a share of
        parts = {}
    shares = {
        f"{part} %": f"{100 * parts[part] / sum(parts.values()):.1f}" if part in parts else ""
        for part in PARTS
    }
    estimated = estimate(chosen).tokens_per_second
    return rows, {
        "profile": chosen.name,
        "tokens": tokens,
        **shares,
        "tokens/s": ours.get("rate", ""),
        "estimated": estimated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profiles",
        nargs="+",
        choices=PROFILES,
        default=list(PROFILES) if ON_GPU else ["tiny", "tiny-moe"],
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=[case for case in CASES if ON_GPU or "comp" not in case],
    )
    parser.add_argument("--steps", type=int, default=20 if ON_GPU else 5)
    parser.add_argument(
        "--warmup", type=int, default=5, help="steps before those that count, at least 1"
    )
    parser.add_argument(
        "--part-steps",
        type=int,
        default=4,
        help="further steps, for the time by part; 0: without it",
    )
    parser.add_argument("--micro-batch", type=int, default=0, help="windows; 0: the profile's own")
    parser.add_argument("--rounds", type=int, default=3 if ON_GPU else 6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--grad-accumulation",
        type=int,
        default=4,
        help="at most; a step of the real profiles has 32 micro-batches",
    )
    parser.add_argument("--tokenizer", default="", help="hub id or folder, for the real tokens")
    parser.add_argument("--tokens", nargs="+", choices=TOKENS, default=TOKENS)
    parser.add_argument(
        "--measure",
        nargs=3,
        metavar=("PROFILE", "TOKENS", "CASE"),
        help="one case, printed as JSON",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments, *arguments.measure)))
        return
    rows, parts = [], []
    for name in arguments.profiles:
        chosen = get_profile(name)
        chosen = get_profile(name, packing="dense", p_sft=0.0, **batch(arguments, chosen))
        for tokens in arguments.tokens:
            of_cases, by_part = rows_of(chosen, tokens, results_of(arguments, name, tokens))
            rows, parts = [*rows, *of_cases], [*parts, by_part]
        device = (
            "cuda" if ON_GPU else "cpu"
        )  # after every profile: what comes later may take hours, or fail
        write_table(f"throughput_{device}", rows)
        write_table(f"throughput_parts_{device}", parts)
    if any(row["failed"] for row in rows):
        raise SystemExit("Some cases failed; their rows say why.")


if __name__ == "__main__":
    main()
