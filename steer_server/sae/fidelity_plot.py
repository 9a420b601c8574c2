"""Feature density as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from steer_server.sae.fidelity import FidelityReport

BINS = 50


def save_density_histogram(report: FidelityReport, path: Path) -> None:
    """Write a PNG to `path`: how many features fire on which share of tokens, log scale, both paths over each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A feature that fired once is the rarest that can be seen.
    rarest = np.log10(1.0 / max(report.served.tokens, report.reference.tokens))
    bins = np.linspace(rarest, 0.0, BINS + 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, side, fill in (("served", report.served, True), ("reference", report.reference, False)):
        fired = side.density[side.density > 0]
        label = f"{name}: {len(fired)} of {len(side.density)} features fired"
        axes.stairs(np.histogram(np.log10(fired), bins)[0], bins, fill=fill, alpha=0.5 if fill else 1.0, label=label)
    axes.set_xlabel("log10 of the share of tokens on which a feature is active")
    axes.set_ylabel("features")
    axes.set_title(f"Feature density, {report.sae}, {report.served.tokens} tokens")
    axes.legend()
    figure.savefig(path, format="png", dpi=150)
