"""What can be said of notebooks, environment and package without running them."""

from __future__ import annotations

import ast
import importlib
import itertools
import operator
import re
import tomllib
import types
from pathlib import Path

import nbformat
import pytest
import yaml

from kl3m_nb.jupyter.parameters import read_parameters
from kl3m_nb.runs import registry

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted((ROOT / "kl3m_nb").rglob("*.py"))
OTHERS = ("torch", "optim", "model")  # libraries and objects whose methods are called as ours are
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data/README.md"])
# What each room may import besides `profiles` and `common`; a room that is not named may import
# every room below it.
ROOMS = {
    "profiles": (),
    "common": (),
    "data": (),
    "model": ("data",),
    "optim": ("data", "model"),
    "evaluation": ("data", "model"),
    "runs": ("data", "model", "optim"),
    "training": ("data", "model", "optim", "runs"),
    "growth": ("data", "model", "optim", "runs"),
    "spectra": ("model", "optim", "runs"),
    "figures": ("model", "optim", "growth", "spectra", "evaluation"),
    "jupyter": (
        "data",
        "model",
        "optim",
        "evaluation",
        "runs",
        "training",
        "growth",
        "spectra",
        "figures",
    ),
    "cli": (
        "data",
        "model",
        "optim",
        "evaluation",
        "runs",
        "training",
        "growth",
        "spectra",
        "figures",
        "jupyter",
    ),
    "__main__": ("cli",),
}


def _cells(path: Path) -> list:
    return nbformat.read(path, as_version=4).cells


def test_the_notebooks_are_the_six_in_order():
    assert [path.stem for path in NOTEBOOKS] == list(registry.NOTEBOOK_STAGES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_is_valid_and_stripped(self, path):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert "widgets" not in notebook.metadata
        assert (
            notebook.metadata.kernelspec.name == "python3"
            and notebook.metadata.kernelspec.language == "python"
        )
        for cell in notebook.cells:
            assert not cell.get("outputs") and cell.get("execution_count") is None

    def test_has_annotated_parameters_each_with_a_comment(self, path):
        parameters = read_parameters(path)
        assert {"profile", "run"} <= parameters.keys()
        assert all(parameter.help for parameter in parameters.values())
        assert parameters["profile"].default == "tiny"

    def test_opens_and_closes_as_all_do(self, path):
        cells = _cells(path)
        assert re.match(rf"# {path.stem[:2]} · ", cells[0].source)
        assert all(word in cells[1].source for word in ("**Needs**", "**Takes**", "**Writes**"))
        assert "parameters" in cells[2].metadata.tags
        assert "versions()" in cells[3].source
        headings = [cell.source.splitlines()[0] for cell in cells if cell.cell_type == "markdown"]
        assert headings[-2] == "## What you should see"
        assert "assert " in cells[-2].source
        assert all(word in cells[-1].source for word in ("**Saved**", "**Next**"))

    def test_cells_are_short_and_prose_leads(self, path):
        cells = _cells(path)
        for number, cell in enumerate(cells):
            if cell.cell_type == "code":
                most = 16 if number in (2, 3) else 10  # parameters and imports are lists
                assert len(cell.source.splitlines()) <= most, cell.source
                assert max(map(len, cell.source.splitlines())) <= 100, cell.source
        words = {
            kind: sum(len(c.source.split()) for c in cells if c.cell_type == kind)
            for kind in ("markdown", "code")
        }
        assert words["markdown"] > 0.75 * words["code"]

    def test_links_lead_somewhere(self, path):
        for cell in _cells(path):
            for target in (
                re.findall(r"\]\(([^)#]+)\)", cell.source) if cell.cell_type == "markdown" else []
            ):
                assert target.startswith("https://") or (path.parent / target).is_file(), target

    def test_imports_only_the_package_and_what_is_installed(self, path):
        declared = {re.split(r"[=<>\[]", line)[0] for line in _project()["dependencies"]} | {
            "collections",
            "math",
        }
        for cell in _cells(path):
            if cell.cell_type == "code":
                for module in _imported(ast.parse(cell.source)):
                    assert module.split(".")[0] in declared | {"kl3m_nb"}, module


def test_the_lab_serves_every_folder_that_the_notebooks_link_to():
    """A link that leaves the folder which JupyterLab was started on does nothing there."""
    served = (
        ROOT / re.search(r"--notebook-dir=(\S+)", (ROOT / "Makefile").read_text())[1]
    ).resolve()
    for path in NOTEBOOKS:
        for target in re.findall(r"\]\(([^)#:]+)\)", "".join(cell.source for cell in _cells(path))):
            assert (path.parent / target).resolve().is_relative_to(served), target


def test_every_module_has_a_docstring_and_a_room():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
        assert _room(path) in {*ROOMS, "__init__"}, path


def test_a_room_imports_only_the_rooms_below_it_and_no_private_name():
    for path in MODULES:
        room = _room(path)
        for module, name in _imported_names(ast.parse(path.read_text())):
            other = [*module.split("."), name][1]
            if other == room or name == "__version__":
                continue
            assert other in (
                "profiles",
                "common",
                *ROOMS.get(room, ()),
            ), f"{path.name} of {room} imports {module}.{name}"
            assert not name.startswith("_"), f"{path.name} imports the private {module}.{name}"


def test_no_module_imports_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    graph = {}
    for name, path in names.items():
        imported = _imported_names(ast.parse(path.read_text()))
        graph[name] = {
            dotted
            for module, what in imported
            for dotted in (f"{module}.{what}", module)
            if dotted in names
        } - {name}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {module for module in graph.keys() - done if graph[module] <= done}
        assert ready, f"these modules import each other: {sorted(graph.keys() - done)}"
        done |= ready


def test_what_the_benchmarks_take_from_the_package_is_there():
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text())
        modules = {}  # name in the script -> module of the package
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kl3m_nb":
                taken_from = importlib.import_module(node.module)
                for alias in node.names:
                    value = getattr(taken_from, alias.name, None) or importlib.import_module(
                        f"{node.module}.{alias.name}"
                    )
                    if isinstance(value, types.ModuleType):
                        modules[alias.asname or alias.name] = value
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in modules
            ):
                assert hasattr(modules[node.value.id], node.attr), (
                    f"{path.name}: {node.value.id}.{node.attr}"
                )


