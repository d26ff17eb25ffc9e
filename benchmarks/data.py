"""How fast is the data stream, beside `datasets` map + grouping on the same files, and how long
does a tokenizer train?

The stream must never be what training waits for. The model of 500M parameters takes 75,000 tokens/s
on the GPU it is made for: the target is five times that from pre-tokenized parquet, once from text
that is tokenized on the way.

    python benchmarks/data.py [--seconds 10] [--only streams]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _common import write_table

from kl3m_nb.data import corpus, loader, tokenizer
from kl3m_nb.profiles import DataSpec

GPU_TOKENS_PER_SECOND = 75_000
SOURCE = "package:licensedcode-data"
SEQ_LEN, WINDOWS = 4096, 8


def write_files(folder: Path, words) -> dict[str, str]:
    """The embedded corpus in the family's schema, once with tokens and once with text; the glob of
    each.
    """
    documents = corpus.preview(SOURCE, held_out=False)
    names = {
        "identifier": [document.identifier for document in documents],
        "dataset": [d.dataset for d in documents],
    }
    shared = pa.table(
        {
            **names,
            "mime_type": ["text/plain"] * len(documents),
            "score": pa.array([1.0] * len(documents), pa.float32()),
        }
    )
    texts = [document.text for document in documents]
    columns = {
        "tokens": pa.array(
            words(texts, add_special_tokens=False)["input_ids"], pa.list_(pa.int32())
        ),
        "text": pa.array(texts),
    }
    for name, column in columns.items():
        (folder / name).mkdir()
        table = shared.append_column(name, column)
        for number in range(4):
            part = table.slice(number * len(table) // 4, len(table) // 4)
            pq.write_table(part, folder / name / f"train-{number:05d}.parquet", row_group_size=100)
    return {name: f"{folder}/{name}/*.parquet" for name in columns}


def our_batches(files: str, words, packing: str = "dense") -> Iterator[torch.Tensor]:
    """The project's stream, with batches made ahead as in training."""
    spec = DataSpec(source=f"files:{files}", seq_len=SEQ_LEN, packing=packing, held_out_windows=8)
    stream = loader.PrefetchedStream(loader.open_stream(spec, words), batches=2)
    while True:
        yield stream.take(WINDOWS).labels


def mapped_batches(files: str, words) -> Iterator[torch.Tensor]:
    """`datasets` streaming, map (tokenize, join, group) and shuffle, as the library's own examples
    do it; pass after pass.
    """
    end = [words.eos_token_id]

    def group(batch: dict) -> dict:
        lists = (
            batch["tokens"]
            if "tokens" in batch
            else words(batch["text"], add_special_tokens=False)["input_ids"]
        )
        joined = list(itertools.chain.from_iterable([*tokens, *end] for tokens in lists))
        full = len(joined) // (SEQ_LEN + 1) * (SEQ_LEN + 1)
        return {
            "input_ids": [
                joined[start : start + SEQ_LEN + 1] for start in range(0, full, SEQ_LEN + 1)
            ]
        }

    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    grouped = rows.map(group, batched=True, batch_size=1000, remove_columns=rows.column_names)
    for seed in itertools.count():
        shuffled = grouped.shuffle(seed=seed, buffer_size=32).with_format("torch")
        for batch in torch.utils.data.DataLoader(shuffled, batch_size=WINDOWS, drop_last=True):
            yield batch["input_ids"][:, 1:]


def tokens_per_second(batches: Iterator[torch.Tensor], seconds: float) -> tuple[float, float]:
    """(labels/s after the first batch, seconds to the first batch); padding does not count."""
    began = time.perf_counter()
    next(batches)
    first = time.perf_counter()
    count = 0
    for batch in batches:
        count += int((batch != -100).sum())
        if time.perf_counter() - first > seconds:
            break
    return count / (time.perf_counter() - first), first - began


def stream_rows(files: dict[str, str], words, seconds: float) -> list[dict]:
    """A row a stream and kind of file: tokens/s, and that as a multiple of what the
    real GPU takes.
    """
    cases: list[tuple[str, Callable, str, float]] = [
        ("this project", our_batches, "tokens", 5.0),
        ("datasets map + grouping", mapped_batches, "tokens", 5.0),
        ("this project, segments", partial(our_batches, packing="segments"), "tokens", 5.0),
        ("this project", our_batches, "text", 1.0),
        ("datasets map + grouping", mapped_batches, "text", 1.0),
        ("this project, segments", partial(our_batches, packing="segments"), "text", 1.0),
    ]
    rows = []
    for stream, batches, column, times in cases:
        speed, first = tokens_per_second(batches(files[column], words), seconds)
        rows.append(
            {
                "stream": stream,
                "parquet_with": column,
                "tokens_per_second": speed,
                "times_the_gpu": speed / GPU_TOKENS_PER_SECOND,
                "target": times,
                "seconds_to_first_batch": first,
            }
        )
    return rows


def tokenizer_rows() -> list[dict]:
    """Training time of a tokenizer on the embedded corpus, by size and whitespace manner."""
    texts = [document.text for document in corpus.preview(SOURCE, held_out=False)]
    rows = []
    # without spaces in front, the words of the corpus give no more than 22,652 entries
    for manner, size in (
        ("ordinary", 4096),
        ("ordinary", 32_768),
        ("unorthodox", 4096),
        ("unorthodox", 16_384),
    ):
        began = time.perf_counter()
        trained = tokenizer.train_tokenizer(texts, size, manner)
        seconds = time.perf_counter() - began
        sample = texts[::20]
        count = sum(map(len, trained(sample, add_special_tokens=False)["input_ids"]))
        rows.append(
            {
                "whitespace": manner,
                "entries": len(trained),
                "seconds": seconds,
                "characters_per_token": sum(map(len, sample)) / count,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=10, help="how long each stream is measured"
    )
    parser.add_argument("--only", choices=("streams", "tokenizer"), help="one of the two tables")
    options = parser.parse_args()
    if options.only != "tokenizer":
        words = tokenizer.load_tokenizer("corpus", SOURCE, 32_768)
        with tempfile.TemporaryDirectory() as folder:
            write_table(
                "data_streams",
                stream_rows(write_files(Path(folder), words), words, options.seconds),
            )
    if options.only != "streams":
        write_table("data_tokenizer", tokenizer_rows())


if __name__ == "__main__":
    main()
