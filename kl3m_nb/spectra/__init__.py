"""The singular values of a model's matrices, the divergence of copied blocks, what both say."""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "block_function": ["block_similarity", "swap_loss"],
        "copies": ["copy_divergence", "inheritance"],
        "findings": [
            "describe_clamp",
            "describe_divergence",
            "describe_function",
            "describe_inheritance",
            "describe_model",
            "ill_matrices",
            "mark_ill",
            "most_diverged",
        ],
        "history": ["clamp_history", "over_checkpoints"],
        "matrices": ["find_matrices"],
        "singular_values": [
            "analyse_model",
            "check_role",
            "model_spectra",
            "spectra_frame",
            "spectrum_key",
            "spectrum_of",
        ],
        "subject": ["find_subject"],
    },
)
