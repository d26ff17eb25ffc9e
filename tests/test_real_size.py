"""The real models at their true size, trained through notebook 02, on the machine the tests run on:
minutes, most of its memory.

The sources are random: what is tested is that 500 million parameters are stacked, verified, loaded,
trained and used.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import pipeline

from kl3m_nb.data.tokenizer import load_tokenizer
from kl3m_nb.evaluation import generation
from kl3m_nb.growth import stacking
from kl3m_nb.model import decoder, roles
from kl3m_nb.profiles import get_profile, source_profile, usage_of
from kl3m_nb.runs import checkpoints
from kl3m_nb.runs.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = "package:licensedcode-data"
MOST_MEMORY = 14 * 10**9  # resident, of any one process
# Newton-Schulz is most of a step of 512 tokens. The 500M takes its profile's five steps (0), the
# mixture three, as kl3m-006 did: its matrices cost twice as much, and the suite has to end.
NS_STEPS = {"kl3m-007-500m": 0, "kl3m-002-520m": 3}
SMALL_DATA = {"seq_len": 512, "held_out_windows": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs of this module lie; the 500M stack that notebook 01 writes is what notebook 02
    begins with.
    """
    return tmp_path_factory.mktemp("real")


def _random_source(profile, folder: Path) -> Path:
    decoder.build_model(profile).save_pretrained(folder)
    load_tokenizer("corpus", DOCUMENTS, 4096).save_pretrained(folder)
    return folder


def _run_notebook(folder: Path, name: str, **parameters) -> None:
    given = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "kl3m_nb", "run", name, "--without-gpu", *given]
    environment = {**os.environ, "KL3M_NB_RUNS": str(folder / "runs"), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit < MOST_MEMORY


def _train_two_steps(folder: Path, profile: str, tokenizer: Path, init: str = "") -> Path:
    _run_notebook(
        folder,
        "02_training",
        profile=profile,
        init=init,
        max_steps=2,
        micro_batch=1,
        grad_accumulation=1,
        source=DOCUMENTS,
        tokenizer=tokenizer,
        ns_steps=NS_STEPS[profile],
        **SMALL_DATA,
    )
    run_dir = folder / "runs" / f"{profile}-grown"
    train = read_metrics(run_dir, "train")
    assert (
        list(train.step) == [1, 2] and list(train.tokens) == [512, 1024] and not train.skipped.any()
    )
    unknowing = math.log(get_profile(profile).model.vocabulary)
    assert train.cross_entropy.between(unknowing - 0.8, unknowing + 1.3).all()
    return checkpoints.latest_checkpoint(run_dir)


def _moved(before: Path, after: Path, names: tuple[str, ...]) -> None:
    from safetensors import safe_open

    with (
        safe_open(before / "model.safetensors", "pt") as old,
        safe_open(after / "model.safetensors", "pt") as new,
    ):
        assert set(old.keys()) == set(new.keys())
        for name in names:
            moved = (new.get_tensor(name) - old.get_tensor(name)).abs().max().item()
            assert 0 < moved < 0.01, f"{name} moved by {moved}"


def _writes(checkpoint: Path) -> None:
    writer = pipeline("text-generation", model=str(checkpoint), device="cpu")
    assert writer.model.num_parameters() == roles.parameter_counts(writer.model)["total"]
    prompt = writer.tokenizer("Governing Law.")["input_ids"]
    written = writer("Governing Law.", min_new_tokens=4, max_new_tokens=4, return_tensors=True)[0][
        "generated_token_ids"
    ]
    assert written[: len(prompt)] == prompt and len(written) == len(prompt) + 4


def test_the_500m_is_stacked_verified_loaded_and_trained_through_the_notebooks(folder):
    profile = get_profile("kl3m-007-500m")
    source = _random_source(source_profile(profile), folder / "kl3m-006-170m")
    _run_notebook(
        folder,
        "01_stacking",
        profile=profile.name,
        source=source,
        documents=DOCUMENTS,
        tokenizer=source,
        **SMALL_DATA,
    )
    stack = folder / "runs" / "kl3m-007-500m-stack" / "checkpoint"
    made = json.loads((stack / "stack.json").read_text())
    assert made["parameters"] == 500_309_568 and made["block_sources"] == [*range(30)] * 4
    assert (stack / "model.safetensors").stat().st_size == pytest.approx(4 * 500_309_568, rel=1e-4)
    _writes(stack)
    trained = _train_two_steps(folder, profile.name, source)
    _moved(
        stack,
        trained,
        (
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.119.mlp.up_proj.weight",
        ),
    )


def test_the_520m_mixture_is_stacked_trained_in_notebook_02_and_writes_as_its_card_does(
    folder,
):
    """Not through notebook 01: the profile was not grown, so the notebook would copy its source."""
    profile = get_profile("kl3m-002-520m")
    source = _random_source(
        source_profile(get_profile(profile.name, growth_factor=4)), folder / "kl3m-002-quarter"
    )
    stack = folder / "mixture"
    assert stacking.stack_checkpoint(source, stack).parameters == 520_193_024
    stacking.verify_stack(source, stack)
    _writes(stack)
    trained = _train_two_steps(folder, profile.name, source, init=str(stack))
    expert = "model.layers.15.block_sparse_moe.experts.3.w1.weight"
    _moved(
        stack,
        trained,
        (
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
            expert,
        ),
    )
    shares = read_metrics(trained.parents[1], "experts").pivot(
        index="layer", columns="expert", values="share"
    )
    assert (
        shares.shape == (16, 4) and shares.max(axis=None) <= 0.5
    )  # the two experts of a token are two
    assert (
        shares.loc[0] > 0.01
    ).all()  # behind random blocks tokens are alike, and some experts are left out
    prompts = usage_of(profile.name).prompts
    written = generation.run_card(trained, profile.name, seed=5)
    assert [len(texts) for texts in written] == [3, 3]
    assert all(
        text.startswith(prompt)
        for prompt, texts in zip(prompts, written, strict=True)
        for text in texts
    )
