"""Bad words and protected groups in what a model writes, counted by word lists; and a place to plug
in a better judge.

A list finds words, not meaning. It misses insults in polite words, irony, other spellings and other
languages; it counts quotations, and a text that forbids an insult counts like one that utters it.
Naming a protected group is not bias: statutes do it on purpose. The rates tell whether something
changed between two models that continued the same prompts, and where to read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import pandas as pd

from kl3m_nb.common.paths import resolve, word_lists_dir

# Gives every text a score between 0 and 1, higher is worse: a classifier, a service, a person with
# a form.
Judge = Callable[[Sequence[str]], Sequence[float]]


_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")


def find_bad_words(text: str, word_list: str = "") -> list[str]:
    """Every bad word of `text` in lower case, in the order of the text; `word_list` names a file
    other than the project's own.
    """
    pattern = _pattern(_stems(word_list or str(word_lists_dir() / "bad_words.txt")))
    return [match.group().lower() for match in pattern.finditer(text)]


def find_groups(text: str) -> list[tuple[str, str]]:
    """(ground, word) of every protected group named in `text`, by ground."""
    found = []
    for ground, stems in _grounds().items():
        found += [(ground, match.group().lower()) for match in _pattern(stems).finditer(text)]
    return found


def toxicity_table(
    texts: Sequence[str], judges: Mapping[str, Judge] | None = None, word_list: str = ""
) -> pd.DataFrame:
    """A row per text: `text`, `bad_words`, `groups` (grounds named), `bad_words_near_group`, and a
    column per judge.

    `bad_words_near_group` counts the bad words in sentences that name a protected group. Each of
    `judges` is called once with all texts. Raises ValueError for a judge that does not answer with
    one score between 0 and 1 for every text.
    """
    rows = []
    for text in texts:
        near = sum(
            len(find_bad_words(part, word_list))
            for part in _SENTENCE_END.split(text)
            if find_groups(part)
        )
        grounds = sorted({ground for ground, _ in find_groups(text)})
        bad = len(find_bad_words(text, word_list))
        rows.append(
            {
                "text": text,
                "bad_words": bad,
                "groups": ", ".join(grounds),
                "bad_words_near_group": near,
            }
        )
    table = pd.DataFrame(rows)
    for name, judge in (judges or {}).items():
        scores = [float(score) for score in judge(list(texts))]
        if len(scores) != len(texts) or not all(0 <= score <= 1 for score in scores):
            raise ValueError(
                f"The judge {name!r} must give one score between 0 and 1 for each of the"
                f" {len(texts)} texts."
            )
        table[name] = scores
    return table


def measure_toxicity(
    texts: Sequence[str], judges: Mapping[str, Judge] | None = None, word_list: str = ""
) -> dict[str, float]:
    """Rates over `texts`, continuations without their prompts, and the mean score of every judge.

    `bad_words_per_1000` words; `bad_text_rate`, the share of texts with any; `group_rate`, the
    share that name a protected group; `near_group_rate`, the share with a bad word in a sentence
    that names one. Raises ValueError without texts.
    """
    if not texts:
        raise ValueError("measure_toxicity was given no texts; generate at least one.")
    table = toxicity_table(texts, judges, word_list)
    words = sum(len(re.findall(r"\w+", text)) for text in texts)
    return {
        "bad_words_per_1000": 1000 * float(table["bad_words"].sum()) / max(1, words),
        "bad_text_rate": float((table["bad_words"] > 0).mean()),
        "group_rate": float((table["groups"] != "").mean()),
        "near_group_rate": float((table["bad_words_near_group"] > 0).mean()),
        **{name: float(table[name].mean()) for name in judges or {}},
    }


@lru_cache
def _stems(path: str) -> tuple[str, ...]:
    lines = resolve(path).read_text(encoding="utf-8").splitlines()
    return tuple(
        line.strip().lower() for line in lines if line.strip() and not line.startswith("#")
    )


@lru_cache
def _grounds() -> dict[str, tuple[str, ...]]:
    grounds: dict[str, list[str]] = {}
    for line in _stems(str(word_lists_dir() / "protected_groups.txt")):
        ground, _, stem = line.partition("\t")
        grounds.setdefault(ground, []).append(stem)
    return {ground: tuple(stems) for ground, stems in grounds.items()}


@lru_cache
def _pattern(stems: tuple[str, ...]) -> re.Pattern:
    """Longest first; white space in a stem is any white space, a closing "." a word boundary, else
    the word is taken whole.
    """
    forms = []
    for stem in sorted(stems, key=len, reverse=True):
        body = r"\s+".join(re.escape(word) for word in stem.removesuffix(".").split())
        forms.append(body + (r"\b" if stem.endswith(".") else r"\w*"))
    return re.compile(rf"\b(?:{'|'.join(forms)})", re.IGNORECASE)
