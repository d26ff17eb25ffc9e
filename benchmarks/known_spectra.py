"""A source, its stack and a "trained" model whose spectra, conditions, ranks and divergence are
known in closed form.

The analysis is checked against them, at the size of a test and at the size of the real model. A
matrix is U·diag(s)·Vᵀ on the side of its shorter dimension n, with a geometric spectrum s. Training
is imitated by two changes that can be undone on paper: in copy c the spectrum is raised to the
power 1 + 0.01·c, and the left directions are turned in pairs, i of the first quarter towards i +
n/4 of the second by 0.05·c radians, i of the third towards i + n/4 of the last by twice that,
forward in odd copies and backward in even ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from kl3m_nb.growth.stacking import stack_checkpoint
from kl3m_nb.model import decoder
from kl3m_nb.model.roles import BLOCK_ROLES, HEAD_LAYER
from kl3m_nb.profiles import ATTENTION_ROLES, ModelSpec

ANGLE = 0.05  # radians by which the upper half of copy 1 is turned
LOWER = 2  # how much further its lower half is turned
POWER = 0.01  # the spectrum of copy 1 is raised to the power 1 + POWER
HEAD_CONDITION = 500.0
SIGMA_MAX = 20.0
_BASES = 4  # pairs of orthonormal bases of each shape; blocks take them in turn


@dataclass(frozen=True)
class KnownStack:
    """The three checkpoint folders, and what an exact analysis has to find in them.

    `spectra`: singular values of `trained` by (layer, role), float64, descending. `divergence` has
    the columns of `copies.copy_divergence` without gaps and chance levels, for a top_k of up to a
    quarter of the shortest side; `rmse` is the inheritance by (layer, role).
    """

    source: Path
    stack: Path
    trained: Path
    source_layers: int
    spectra: dict[tuple[int, str], np.ndarray]
    divergence: pd.DataFrame
    rmse: dict[tuple[int, str], float]


def write_known_stack(folder: str | Path, spec: ModelSpec, copies: int) -> KnownStack:
    """Writes source, stack and trained model of `spec` (a dense Llama with tied embeddings) into
    `folder`.

    `spec.layers` is the depth of the stack, `copies` how often each source block is in it. What an
    earlier call with the same arguments wrote is left as it is. Weights are float32, so what is
    read differs from what was put in by their rounding: about 1e-8·σ₁ in a singular value.
    """
    folder, source_layers = Path(folder), spec.layers // copies
    bases = _Bases(spec, source_layers)
    source = folder / "source"
    _write(source, spec, source_layers, lambda layer, role: bases.matrix(layer, role, 0), bases)
    stack = folder / "stack"
    stack_checkpoint(source, stack, copies)

    def trained_matrix(layer: int, role: str) -> torch.Tensor:
        return bases.matrix(layer % source_layers, role, layer // source_layers)

    trained = folder / "trained"
    _write(trained, spec, spec.layers, trained_matrix, bases)
    keys = [(layer, role) for layer in range(spec.layers) for role in BLOCK_ROLES]
    spectra = {
        (layer, role): bases.spectrum(layer % source_layers, role, layer // source_layers)
        for layer, role in keys
    }
    rmse = {
        (layer, role): (
            POWER
            * (layer // source_layers)
            * _root_mean_square(np.log(bases.spectrum(layer % source_layers, role, 0) / SIGMA_MAX))
        )
        for layer, role in keys
    }
    head = {(HEAD_LAYER, "lm_head"): _geometric(HEAD_CONDITION, min(spec.vocabulary, spec.hidden))}
    rows = [
        _expected_row(bases, block, role, a, b)
        for block in range(source_layers)
        for role in BLOCK_ROLES
        for a, b in combinations(range(copies), 2)
    ]
    return KnownStack(
        source, stack, trained, source_layers, spectra | head, pd.DataFrame(rows), rmse
    )


def _expected_row(bases: _Bases, block: int, role: str, a: int, b: int) -> dict:
    start, first, second = (bases.spectrum(block, role, copy) for copy in (0, a, b))
    # Column i of two copies meets at the difference of their angles, and different columns never
    # meet.
    half = np.repeat([1, LOWER], len(start) // 2)
    inner = {
        pair: np.cos(half * (_angle(pair[0]) - _angle(pair[1])))
        for pair in ((a, b), (a, 0), (b, 0))
    }
    distance = np.sqrt(np.sum(first**2 + second**2 - 2 * first * second * inner[a, b]))
    lengths = [
        np.sqrt(np.sum(moved**2 + start**2 - 2 * moved * start * inner[copy, 0]))
        for copy, moved in ((a, first), (b, second))
    ]
    product = np.sum(
        first * second * inner[a, b]
        - first * start * inner[a, 0]
        - second * start * inner[b, 0]
        + start**2
    )
    return {
        "role": role,
        "source_layer": block,
        "copy_a": a,
        "copy_b": b,
        "distance": distance / np.mean([np.linalg.norm(first), np.linalg.norm(second)]),
        "movement_cosine": product / np.prod(lengths) if a else np.nan,  # copy 0 has not moved
        "top_overlap": inner[a, b][0] ** 2,
        "bottom_overlap": inner[a, b][-1] ** 2,
    }


class _Bases:
    """Matrices of the known stack, from a few orthonormal bases in float64."""

    def __init__(self, spec: ModelSpec, source_layers: int):
        queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        self.shapes = {
            "q_proj": (queries, spec.hidden),
            "k_proj": (keys, spec.hidden),
            "v_proj": (keys, spec.hidden),
            "o_proj": (spec.hidden, queries),
            "gate_proj": (spec.mlp, spec.hidden),
            "up_proj": (spec.mlp, spec.hidden),
            "down_proj": (spec.hidden, spec.mlp),
        }
        self._source_layers = source_layers
        self._random = torch.Generator().manual_seed(0)
        self._pairs = {
            sides: [
                tuple(self._orthonormal(side, sides[0]) for side in sides) for _ in range(_BASES)
            ]
            for sides in {(min(shape), max(shape)) for shape in self.shapes.values()}
        }
        self._head_shape = (spec.vocabulary, spec.hidden)

    def head(self) -> torch.Tensor:
        """The embedding, float32; the same at every call."""
        self._random.manual_seed(1)
        short, long = sorted(self._head_shape)
        tall = self._orthonormal(long, short) * torch.from_numpy(_geometric(HEAD_CONDITION, short))
        tall = (tall @ self._orthonormal(short, short).T).float()
        return tall if self._head_shape == (long, short) else tall.T.contiguous()

    def _orthonormal(self, rows: int, cols: int) -> torch.Tensor:
        return torch.linalg.qr(
            torch.randn(rows, cols, generator=self._random, dtype=torch.float64)
        ).Q

    def spectrum(self, block: int, role: str, copy: int) -> np.ndarray:
        """float64, descending. Attention lies near a ceiling of 3000, the MLP at 4 to 5, as the
        family's cards report.
        """
        place = (
            block + BLOCK_ROLES.index(role) / len(BLOCK_ROLES)
        ) / self._source_layers  # no two are alike
        condition = 2200.0 + 720.0 * place if role in ATTENTION_ROLES else 4.0 + place
        return _geometric(condition ** (1 + POWER * copy), min(self.shapes[role]))

    def matrix(self, block: int, role: str, copy: int) -> torch.Tensor:
        """float32, contiguous."""
        rows, cols = self.shapes[role]
        left, right = self._pairs[min(rows, cols), max(rows, cols)][
            (block + BLOCK_ROLES.index(role)) % _BASES
        ]
        first, second, third, last = left.chunk(4, dim=1)
        turned = torch.cat(
            [*_turned(first, second, _angle(copy)), *_turned(third, last, LOWER * _angle(copy))],
            dim=1,
        )
        weight = (turned * torch.from_numpy(self.spectrum(block, role, copy))) @ right.T
        return (weight if rows <= cols else weight.T).float().contiguous()


def _angle(copy: int) -> float:
    return ANGLE * copy * (1 if copy % 2 else -1)


def _turned(
    upper: torch.Tensor, lower: torch.Tensor, angle: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        np.cos(angle) * upper + np.sin(angle) * lower,
        np.cos(angle) * lower - np.sin(angle) * upper,
    )


def _geometric(condition: float, count: int) -> np.ndarray:
    return np.geomspace(SIGMA_MAX, SIGMA_MAX / condition, count)


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _write(
    folder: Path,
    spec: ModelSpec,
    layers: int,
    matrix: Callable[[int, str], torch.Tensor],
    bases: _Bases,
) -> None:
    """A checkpoint folder in shards of at most 30 layers, so that no whole model is in memory. A
    whole one is left as it is.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = decoder.model_config(replace(spec, layers=layers))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    places = {}
    for first in range(0, layers, 30):
        tensors = (
            {
                "model.embed_tokens.weight": bases.head(),
                "model.norm.weight": torch.ones(spec.hidden),
            }
            if first == 0
            else {}
        )
        for layer in range(first, min(first + 30, layers)):
            for role in BLOCK_ROLES:
                part = "self_attn" if role in ATTENTION_ROLES else "mlp"
                tensors[f"model.layers.{layer}.{part}.{role}.weight"] = matrix(layer, role)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(spec.hidden)
        name = f"model-{first // 30 + 1:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
