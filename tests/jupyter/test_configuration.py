"""What the notebooks' parameters accept: each notebook's configuration refuses in one sentence what
its work could not use, before a kernel starts and in the kernel.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from kl3m_nb import cli
from kl3m_nb.growth import stacking
from kl3m_nb.jupyter import runner
from kl3m_nb.jupyter.parameters import (
    check_notebook,
    check_parameters,
    find_notebook,
    read_parameters,
)
from kl3m_nb.model import decoder
from kl3m_nb.profiles import get_profile, source_profile
from kl3m_nb.runs import folder, registry
from kl3m_nb.training import loop
from tests.conftest import make_tokenizer, small_profile

SOURCE, STACKING, TRAINING, SPECTRA, GENERATION, GROWTH = registry.NOTEBOOK_STAGES
OF_ANOTHER_TYPE = {"str": 3, "int": 2.5, "float": "hot", "bool": "false", "list": 3}
SMALL = {"layers": 4, "growth_factor": 2, "context": 512, "max_steps": 1, "source_steps": 1}


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    """runs/ with a source, its stack, and a run `demo-grown` that began with the stack."""
    runs = tmp_path_factory.mktemp("all") / "runs"
    settings = small_profile(**SMALL)
    source = loop.train(source_profile(settings), runs / "demo-source").checkpoint
    stacking.stack_checkpoint(source, runs / "demo-stack" / "checkpoint", 2)
    loop.train(settings, runs / "demo-grown", runs / "demo-stack" / "checkpoint")
    return runs


@pytest.fixture(autouse=True)
def empty_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def the_runs(all_runs, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(all_runs))


def _configure(notebook: str, **given) -> dict:
    """What a notebook configures; of 00 in a new folder, as a run of another profile is there."""
    given = ({"run": "new"} if notebook == SOURCE else {}) | given
    path = find_notebook(notebook)
    return runner.configuration(path, check_parameters(path, given))


def _train(**given) -> dict:
    return _configure(TRAINING, **{"init": "random", "run": "new", **given})


def _files(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


BAD = [
    *((notebook, {"profile": "tniy"}, "'tniy'") for notebook in registry.NOTEBOOK_STAGES),
    *((notebook, {"run": "a/b"}, "'a/b'") for notebook in registry.NOTEBOOK_STAGES),
    (SOURCE, {"source": "files:nope/*"}, "/nope/"),
    (SOURCE, {"source": "0.5*package:licensedcode-data + 0.5*files:nope/*"}, "/nope/"),
    (SOURCE, {"source": "nope"}, "'nope'"),
    (SOURCE, {"max_steps": -1}, "'max_steps' is -1"),
    (SOURCE, {"packing": "tight"}, "'packing' is 'tight'"),
    (STACKING, {"documents": "files:nope/*"}, "/nope/"),
    (STACKING, {"source": "owner/name"}, "owner/name"),
    (STACKING, {"source": "nowhere"}, "nowhere"),
    (STACKING, {"order": "spiral"}, "'spiral'"),
    (STACKING, {"noise": 1.0}, r"noise 1\.0"),
    (STACKING, {"order": "random", "noise": 0.2}, r"noise 0\.2"),
    (STACKING, {"seq_len": 513}, "513 .* 512"),
    (TRAINING, {"run": "new", "init": "random", "source": "files:nope/*"}, "/nope/"),
    (TRAINING, {"run": "new", "init": "random", "processes": -1}, "processes is -1"),
    (TRAINING, {"run": "new", "init": "random", "processes": 3}, "3 processes"),
    (TRAINING, {"run": "new", "init": "random", "ns_steps": 9}, "'ns_steps' is 9"),
    (TRAINING, {"run": "new", "init": "random", "seq_len": 4096}, "4096 .* 256"),
    (TRAINING, {"run": "new", "init": "nowhere"}, "nowhere"),
    (TRAINING, {"run": "new"}, "num_hidden_layers 4, .* 12"),  # the stack of another profile
    (TRAINING, {"max_steps": 7}, "layers = 4, now it is 12"),  # a run with other settings
    (SPECTRA, {"role": "qproj"}, "'qproj'; .* q_proj, k_proj"),
    (SPECTRA, {"role": "lm_head"}, "'lm_head'"),
    (SPECTRA, {"role": "up_proj[0]"}, r"'up_proj\[0\]'; .* up_proj, down_proj"),
    (SPECTRA, {"windows": -1}, "windows is -1"),
    (SPECTRA, {"stack": "./nowhere"}, "nowhere"),
    (GENERATION, {"document_count": 0}, "document_count is 0"),
    (GENERATION, {"prompt_count": -1}, "prompt_count is -1"),
    (GENERATION, {"top_p": 1.5}, r"top_p is 1\.5"),
    (GENERATION, {"top_p": -0.5}, r"top_p is -0\.5"),
    (GENERATION, {"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0"),
    (GENERATION, {"max_new_tokens": 0}, "max_new_tokens is 0"),
    (GENERATION, {"max_new_tokens": 511}, "max_new_tokens 511 .* 512"),
    (GENERATION, {"trained": "runs/nowhere"}, "runs/nowhere"),
    (GENERATION, {"others": "no/where/x"}, "no/where/x"),
    (GROWTH, {"scratch_run": ".."}, r"'\.\.'"),
    (GROWTH, {"scratch_steps": -1}, "'max_steps' is -1"),
    (GROWTH, {"reference_loss": -0.5}, r"reference_loss is -0\.5"),
    (GROWTH, {"seen_share": 1.5}, r"seen_share is 1\.5"),
]


@pytest.mark.parametrize(("notebook", "given", "words"), BAD, ids=str)
def test_what_cannot_be_meant_is_refused_in_one_sentence_and_nothing_is_written(
    notebook, given, words, all_runs, the_runs, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = _files(all_runs)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refusal:
        _configure(notebook, **given)
    assert "\n" not in str(refusal.value)
    assert _files(all_runs) == before


def test_the_command_shows_that_sentence_and_leaves_what_an_earlier_run_has_made(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runner, "run_notebook", lambda *_: pytest.fail("a kernel has started"))
    for ending in ("ipynb", "html", "status.json", "attempt.ipynb"):
        made = tmp_path / "runs" / "demo-source" / "notebooks" / f"{SOURCE}.{ending}"
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text("{}")
    before = _files(tmp_path)
    with pytest.raises(ValueError, match="tight") as refusal:
        _configure(SOURCE, packing="tight")
    assert cli.main(["run", SOURCE, "-p", "packing", "tight"]) == 2
    assert capsys.readouterr() == ("", f"kl3m_nb: {refusal.value}\n")
    assert _files(tmp_path) == before


@pytest.mark.parametrize("notebook", registry.NOTEBOOK_STAGES)
def test_the_defaults_are_accepted(notebook, the_runs):
    given = {"run": "new", "init": "random"} if notebook == TRAINING else {}
    assert _configure(notebook, **given)["run_dir"].parent == registry.run_path("", "", "x").parent


@pytest.mark.parametrize("notebook", registry.NOTEBOOK_STAGES)
def test_a_kernel_checks_the_types_of_what_was_typed_or_injected(notebook):
    parameters = read_parameters(find_notebook(notebook))
    cell = "\n".join(f"{name}: {it.kind} = {it.default!r}" for name, it in parameters.items())
    values = {name: it.default for name, it in parameters.items()}
    seen = {"In": ["", "import", cell], **values}  # a cell that was no Python is remembered, too
    check_notebook(notebook, seen)
    for name, it in parameters.items():
        with pytest.raises(ValueError, match=f"'{name}' of {notebook} is of type {it.kind}; "):
            check_notebook(notebook, seen | {name: OF_ANOTHER_TYPE[it.kind]})
        if it.kind == "float":
            check_notebook(notebook, seen | {name: int(it.default)})
    injected = ["# Parameters\nseeds = 3\n", "# Parameters\nprofile = 'tiny'\n"]
    with pytest.raises(ValueError, match=r"'seeds'.*profile, run, "):
        check_notebook(notebook, seen | {"In": [*seen["In"], injected[0]]})
    check_notebook(notebook, seen | {"In": [*seen["In"], *injected]})


def test_plain_papermill_is_refused_an_unknown_name_by_the_configuration(tmp_path):
    with pytest.raises(PapermillExecutionError) as refusal:
        papermill.execute_notebook(
            str(find_notebook(GROWTH)),
            str(tmp_path / "out.ipynb"),
            {"seeds": 3},
            progress_bar=False,
        )
    assert refusal.value.ename == "ValueError" and "'seeds'" in refusal.value.evalue
    assert not (tmp_path / "runs").exists()


def test_a_run_that_has_begun_needs_neither_its_start_nor_its_tokenizer(tmp_path):
    _train(init="owner/name")
    bare = str(make_tokenizer(tmp_path / "bare", last=()))
    for given in ({"init": "nowhere"}, {"tokenizer": bare}):
        with pytest.raises(ValueError, match=r"nowhere|end-of-text"):
            _train(**given)
        (tmp_path / "runs" / "new").mkdir(parents=True)
        folder.write_run_file(tmp_path / "runs" / "new", small_profile(), None, "cpu")
        _train(**given)
        shutil.rmtree(tmp_path / "runs")


@pytest.mark.parametrize("profile", ["tiny", "kl3m-002-520m"])
def test_a_stack_that_is_not_there_is_missed_before_anything_starts(profile, tmp_path):
    with pytest.raises(ValueError, match=r"-stack/checkpoint .*init random"):
        _train(init="", profile=profile)
    if profile == "tiny":
        stack = tmp_path / "runs" / "demo-stack" / "checkpoint"
        decoder.build_model(get_profile("tiny")).save_pretrained(stack)
        _train(init="")


def test_a_start_or_source_is_judged_by_its_own_numbers(tmp_path):
    """A window may be longer than the profile's context, not than the model's."""
    for context in (64, 512):
        model = decoder.build_model(get_profile("tiny", seq_len=64, context=context))
        model.save_pretrained(tmp_path / str(context))
    _train(init=str(tmp_path / "64"), seq_len=64)
    with pytest.raises(ValueError, match=r"256 .* 64"):
        _train(init=str(tmp_path / "64"))
    _configure(STACKING, source=str(tmp_path / "512"), seq_len=512)
    with pytest.raises(ValueError, match=r"65 .* 64"):
        _configure(STACKING, source=str(tmp_path / "64"), seq_len=65)


def test_files_and_folders_that_are_there_are_accepted(tmp_path, the_runs):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for source in (f"files:{tmp_path}/*.jsonl", "hub:owner/name"):
        _configure(SOURCE, source=source)
        _configure(STACKING, documents=source)
        _train(source=source)
    elsewhere = tmp_path / "My Drive, mine" / "m"
    shutil.copytree(registry.require_stage_checkpoint("tiny", "grown"), elsewhere)
    assert str(elsewhere) in _configure(GENERATION, others=str(elsewhere))["folders"]
    _configure(SPECTRA, trained=str(elsewhere), role="down_proj")


@pytest.mark.parametrize("notebook", [SOURCE, TRAINING])
def test_a_tokenizer_that_does_not_fit_is_refused(notebook, tmp_path):
    """Too large for the vocabulary, without a token that the data need, or not there."""

    def configure(**given):
        return _train(**given) if notebook == TRAINING else _configure(SOURCE, **given)

    every = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    whole = str(make_tokenizer(tmp_path / "whole", tuple(every.values()), (), **every))
    configure(tokenizer=whole, vocabulary=400)
    with pytest.raises(ValueError, match=r"400, .* 399; .* 400"):
        configure(tokenizer=whole, vocabulary=399)
    with pytest.raises(ValueError, match="end-of-text"):
        configure(tokenizer=str(make_tokenizer(tmp_path / "bare", last=())))
    with pytest.raises(ValueError, match="nowhere"):
        configure(tokenizer=str(tmp_path / "nowhere"))
    if notebook == SOURCE:
        ends = str(make_tokenizer(tmp_path / "ends", ("<|end|>",), (), eos_token="<|end|>"))
        configure(tokenizer=ends)
        with pytest.raises(ValueError, match="beginning-of-text"):
            configure(tokenizer=ends, packing="segments")


def test_a_role_may_be_an_experts(tmp_path, the_runs):
    mixture = small_profile(experts=2, active_experts=1, heads=4, mlp=16)
    decoder.build_model(mixture).save_pretrained(tmp_path / "mixture")
    _configure(SPECTRA, role="up_proj[1]", trained=str(tmp_path / "mixture"))
    with pytest.raises(ValueError, match=r"'up_proj'; .*, up_proj\[0\], up_proj\[1\], "):
        _configure(SPECTRA, role="up_proj", trained=str(tmp_path / "mixture"))


def test_a_model_without_a_token_to_begin_with_is_refused(tmp_path):
    decoder.build_model(get_profile("tiny")).save_pretrained(tmp_path / "bare")
    bare = make_tokenizer(tmp_path / "tokenizer", last=()) / "tokenizer.json"
    shutil.copy(bare, tmp_path / "bare")
    with pytest.raises(ValueError, match="end-of-text"):
        _configure(GENERATION, trained=str(tmp_path / "bare"))


def test_lm_eval_is_asked_for_only_where_it_is_installed(the_runs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\[harness\]"):
        _configure(GENERATION, with_lm_eval=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    _configure(GENERATION, with_lm_eval=True)
