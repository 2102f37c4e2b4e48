"""Heat maps of pools, drawn by matplotlib's Agg backend, without a display or global state.

matplotlib is in the extra `plot` and is imported only here; without it --png is refused.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_serve.errors import ConfigError
from emo_serve.pools.comparison import PoolComparison

__all__ = ["comparison_png", "require_matplotlib", "usage_png", "write_picture"]

_DPI = 120
_MOST_LABELLED = 16  # up to this many pools a cell has room for its number
_CELL_INCHES = 0.42
_EXPERT_INCHES = 0.12
_NOT_IN_POOL = float("nan")


def require_matplotlib() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--png needs matplotlib, which is not installed; run `make install` or"
            " pip install 'emo-serve[plot]'"
        ) from error


def comparison_png(comparison: PoolComparison) -> bytes:
    """Draw pools x pools similarity beside layers x pools overlap, and return the PNG."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pools, layers = len(comparison.names), len(comparison.layers)
    side = min(max(_CELL_INCHES * pools, 2.0), 16.0)
    tall = min(max(_CELL_INCHES * layers, 1.0), 16.0)
    figure = Figure(figsize=(2 * side + 4.5, max(side, tall) + 2.0), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    similarity, overlap = figure.subplots(1, 2)
    _draw(
        figure,
        similarity,
        comparison.similarity,
        comparison.names,
        "similarity of two pools\n(experts in both / in either, mean over layers)",
    )
    _draw(
        figure,
        overlap,
        comparison.overlap,
        [str(layer) for layer in comparison.layers],
        "overlap with another pool, by layer\n(share of the pool's experts, mean over the others)",
    )
    overlap.set_ylabel("layer")
    for axes in (similarity, overlap):
        axes.set_xticks(range(pools), comparison.names, rotation=90)
    return _saved(figure)


def usage_png(name: str, shares: Sequence[Sequence[float | None]]) -> bytes:
    """Draw layers x experts, each the share of tokens that took the expert, and return the PNG.

    None stands for an expert outside the pool and an empty row for a dense layer; both are grey.
    Experts that every token takes have the brightest color and do not affect the scale.
    """
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    experts = max(map(len, shares))
    rows = [
        [_NOT_IN_POOL if share is None else share for share in row]
        + [_NOT_IN_POOL] * (experts - len(row))
        for row in shares
    ]
    chosen = [share for row in shares for share in row if share is not None and share < 1]
    wide = min(max(_EXPERT_INCHES * experts, 3.0), 20.0)
    tall = min(max(_EXPERT_INCHES * len(rows), 1.0), 16.0)
    figure = Figure(figsize=(wide + 2.0, tall + 1.6), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = colormaps["viridis"].with_extremes(bad="lightgrey")
    most = max(chosen, default=0.0) or 1.0
    image = axes.imshow(
        rows, vmin=0.0, vmax=most, cmap=colors, aspect="auto", interpolation="nearest"
    )
    axes.set_title(f"pool {name}: share of tokens that took the expert", fontsize="medium")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    has_brighter = any(share is not None and share > most for row in shares for share in row)
    figure.colorbar(image, ax=axes, extend="max" if has_brighter else "neither")
    return _saved(figure)


def write_picture(png: bytes, path: Path) -> None:
    """Write the file that --png names; raises ConfigError if it cannot be written."""
    try:
        path.write_bytes(png)
    except OSError as error:
        raise ConfigError(f"--png {path} cannot be written: {error.strerror or error}") from error


def _saved(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw(
    figure: Any, axes: Any, values: Sequence[Sequence[float]], labels: Sequence[str], title: str
) -> None:
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="equal")
    axes.set_title(title, fontsize="medium")
    axes.set_yticks(range(len(labels)), labels)
    figure.colorbar(image, ax=axes, shrink=0.6)
    if len(values[0]) > _MOST_LABELLED or len(values) > 2 * _MOST_LABELLED:
        return
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            color = "black" if value > 0.6 else "white"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7
            )
