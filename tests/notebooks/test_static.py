"""What can be said of notebooks, environment and package without running them."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import tomllib
import types
from pathlib import Path

import nbformat
import pytest
import yaml

from kl3m_nb import runs
from kl3m_nb.parameters import read_parameters

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted((ROOT / "kl3m_nb").glob("*.py"))
FLOORS = {
    1: "display distributed random_state paths profile_checks profiles progress flops parameters stopping memory card_usage "
    "values intervals",
    2: "sources data_files json_lines parquet_rows readers shingles corpus instructions custom_tokens tokenizer "
    "document_stream packing cotraining "
    "segmentation streams models roles runtime stacking muon clamping model_clamp gram objective schedule evaluation experts "
    "loss_law fused_projections flash_attention finite training_loss model_folder clamp_conditions "
    "stackable stored_tensors grown_config",
    3: "checkpoints metrics run_folder resuming saving training cards stack_facts publishing",
    4: "spectra matrices generation growth estimate pulls spectral_cache spectral_summary copies history block_function "
    "known_spectra prediction comparison writing legal_form extraction memorisation toxicity harness",
    5: "figures plots data_plots spectral_plots launch live runs report report_page run_report html run_status runner demo "
    "cli __main__ matrix_plots spectral_explorer spectral_report spectral_subject progress_bar evaluation_plots token_view "
    "prompt_box growth_runs parameter_checks",
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}


def _cells(path: Path) -> list:
    return nbformat.read(path, as_version=4).cells


def test_the_notebooks_are_the_six_in_order():
    assert [path.stem for path in NOTEBOOKS] == list(runs.NOTEBOOK_STAGES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_is_valid_and_stripped(self, path):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert "widgets" not in notebook.metadata
        assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.kernelspec.language == "python"
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
        assert "runtime.versions()" in cells[3].source
        headings = [cell.source.splitlines()[0] for cell in cells if cell.cell_type == "markdown"]
        assert headings[-2] == "## What you should see"
        assert "assert " in cells[-2].source
        assert all(word in cells[-1].source for word in ("**Saved**", "**Next**"))

    def test_cells_are_short_and_prose_leads(self, path):
        cells = _cells(path)
        for number, cell in enumerate(cells):
            if cell.cell_type == "code":
                most = 14 if number in (2, 3) else 10  # parameters and imports are lists
                assert len(cell.source.splitlines()) <= most, cell.source
                assert max(map(len, cell.source.splitlines())) <= 100, cell.source
        words = {kind: sum(len(c.source.split()) for c in cells if c.cell_type == kind) for kind in ("markdown", "code")}
        assert words["markdown"] > 0.75 * words["code"]

    def test_links_lead_somewhere(self, path):
        for cell in _cells(path):
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source) if cell.cell_type == "markdown" else []:
                assert target.startswith("https://") or (path.parent / target).is_file(), target

    def test_imports_only_the_package_and_what_is_installed(self, path):
        declared = {re.split(r"[=<>\[]", line)[0] for line in _project()["dependencies"]} | {"collections", "math"}
        for cell in _cells(path):
            if cell.cell_type == "code":
                for module in _imported(ast.parse(cell.source)):
                    assert module.split(".")[0] in declared | {"kl3m_nb"}, module


def test_the_lab_serves_every_folder_that_the_notebooks_link_to():
    """A link that leaves the folder which JupyterLab was started on does nothing there."""
    served = (ROOT / re.search(r"--notebook-dir=(\S+)", (ROOT / "Makefile").read_text())[1]).resolve()
    for path in NOTEBOOKS:
        for target in re.findall(r"\]\(([^)#:]+)\)", "".join(cell.source for cell in _cells(path))):
            assert (path.parent / target).resolve().is_relative_to(served), target


def test_every_module_stands_on_a_floor_and_has_a_docstring():
    assert {path.stem for path in MODULES} == FLOOR_OF.keys() | {"__init__"}
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path.name
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_no_module_imports_upwards_or_in_a_circle():
    graph = {
        path.stem: {name.split(".")[1] for name in _imported(ast.parse(path.read_text())) if name.startswith("kl3m_nb.")}
        for path in MODULES
        if path.stem != "__init__"
    }
    for module, imported in graph.items():
        for other in imported:
            lower_enough = FLOOR_OF[other] <= FLOOR_OF[module]
            if FLOOR_OF[module] == 4 and FLOOR_OF[other] == 3:
                lower_enough = other in ("checkpoints", "metrics")
            assert lower_enough, f"{module} (floor {FLOOR_OF[module]}) imports {other} (floor {FLOOR_OF[other]})"
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
                    value = getattr(taken_from, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                    if isinstance(value, types.ModuleType):
                        modules[alias.asname or alias.name] = value
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), f"{path.name}: {node.value.id}.{node.attr}"


def test_environment_yml_takes_its_versions_from_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-e .[test]"]
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip", "make"}
    minor = int(next(entry for entry in conda if entry.startswith("python=")).split(".")[1])
    assert minor >= int(_project()["requires-python"].split(".")[1])


def test_every_version_is_pinned_once():
    requirements = [*_project()["dependencies"], *itertools.chain(*_project()["optional-dependencies"].values())]
    assert all("==" in requirement for requirement in requirements)
    assert "torch==2.13.0" in requirements
    assert not any("flash-attn" in requirement for requirement in _project()["dependencies"])


def test_the_readme_tells_of_every_notebook_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in text
    for target in re.findall(r"\]\(([^)#]+)\)|<img [^>]*src=\"([^\"]+)\"", text):
        target = target[0] or target[1]
        assert target.startswith("https://") or (ROOT / target).exists(), target


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _imported(tree: ast.AST) -> set[str]:
    """Dotted names of what a tree imports at any depth; `from kl3m_nb import a` counts as kl3m_nb.a."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "kl3m_nb"
            names |= {f"kl3m_nb.{alias.name}" for alias in node.names} if whole else {node.module}
    return names
