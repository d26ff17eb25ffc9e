"""The benchmark of training speed, in what can go wrong before and between its measurements."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from kl3m_nb.data.loader import open_stream
from kl3m_nb.data.tokenizer import load_tokenizer
from kl3m_nb.profiles import get_profile

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("throughput")


def arguments(**changes) -> argparse.Namespace:
    given = dict(steps=2, warmup=1, rounds=2, micro_batch=0, grad_accumulation=1)
    return argparse.Namespace(**{**given, "cases": ["kl3m_nb", "Trainer"], **changes})


def test_a_real_profile_reads_synthetic_tokens_through_a_small_tokenizer(throughput, tmp_path):
    tokenizer = load_tokenizer("corpus", "package:licensedcode-data", 512)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    chosen = throughput.settings(
        arguments(tokenizer=str(tmp_path / "tokenizer")),
        tmp_path,
        "kl3m-002-520m",
        "synthetic",
        padded=False,
    )
    stream = open_stream(chosen.data, tokenizer)
    batch = stream.take(4)
    assert stream.report.bad_rows == 0 and batch.input_ids.max() < 512 < chosen.model.vocabulary
    assert batch.valid_tokens == batch.input_ids.numel() == 4 * 1024


def test_all_that_is_compared_has_dense_windows(throughput, tmp_path):
    compared, padded = (
        throughput.settings(
            arguments(tokenizer="corpus"), tmp_path, "kl3m-002-520m", "real", padded
        ).data
        for padded in (False, True)
    )
    assert (compared.packing, compared.p_sft) == ("dense", 0.0)
    assert (padded.packing, padded.p_sft) == ("segments", 0.1)


def test_a_case_that_fails_is_noted_and_the_others_go_on(throughput, monkeypatch):
    asked = []

    def measured(options, name, tokens, case):
        asked.append(case)
        return (
            {"failed": "out of memory"}
            if case == "Trainer"
            else {"rate": 100.0 * len(asked), "peak": 1e9, "forward": 2.0}
        )

    monkeypatch.setattr(throughput, "in_a_process", measured)
    results = throughput.results_of(arguments(), "kl3m-002-520m", "real")
    assert asked == [
        "kl3m_nb",
        "Trainer",
        throughput.PADDED,
        "kl3m_nb",
        throughput.PADDED,
    ]  # in turns, the failed one once
    rows, parts = throughput.rows_of(
        get_profile("kl3m-002-520m", packing="dense", p_sft=0.0), "real", results
    )
    ours, trainer, padded = rows
    assert (ours["tokens/s"], ours["ours / this"], ours["failed"]) == (400.0, 1.0, "")
    assert (trainer["tokens/s"], trainer["failed"]) == ("", "out of memory")
    assert (padded["tokens/s"], padded["ours / this"]) == (500.0, "")
    assert (parts["forward %"], parts["clamp %"]) == ("100.0", "")


def test_a_part_that_comes_several_times_in_a_step_counts_each_time(throughput, monkeypatch):
    times = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr(throughput, "now", lambda: next(times))
    clock = throughput.PartClock()
    for name in ("kl3m_nb forward", "kl3m_nb backward", "kl3m_nb forward"):
        with clock(name):
            pass
    assert clock.seconds == {"forward": 1.5, "backward": 2.0}


def test_a_larger_micro_batch_makes_the_same_step(throughput):
    own = get_profile("kl3m-007-500m")
    assert throughput.batch(arguments(grad_accumulation=99), own) == {
        "micro_batch": 5,
        "grad_accumulation": 32,
    }
    assert throughput.batch(arguments(grad_accumulation=99, micro_batch=10), own) == {
        "micro_batch": 10,
        "grad_accumulation": 16,
    }
    assert (
        throughput.batch(arguments(grad_accumulation=4, micro_batch=10), own)["grad_accumulation"]
        == 4
    )


def test_mfu_leaves_out_what_is_computed_again(throughput, monkeypatch):
    """The 500M at the rate measured on an H200."""
    monkeypatch.setattr(throughput, "ON_GPU", True)
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    results = {
        "kl3m_nb": {"rate": 78_800.0, "peak": 1e9},
        "Trainer": {"rate": 78_800.0, "peak": 1e9, "recompute": True},
    }
    rows, _ = throughput.rows_of(get_profile("kl3m-007-500m"), "synthetic", results)
    assert [(row["MFU"], row["HFU"], row["MFU PaLM"]) for row in rows] == [
        ("37.4%", "39.7%", "51.0%"),
        ("37.4%", "51.0%", "51.0%"),
    ]
