"""Legal form on hand-made texts: what closes, counts on, is used and parses, and what does not."""

from __future__ import annotations

import pytest

from kl3m_nb.evaluation.legal_form import (
    brackets_balanced,
    citations,
    defined_terms,
    numbering_steps,
    quotes_balanced,
)


@pytest.mark.parametrize(
    ("text", "balanced", "balanced_if_cut"),
    [
        ("within thirty (30) days [of notice {sic}]", True, True),
        ("within thirty (30 days", False, True),
        ("within thirty 30) days) of", False, False),
        ("(a] b", False, False),
        ("Conditions:\na) keep this notice;\n12) mark (all) changes;\niv) pay", True, True),
        ("as in section 3(a)(1)(ii)", True, True),
        ("", True, True),
    ],
)
def test_brackets(text, balanced, balanced_if_cut):
    assert brackets_balanced(text) is balanced
    assert brackets_balanced(text, complete=False) is balanced_if_cut


@pytest.mark.parametrize(
    ("text", "balanced", "balanced_if_cut"),
    [
        ('"Work" means the author\'s "code".', True, True),
        ('"Work means code.', False, True),
        ('"Work means code.\n\n"Code" means text.', False, False),
        ("“Work” means code.", True, True),
        ("“Work means code.", False, True),
        ("Work” means code.", False, False),
        ("“Work “code””", False, False),
    ],
)
def test_quotes(text, balanced, balanced_if_cut):
    assert quotes_balanced(text) is balanced
    assert quotes_balanced(text, complete=False) is balanced_if_cut


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("1. Grant\n2. Term\n3. Law", [True, True]),
        ("5. Disclaimer\n6. Liability", [True]),  # the first number may be any
        ("1. Grant\n3. Law", [False]),
        ("1. Grant\n3. Law\n4. Venue", [False, True]),  # counting goes on from a wrong number
        ("1. Grant\n1. Term", [False]),
        ("Section 1. A\n(a) b\n(b) c\n(1) d\n(2) e\n(c) f\nSection 2. G\n(a) h", [True] * 7),
        ("Section 1. A\n(b) c", [False]),  # a new level begins at its first value
        ("(g) x\n(h) y\n(i) z\n(j) w", [True] * 3),
        ("(a) x\n(i) y\n(ii) z\n(iii) v\n(b) w", [True] * 4),
        ("1.1 A\n1.2 B\n1.2.1 C\n1.3 D\n2. E\n2.1 F", [True] * 5),
        ("1.9 A\n2.1 B", [True]),  # the heading 2 may have no number
        ("1.1 A\n1.3 B", [False]),
        ("(y) A\n(z) B\n(aa) C", [True, True]),
        ("a) keep\nb) mark\nd) pay", [True, False]),
        ("within 30 days (a) or (c) of notice", []),  # in running text nothing is a number
        ("1. Only one", []),
        ("", []),
    ],
)
def test_numbers_that_count_on(text, steps):
    assert numbering_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ('"Work" means any text. The Work is free.', {"Work": 1}),
        ("“Source Code” shall mean the form. Source Code and Source Codes.", {"Source Code": 2}),
        (
            'Elm LLC (the "Landlord") and Dana Ruiz ("Tenant"). The Landlord pays.',
            {"Landlord": 1, "Tenant": 0},
        ),
        (
            (
                'A person (each, a "Party") and all (collectively, the "Parties") agree; each Party'
                " signs."
            ),
            {"Party": 1, "Parties": 0},
        ),
        ('"Work" means text. Workers rest.', {"Work": 0}),
        ('He said "Work" to her.', {}),
        ("", {}),
    ],
)
def test_defined_terms_and_their_uses(text, uses):
    assert defined_terms(text) == uses


@pytest.mark.parametrize(
    "citation",
    [
        "42 U.S.C. § 1983",
        "5 U.S.C. §552(a)(4)",
        "15 U.S.C. 78j",
        "42 U. S. C. § 2000e-2(a)",
        "29 C.F.R. § 1604.11",
        "40 C.F.R. Part 60",
        "17 C.F.R. § 240.10b-5",
        "76 Fed. Reg. 25,538",
        "Pub. L. No. 111-203",
        "Pub. L. 94–580",
        "504 U.S. 555",
        "410 U.S. 113, 153 (1973)",
        "812 F.3d 1018 (9th Cir. 2016)",
        "305 F. Supp. 2d 1 (D.D.C. 2004)",
        "93 S. Ct. 705",
        "U.S. Const. art. I, § 8, cl. 3",
        "U.S. Const. amend. XIV",
        "U. S. Const., Art. III",
        "Fed. R. Civ. P. 12(b)(6)",
        "Fed. R. Evid. 403",
        "Fed.R.Crim.P. 32.1",
    ],
)
def test_citations_that_parse(citation):
    assert citations(f"See {citation}.") == [True]


@pytest.mark.parametrize(
    "citation",
    [
        "U.S.C. § 1983",
        "77 U.S.C. § 12",
        "42 U.S.C. §",
        "0 U.S.C. § 4",
        "C.F.R. Part 60",
        "63 C.F.R. § 4",
        "29 C.F.R. the",
        "Fed. Reg. 25",
        "76 Fed. Reg.",
        "Pub. L. No. the",
        "504 U.S. the",
        "12 F.3d the",
        "U.S. Const. the",
        "U.S. Const. art. 1",
        "Fed. R. Civ. P. the",
        "Fed. R. Evid.",
    ],
)
def test_citations_that_do_not(citation):
    assert citations(f"See {citation} and others") == [False]


def test_citations_are_judged_one_by_one_and_other_words_are_none():
    assert citations("See 5 U.S.C. § 552, 99 C.F.R. 4 and 504 U.S. 555.") == [True, False, True]
    assert citations("The U.S. government of 1990 and the U.S. Code.") == []


@pytest.mark.parametrize(
    "cut",
    [
        "42 U.S.C.",
        "42 U.S.C. ",
        "42 U.S.C. §",
        "40 C.F.R. § ",
        "40 C.F.R. Sec",
        "76 Fed. Reg.",
        "Pub. L.",
        "Pub. L. No.",
        "Pub. L. No. 111-",
        "410 U.S.",
        "U.S. Const.",
        "U.S. Const. amend.",
        "Fed. R. Civ. P.",
        "Fed. R. Evid. ",
    ],
)
def test_a_citation_in_which_a_text_was_cut_is_not_judged(cut):
    assert citations(f"See {cut}", complete=False) == []
    assert citations(f"See {cut}") == [False]


@pytest.mark.parametrize(
    "wrong", ["U.S.C. §", "77 U.S.C.", "42 U.S.C. § and", "Fed. R. Civ. P. the", "0 C.F.R. Part"]
)
def test_a_citation_that_was_wrong_before_the_cut_is_wrong(wrong):
    assert citations(f"See {wrong}", complete=False) == [False]


def test_what_was_cited_before_the_cut_is_judged():
    assert citations("See 5 U.S.C. § 552 and 77 U.S.C. § 1 and 42 U.S.C. § 19", complete=False) == [
        True,
        False,
        True,
    ]
    assert citations("See 77 U.S.C. § 1 and 42 U.S.C. §", complete=False) == [False]
