"""Notebook 04 with one checkpoint and nothing to compare it with: trained by a run here, or come
from elsewhere.
"""

from __future__ import annotations

import json
import random
import shutil

import pytest

from kl3m_nb import evaluation, figures
from kl3m_nb.data import corpus, loader, sources
from kl3m_nb.data.documents import DocumentStream
from kl3m_nb.data.tokenizer import load_tokenizer, read_tokenizer
from kl3m_nb.evaluation import documents as evaluation_documents
from kl3m_nb.runs import checkpoints, registry
from kl3m_nb.training import loop
from tests.conftest import execute_notebook, small_profile

SMALL = {"document_count": 3, "prompt_count": 2, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two steps on enough documents to tell given ones from others, of a model with room
    for the longest prompt.
    """
    run_dir = tmp_path_factory.mktemp("one") / "run"
    loop.train(
        small_profile(context=512, seq_len=64, micro_batch=160, max_steps=2, held_out_windows=2),
        run_dir,
    )
    return run_dir


@pytest.fixture
def no_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path))
    monkeypatch.setattr(
        figures,
        "save_figure",
        lambda *_: registry.run_path("tiny", "generation").mkdir(exist_ok=True),
    )


def test_the_checkpoint_of_a_run_is_enough_and_known_by_its_path_as_text(run_dir, no_runs):
    shutil.copytree(run_dir, registry.run_path("tiny", "grown"))
    newest = checkpoints.latest_checkpoint(registry.run_path("tiny", "grown"))
    namespace = execute_notebook("04_generation_evaluation", {**SMALL, "trained": str(newest)})
    assert namespace["reference"] == namespace["subject"] == "trained"
    assert list(namespace["summary"].index) == list(namespace["gaps"]) == ["trained"]
    assert namespace["window"] == 64
    assert namespace["by_step"] == {2: namespace["judged"]["trained"]}  # not evaluated once more


def test_a_checkpoint_of_no_run_is_judged_without_what_it_has_seen(run_dir, no_runs, tmp_path):
    shutil.copytree(checkpoints.latest_checkpoint(run_dir), tmp_path / "elsewhere" / "model")
    namespace = execute_notebook(
        "04_generation_evaluation", {**SMALL, "others": str(tmp_path / "elsewhere" / "model")}
    )
    assert len(namespace["summary"]) == 1 and namespace["gaps"] == namespace["by_step"] == {}


def test_no_document_is_judged_that_stands_in_the_text_trained_on(no_runs, tmp_path, monkeypatch):
    """Each text of the files stands there twice, under a held-out name and under one
    that is not.
    """
    rng, names = random.Random(0), [f"d{i}" for i in range(3000)]
    sides = [
        [name for name in names if corpus.is_held_out(sources.Document(name, "", "")) == side]
        for side in (True, False)
    ]
    texts = [
        " ".join(rng.choices(["pay", "rent", "law", "term", "fee", "tax", "deed", "lien"], k=90))
        for _ in range(150)
    ]
    rows = [
        {"identifier": name, "text": text}
        for side in sides
        for name, text in zip(side, texts, strict=False)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_tokenizer("corpus", "package:licensedcode-data", 512).save_pretrained(
        tmp_path / "tokenizer"
    )
    settings = small_profile(
        context=512,
        seq_len=64,
        micro_batch=8,
        max_steps=2,
        held_out_windows=4,
        source=f"files:{tmp_path}/texts.jsonl",
        tokenizer=str(tmp_path / "tokenizer"),
    )
    checkpoint = loop.train(settings, registry.run_path("tiny", "grown")).checkpoint
    judged = []
    monkeypatch.setattr(
        evaluation,
        "evaluate_documents",
        lambda model, tokenizer, documents, *_, **__: judged.extend(documents),
    )
    with pytest.raises(AttributeError):  # the table of what nothing was predicted for
        execute_notebook("04_generation_evaluation", SMALL | {"document_count": 1000})
    tokenizer = read_tokenizer(str(checkpoint))
    stream = DocumentStream(settings.data, tokenizer)
    trained_on = {tokenizer.decode(stream.next()) for _ in range(400) if stream.epoch < 1}
    assert judged and len(trained_on) > 100
    assert not {document.text for document in judged} & trained_on


def test_a_document_is_predicted_from_a_token_that_stood_there_in_training(no_runs, monkeypatch):
    """Segments begin with `<|start|>`, and end with `<|end|>`, which therefore is never read."""

    class Enough(Exception):
        pass

    def stop(model, sequences, *_):
        read.extend(sequence[0] for sequence in sequences)
        raise Enough

    settings = small_profile(
        context=512, seq_len=64, max_steps=1, held_out_windows=2, packing="segments"
    )
    checkpoint = loop.train(settings, registry.run_path("tiny", "grown")).checkpoint
    read: list[int] = []
    monkeypatch.setattr(evaluation_documents, "score_sequences", stop)
    with pytest.raises(Enough):
        execute_notebook("04_generation_evaluation", SMALL)
    inputs = loader.open_stream(settings.data, read_tokenizer(str(checkpoint))).take(100).input_ids
    assert read[0] in inputs


def test_no_checkpoint_at_all_is_said(no_runs):
    with pytest.raises(ValueError, match="no checkpoint of tiny yet"):
        execute_notebook("04_generation_evaluation", SMALL)
