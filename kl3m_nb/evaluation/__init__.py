"""What a checkpoint predicts and writes, measured: documents, tasks, samples, memorisation,
toxicity.
"""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "comparison": [
            "differences_table",
            "rank_agreement",
            "side_by_side",
            "steps_table",
            "summary_table",
        ],
        "documents": ["beginning", "evaluate_documents", "worth_of_context"],
        "generation": [
            "Gallery",
            "Sampling",
            "advised_sampling",
            "answer_extractions",
            "check_room",
            "choose_prompts",
            "chosen_sampling",
            "generate",
            "load_prompts",
            "run_card",
        ],
        "legal_form": ["citations"],
        "memorisation": ["NotMeasurable", "PREFIX_LENGTHS", "copying"],
        "tasks": [
            "TASKS",
            "answer_items",
            "check_lm_eval",
            "load_items",
            "run_lm_eval",
            "task_summary",
        ],
        "toxicity": ["measure_toxicity"],
        "writing": [
            "entropy_along",
            "measure",
            "measure_extraction",
            "samples_table",
            "sampling_sweep",
        ],
    },
)
