"""Writing: what a model continues the project's prompts with, and plain measures of how well formed that is.

Sampling is transformers' own `generate`, in left-padded batches with a KV cache. The measures work on words and punctuation, not
on token ids, so that models with different tokenizers compare. None of them knows whether a sentence is true.
"""

from __future__ import annotations

import html
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.evaluation import evaluation_mode
from kl3m_nb.paths import prompts_dir

PROMPT_KINDS = ("card", "clause", "regulation", "citation", "extraction")


@dataclass(frozen=True)
class Prompt:
    """One prompt of `data/prompts/prompts.jsonl`."""

    id: str
    kind: str  # one of PROMPT_KINDS
    text: str


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are the kl3m-007 card's advice (kl3m-002: temperature 0.5).

    Nothing else filters the distribution: transformers' own default of `top_k = 50` is switched off. Temperature 0 takes the
    likeliest token.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"The temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"The repetition_penalty is {self.repetition_penalty}; it must be above 0, and 1 for none.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")


@dataclass(frozen=True)
class Sample:
    """One continuation."""

    prompt: str
    text: str  # the continuation alone, special tokens left out
    tokens: tuple[int, ...]  # ids of the continuation, without the end-of-text token
    ended: bool  # the model wrote its end-of-text token; otherwise it was cut at max_new_tokens
    seconds: float  # its share of the batch's time: these add up to the time of the whole call


def load_prompts(kind: str | None = None) -> list[Prompt]:
    """The project's prompts in the order of the file, of one kind or (without `kind`) of all kinds; the cards' come first.

    Raises ValueError for an unknown kind.
    """
    if kind is not None and kind not in PROMPT_KINDS:
        raise ValueError(f"There are no prompts of the kind {kind!r}; choose one of {', '.join(PROMPT_KINDS)}.")
    lines = (prompts_dir() / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [Prompt(**json.loads(line)) for line in lines]
    return [prompt for prompt in prompts if kind in (None, prompt.kind)]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int,
    batch_size: int = 16,
) -> list[Sample]:
    """One sampled continuation for every prompt, in the order of `prompts`; a prompt given twice is sampled twice.

    The same seed, prompts and batch size give the same samples on the same machine; the caller's random state and the model's
    mode are left as they were. The tokenizer must have a padding and an end-of-text token.
    Raises ValueError for a prompt without tokens and for one that leaves no room for `max_new_tokens` in the model's context.
    """
    config = _generation_config(sampling, tokenizer)
    _check_room(model, tokenizer, prompts, sampling)
    samples = []
    with evaluation_mode(model), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        _seed(model.device, seed)
        for start in range(0, len(prompts), batch_size):
            samples += _generate_batch(model, tokenizer, prompts[start : start + batch_size], config)
    return samples


