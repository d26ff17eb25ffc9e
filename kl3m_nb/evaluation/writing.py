"""How well formed a set of samples is: variety, repetition, length, the form of legal drafting, and
entropy along the text.

The measures work on words and punctuation, not on token ids, so that models with different
tokenizers compare. None of them knows whether a sentence is true.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.evaluation.extraction import extraction_rates, score_extraction
from kl3m_nb.evaluation.generation import Prompt, Sample, Sampling, generate
from kl3m_nb.evaluation.legal_form import (
    brackets_balanced,
    citations,
    defined_terms,
    numbering_steps,
    quotes_balanced,
)
from kl3m_nb.model.scoring import score_sequences


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks, the units of the measures below."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams, pooled over `texts` (distinct-n, arXiv:1510.03055); NaN
    without any.

    It falls with the amount of text: compare only sets of the same prompts, number and length.
    """
    grams = [gram for text in texts for gram in _n_grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition_rate(text: str, n: int = 4) -> float:
    """Share of the n-grams of `text` that it had already (seq-rep-n, arXiv:1908.04319); NaN below n
    words.
    """
    grams = _n_grams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def ends_in_loop(text: str, repeats: int = 3, min_words: int = 8) -> bool:
    """Whether the last words are one phrase `repeats` times or more, over at least `min_words`
    words.

    Only the end counts: a model that has fallen into a loop stays there, while separator lines and
    lists stop.
    """
    sequence = words(text)
    for period in range(1, len(sequence) // repeats + 1):
        tail = sequence[-max(repeats * period, min_words) :]
        if len(tail) >= min_words and tail[period:] == tail[:-period]:
            return True
    return False


def self_bleu(texts: Sequence[str], n: int = 4) -> float:
    """Mean BLEU-n of each text against all others (self-BLEU, Texygen, arXiv:1802.01886): high when
    all say the same.

    Without smoothing: a text that shares no n-gram with any other scores 0. NaN for fewer than two
    texts of at least n words.
    """
    sequences = [sequence for text in texts if len(sequence := words(text)) >= n]
    if len(sequences) < 2:
        return math.nan
    log_precisions = [0.0] * len(sequences)
    for order in range(1, n + 1):
        counts = [Counter(_n_grams(sequence, order)) for sequence in sequences]
        highest = _two_highest(counts)
        for index, own in enumerate(counts):
            matched = sum(
                min(count, highest[gram][highest[gram][0] == (count, index)][0])
                for gram, count in own.items()
            )
            log_precisions[index] += (math.log(matched / own.total()) if matched else -math.inf) / n
    lengths = sorted(len(sequence) for sequence in sequences)
    scores = [
        math.exp(precision + min(0.0, 1 - _nearest_other(lengths, len(sequence)) / len(sequence)))
        for precision, sequence in zip(log_precisions, sequences, strict=True)
    ]
    return sum(scores) / len(scores)


def _two_highest(
    counts: Sequence[Counter],
) -> dict[tuple[str, ...], tuple[tuple[int, int], tuple[int, int]]]:
    """For each n-gram its two highest (count, text), so that the highest count in all *other* texts
    costs one look-up.
    """
    highest: dict = {}
    for index, of_text in enumerate(counts):
        for gram, count in of_text.items():
            first, second = highest.get(gram, ((0, -1), (0, -1)))
            mine = (count, index)
            highest[gram] = (mine, first) if mine > first else (first, max(second, mine))
    return highest


def _nearest_other(lengths: list[int], own: int) -> int:
    """The length nearest to `own` among the other texts; the shorter of two equally near."""
    others = lengths.copy()
    others.remove(own)
    return min(others, key=lambda length: (abs(length - own), length))


def samples_table(samples: Sequence[Sample]) -> pd.DataFrame:
    """A row for each sample: prompt, text, number of tokens, ended, and the measures that belong to
    one text.

    Repetition and loops are judged on the continuation; the legal form on prompt and continuation
    together, since what a prompt opens or counts is to be closed and counted on. `numbers`, `terms`
    and `citations` are how many were judged, `numbers_right`, `terms_used` and `citations_parsed`
    how many of them passed.
    """
    rows = []
    for sample in samples:
        whole = sample.prompt + sample.text
        numbers, terms, cited = (
            numbering_steps(whole),
            defined_terms(whole),
            citations(whole, complete=sample.ended),
        )
        rows.append(
            {
                "prompt": sample.prompt,
                "text": sample.text,
                "tokens": len(sample.tokens),
                "ended": sample.ended,
                "repetition_rate": repetition_rate(sample.text),
                "ends_in_loop": ends_in_loop(sample.text),
                "brackets_balanced": brackets_balanced(whole, complete=sample.ended),
                "quotes_balanced": quotes_balanced(whole, complete=sample.ended),
                "numbers": len(numbers),
                "numbers_right": sum(numbers),
                "terms": len(terms),
                "terms_used": sum(uses > 0 for uses in terms.values()),
                "citations": len(cited),
                "citations_parsed": sum(cited),
            }
        )
    return pd.DataFrame(rows)


def measure(samples: Sequence[Sample]) -> dict[str, float]:
    """Measures of a set of samples, all between 0 and 1 but for the counts, the length and the
    speed.

    `samples`, `mean_tokens`, `end_rate` (share that ended by itself), `distinct_1` to `distinct_3`
    (pooled), `self_bleu`, `repetition_rate` (mean over the samples with at least 4 words),
    `loop_rate`, `balanced_brackets_rate`, `balanced_quotes_rate`, `numbering_rate`,
    `terms_used_rate`, `citations_rate` (each pooled over all samples, with the `numbers`, `terms`
    and `citations` there were to judge; NaN where there were none), `tokens_per_second`. Raises
    ValueError without samples.
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
        "self_bleu": self_bleu(texts),
        "repetition_rate": float(table["repetition_rate"].mean()),
        "loop_rate": float(table["ends_in_loop"].mean()),
        "balanced_brackets_rate": float(table["brackets_balanced"].mean()),
        "balanced_quotes_rate": float(table["quotes_balanced"].mean()),
        "numbers": int(table["numbers"].sum()),
        "numbering_rate": _share(table["numbers_right"], table["numbers"]),
        "terms": int(table["terms"].sum()),
        "terms_used_rate": _share(table["terms_used"], table["terms"]),
        "citations": int(table["citations"].sum()),
        "citations_rate": _share(table["citations_parsed"], table["citations"]),
        "tokens_per_second": float(
            table["tokens"].sum() / sum(sample.seconds for sample in samples)
        ),
    }


def measure_extraction(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> dict[str, float]:
    """`extraction.extraction_rates` of the samples of those prompts that carry an expected answer,
    one sample a prompt.
    """
    pairs = zip(prompts, samples, strict=True)
    return extraction_rates(
        score_extraction(prompt.text, sample.text, prompt.expected)
        for prompt, sample in pairs
        if prompt.expected
    )


def entropy_along(model: PreTrainedModel, samples: Sequence[Sample]) -> pd.DataFrame:
    """Uncertainty of `model` along its own samples: a row per position with `samples`,
    `entropy_bits` and `surprise_bits`.

    Position 0 is the first token of the continuation. The entropy is that of the model's plain
    prediction (temperature 1, nothing cut off), the surprise −log₂ of the plain probability of the
    token that was drawn; where sampling is sharpened the surprise lies below the entropy. The
    end-of-text token counts as a token drawn.
    """
    sequences = [[*sample.prompt_tokens, *sample.tokens, *sample.end_tokens] for sample in samples]
    drawn = [len(sample.tokens) + len(sample.end_tokens) for sample in samples]
    rows = [
        pd.DataFrame(
            {
                "position": range(len(scores.loss)),
                "entropy_bits": scores.entropy,
                "surprise_bits": scores.loss,
            }
        )
        for scores in score_sequences(model, sequences, drawn)
    ]
    by_position = pd.concat(rows).groupby("position")
    return (by_position.mean() / math.log(2)).assign(samples=by_position.size()).reset_index()


def sampling_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    grid: Sequence[Sampling],
    advised: Sampling,
    seed: int,
) -> pd.DataFrame:
    """A row per setting of the grid: temperature, top_p, repetition_penalty, `advised`, and what
    `measure` gives.

    Every setting continues the same prompts with the same seed. `advised` marks the setting of the
    card, which is added where the grid lacks it.
    """
    marked = dict.fromkeys(grid, False) | {advised: True}
    return pd.DataFrame(
        {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "repetition_penalty": sampling.repetition_penalty,
            "advised": is_advised,
            **measure(
                generate(
                    model, tokenizer, prompts, sampling, seed, batch_size=max(16, len(prompts))
                )
            ),
        }
        for sampling, is_advised in marked.items()
    )


def _share(passed: pd.Series, judged: pd.Series) -> float:
    return float(passed.sum() / judged.sum()) if judged.sum() else math.nan


def _n_grams(sequence: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(sequence[offset:] for offset in range(n)), strict=False))
