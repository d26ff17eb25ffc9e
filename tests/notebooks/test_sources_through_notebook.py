"""Notebook 00 trains from files, a data set of the hub and its mirror, is stopped midway, continues
with the very next token.

The package's turn is in test_headless, there as a job of its own.
"""

from __future__ import annotations

import json
import os
import signal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kl3m_nb import figures, jupyter
from kl3m_nb.data.instructions import load_pairs
from kl3m_nb.data.tokenizer import load_tokenizer
from kl3m_nb.runs import checkpoints, registry
from kl3m_nb.runs.metrics import read_metrics
from tests.conftest import at_step, execute_notebook

STEPS, STOP_AFTER = 6, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Our own texts as a user's jsonl files, as a mirror in the family's schema, and a tokenizer
    for both.
    """
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = load_tokenizer("corpus", "package:licensedcode-data", 1024)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [
        {
            "identifier": pair.id,
            "dataset": pair.use,
            "mime_type": "text/plain",
            "score": 2.0,
            "text": pair.response,
        }
        for pair in load_pairs()
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        row["tokens"] = tokenizer.encode(row.pop("text"))
    strings = {name: pa.string() for name in ("identifier", "dataset", "mime_type")}
    schema = pa.schema({**strings, "tokens": pa.list_(pa.int32()), "score": pa.float32()})
    (folder / "mirror" / "data").mkdir(parents=True)
    path = folder / "mirror" / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=32)
    return folder


@pytest.fixture(params=["files", "mirror", "hub"])
def parameters(request, folder, monkeypatch):
    load_dataset = (
        datasets.load_dataset
    )  # the library's own streaming, with a folder in the hub's place
    mirror = str(folder / "mirror")
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, **options: load_dataset({"owner/name": mirror}[name], **options),
    )
    source = {
        "files": (
            f"0.5*files:{folder}/*.jsonl(min_tokens=4) + 0.5*files:{folder}/mirror/data/*.parquet"
        ),
        "mirror": f"hub:{mirror}(score_max=8, mime_types=text/plain)",
        "hub": "hub:owner/name(score_max=8, mime_types=text/plain)",
    }[request.param]
    return {
        "run": f"from-{request.param}",
        "source": source,
        "tokenizer": str(folder / "tokenizer"),
        "max_steps": STEPS,
        "micro_batch": 2,
        "seq_len": 48,
    }


def test_a_run_from_each_source_is_stopped_and_continues_with_the_next_token(
    parameters, monkeypatch
):
    monkeypatch.setattr(figures, "save_figure", lambda *_: None)
    monkeypatch.setattr(jupyter, "LiveView", lambda run_dir: lambda row: None)
    whole = execute_notebook("00_source_model", {**parameters, "run": parameters["run"] + "-whole"})
    stop = at_step(
        STOP_AFTER, lambda: os.kill(os.getpid(), signal.SIGINT)
    )  # as the notebook's stop button does
    monkeypatch.setattr(jupyter, "LiveView", lambda run_dir: stop)
    with pytest.raises(KeyboardInterrupt):
        execute_notebook("00_source_model", parameters)
    run_dir = registry.run_path("tiny", "source", parameters["run"])
    assert checkpoints.checkpoint_step(checkpoints.latest_checkpoint(run_dir)) == STOP_AFTER
    monkeypatch.setattr(jupyter, "LiveView", lambda run_dir: lambda row: None)
    namespace = execute_notebook("00_source_model", parameters)
    assert namespace["settings"].data.source == parameters["source"]
    expected, found = (read_metrics(path, "train") for path in (whole["run_dir"], run_dir))
    assert list(found.step) == list(range(1, STEPS + 1))
    assert list(found.loss) == list(expected.loss)
