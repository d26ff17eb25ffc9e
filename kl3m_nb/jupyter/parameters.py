"""The parameters of a notebook: what its cell tagged `parameters` accepts, and values checked
against it.

Papermill only logs an unknown name and injects a value of any type; a mistyped `learning_rate`
would train for hours with the default. So names and types are checked before a kernel starts, and
again by the notebook's own configuration cell. Whether a value can be meant is judged by what the
cell hands it to.
"""

from __future__ import annotations

import ast
import io
import os
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from kl3m_nb.common.paths import notebooks_dir
from kl3m_nb.common.text import did_you_mean
from kl3m_nb.common.values import KINDS, cast

_INJECTED = "# Parameters\n"  # how papermill begins the cell it injects


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell, `name: kind = default  # help`; `kind` is one of
    `values.KINDS`.
    """

    name: str
    kind: str
    default: int | float | str | bool | list[str]
    help: str


def find_notebook(name: str | os.PathLike) -> Path:
    """The notebook at the path `name`, or the one of the workbook called `name` ("02_training");
    ValueError if neither is.
    """
    known = {path.stem: path for path in sorted(notebooks_dir().glob("*.ipynb"))}
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.name == str(name) and path.name.removesuffix(".ipynb") in known:
        return known[path.name.removesuffix(".ipynb")]
    here = (
        f"a name: {', '.join(known)}"
        if known
        else f"start in a clone of the project ({notebooks_dir()} has none)"
    )
    raise ValueError(f"There is no notebook {str(name)!r}; give the path of one, or {here}.")


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """What the cell tagged `parameters` of `notebook` accepts, in its order.

    Raises ValueError when there is no such notebook or cell, or a line of it is not an annotated
    literal.
    """
    source, statements = _parameters_cell(notebook)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    parameters = {}
    for statement in statements:
        parameter = _parameter(
            statement, comments.get(statement.end_lineno or statement.lineno, "")
        )
        if parameter is None:
            raise ValueError(
                f"Line {statement.lineno} of the parameters cell of {notebook},"
                f" {ast.unparse(statement)!r}, is not of the form 'name: type = literal  # help'"
                f" with a type out of {', '.join(KINDS)}."
            )
        parameters[parameter.name] = parameter
    return parameters


def check_parameters(
    notebook: Path, given: dict[str, object]
) -> dict[str, int | float | str | bool | list[str]]:
    """What is to be injected into `notebook`: `given`, and what an earlier run has injected there,
    cast to their types.

    A notebook that was executed carries its parameters in a cell of its own, which overrules the
    cell tagged `parameters` in the kernel; `given` overrules both. Text is read as a number or
    truth value where one is wanted, for a shell knows only text. Raises ValueError for a name the
    notebook does not have or a value that is not of its type.
    """
    accepted = read_parameters(notebook)
    values = _injected(notebook) | given
    require_known(values, accepted, notebook)
    checked = {}
    for name, value in values.items():
        kind = accepted[name].kind
        try:
            checked[name] = cast(kind, value)
        except (ValueError, OverflowError) as error:
            hint = str(error) or (" (in YAML, put text in quotes)" if kind == "str" else "")
            raise ValueError(
                f"The parameter {name!r} of {notebook} is of type {kind}; {value!r} is not{hint}."
            ) from None
    return checked


def check_notebook(name: str, namespace: Mapping[str, Any]) -> None:
    """Checks the parameters that a kernel has seen, in the notebook `name` with the `globals()`
    `namespace`: papermill injects any name and casts no value, and JupyterLab takes any line.

    What was seen is read from the cells that IPython remembers. Raises ValueError for an injected
    name that no cell declares, and for a value that is not of its declared type.
    """
    declared: dict[str, str] = {}
    injected: Iterable[str] = ()
    for source in namespace.get("In", ()):
        declared |= _declared(source)
        if source.startswith(_INJECTED):
            injected = assigned_names(source)
    require_known(injected, declared, name)
    for key in filter(namespace.__contains__, declared):
        value, kind = namespace[key], declared[key]
        found = type(value).__name__
        if found != kind and (found, kind) not in (("int", "float"), ("str", "list")):
            raise ValueError(
                f"The parameter {key!r} of {name} is of type {kind}; {value!r} is not."
            )


def _declared(source: str) -> dict[str, str]:
    """{name: type} of the lines `name: type = value` in a cell, the types being of `KINDS`; empty
    for a cell that is not valid Python.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return {}
    return {
        statement.target.id: kind
        for statement in statements
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if (kind := ast.unparse(statement.annotation)) in KINDS
    }


