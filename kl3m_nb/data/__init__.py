"""From documents to windows of tokens: sources, readers, tokenizers, packing, segments, instruction
pairs.
"""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "corpus": ["check_source", "measure_leak"],
        "documents": ["unseen_documents"],
        "loader": ["open_stream"],
        "special_ids": ["check_tokenizer"],
        "tokenizer": ["CORPUS_NAMES", "check_same_entries", "load_tokenizer", "read_tokenizer"],
        "windows": ["document_table", "sampled_windows"],
    },
)
