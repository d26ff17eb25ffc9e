"""The config.json of a deeper model, and what a config.json leaves to its family's defaults."""

from __future__ import annotations

import copy

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists of some families with an entry for each block


def grown_config(config: dict, blocks: tuple[int, ...]) -> dict:
    """`config` with as many layers as `blocks` has, each set up as the layer of `config` that `blocks` names, or -1 as the first.

    What sets one layer apart from another, a sliding window say, is written down where the family's defaults for the new depth
    would choose other layers.
    """
    grown = dict(config, num_hidden_layers=len(blocks))
    now, later = with_defaults(config), with_defaults({key: value for key, value in grown.items() if key not in PER_BLOCK})
    for key in PER_BLOCK:
        settings = config.get(key) or now.get(key)
        if not settings:
            continue
        repeated = [settings[max(block, 0)] for block in blocks]
        if config.get(key) or repeated != later.get(key):
            grown[key] = repeated
    return grown


def with_defaults(config: dict) -> dict:
    """`config` with what transformers adds to it; as it is when the family is unknown here or its values are refused."""
    settings = copy.deepcopy(config)
    try:
        return AutoConfig.for_model(settings.pop("model_type", None), **settings).to_dict()
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError):
        return config
