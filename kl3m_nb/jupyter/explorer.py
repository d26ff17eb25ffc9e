"""Choose a checkpoint, role, layer, copy and metric, and see the spectrum change at once.

In JupyterLab the controls act; where no widget can live (a headless run, an HTML page, GitHub) the
same output is the picture of the choice that was made in code.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import ipywidgets as widgets
import numpy as np
import pandas as pd

from kl3m_nb.figures import matrices
from kl3m_nb.model.roles import HEAD_LAYER
from kl3m_nb.spectra.singular_values import spectrum_key

METRICS = (
    "condition",
    "sigma_max",
    "sigma_min",
    "stable_rank",
    "effective_rank",
    "entropy",
    "participation_ratio",
    "max_over_median",
    "alpha",
)


class SpectrumExplorer:
    """The controls and the picture: `checkpoint`, `role`, `layer`, `copy` and `metric` are widgets
    with a `value` to set.
    """

    def __init__(
        self,
        tables: Mapping[str, pd.DataFrame],
        singular_values: Mapping[str, Mapping[tuple[int, str], np.ndarray]],
        checkpoint: str,
        role: str,
        layer: int = 0,
        metric: str = "condition",
    ):
        """`tables` and `singular_values` hold by checkpoint what `spectra.analyse_model` returns.
        Raises ValueError for a first choice that is not there.
        """
        self._tables, self._values = tables, singular_values
        self._keys = {
            name: [
                spectrum_key(*key)
                for key in table[["layer", "role", "expert"]].itertuples(index=False)
            ]
            for name, table in tables.items()
        }
        if checkpoint not in tables or (layer, role) not in self._keys[checkpoint]:
            raise ValueError(
                f"There is no {role} of layer {layer} in {checkpoint!r}; the checkpoints are"
                f" {', '.join(tables)}."
            )
        self.checkpoint = widgets.Dropdown(
            options=list(tables), value=checkpoint, description="checkpoint"
        )
        self.role = widgets.Dropdown(description="role")
        self.layer = widgets.SelectionSlider(
            options=[layer], description="layer", continuous_update=False
        )
        self.copy = widgets.Dropdown(description="copy")
        metrics = [name for name in METRICS if all(name in table for table in tables.values())]
        if metric not in metrics:
            raise ValueError(
                f"There is no metric {metric!r} in every table; choose one of {', '.join(metrics)}."
            )
        self.metric = widgets.Dropdown(options=metrics, value=metric, description="metric")
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self._updating = False
        self._update(role, layer)
        for control, changed in (
            (self.checkpoint, self._changed),
            (self.role, self._changed),
            (self.layer, self._changed),
            (self.metric, self._changed),
            (self.copy, self._copy_changed),
        ):
            control.observe(changed, names="value")
        controls = (
            widgets.HBox([self.checkpoint, self.role, self.metric]),
            widgets.HBox([self.layer, self.copy]),
        )
        self.widget = widgets.VBox([*controls, self.image])

    def figure(self):
        """The picture of the present choice, as a matplotlib Figure."""
        return matrices.plot_choice(
            self._tables,
            self._values,
            self.checkpoint.value,
            self.layer.value,
            self.role.value,
            self.metric.value,
        )

    def _repr_mimebundle_(self, **options) -> dict:
        """The widget for a page with a kernel behind it, and the picture for every other."""
        picture = base64.b64encode(self.image.value).decode("ascii")
        return {**self.widget._repr_mimebundle_(**options), "image/png": picture}

    def _changed(self, _) -> None:
        if not self._updating:
            self._update(self.role.value, self.layer.value)

    def _copy_changed(self, change) -> None:
        if not self._updating:
            step = change["new"] - change["old"]
            self._update(self.role.value, self.layer.value + step * self._source_layers())

    def _update(self, role: str, layer: int) -> None:
        """Offers what the chosen checkpoint has, keeps the choice where it can be
        kept, and draws.
        """
        keys = self._keys[self.checkpoint.value]
        roles = list(dict.fromkeys(name for _, name in keys))
        role = role if role in roles else roles[0]
        layers = [number for number, name in keys if name == role]
        layer = layer if layer in layers else layers[0]
        period = self._source_layers()
        copies = (
            []
            if layer == HEAD_LAYER
            else [number // period for number in layers if number % period == layer % period]
        )
        places = [("LM head", HEAD_LAYER)] if layer == HEAD_LAYER else layers
        self._updating = True
        try:
            for control, options, value in (
                (self.role, roles, role),
                (self.layer, places, layer),
                (self.copy, copies, layer // period if copies else None),
            ):
                if list(control.options) != options:
                    control.options = options
                control.value = value
        finally:
            self._updating = False
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=110)
        self.image.value = buffer.getvalue()

    def _source_layers(self) -> int:
        return 1 + int(self._tables[self.checkpoint.value]["source_layer"].max())
