"""Whether copies of a block still do the same: linear CKA of their outputs, and the loss when two
of them change places.

Weights that differ may compute alike and weights that are close may not, so these two run the
model, on held-out windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kl3m_nb.common.intervals import mean_interval
from kl3m_nb.model.scoring import evaluation_mode, held_out_loss
from kl3m_nb.spectra.matrices import check_source_layers
from kl3m_nb.spectra.singular_values import Progress


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same samples, e.g. [2048, 576]
    each; between 0 and 1.

    ‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) of the centred features, in float64 (Kornblith et al.,
    arXiv:1905.00414). It does not change when one set is rotated or scaled. NaN where features are
    constant.
    """
    x, y = (features.double() - features.double().mean(dim=0) for features in (first, second))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def chance_cka(first: Tensor, second: Tensor) -> float:
    """Mean linear CKA over all ways to pair the samples of `first` with those of `second` at
    random, e.g. [2048, 576] each.

    Exact without any drawing: tr K · tr L / ((n − 1) ‖K‖_F ‖L‖_F) with the Gram matrices K, L of
    the centred features and n samples (Kazi-Aoual et al. 1995, Comput. Stat. Data Anal. 20, for the
    RV coefficient, which linear CKA is). NaN where features are constant.
    """
    x, y = (features.double() - features.double().mean(dim=0) for features in (first, second))
    traces = x.square().sum() * y.square().sum()
    return float(traces / ((len(x) - 1) * (x.T @ x).norm() * (y.T @ y).norm()))


def block_similarity(
    model: PreTrainedModel,
    windows: Tensor,
    source_layers: int,
    batch_windows: int = 8,
    samples: int = 2048,
) -> pd.DataFrame:
    """Linear CKA of what the copies of each source block compute: a row per source block and pair
    of copies.

    `windows` is int64 [N, seq_len + 1], e.g. [48, 257]; features are taken at up to `samples`
    positions spread evenly over them. output_cka compares the residual stream behind the blocks,
    which carries what all blocks below wrote; update_cka what the block itself adds to it.
    output_chance and update_chance are `chance_cka`: what the same features give when the positions
    of the two copies are paired at random. Raises ValueError for `source_layers` that do not divide
    the layers or leave one copy.
    """
    pairs = copy_pairs(model, source_layers)
    positions = windows.shape[0] * (windows.shape[1] - 1)
    chosen = torch.linspace(0, positions - 1, min(samples, positions)).round().long().unique()
    outputs, updates = _block_features(model, windows, chosen, batch_windows)
    rows = []
    for source_layer, a, b in pairs:
        row = {
            "source_layer": source_layer,
            "copy_a": a // source_layers,
            "copy_b": b // source_layers,
        }
        for name, features in (("output", outputs), ("update", updates)):
            row[f"{name}_cka"] = linear_cka(features[a], features[b])
            row[f"{name}_chance"] = chance_cka(features[a], features[b])
        rows.append(row)
    return pd.DataFrame(rows)


def swap_loss(
    model: PreTrainedModel,
    windows: Tensor,
    source_layers: int,
    families: Sequence[Hashable] | None = None,
    batch_windows: int = 8,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Change of the held-out loss when two copies of a source block change places: a row per source
    block and pair of copies.

    `windows` is int64 [N, seq_len + 1], e.g. [16, 257]. loss is that of the model as it is, change
    = swapped loss − loss in nats per token, low and high its 95% interval, effective the effective
    number of `families` that it rests on: the document family of each window, as
    `windows.sampled_windows` gives it, or without them the windows. Copies that are equal change
    nothing. The model is as it was afterwards, also after an error. Raises ValueError as
    `block_similarity`.
    """
    pairs = copy_pairs(model, source_layers)
    before = held_out_loss(model, windows, batch_windows)
    rows = []
    for done, (source_layer, a, b) in enumerate(pairs, start=1):
        with _swapped(model.model.layers, a, b):
            after = held_out_loss(model, windows, batch_windows)
        interval = mean_interval(after.loss_per_window - before.loss_per_window, families=families)
        rows.append(
            {
                "source_layer": source_layer,
                "copy_a": a // source_layers,
                "copy_b": b // source_layers,
                "loss": before.loss,
                "change": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "effective": interval.effective,
            }
        )
        if progress is not None:
            progress(done, len(pairs))
    return pd.DataFrame(rows)


def copy_pairs(model: PreTrainedModel, source_layers: int) -> list[tuple[int, int, int]]:
    """(source block, layer, layer) for every two copies of a block in a cyclic stack.

    Raises ValueError for `source_layers` that do not divide the layers or leave one copy.
    """
    layers = len(model.model.layers)
    if check_source_layers(layers, source_layers) == layers:
        raise ValueError(
            f"A model of {layers} layers made of {source_layers} source layers has no copies to"
            " compare."
        )
    return [
        (block, a, b)
        for block in range(source_layers)
        for a, b in combinations(range(block, layers, source_layers), 2)
    ]


@torch.no_grad()
def _block_features(
    model: PreTrainedModel, windows: Tensor, chosen: Tensor, batch_windows: int
) -> tuple[list, list]:
    """Per layer the residual stream behind the block and what the block added to it: float32
    [samples, hidden] on the CPU.
    """
    layers = model.model.layers
    outputs, updates = ([[] for _ in layers] for _ in range(2))
    first = 0

    def keep(layer: int, arguments: tuple, named: dict, output) -> None:
        before = arguments[0] if arguments else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        here = (
            chosen[(chosen >= first) & (chosen < first + before.shape[0] * before.shape[1])] - first
        )
        before, after = (
            hidden.flatten(0, 1)[here.to(hidden.device)].float().cpu() for hidden in (before, after)
        )
        outputs[layer].append(after)
        updates[layer].append(after - before)

    hooks = [
        layer.register_forward_hook(
            lambda _, arguments, named, output, index=index: keep(index, arguments, named, output),
            with_kwargs=True,
        )
        for index, layer in enumerate(layers)
    ]
    try:
        with evaluation_mode(model):
            for batch in windows.split(batch_windows):
                model.base_model(input_ids=batch[:, :-1].to(model.device), use_cache=False)
                first += batch.shape[0] * (batch.shape[1] - 1)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in outputs], [torch.cat(parts) for parts in updates]


@contextlib.contextmanager
def _swapped(layers: torch.nn.ModuleList, a: int, b: int) -> Iterator[None]:
    layers[a], layers[b] = layers[b], layers[a]
    try:
        yield
    finally:
        layers[a], layers[b] = layers[b], layers[a]
