"""Models written here load in the oldest transformers that is promised, with the same logits and
the same ids.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl3m_nb.growth import stacking
from kl3m_nb.model import decoder, loading, older_readers
from kl3m_nb.runs import export
from kl3m_nb.training import loop
from tests.conftest import small_profile

SCRIPT = Path(__file__).with_name("older_load.py")
TOKENS = list(range(3, 40))
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, its export and its stack; a checkpoint of a mixture; checkpoints of models
    whose positions are scaled.
    """
    folder = tmp_path_factory.mktemp("written")
    checkpoint = loop.train(
        small_profile(max_steps=1, warmup_steps=0, rope_theta=50_000.0), folder / "run"
    ).checkpoint
    exported = export.export_model(checkpoint, folder)
    stacking.stack_checkpoint(checkpoint, folder / "stack", factor=2)
    made = [checkpoint, exported, folder / "stack"]
    mixture = small_profile(
        max_steps=1, warmup_steps=0, experts=4, active_experts=2, rope_theta=50_000.0
    )
    made.append(loop.train(mixture, folder / "mixture").checkpoint)
    for name, rope in (("linear", LINEAR), ("llama3", SCALED)):
        start = decoder.build_model(small_profile(rope_theta=5000.0))
        start.config.rope_parameters = rope
        start.save_pretrained(folder / f"{name}-start")
        profile = small_profile(max_steps=1, warmup_steps=0, rope_theta=5000.0)
        made.append(loop.train(profile, folder / name, init=folder / f"{name}-start").checkpoint)
    return made


def test_what_is_added_says_the_same_as_what_was_there(folders):
    for folder in folders:
        written = json.loads((folder / "config.json").read_text())
        alone = {
            key: value
            for key, value in written.items()
            if key not in ("rope_theta", "rope_scaling")
        }
        both, newer = (
            loading.read_config(config).to_dict() | {"_name_or_path": ""}
            for config in (written, alone)
        )
        assert both == newer
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] != 10_000.0
        assert (
            json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
            == "PreTrainedTokenizerFast"
        )
    assert (
        json.loads((folders[-1] / "config.json").read_text())["rope_scaling"][
            "original_max_position_embeddings"
        ]
        == 16
    )


def test_a_foreign_stack_and_an_old_checkpoints_export_are_written_so_too(folders, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for path in folders[0].iterdir():
        if path.is_file():
            (old / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((old / "tokenizer_config.json").read_text())
    tokenizer["extra_special_tokens"] = tokenizer.pop("additional_special_tokens", [])
    (old / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"tokenizer_class": "TokenizersBackend"})
    )
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "rope_theta"})
    )
    stacking.stack_checkpoint(old, tmp_path / "stack", factor=2)
    stacking.verify_stack(old, tmp_path / "stack")
    for folder in (tmp_path / "stack", export.export_model(old, tmp_path)):
        assert json.loads((folder / "config.json").read_text())["rope_theta"] == 50_000.0
        assert json.loads((folder / "tokenizer_config.json").read_text()) == tokenizer_as_written(
            folders[0]
        )


def tokenizer_as_written(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_parameters_by_type_of_layer_and_families_without_any_are_left_alone():
    nested = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}}
    for config in (nested, {"model_type": "gpt2"}, {"rope_parameters": None}):
        assert older_readers.older_config(config) == config


@pytest.mark.slow
def test_the_oldest_transformers_gives_the_same_logits_and_ids(folders, tmp_path):
    python = older_python(tmp_path / "older")
    done = subprocess.run(
        [python, SCRIPT, json.dumps(TOKENS), *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["version"] == older_readers.OLDEST
    for folder, older in zip(folders, told["results"], strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([TOKENS])).logits[
                0
            ]
        torch.testing.assert_close(torch.tensor(older["logits"]), expected, rtol=0.0, atol=1e-5)
        special = [
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            *sorted(tokenizer.all_special_ids),
        ]
        assert older["ids"] == tokenizer("The Secretary shall file <|end|> § 12.").input_ids
        assert older["special"] == special and older["lost"] == []


def older_python(folder: Path) -> Path:
    """The Python of an environment with the oldest transformers that is promised, and this one's
    torch; skips without pip.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", f"transformers=={older_readers.OLDEST}"]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(
            f"pip cannot install transformers {older_readers.OLDEST} here:"
            f" {installed.stderr.strip()[-200:]}"
        )
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(place) / "torch_of_this_environment.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # behind its own packages
    return python
