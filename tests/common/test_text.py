from __future__ import annotations

from kl3m_nb.common.text import Sentences


def test_sentences_stand_on_lines_of_their_own_and_are_escaped():
    shown = Sentences(line for line in ("σ₁ < 3.", "No matrix is ill."))
    assert repr(shown) == "σ₁ < 3.\nNo matrix is ill."
    assert shown._repr_html_().count("<div") == 2 and "σ₁ &lt; 3." in shown._repr_html_()
