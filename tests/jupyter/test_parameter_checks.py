"""What the notebooks' parameters accept: the same before a kernel starts and in the kernel, of each
notebook.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from kl3m_nb.jupyter import parameter_checks, parameters
from kl3m_nb.jupyter.parameter_checks import check_notebook
from kl3m_nb.jupyter.parameters import check_parameters, find_notebook, read_parameters
from kl3m_nb.model import decoder
from kl3m_nb.profiles import get_profile
from kl3m_nb.runs import checkpoints, folder, registry
from tests.conftest import execute_notebook, make_tokenizer, small_profile

SOURCE, STACKING, TRAINING, SPECTRA, GENERATION, GROWTH = registry.NOTEBOOK_STAGES
OF_ANOTHER_TYPE = {"str": 3, "int": 2.5, "float": "hot", "bool": "false", "list": 3}


@pytest.fixture(autouse=True)
def empty_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path / "runs"))


def _check(notebook: str, **changes) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in read_parameters(find_notebook(notebook)).items()
    }
    assert changes.keys() <= defaults.keys()
    if notebook == TRAINING:
        defaults["init"] = "random"  # there is no stack in the empty runs
    check_notebook(notebook, {"name": "of the notebook's own", **defaults, **changes})


@pytest.mark.parametrize("notebook", registry.NOTEBOOK_STAGES)
def test_the_defaults_are_accepted_and_no_parameter_takes_another_type(notebook, tmp_path):
    _check(notebook)
    for name, parameter in read_parameters(find_notebook(notebook)).items():
        with pytest.raises(
            ValueError, match=f"The parameter '{name}' of {notebook} is of type {parameter.kind}; "
        ):
            _check(notebook, **{name: OF_ANOTHER_TYPE[parameter.kind]})
        if parameter.kind == "float":
            _check(notebook, **{name: int(parameter.default)})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("notebook", "changes", "words"),
    [
        *(
            (notebook, {"profile": "tniy"}, "There is no profile 'tniy'")
            for notebook in registry.NOTEBOOK_STAGES
        ),
        *(
            (notebook, {"run": "a/b"}, "no name of a folder right below")
            for notebook in registry.NOTEBOOK_STAGES
        ),
        (SOURCE, {"source": "files:nope/*"}, "No file matches .*/nope/"),
        (
            SOURCE,
            {"source": "0.5*package:licensedcode-data + 0.5*files:nope/*"},
            "No file matches .*/nope/",
        ),
        (SOURCE, {"source": "nope"}, "The source 'nope' is not known"),
        (SOURCE, {"max_steps": -1}, "'max_steps' is -1"),
        (SOURCE, {"packing": "tight"}, "'packing' is 'tight'"),
        (STACKING, {"documents": "files:nope/*"}, "No file matches .*/nope/"),
        (STACKING, {"source": "owner/name"}, "The parameter source names no checkpoint"),
        (STACKING, {"order": "spiral"}, "The order 'spiral' is not known"),
        (STACKING, {"noise": 1.0}, "a share from 0 to below 1"),
        (STACKING, {"order": "random", "noise": 0.2}, "for cyclic or interpolated"),
        (STACKING, {"seq_len": 4096}, "context of 256"),
        (TRAINING, {"source": "files:nope/*"}, "No file matches .*/nope/"),
        (
            TRAINING,
            {"processes": -1},
            "The parameter processes is -1; it must be a whole number, at least 0",
        ),
        (TRAINING, {"processes": 3}, "3 processes"),
        (TRAINING, {"ns_steps": 9}, "'ns_steps' is 9"),
        (TRAINING, {"init": "nowhere"}, "The parameter init names no checkpoint nowhere"),
        (SPECTRA, {"role": "qproj"}, "There is no role 'qproj'; choose one of q_proj, k_proj"),
        (SPECTRA, {"role": "lm_head"}, "There is no role 'lm_head'"),
        (SPECTRA, {"windows": -1}, "The parameter windows is -1"),
        (
            GENERATION,
            {"document_count": 0},
            "The parameter document_count is 0; it must be a whole number, at least 1",
        ),
        (
            GENERATION,
            {"document_count": -5, "prompt_count": -1},
            "The parameter document_count is -5",
        ),
        (GENERATION, {"prompt_count": -1}, "The parameter prompt_count is -1"),
        (GENERATION, {"top_p": 1.5}, "top_p is 1.5"),
        (GENERATION, {"top_p": -0.5}, "top_p is -0.5"),
        (GENERATION, {"temperature": float("nan")}, "The temperature is nan"),
        (GENERATION, {"repetition_penalty": 0.0}, "The repetition_penalty is 0.0"),
        (GENERATION, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (GROWTH, {"scratch_run": ".."}, "no name of a folder right below"),
        (GROWTH, {"scratch_steps": -1}, "The parameter scratch_steps is -1"),
        (
            GROWTH,
            {"reference_loss": -0.5},
            "The parameter reference_loss is -0.5; it must be at least 0 and finite",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(
    notebook, changes, words, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refusal:
        _check(notebook, **changes)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("notebook", registry.NOTEBOOK_STAGES)
def test_what_is_typed_into_the_cell_is_checked_before_the_notebook_works(notebook, tmp_path):
    with pytest.raises(
        ValueError, match=f"The parameter 'run' of {notebook} is of type str; 3 is not"
    ):
        execute_notebook(notebook, {"run": 3})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("notebook", [GENERATION, GROWTH])
def test_a_name_that_papermill_injected_and_no_notebook_has_is_refused(notebook):
    injected = parameterize_notebook(
        load_notebook_node(str(find_notebook(notebook))), {"profile": "tiny", "seeds": 3}
    )
    ran = [cell.source for cell in injected.cells if cell.cell_type == "code"]
    defaults = {
        name: parameter.default
        for name, parameter in read_parameters(find_notebook(notebook)).items()
    }
    with pytest.raises(ValueError, match=r"has no parameter 'seeds'.*; it accepts profile, run, "):
        check_notebook(notebook, {"In": ["", *ran[:3]], "seeds": 3, **defaults})
    check_notebook(
        notebook, {"In": ["", *ran[:3], "# Parameters\nprofile = 'tiny'\n"], "seeds": 3, **defaults}
    )


def test_a_list_that_came_as_text_is_accepted(tmp_path):
    drive = tmp_path / "My Drive, mine" / "m"
    decoder.build_model(small_profile()).save_pretrained(drive)
    assert check_parameters(find_notebook(GENERATION), {"others": str(drive)}) == {
        "others": [str(drive)]
    }
    with pytest.raises(
        ValueError,
        match=(
            r"others names no checkpoint .*/My below .* in quotes where it holds a comma or blank"
        ),
    ):
        _check(GENERATION, others=f"{drive} owner/name")
    with pytest.raises(ValueError, match="others names no checkpoint owner/a/b below"):
        _check(GENERATION, others="owner/c owner/a/b")
    with pytest.raises(ValueError, match="others names no checkpoint c d below"):
        _check(GENERATION, others=["owner/a", "c d"])


@pytest.mark.parametrize(
    "settings", [{"max_steps": 7}, {"init": "random"}, {"seq_len": 16}], ids=str
)
def test_a_run_that_was_begun_with_other_settings_is_refused_before_its_notebook_works(
    settings, trained_run, monkeypatch
):
    monkeypatch.setattr(
        parameter_checks, "profile_with", lambda name, **fields: small_profile(**_given(fields))
    )
    shutil.copytree(trained_run[0], registry.run_path("tiny", "grown"))
    run_file = registry.run_path("tiny", "grown") / folder.RUN_FILE
    run_file.write_text(run_file.read_text().replace('"random weights"', '"owner/name"'))
    _check(TRAINING, init="owner/name")
    with pytest.raises(ValueError, match=r"; use (the same settings or )?another run folder"):
        _check(TRAINING, **{"init": "owner/name"} | settings)


def _given(fields: dict) -> dict:
    return {key: value for key, value in fields.items() if value not in (0, "")}


def test_a_line_that_was_saved_without_its_type_is_judged_by_its_value(monkeypatch):
    monkeypatch.setattr(
        parameter_checks,
        "assigned_kinds",
        lambda notebook: {"profile": "str", "run": "", "scratch_steps": ""},
    )
    namespace = {"profile": "tiny", "run": "a", "scratch_steps": 5}
    check_notebook(GROWTH, namespace)
    for wrong in ({"run": 3}, {"scratch_steps": 2.5}, {"scratch_steps": "5"}):
        with pytest.raises(ValueError, match=next(iter(wrong)) + "|no name of a folder"):
            check_notebook(GROWTH, namespace | wrong)


def test_the_roles_are_those_of_the_trained_model(trained_run, tmp_path):
    _check(SPECTRA, role="up_proj[3]")  # may be an expert's: there is no model yet
    newest = str(trained_run[1].checkpoint)
    _check(SPECTRA, role="down_proj", trained=newest)
    with pytest.raises(
        ValueError, match=r"no role 'up_proj\[0\]'; choose one of q_proj, .*, down_proj\.$"
    ):
        _check(SPECTRA, role="up_proj[0]", trained=newest)
    mixture = small_profile(experts=2, active_experts=1, heads=4, mlp=16)
    decoder.build_model(mixture).save_pretrained(tmp_path / "mixture")
    _check(SPECTRA, role="up_proj[1]", trained=str(tmp_path / "mixture"))
    with pytest.raises(ValueError, match=r"no role 'up_proj'; .*, up_proj\[0\], up_proj\[1\], "):
        _check(SPECTRA, role="up_proj", trained=str(tmp_path / "mixture"))
    _check(SPECTRA, trained="owner/name")


def test_texts_that_are_longer_than_a_models_context_are_refused(trained_run, tmp_path):
    shutil.copytree(trained_run[0], registry.run_path("tiny", "grown"))
    with pytest.raises(ValueError, match="max_new_tokens 63 exceeds the model's context of 64"):
        _check(GENERATION, max_new_tokens=63)
    with pytest.raises(ValueError, match="max_new_tokens 63 exceeds the model's context of 64"):
        _check(
            GENERATION,
            max_new_tokens=63,
            trained="owner/name",
            others=str(trained_run[1].checkpoint),
        )
    _check(GENERATION, max_new_tokens=63, trained="owner/name", others="owner/other")


def test_lm_eval_is_asked_for_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"lm-eval is not installed; pip install -e '.\[harness\]'"
    ):
        _check(GENERATION, with_lm_eval=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    _check(GENERATION, with_lm_eval=True)


def test_a_run_that_has_begun_does_not_need_its_start_any_more():
    _check(TRAINING, init="random")
    _check(TRAINING, init="owner/name")
    run_dir = registry.run_path("tiny", "grown")
    run_dir.mkdir(parents=True)
    folder.write_run_file(run_dir, small_profile(), None, "cpu")
    _check(TRAINING, init="nowhere")


def test_a_stack_that_is_not_there_is_missed_before_anything_starts(tmp_path):
    for profile in ("tiny", "kl3m-002-520m"):  # the second is never stacked, unless somebody does
        with pytest.raises(
            ValueError, match=r"no stack in .*-stack to begin with; .* random weights .init random"
        ):
            _check(TRAINING, profile=profile, init="")
    decoder.build_model(get_profile("tiny")).save_pretrained(
        tmp_path / "runs" / "demo-stack" / "checkpoint"
    )
    _check(TRAINING, init="")


def test_files_and_folders_that_are_there_are_accepted(trained_run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for notebook, name in ((SOURCE, "source"), (STACKING, "documents"), (TRAINING, "source")):
        _check(notebook, **{name: f"files:{tmp_path}/*.jsonl"})
        _check(notebook, **{name: "hub:owner/name"})
    checkpoint = checkpoints.latest_checkpoint(Path(trained_run[0]))
    _check(STACKING, source=str(checkpoint), seq_len=64)
    decoder.build_model(get_profile("tiny", seq_len=64, context=64)).save_pretrained(
        tmp_path / "start"
    )
    _check(TRAINING, init=str(tmp_path / "start"), seq_len=64)


def test_a_start_or_source_of_another_shape_is_refused_before_the_kernel(trained_run, tmp_path):
    """By its own numbers, whatever the profile's: a window may be longer than this profile's
    context, not than the model's.
    """
    checkpoint = str(checkpoints.latest_checkpoint(Path(trained_run[0])))
    with pytest.raises(ValueError, match="num_hidden_layers 2, the profile tiny wants 12"):
        _check(TRAINING, init=checkpoint)
    with pytest.raises(ValueError, match="seq_len 65 is longer than the context of 64"):
        _check(STACKING, source=checkpoint, seq_len=65)
    long = get_profile("tiny", context=512)
    decoder.build_model(long).save_pretrained(tmp_path / "long")
    _check(STACKING, source=str(tmp_path / "long"), seq_len=512)
    decoder.build_model(get_profile("tiny", seq_len=64, context=64)).save_pretrained(
        tmp_path / "short"
    )
    with pytest.raises(
        ValueError, match="seq_len 256 is longer than the context of 64 tokens that the checkpoint"
    ):
        _check(TRAINING, init=str(tmp_path / "short"))


@pytest.mark.parametrize("notebook", [SOURCE, TRAINING])
def test_a_tokenizer_that_does_not_fit_is_refused_before_the_kernel(notebook, tmp_path):
    """Too large for the vocabulary, which can be set; without a token that the data need; not
    there.
    """
    every = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    first = tuple(every.values())
    whole = str(make_tokenizer(tmp_path / "whole", first, (), **every))
    _check(notebook, tokenizer=whole)
    with pytest.raises(
        ValueError,
        match=r"vocabulary of 400, and the model's is only 399; set vocabulary to 400 or more",
    ):
        _check(notebook, tokenizer=whole, vocabulary=399)
    _check(notebook, tokenizer=whole, vocabulary=400)
    bare = str(make_tokenizer(tmp_path / "bare", last=()))
    with pytest.raises(ValueError, match="names no end-of-text token"):
        _check(notebook, tokenizer=bare)
    if notebook == SOURCE:
        no_start = str(make_tokenizer(tmp_path / "no_start", first, (), eos_token="<|end|>"))
        _check(notebook, tokenizer=no_start)
        with pytest.raises(ValueError, match="names no beginning-of-text token"):
            _check(notebook, tokenizer=no_start, packing="segments")
    with pytest.raises(ValueError, match="tokenizer"):
        _check(notebook, tokenizer=str(tmp_path / "nowhere"))
    run_dir = registry.run_path("tiny", registry.NOTEBOOK_STAGES[notebook])
    run_dir.mkdir(parents=True)
    folder.write_run_file(run_dir, small_profile(), None, "cpu")
    _check(notebook, tokenizer=bare)  # a run that has begun has its checkpoint's


def test_a_model_without_a_token_to_begin_with_is_refused_before_the_kernel(tmp_path):
    decoder.build_model(get_profile("tiny")).save_pretrained(tmp_path / "bare")
    shutil.copy(
        make_tokenizer(tmp_path / "tokenizer", last=()) / "tokenizer.json", tmp_path / "bare"
    )
    with pytest.raises(ValueError, match="names no end-of-text token"):
        _check(GENERATION, trained=str(tmp_path / "bare"))


def test_a_notebook_that_was_renamed_is_judged_by_what_its_cell_declares(tmp_path, monkeypatch):
    defaults = {
        name: parameter.default
        for name, parameter in read_parameters(find_notebook(TRAINING)).items()
    }
    monkeypatch.setattr(parameters, "notebooks_dir", lambda: tmp_path)
    declared = {"__annotations__": {name: type(value) for name, value in defaults.items()}}
    defaults["init"] = "random"
    check_notebook(TRAINING, {**declared, **defaults})
    with pytest.raises(
        ValueError, match="'max_steps' of 02_training is of type int; 'many' is not"
    ):
        check_notebook(TRAINING, {**declared, **defaults, "max_steps": "many"})


def test_a_parameter_that_was_taken_out_is_named():
    defaults = {
        name: parameter.default
        for name, parameter in read_parameters(find_notebook(TRAINING)).items()
    }
    del defaults["run"]
    with pytest.raises(
        ValueError, match="The parameter 'run' of 02_training is not set; put its line back"
    ):
        check_notebook(TRAINING, defaults)
