from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl3m_nb.data import near_duplicates

texts = st.lists(
    st.lists(st.sampled_from("ab"), min_size=0, max_size=14).map(" ".join), min_size=1, max_size=6
)


def _sets(text, width):
    words = text.split()
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


@given(texts, texts)
def test_the_leak_rate_is_that_of_sets_of_word_runs(held_out, training):
    wanted = [_sets(text, 8) for text in held_out]
    known = set().union(*(_sets(text, 8) for text in training))
    arguments = [
        [near_duplicates.word_shingles(text) for text in side] for side in (held_out, training)
    ]
    if not any(wanted):
        with pytest.raises(ValueError, match="at least one document"):
            near_duplicates.leak_rate(*arguments)
        return
    expected = sum(len(own & known) for own in wanted) / sum(len(own) for own in wanted)
    assert near_duplicates.leak_rate(*arguments) == pytest.approx(expected)


@given(texts, st.lists(st.sampled_from("ab"), max_size=40).map(" ".join))
def test_likeness_is_the_larger_of_the_shares_known_and_covered(held_out, text):
    index = near_duplicates.ShingleIndex(
        [near_duplicates.word_shingles(other) for other in held_out]
    )
    words = text.split()
    own = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    sets = [_sets(other, 8) for other in held_out]
    known = sum(run in set().union(*sets) for run in own) / len(own) if own else 0.0
    covered = max((len(other & set(own)) / len(other) for other in sets if other), default=0.0)
    assert index.likeness(near_duplicates.word_shingles(text)) == pytest.approx(max(known, covered))


def test_case_punctuation_and_line_breaks_do_not_count():
    one, other = (
        "The Licensee, shall NOT\n(sub)license it now!",
        "the licensee shall not sub license it now",
    )
    first, second = (near_duplicates.word_shingles(text) for text in (one, other))
    assert first.tolist() == second.tolist() and first.size == 1


def test_token_rows_are_compared_by_runs_of_twelve():
    tokens = np.arange(100, 140, dtype=np.int32)
    index = near_duplicates.ShingleIndex([near_duplicates.token_shingles(tokens)])
    assert index.likeness(near_duplicates.token_shingles(tokens[5:17])) == 1.0
    assert index.likeness(near_duplicates.token_shingles(tokens[5:16])) == 0.0