def test_environment_yml_takes_its_versions_from_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-e .[test]"]
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip", "make"}
    minor = int(next(entry for entry in conda if entry.startswith("python=")).split(".")[1])
    assert minor >= int(_project()["requires-python"].split(".")[1])


def test_every_version_is_pinned_once():
    requirements = [
        *_project()["dependencies"],
        *itertools.chain(*_project()["optional-dependencies"].values()),
    ]
    assert all("==" in requirement for requirement in requirements)
    assert "torch==2.13.0" in requirements
    assert not any("flash-attn" in requirement for requirement in _project()["dependencies"])


def test_the_hooks_need_no_network_and_call_what_is_pinned():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repository["repo"] for repository in hooks} == {"local"}
    pinned = {line.split("==")[0] for line in _project()["optional-dependencies"]["test"]}
    called = set()
    for hook in itertools.chain(*(repository["hooks"] for repository in hooks)):
        assert hook["language"] == "system"
        called.add(re.search(r"exec ([\w-]+)", hook["entry"])[1])
    assert called == {"ruff", "nbstripout"} and called | {"pre-commit"} <= pinned


def test_the_readme_names_every_notebook_and_every_page_and_stays_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    for path in (*NOTEBOOKS, *(ROOT / "docs").glob("*.md")):
        assert f"]({path.relative_to(ROOT)})" in text, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)|<img [^>]*src=\"([^\"]+)\"", page.read_text()):
        target = target[0] or target[1]
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not heading or heading in _anchors(linked), target


def test_the_page_on_the_layout_has_the_rooms_and_names_code_that_is_there():
    """What stands before a link to a module, as in `name` and `Class.name` in [module](path)."""
    text = (ROOT / "docs/layout.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", text, re.MULTILINE))
    assert {room for room in ROOMS if room != "__main__"} == rows.keys()
    for room in rows.keys() - {"profiles", "common"}:
        above = list(rows)[2 : list(rows).index(room)]
        allowed = above if rows[room] == "all above" else re.findall(r"`(\w+)`", rows[room])
        assert set(allowed) == set(ROOMS[room]), room
    named = re.findall(
        r"((?:`[\w.]+`(?: and |, )?)+) in \[[^\]]+\]\(\.\./(kl3m_nb/[^)]+)\.py\)", text
    )
    assert len(named) > 5
    for names, path in named:
        module = importlib.import_module(path.replace("/", "."))
        for name in re.findall(r"`([\w.]+)`", names):
            assert operator.attrgetter(name)(module) is not None, name


def test_the_page_of_faults_names_tests_that_are_there():
    """`room/file.py::test`, `test` of training/test_faults.py, or `…::test` of the file before; a
    name may end in ….
    """
    tests = ROOT / "tests"
    files = {str(path.relative_to(tests)): path.read_text() for path in tests.rglob("test_*.py")}
    for row in (ROOT / "docs/faults.md").read_text().splitlines():
        file = "training/test_faults.py"
        for name in re.findall(r"`([^`\s]*test_[^`\s]*)`", row):
            if name.endswith(".py"):
                assert name.removeprefix("tests/") in files, name
                continue
            path, _, test = name.rpartition("::")
            file = file if path == "…" else path or "training/test_faults.py"
            assert file in files, name
            end = "" if test.endswith("…") else "("
            assert f"def {test.removesuffix('…')}{end}" in files[file], name


def test_texts_name_functions_by_the_module_that_has_them():
    """`module.function` in a docstring or on a page; what is no function of the package is passed
    over.
    """
    places = {}  # public name -> modules and rooms that define it
    texts = {page: page.read_text() for page in PAGES if page.name != "log.md"}
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                places.setdefault(node.name, set()).update({path.stem, _room(path)})
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        texts[path] = "\n".join(filter(None, map(ast.get_docstring, nodes)))
    for path, text in texts.items():
        for module, name in re.findall(r"`(?:\w+\.)*([a-z_]+)\.(\w+)(?:\([^`]*)?`", text):
            if name in places and module not in OTHERS:
                assert module in places[name], f"{path.name}: {module}.{name}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _imported(tree: ast.AST) -> set[str]:
    """Dotted names of what a tree imports at any depth; `from kl3m_nb import a` counts as
    kl3m_nb.a.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "kl3m_nb"
            names |= {f"kl3m_nb.{alias.name}" for alias in node.names} if whole else {node.module}
    return names


def _room(path: Path) -> str:
    """The room of a module: its folder, or its own name at the top of the package."""
    return path.relative_to(ROOT / "kl3m_nb").with_suffix("").parts[0]


def _imported_names(tree: ast.AST) -> set[tuple[str, str]]:
    """(module, name) of every `from kl3m_nb… import name` of a tree, at any depth."""
    return {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kl3m_nb"
        for alias in node.names
    }
