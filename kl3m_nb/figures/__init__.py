"""Every figure of the notebooks, drawn from tables."""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["plot_documents", "plot_token_lengths", "tokens_html", "window_html"],
        "evaluation": [
            "plot_differences",
            "plot_entropy_along",
            "plot_generation_measures",
            "plot_memorisation",
            "plot_over_training",
            "plot_prediction",
            "plot_quality_match",
            "plot_sampling_sweep",
        ],
        "matrices": ["plot_block_function", "plot_clamp_map", "plot_matrix_page"],
        "spectra": [
            "MOST_COPIES",
            "plot_condition_heatmap",
            "plot_copies",
            "plot_divergence",
            "plot_inheritance",
            "plot_ridgeline",
        ],
        "style": ["save_figure", "use_style"],
        "training": [
            "plot_clamp_events",
            "plot_expert_use",
            "plot_growth",
            "plot_objective_terms",
            "plot_stack_map",
            "plot_training",
        ],
    },
)
