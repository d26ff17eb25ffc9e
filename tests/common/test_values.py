"""What people write in a shell or a file is read as they mean it, or refused."""

from __future__ import annotations

import pytest

from kl3m_nb import cli
from kl3m_nb.common.values import cast, listed, read_mapping


@pytest.mark.parametrize(
    "text",
    ["0500", "-017", "00", "0_5", "1:30", "1:30:00", "0o17", "0x1f", "190:20:30.15", "", "~"],
)
@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_number_that_yaml_reads_in_another_base_is_refused_wherever_it_is_written(
    text, kind, tmp_path, capsys
):
    with pytest.raises(ValueError):
        cast(kind, text)
    (tmp_path / "p.yaml").write_text(f"value: {text}\n")
    with pytest.raises(ValueError):
        cast(kind, read_mapping(tmp_path / "p.yaml")["value"])
    field = {"int": "max_steps", "float": "base_lr"}[kind]
    assert cli.main(["estimate", "tiny", "--set", field, text]) == 2
    assert f"{field!r} is of type {kind}; {text!r} is not" in capsys.readouterr().err
    assert cli.main(["run", "02_training", "-p", field, text]) == 2
    assert (
        f"{field!r} of " in (error := capsys.readouterr().err)
        and f"is of type {kind}; {text!r} is not" in error
    )


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        *[
            ("int", "500", 500),
            ("int", "-1", -1),
            ("int", "1_000", 1000),
            ("int", "0", 0),
            ("int", "1e3", 1000),
        ],
        *[
            ("float", "1e-4", 1e-4),
            ("float", "0.5", 0.5),
            ("float", "3", 3.0),
            ("float", "-0", 0.0),
            ("float", "00.5", 0.5),
        ],
        *[
            ("bool", "true", True),
            ("str", "on", "on"),
            ("str", "0500", "0500"),
            ("str", "1:30", "1:30"),
            ("list", "a b", ["a", "b"]),
        ],
    ],
)
def test_a_file_and_a_shell_are_read_alike(kind, text, value, tmp_path):
    (tmp_path / "p.yaml").write_text(f"value: {text}\n")
    from_file, from_shell = cast(kind, read_mapping(tmp_path / "p.yaml")["value"]), cast(kind, text)
    assert from_file == from_shell == value and type(from_file) is type(from_shell) is type(value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "names a a second time in line 3"),
        ("a: {b: 1, b: 2}\n", "names b a second time in line 1"),
        *[(content, "is empty") for content in ("", "# nothing\n", "{}\n", "---\n")],
        ("- a\n", "holds a list"),
        ("a: [1\n", "is not valid YAML"),
        ("a: 1\n---\na: 2\n", "is not valid YAML"),
    ],
)
def test_a_parameter_file_that_cannot_be_meant_is_refused_in_one_sentence(
    content, words, tmp_path, capsys
):
    (tmp_path / "p.yaml").write_text(content)
    assert cli.main(["run", "02_training", "-f", str(tmp_path / "p.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"p.yaml {words}" in error and error.count("\n") == 1


def test_a_list_is_written_as_one_or_as_a_text_with_quotes(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "plain: [a, 'b c']\nlines:\n  - a\n  - b, c\ntext: a, 'b c'\nnested: [a, [b]]\n"
    )
    values = read_mapping(tmp_path / "p.yaml")
    assert cast("list", values["plain"]) == cast("list", values["text"]) == ["a", "b c"]
    assert cast("list", values["lines"]) == ["a", "b, c"] == listed("a 'b, c'")
    for wrong in (values["nested"], 3, None, "a 'b"):
        with pytest.raises(ValueError):
            cast("list", wrong)
