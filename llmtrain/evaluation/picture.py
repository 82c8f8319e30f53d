"""How far parties are from the trained model, token by token, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmtrain.evaluation.parity import Verdict
from llmtrain.files import fsync, writing

LEAST, MOST = 1e-8, 1e2
"""Nats: what is drawn; smaller and larger differences stand at the edges."""


def draw(verdicts: Sequence[Verdict], path: Path) -> None:
    """For each party the share of tokens that differ by more than so much, with the bound of the largest difference as
    a dot. The picture appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, verdict in enumerate(verdicts):
        nats = np.sort(np.nan_to_num(verdict.found.nats, nan=MOST).clip(LEAST, MOST))
        share = 1 - np.arange(len(nats)) / len(nats)
        label = f"{verdict.party} ({'NOT THE SAME' if verdict.faults else 'the same'})"
        axes.step(nats, share, where="pre", color=f"C{number}", label=label)
        axes.plot(verdict.bounds.max_nats, share[-1], marker="o", color=f"C{number}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(LEAST, MOST)
    axes.set_xlabel("|difference of a token's log-probability|, nats; dots: the largest allowed")
    axes.set_ylabel("share of tokens that differ by more")
    axes.set_title("Parity with the trained weights", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    aside = path.with_name(f"{path.name}.writing")
    with writing(path):
        figure.savefig(aside, format="png")
        fsync(aside)
        aside.rename(path)
