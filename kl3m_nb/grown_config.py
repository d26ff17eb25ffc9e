"""The config.json of a deeper model, and what a config.json leaves to its family's defaults."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from kl3m_nb.loading import REFUSALS, empty_model, read_config, reason
from kl3m_nb.older_readers import older_config

# Lists of some families with an entry for each block, ...
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "indexer_types", "layer_rope_theta")
_BLOCK_NUMBERS = ("moe_layers", "mlp_only_layers", "full_attn_idxs")  # ... lists of the blocks that are of one kind ...
_LAST_BLOCK = ("moe_layer_end_index",)  # ... and the number of the last block that is
_PLAIN = (bool, int, float, str, tuple, list, type(None))  # attributes of a module that can be compared


def grown_config(config: dict, blocks: tuple[int, ...]) -> dict:
    """`config` with as many layers as `blocks` has, each set up as the layer of `config` that `blocks` names, or -1 as the first.

    What sets one layer apart from another, a sliding window say, is written down where the family's defaults for the new depth
    would choose other layers. It is as older versions of transformers read it, too.
    """
    sources = [max(block, 0) for block in blocks]
    grown = dict(config, num_hidden_layers=len(blocks))
    now = with_defaults(config)
    later = with_defaults({key: value for key, value in grown.items() if key not in (*PER_BLOCK, *_BLOCK_NUMBERS, *_LAST_BLOCK)})

    def write(key: str, repeated: object) -> None:
        if key in config or repeated != later.get(key):
            grown[key] = repeated

    for key in PER_BLOCK:
        if settings := config.get(key) or now.get(key):
            write(key, [settings[source] for source in sources])
    for key in _BLOCK_NUMBERS:
        if isinstance(numbers := config.get(key) or now.get(key), list) and numbers:
            write(key, [target for target, source in enumerate(sources) if source in numbers])
    for key in _LAST_BLOCK:
        if (config.get(key) or now.get(key)) == config["num_hidden_layers"] - 1:
            write(key, len(blocks) - 1)
    return older_config(grown)


def check_blocks(source: Path, config: dict, grown: dict, blocks: tuple[int, ...]) -> None:
    """Raises ValueError when transformers sets up a block of `grown` in another way than the block of `config` it is made from.

    The modules of both models are compared, and their numbers and names: a window, whether positions are rotated, which blocks
    hold experts. What is a block's own number may differ. `source` is the folder that the sentence names.
    """
    try:
        small, large = (empty_model(settings).get_submodule("model.layers") for settings in (config, grown))
    except REFUSALS as error:
        raise ValueError(f"transformers cannot build the stack of {source} ({reason(error)}); give another model.") from error
    for target, block in enumerate(blocks):
        number = max(block, 0)
        ours, theirs = _described(small[number]), _described(large[target])
        for key in ours | theirs:
            a, b = ours.get(key), theirs.get(key)
            if a != b and (a, b) != (number, target):
                raise ValueError(
                    f"{source} is a {config.get('model_type')}, and such a model of {len(blocks)} layers has {key} {b} in layer "
                    f"{target} where the copied layer {number} has {a}; give a model whose layers do not differ by number."
                )


def _described(block: nn.Module) -> dict[str, object]:
    """The class of every module of a block and its plain attributes, by the module's name in the block."""
    described: dict[str, object] = {}
    for name, module in block.named_modules():
        described[name or "block"] = type(module).__name__
        prefix = f"{name}." if name else ""
        described |= {
            prefix + key: value for key, value in vars(module).items() if key[0] != "_" and isinstance(value, _PLAIN)
        }  # fmt: skip
    return described


def with_defaults(config: dict) -> dict:
    """`config` with what transformers adds to it; as it is when the family is unknown here or its values are refused."""
    try:
        return read_config(config).to_dict()
    except REFUSALS:
        return config
