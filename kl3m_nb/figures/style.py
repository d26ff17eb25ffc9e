"""The look of every figure, and how one is saved.

Okabe and Ito's palette and cividis, which the colour-blind can tell apart, told apart again by dash
or marker so that a grey print can be read. A figure belongs to no window: it is closed for pyplot
when it is returned, is shown as the value of a notebook cell, and does not pile up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from kl3m_nb.common.files import naming, replace_text, unlinked

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #CC79A7".split()
)


GREY = "#767676"


SEQUENCE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)


ROLE_LINES = {
    role: {"color": color, "linestyle": dashes}
    for role, color, dashes in (
        ("q_proj", BLUE, "-"),
        ("k_proj", SKY, "--"),
        ("v_proj", GREEN, "-."),
        ("o_proj", BLACK, ":"),
        ("gate_proj", VERMILLION, "-"),
        ("gate_up_proj", VERMILLION, "-"),
        ("up_proj", ORANGE, "--"),
        ("down_proj", PURPLE, "-."),
        ("lm_head", GREY, "-"),
    )
}


STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=SEQUENCE),
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "image.cmap": "cividis",
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text: it can be searched and edited
}


def use_style() -> None:
    """Makes the style the default of this process, for figures a notebook draws by itself."""
    plt.rcParams.update(STYLE)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the project's style and hands the figure over without leaving it open in pyplot."""

    @functools.wraps(draw)
    def draw_in_style(*args, **kwargs) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            plt.close(figure)
        return figure

    return draw_in_style


@dataclass(frozen=True)
class SavedFigure:
    """A figure in the file `path`; as the value of a notebook cell it is shown from there, which
    saves to draw it again.
    """

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


def save_figure(figure: Figure, folder: str | Path, name: str, data: pd.DataFrame) -> SavedFigure:
    """Writes `name`.png, `name`.pdf and the figure's numbers as `name`.csv into `folder`; returns
    the PNG.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE), naming(folder / f"{name}.png"):
        figure.savefig(unlinked(folder / f"{name}.png"))
        figure.savefig(unlinked(folder / f"{name}.pdf"), metadata={"CreationDate": None})
    replace_text(folder / f"{name}.csv", data.to_csv(index=False))
    return SavedFigure(folder / f"{name}.png")


def step_axis(axes: Axes) -> None:
    """Optimizer steps along x, at round numbers."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def percent_axis(axis: Axis) -> None:
    """Shares as percent, with ticks that are written as exactly as they stand."""
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g}%"))


def plain_log_axis(axis: Axis) -> None:
    """A logarithmic axis with plain numbers, also between the powers of ten where the data span
    few; call it after plotting.

    An axis on which nothing is positive stays as it is.
    """
    if not math.isfinite(axis.get_minpos()):
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    fewer = (
        {"numticks": 5} if decades > 5 else {}
    )  # every other power of ten: 0.0001 and its neighbours would touch
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,), **fewer))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())
