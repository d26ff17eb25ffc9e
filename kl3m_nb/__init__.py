"""kl3m_nb: the helper package behind the workbook's notebooks. Read the modules in the order of the
data's way.

documents (`corpus`) → tokens (`tokenizer`) → windows (`packing`) → model (`models`, `stacking`) →
objective (`objective`) → Muon / AdamW (`muon`) → clamp (`clamping`, `model_clamp`) → checkpoint
(`checkpoints`, `training`) → spectra, generations, plots, report.
"""

__version__ = "0.1.0"
