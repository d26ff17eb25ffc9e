"""The training loop, what it resumes from, and torchrun."""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loop": ["train"],
        "resume": ["TrainResult", "check_start"],
        "torchrun": ["check_processes", "train_with_torchrun"],
    },
)
