"""The decoder: built, loaded and run; the names of its tensors, its costs, the scores of its
predictions.
"""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "costs": ["count_parameters"],
        "decoder": [
            "build_model",
            "check_checkpoint",
            "context_of",
            "load_model",
            "profile_of_start",
        ],
        "estimate": ["estimate_table"],
        "experts": ["load_balancing_loss"],
        "roles": ["parameter_counts"],
        "runtime": ["choose_runtime", "versions"],
        "scoring": ["held_out_loss"],
    },
)