def require_known(names: Iterable[object], accepted: Iterable[str], notebook: str | Path) -> None:
    """Raises ValueError for the first of `names` that is none of the parameters that `notebook`
    has, the `accepted` ones.
    """
    accepted = list(accepted)
    for name in names:
        if name not in accepted:
            hint = did_you_mean(name, accepted)
            raise ValueError(
                f"{notebook} has no parameter {name!r}{hint}; it accepts"
                f" {', '.join(accepted) or 'none'}."
            )


def assigned_names(source: str) -> dict[str, ast.expr]:
    """{name: value} of the assignments in a cell's `source`, in their order. Raises ValueError for
    one that is no Python.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"a cell of parameters is not valid Python: {error}") from None
    found: dict[str, ast.expr] = {}
    for statement in statements:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {
                target.id: statement.value for target in targets if isinstance(target, ast.Name)
            }
    return found


def load_notebook(notebook: Path) -> nbformat.NotebookNode:
    """The notebook in the file `notebook`; ValueError when there is none."""
    if not notebook.is_file():
        raise ValueError(f"There is no notebook {notebook}; give the path of an .ipynb file.")
    try:
        return nbformat.read(notebook, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError):
        raise ValueError(
            f"{notebook} is not a Jupyter notebook; give the path of an .ipynb file."
        ) from None


def _parameters_cell(notebook: Path) -> tuple[str, list[ast.stmt]]:
    """The text of the parameters cell and its statements."""
    tagged = _tagged(notebook, "parameters")
    if not tagged:
        raise ValueError(
            f"{notebook} has no cell tagged 'parameters'; tag the cell that holds them."
        )
    source = tagged[0][1]
    try:
        return source, ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(
            f"The parameters cell of {notebook} is not valid Python: {error}."
        ) from None


def _injected(notebook: Path) -> dict[str, object]:
    """What papermill has injected into an executed notebook; empty for one as it was written."""
    tagged = _tagged(notebook, "injected-parameters")
    if not tagged:
        return {}
    remedy = "run the notebook that it was made from"
    if tagged[0][0] < _tagged(notebook, "parameters")[0][0]:
        raise ValueError(
            f"The injected parameters of {notebook} stand above its parameters cell, which undoes"
            f" them; {remedy}."
        )
    try:
        return {
            name: ast.literal_eval(value) for name, value in assigned_names(tagged[0][1]).items()
        }
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"The injected parameters of {notebook} are not 'name = literal' lines ({error});"
            f" {remedy}."
        ) from None


def _tagged(notebook: Path, tag: str) -> list[tuple[int, str]]:
    """Place and text of the cell that has a tag, if any. Raises ValueError for several: papermill
    heeds one, the kernel all.
    """
    cells = enumerate(load_notebook(notebook).cells)
    tagged = [(place, cell.source) for place, cell in cells if tag in cell.metadata.get("tags", [])]
    if len(tagged) > 1:
        raise ValueError(
            f"{notebook} has {len(tagged)} cells tagged {tag!r}; leave the tag on one and remove"
            " the others."
        )
    return tagged


def _parameter(statement: ast.stmt, comment: str) -> Parameter | None:
    """The parameter a statement declares; None when it is not an annotated literal of one of
    `KINDS`.
    """
    if (
        not isinstance(statement, ast.AnnAssign)
        or not isinstance(statement.target, ast.Name)
        or statement.value is None
    ):
        return None
    kind = ast.unparse(statement.annotation)
    try:
        default = ast.literal_eval(statement.value)
    except (ValueError, TypeError):
        return None
    if kind == "float" and type(default) is int:
        default = float(default)
    if kind == "list" and not (
        isinstance(default, list) and all(isinstance(entry, str) for entry in default)
    ):
        return None
    return (
        Parameter(statement.target.id, kind, default, comment)
        if type(default).__name__ == kind in KINDS
        else None
    )
