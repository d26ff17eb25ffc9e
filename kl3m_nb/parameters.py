"""The parameters of a notebook: what its cell tagged `parameters` accepts, and values checked against it.

Papermill only logs an unknown name and injects a value of any type; a mistyped `learning_rate` would train for hours with
the default. So every value is checked before a kernel starts.
"""

from __future__ import annotations

import ast
import io
import math
import os
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

import nbformat

from kl3m_nb.display import did_you_mean
from kl3m_nb.paths import notebooks_dir

KINDS = ("int", "float", "str", "bool")


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell, `name: kind = default  # help`; `kind` is "int", "float", "str" or "bool"."""

    name: str
    kind: str
    default: int | float | str | bool
    help: str


def find_notebook(name: str | os.PathLike) -> Path:
    """The notebook at the path `name`, or the one of the workbook called `name` ("02_training"); ValueError if neither is."""
    known = {path.stem: path for path in sorted(notebooks_dir().glob("*.ipynb"))}
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.name == str(name) and path.name.removesuffix(".ipynb") in known:
        return known[path.name.removesuffix(".ipynb")]
    here = f"a name: {', '.join(known)}" if known else f"start in a clone of the project ({notebooks_dir()} has none)"
    raise ValueError(f"There is no notebook {str(name)!r}; give the path of one, or {here}.")


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """What the cell tagged `parameters` of `notebook` accepts, in its order.

    Raises ValueError when there is no such notebook or cell, or a line of it is not an annotated literal.
    """
    source, statements = _parameters_cell(notebook)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    parameters = {}
    for statement in statements:
        parameter = _parameter(statement, comments.get(statement.end_lineno, ""))
        if parameter is None:
            raise ValueError(
                f"Line {statement.lineno} of the parameters cell of {notebook}, {ast.unparse(statement)!r}, is not of the "
                f"form 'name: type = literal  # help' with a type out of {', '.join(KINDS)}."
            )
        parameters[parameter.name] = parameter
    return parameters


def assigned_kinds(notebook: Path) -> dict[str, str]:
    """{name: type} of all that the parameters cell of `notebook` assigns, whatever the value; "" where a line names no type.

    For what is typed in JupyterLab: a line that was saved there may be any Python. Raises ValueError when there is no such
    notebook or cell, or it is not valid Python.
    """
    kinds = {}
    for statement in _parameters_cell(notebook)[1]:
        annotated = isinstance(statement, ast.AnnAssign)
        targets = [statement.target] if annotated else getattr(statement, "targets", [])
        kind = ast.unparse(statement.annotation) if annotated else ""
        kinds |= {target.id: kind if kind in KINDS else "" for target in targets if isinstance(target, ast.Name)}
    return kinds


def check_parameters(notebook: Path, given: dict[str, object]) -> dict[str, int | float | str | bool]:
    """`given` with every value cast to the type its parameter has in `notebook`.

    Text is read as a number or truth value where one is wanted: YAML 1.1 reads `1e-4` as text, a shell knows only text.
    Raises ValueError for a name the notebook does not have or a value that is not of its type.
    """
    accepted = read_parameters(notebook)
    checked = {}
    for name, value in given.items():
        if name not in accepted:
            hint = did_you_mean(name, accepted)
            raise ValueError(f"{notebook} has no parameter {name!r}{hint}; it accepts {', '.join(accepted) or 'none'}.")
        try:
            checked[name] = _cast(accepted[name].kind, value)
        except (ValueError, OverflowError):
            quotes = " (in YAML, put text in quotes)" if accepted[name].kind == "str" else ""
            raise ValueError(
                f"The parameter {name!r} of {notebook} is of type {accepted[name].kind}; {value!r} is not{quotes}."
            ) from None
    return checked


def load_notebook(notebook: Path) -> nbformat.NotebookNode:
    """The notebook in the file `notebook`; ValueError when there is none."""
    if not notebook.is_file():
        raise ValueError(f"There is no notebook {notebook}; give the path of an .ipynb file.")
    try:
        return nbformat.read(notebook, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError):
        raise ValueError(f"{notebook} is not a Jupyter notebook; give the path of an .ipynb file.") from None


def _parameters_cell(notebook: Path) -> tuple[str, list[ast.stmt]]:
    """The text of the parameters cell and its statements."""
    tagged = [cell for cell in load_notebook(notebook).cells if "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        raise ValueError(f"{notebook} has no cell tagged 'parameters'; tag the cell that holds them.")
    source = tagged[0].source
    try:
        return source, ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"The parameters cell of {notebook} is not valid Python: {error}.") from None


def _parameter(statement: ast.stmt, comment: str) -> Parameter | None:
    """The parameter a statement declares; None when it is not an annotated literal of one of the four types."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name) or statement.value is None:
        return None
    kind = ast.unparse(statement.annotation)
    try:
        default = ast.literal_eval(statement.value)
    except (ValueError, TypeError):
        return None
    if kind == "float" and type(default) is int:
        default = float(default)
    return Parameter(statement.target.id, kind, default, comment) if type(default).__name__ == kind in KINDS else None


def _cast(kind: str, value: object) -> int | float | str | bool:
    """`value` as a `kind`; ValueError where that would change what was meant."""
    if type(value).__name__ == kind == "str" or (kind == "bool" and isinstance(value, bool)):
        return value
    if kind == "bool" and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind in ("int", "float") and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        if kind == "int" and (isinstance(value, int) or re.fullmatch(r"\s*[+-]?[\d_]+\s*", str(value))):
            return int(value)
        number = float(value)
        if math.isfinite(number) and (kind == "float" or number.is_integer()):
            return int(number) if kind == "int" else number
    raise ValueError
