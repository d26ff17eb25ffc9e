"""Multiple choice on the project's own tasks, and the same tasks through lm-eval's `hf` backend.

A task is one file pair in `data/tasks/`: lm-eval's own YAML and its items as JSON lines; both
evaluations read the same files. `answer_items` needs nothing but a model; `run_lm_eval` needs the
extra `harness` and gives the same accuracies. lm-eval's figures for whole documents
(`held_out_documents`) are those of `documents` with a stride of the whole window.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.common.files import replace_text
from kl3m_nb.common.intervals import Interval, share_interval
from kl3m_nb.common.paths import checkpoint_place, tasks_dir
from kl3m_nb.data.sources import Document
from kl3m_nb.data.special_ids import border_id
from kl3m_nb.data.tokenizer import read_tokenizer
from kl3m_nb.model.scoring import score_sequences

TASKS = ("clause_cloze", "next_section")


HELD_OUT_TASK = "held_out_documents"


@dataclass(frozen=True)
class ChoiceItem:
    """One question: which of `choices` follows `context`, joined to it by `delimiter`? `answer` is
    the right one's place.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int
    delimiter: str


def load_items(task: str) -> list[ChoiceItem]:
    """The items of one task in the order of its file. Raises ValueError for an unknown task."""
    config = task_config(task)
    lines = (
        Path(config["dataset_kwargs"]["data_files"]["test"])
        .read_text(encoding="utf-8")
        .splitlines()
    )
    rows = [json.loads(line) for line in lines]
    return [
        ChoiceItem(**row | {"choices": tuple(row["choices"])}, delimiter=config["target_delimiter"])
        for row in rows
    ]


def task_config(task: str) -> dict:
    """lm-eval's configuration of one task, with the absolute path of its items. Raises ValueError
    for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}; choose one of {', '.join(TASKS)}.")
    config = yaml.safe_load((tasks_dir() / f"{task}.yaml").read_text(encoding="utf-8"))
    config["dataset_kwargs"]["data_files"]["test"] = str(tasks_dir() / f"{task}.jsonl")
    return config


def answer_items(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[ChoiceItem]
) -> pd.DataFrame:
    """A row per item: id, `correct`, `correct_per_character`, `right_log_likelihood` and
    `best_wrong_log_likelihood` in nats, and `right_characters`.

    The choice of a model is the one whose text has the highest log-likelihood behind the context,
    in total or divided by its characters: lm-eval's `acc` and `acc_norm`. Context and choice are
    tokenized together and cut as `encode_pair` does; as in lm-eval, what is too long for the
    model's context loses its beginning. Raises ValueError for a choice that alone is too long.
    """
    longest = model.config.max_position_embeddings + 1  # the last token is only predicted
    sequences, predicted = [], []
    for item in items:
        for choice in item.choices:
            context, continuation = encode_pair(tokenizer, item.context, item.delimiter + choice)
            sequences.append([*context, *continuation][-longest:])
            predicted.append(len(continuation))
    scores = iter(score_sequences(model, sequences, predicted))
    rows = []
    for item in items:
        log_likelihoods = [-next(scores).loss.sum().item() for _ in item.choices]
        per_character = [
            value / len(choice) for value, choice in zip(log_likelihoods, item.choices, strict=True)
        ]
        rows.append(
            {
                "id": item.id,
                "correct": log_likelihoods.index(max(log_likelihoods)) == item.answer,
                "correct_per_character": per_character.index(max(per_character)) == item.answer,
                "right_log_likelihood": log_likelihoods[item.answer],
                "right_characters": len(item.choices[item.answer]),
                "best_wrong_log_likelihood": max(
                    v for place, v in enumerate(log_likelihoods) if place != item.answer
                ),
            }
        )
    return pd.DataFrame(rows)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """The token ids of two texts, tokenized together: those that the model reads, and those that it
    predicts, at least one each.

    The rule is lm-eval's: blanks at the end of the context belong to the continuation, and the cut
    is at the length of the context tokenized alone. Where a token goes over the end of the context,
    lm-eval would leave out a part of the text, or all of it; then the cut is at the last border
    between two tokens that is not behind the end of the context, so the model predicts the last
    token of the context anew, together with the continuation.
    """
    end = len(context.rstrip())
    alone, whole = tokenizer.encode(context[:end]), tokenizer.encode(context + continuation)
    cut = len(alone)
    if whole[:cut] != alone or cut == len(whole):
        ends = [
            last
            for _, last in tokenizer(context + continuation, return_offsets_mapping=True)[
                "offset_mapping"
            ]
        ]
        cut = next((place for place, last in enumerate(ends) if last > end), len(whole) - 1)
    if cut == 0:  # context and continuation begin in one token
        whole, cut = [border_id(tokenizer), *whole], 1
    return whole[:cut], whole[cut:]


def accuracy(answers: pd.DataFrame, column: str = "correct") -> Interval:
    """Share of right answers with its 95% interval over the items; `column` may be
    `correct_per_character`.
    """
    return share_interval(answers[column].to_numpy())


def answer_bits(answers: pd.DataFrame) -> float:
    """Bits per character that the right answers cost: finer than accuracy, since every item counts
    by how nearly it was right.
    """
    return float(
        -answers["right_log_likelihood"].sum() / math.log(2) / answers["right_characters"].sum()
    )


def task_summary(answers: pd.DataFrame) -> dict[str, float]:
    """The figures of one row of a table: `accuracy` with its 95% interval `low` to `high`, the
    accuracy `per_character` (of the choice that is likeliest by character), and `answer_bits`.
    """
    share = accuracy(answers)
    return {
        "accuracy": share.mean,
        "low": share.low,
        "high": share.high,
        "per_character": float(answers["correct_per_character"].mean()),
        "answer_bits": answer_bits(answers),
    }


def check_lm_eval() -> None:
    """Raises ValueError where lm-eval, the extra `harness`, is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed; install it: pip install -e '.[harness]'.")


