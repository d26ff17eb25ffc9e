"""What one step changes: the objective, Muon and AdamW, the clamp, the schedule, the rule of every
parameter.
"""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "clamp": ["ClampOutcome", "clamp_spectrum_"],
        "loss": ["TARGET_OFFSET", "TARGET_SPREAD", "entropy_target_parts", "term_pulls"],
        "muon": ["Muon", "orthogonalize"],
        "objective": ["ObjectiveTerms", "chunked_objective"],
        "rules": ["role_table"],
        "schedule": ["lr_factor"],
    },
)
