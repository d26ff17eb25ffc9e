"""The ground: paths, files, text, intervals, linear algebra, processes and stop requests. It knows
no model and no run.
"""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "files": ["replace_text"],
        "paths": ["find"],
        "text": ["Sentences", "SortableTable"],
        "values": ["check_bounds"],
    },
)
