"""What lies on disk: run folders, metrics, checkpoints, model cards, and where a
model comes from.
"""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoints": ["checkpoint_step", "require_checkpoint", "whole_checkpoints"],
        "folder": ["read_run_init", "read_run_profile", "read_run_runtime"],
        "lineage": ["model_step"],
        "metrics": ["read_metrics"],
        "registry": [
            "UnknownTraining",
            "document_prefix",
            "load_runs",
            "named_checkpoints",
            "profile_to_judge",
            "readings",
            "require_stage_checkpoint",
            "run_path",
            "stage_profile",
            "trained_on",
        ],
        "summary": ["describe_run"],
    },
)
