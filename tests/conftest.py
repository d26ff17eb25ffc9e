"""Every test, and every notebook under nbval, works in its own empty `runs/`, never
in the user's.
"""

# ruff: noqa: E402
from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import tempfile

import nbformat
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models

# Set before anything is collected, and inherited by the kernels nbval starts: all notebooks of one
# session share the folder.
_RUNS = tempfile.TemporaryDirectory(prefix="kl3m-nb-runs-")
os.environ["KL3M_NB_RUNS"] = _RUNS.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from kl3m_nb import profiles
from kl3m_nb.common import paths
from kl3m_nb.runs import card
from kl3m_nb.training import loop
from tests.warm_processes import WarmProcesses

SECTIONS = [
    f"Section {n}. The holder of permit {n * 7} shall file report {n % 13} with office {n % 29}."
    for n in range(400)
]


def small_profile(**overrides) -> profiles.Profile:
    """A two-layer model of 32 hidden units on the embedded corpus; a step takes a few
    milliseconds.
    """
    settings = dict(
        layers=2,
        hidden=32,
        mlp=64,
        heads=4,
        kv_heads=2,
        head_size=8,
        growth_factor=1,
        vocabulary=512,
        context=64,
        seq_len=32,
        micro_batch=4,
        held_out_windows=8,
        max_steps=6,
        warmup_steps=2,
        eval_every=3,
        checkpoint_every=3,
        clamp_every=2,
        # what is compared here is compared to more digits than bfloat16 has
        ns_precision="float32",
    )
    return profiles.get_profile("tiny", **{**settings, **overrides})


def model_card(profile: profiles.Profile, facts: card.CardFacts) -> str:
    """The card of a model that is as `profile` says, with the family's tokenizer."""
    return card.model_card(
        profile, facts, card.ModelFacts(profile.model, "", "<|start|>", "<|end|>")
    )


def make_tokenizer(folder, first=(), last=("<|endoftext|>",), **named):
    """A byte-level tokenizer folder with the special tokens `first` before and `last` behind the
    text's, as most have them.
    """
    made = Tokenizer(token_models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SECTIONS,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=list(first),
            initial_alphabet=alphabet,
        ),
    )
    made.add_special_tokens(list(last))
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    if named:
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named})
        )
    return folder


def execute_notebook(name: str, parameters: dict) -> dict:
    """What a notebook has defined when its cells have run in this process, with `parameters` in
    place of their defaults.
    """
    namespace = {"display": lambda *_: None, "In": (seen := [""])}
    for cell in nbformat.read(paths.notebooks_dir() / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            seen.append(cell.source)
            exec(cell.source, namespace)
            if "parameters" in cell.metadata.get("tags", ()):
                assert parameters.keys() <= namespace.keys()
                namespace.update(parameters)
    return namespace


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """(run folder, TrainResult) of `small_profile` trained to its end."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    return run_dir, loop.train(small_profile(), run_dir)


@pytest.fixture(scope="session")
def warm_processes():
    """Processes that start in milliseconds."""
    processes = WarmProcesses()
    yield processes
    processes.close()


def at_step(step: int, act):
    """A callback that calls `act` once, when `step` has been trained."""

    def callback(row):
        if row["kind"] == "train" and row["step"] == step:
            act()

    return callback


@contextlib.contextmanager
def files_up_to(size: int):
    """The operating system refuses to let any file of this process grow beyond `size` bytes, as it
    does on a full disk.
    """
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, ignored)
