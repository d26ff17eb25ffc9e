"""The helper package behind the workbook's notebooks. Read the rooms in the order of the
data's way.

documents → tokens → windows (`data`) → model (`model`) → objective → Muon, AdamW → clamp (`optim`)
→ checkpoint (`runs`, written by `training`) → `growth`, `spectra`, `evaluation` → `figures` →
notebook and page (`jupyter`). docs/layout.md says where each formula stands.
"""

__version__ = "0.1.0"
