"""The notebooks' surroundings: parameters, headless runs, live views, widgets, pages, the demo."""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "explorer": ["SpectrumExplorer"],
        "live": ["LiveView"],
        "parameters": ["check_notebook"],
        "progress": ["ProgressBar"],
        "prompt_box": ["PromptBox"],
    },
)
