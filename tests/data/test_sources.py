from __future__ import annotations

import pytest

from kl3m_nb.data import sources
from kl3m_nb.data.sources import Options


def test_mixtures_are_read_with_their_weights_and_options():
    line = (
        "0.7*hub:o/n(score_max=8, tokenizer=o/t) +"
        " 0.3*files:texts/*.jsonl(mime_types=a/b|c/d,min_tokens=64) + "
    )
    parts = sources.parse_source(line + "package:licensedcode-data")
    assert [(str(part), part.weight, part.options) for part in parts] == [
        ("hub:o/n", 0.7, Options(score_max=8.0, tokenizer="o/t")),
        ("files:texts/*.jsonl", 0.3, Options(mime_types=("a/b", "c/d"), min_tokens=64)),
        ("package:licensedcode-data", 1.0, Options()),
    ]


def test_a_glob_with_signs_of_its_own_is_kept():
    (part,) = sources.parse_source("files:/data/[ab]*/part (1)?.jsonl")
    assert part.name == "/data/[ab]*/part (1)?.jsonl" and part.options == Options()


@pytest.mark.parametrize(
    "source",
    [
        "licensedcode-data",
        "package:other",
        "s3:bucket",
        "hub:",
        "0*files:x",
        "1.2.3*files:x",
        "files:a + 0*files:b",
    ],
)
def test_an_unknown_source_is_refused_with_the_known_forms(source):
    with pytest.raises(ValueError, match="package:licensedcode-data"):
        sources.parse_source(source)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "score_max",
        "score_max=high",
        "min_tokens=-1",
        "min_tokens=",
        "colour=red",
        "mime_types=",
    ],
)
def test_an_option_that_is_not_understood_is_refused_with_the_known_ones(options):
    with pytest.raises(ValueError, match="score_max, mime_types, min_tokens, tokenizer"):
        sources.parse_source(f"files:x({options})")