def run_lm_eval(
    checkpoint: str | Path,
    window: int,
    tasks: Sequence[str] = TASKS,
    documents: Sequence[Document] = (),
    prefix: int | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, float]]:
    """lm-eval's own figures for a checkpoint folder or hub id: for every task `acc` and `acc_norm`.

    With `documents` there is also `held_out_documents`, with `bits_per_byte` and `byte_perplexity`
    of their texts in windows of `window` tokens that do not overlap. A document is predicted from
    the token `prefix` as by `evaluate_documents`: without one from that of `border_id`, where
    lm-eval would take the beginning-of-text token. The tokenizer is that of `read_tokenizer`, and
    texts are cut by `encode_pair`. Nothing is downloaded. Raises ValueError without the extra
    `harness`, for an unknown task and for documents without text.
    """
    check_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    configs = [task_config(task) for task in tasks]
    tokenizer = read_tokenizer(str(checkpoint))
    before = border_id(tokenizer) if prefix is None else prefix

    class CutByOurRule(HFLM):
        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            return encode_pair(tokenizer, context, continuation)

    with tempfile.TemporaryDirectory() as folder:
        if documents:
            configs.append(_document_config(documents, Path(folder)))
        results = simple_evaluate(
            model=CutByOurRule(
                pretrained=checkpoint_place(checkpoint).name,
                tokenizer=copy.deepcopy(tokenizer),  # one without a padding token is given one
                dtype="float32",
                max_length=window,
                prefix_token_id=before,
                batch_size=batch_size,
                device="cuda" if torch.cuda.is_available() else "cpu",
            ),
            tasks=configs,
            bootstrap_iters=0,
            verbosity="ERROR",
        )["results"]
    return {task: _plain_names(figures) for task, figures in results.items()}


def _document_config(documents: Sequence[Document], folder: Path) -> dict:
    """A rolling log-likelihood task over the texts of `documents`, written to `folder`."""
    if not all(document.text for document in documents):
        raise ValueError(
            "lm-eval reads texts, and some of these documents hold only tokens; decode them first."
        )
    path = folder / f"{HELD_OUT_TASK}.jsonl"
    replace_text(
        path, "".join(json.dumps({"text": document.text}) + "\n" for document in documents)
    )
    return {
        "task": HELD_OUT_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        "metadata": {"version": 1.0},
    }


def _plain_names(figures: dict) -> dict[str, float]:
    """`acc,none` is `acc`; standard errors and labels are left out."""
    named = {
        name.partition(",")[0]: value for name, value in figures.items() if isinstance(value, float)
    }
    return {
        name: value
        for name, value in named.items()
        if not name.endswith("stderr") and math.isfinite(value)
    }