def _generate_batch(model, tokenizer, prompts: Sequence[str], config: GenerationConfig) -> list[Sample]:
    started = time.perf_counter()
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False).to(
        model.device
    )
    output = model.generate(**inputs, generation_config=config)
    continuations = output[:, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
    seconds = (time.perf_counter() - started) / len(prompts)
    samples = []
    for prompt, tokens in zip(prompts, continuations, strict=True):
        ended = config.eos_token_id in tokens
        tokens = tokens[: tokens.index(config.eos_token_id)] if ended else tokens
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        samples.append(Sample(prompt=prompt, text=text, tokens=tuple(tokens), ended=ended, seconds=seconds))
    return samples


def _generation_config(sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    common = {
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "use_cache": True,
    }
    if sampling.temperature == 0:
        return GenerationConfig(do_sample=False, **common)
    return GenerationConfig(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, **common)


def _check_room(model, tokenizer, prompts: Sequence[str], sampling: Sampling) -> None:
    context = model.config.max_position_embeddings
    for prompt in prompts:
        length = len(tokenizer(prompt)["input_ids"])
        if length == 0:
            raise ValueError(f"The prompt {prompt!r} has no tokens; give the model at least one to continue.")
        if length + sampling.max_new_tokens > context:
            raise ValueError(
                f"The prompt {prompt[:40]!r} has {length} tokens, which with max_new_tokens {sampling.max_new_tokens} exceeds "
                f"the model's context of {context}; shorten the prompt or lower max_new_tokens."
            )


def _seed(device: torch.device, seed: int) -> None:
    """Seeds only the generators that `fork_rng` gives back: torch.manual_seed would reseed every other device for good."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks, the units of the measures below."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams, pooled over `texts` (distinct-n, arXiv:1510.03055); NaN without any.

    It falls with the amount of text: compare only sets of the same prompts, number and length.
    """
    grams = [gram for text in texts for gram in _n_grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition_rate(text: str, n: int = 4) -> float:
    """Share of the n-grams of `text` that it had already (seq-rep-n, arXiv:1908.04319); NaN below n words."""
    grams = _n_grams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def ends_in_loop(text: str, repeats: int = 3, min_words: int = 8) -> bool:
    """Whether the last words are one phrase `repeats` times or more, over at least `min_words` words.

    Only the end counts: a model that has fallen into a loop stays there, while separator lines and lists stop.
    """
    sequence = words(text)
    for period in range(1, len(sequence) // repeats + 1):
        tail = sequence[-max(repeats * period, min_words) :]
        if len(tail) >= min_words and tail[period:] == tail[:-period]:
            return True
    return False


_PAIRS = {")": "(", "]": "[", "}": "{"}
_LIST_MARKER = re.compile(r"(?:^|\s)(?:\d{1,3}|[a-z]{1,2}|[ivxl]+)$", re.IGNORECASE)


def brackets_balanced(text: str, complete: bool = True) -> bool:
    """Whether (), [] and {} close what was opened, in order; list markers such as `a)` and `12)` are not brackets.

    A text that is not `complete` was cut, so what is still open at its end is no fault.
    """
    still_open = []
    for position, mark in enumerate(text):
        if mark in "([{":
            still_open.append(mark)
        elif mark in _PAIRS:
            if still_open and still_open[-1] == _PAIRS[mark]:
                still_open.pop()
            elif not (mark == ")" and _LIST_MARKER.search(text[max(0, position - 8) : position])):
                return False
    return not (complete and still_open)


def quotes_balanced(text: str, complete: bool = True) -> bool:
    """Whether double quotes, straight and curly, come in pairs within each paragraph (paragraphs end at blank lines).

    The last paragraph of a text that is not `complete` may end inside a quotation. Single quotes are not judged: they are
    apostrophes as well.
    """
    paragraphs = re.split(r"\n\s*\n", text)
    for index, paragraph in enumerate(paragraphs):
        may_stay_open = not complete and index == len(paragraphs) - 1
        depth = 0
        for mark in re.findall("[“”]", paragraph):
            depth += 1 if mark == "“" else -1
            if depth not in (0, 1):
                return False
        if (depth or paragraph.count('"') % 2) and not may_stay_open:
            return False
    return True


def samples_table(samples: Sequence[Sample]) -> pd.DataFrame:
    """A row for each sample: prompt, text, number of tokens, ended, and the measures that belong to one text.

    Brackets and quotes are judged on prompt and continuation together, the others on the continuation.
    """
    return pd.DataFrame(
        {
            "prompt": sample.prompt,
            "text": sample.text,
            "tokens": len(sample.tokens),
            "ended": sample.ended,
            "repetition_rate": repetition_rate(sample.text),
            "ends_in_loop": ends_in_loop(sample.text),
            "brackets_balanced": brackets_balanced(sample.prompt + sample.text, complete=sample.ended),
            "quotes_balanced": quotes_balanced(sample.prompt + sample.text, complete=sample.ended),
        }
        for sample in samples
    )


def measure(samples: Sequence[Sample]) -> dict[str, float]:
    """Measures of a set of samples, all between 0 and 1 but for the counts, the length and the speed.

    `samples`, `mean_tokens`, `end_rate` (share that ended by itself), `distinct_1` to `distinct_3` (pooled), `repetition_rate`
    (mean over the samples with at least 4 words), `loop_rate`, `balanced_brackets_rate`, `balanced_quotes_rate`,
    `tokens_per_second`. Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("measure was given no samples; generate at least one.")
    table = samples_table(samples)
    texts = list(table["text"])
    return {
        "samples": len(samples),
        "mean_tokens": float(table["tokens"].mean()),
        "end_rate": float(table["ended"].mean()),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "distinct_3": distinct_n(texts, 3),
        "repetition_rate": float(table["repetition_rate"].mean()),
        "loop_rate": float(table["ends_in_loop"].mean()),
        "balanced_brackets_rate": float(table["brackets_balanced"].mean()),
        "balanced_quotes_rate": float(table["quotes_balanced"].mean()),
        "tokens_per_second": float(table["tokens"].sum() / sum(sample.seconds for sample in samples)),
    }


class Gallery:
    """Prompts in bold, each followed by its continuation; HTML in a notebook, plain text elsewhere."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)

    def _repr_html_(self) -> str:
        blocks = (
            f'<p style="white-space: pre-wrap; margin: 0 0 1.2em 0"><b>{html.escape(sample.prompt)}</b>'
            f"{html.escape(sample.text)} <small>[{_ending(sample)}]</small></p>"
            for sample in self.samples
        )
        return f'<div style="max-width: 60em; text-align: left">{"".join(blocks)}</div>'

    def __repr__(self) -> str:
        return "\n\n".join(f"> {sample.prompt}|{sample.text} [{_ending(sample)}]" for sample in self.samples)


def _ending(sample: Sample) -> str:
    return "end" if sample.ended else f"cut at {len(sample.tokens)} tokens"


def _n_grams(sequence: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(sequence[offset:] for offset in range(n)), strict=False))
