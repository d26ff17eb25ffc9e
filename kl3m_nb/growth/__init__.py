"""Growing a model by stacking its blocks, and what that saves."""

import lazy_loader

# Importing a room costs nothing; a name's module is imported when the name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "compare": ["curves", "find_source", "is_laptop_run", "plan_comparison", "source_curve"],
        "forecast": ["CALIBRATED", "back_test", "coverage", "forecast_match"],
        "speedups": ["compare_growth"],
        "stacking": [
            "ORDERS",
            "StackSummary",
            "block_order",
            "check_order",
            "stack_checkpoint",
            "verify_stack",
        ],
    },
)
