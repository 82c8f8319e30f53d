"""The picture of a run: which panels are there, and that it is whole."""

import math

import matplotlib.image
from matplotlib.figure import Figure

from llmtrain.telemetry.curves import plot_curves
from llmtrain.telemetry.metrics import MetricsFile


def draw(tmp_path, monkeypatch, rows, baselines) -> Figure:
    """The figure, as it is when it is saved; the picture is in tmp_path."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), save(figure, *a, **k)))
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for row in rows:
        metrics.append(row)
    plot_curves(metrics.path, tmp_path / "curves.png", baselines)
    return saved[0]


def panels(figure: Figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes if axes.axison}


def test_pretraining_shows_losses_with_baselines_and_the_schedule(tmp_path, monkeypatch):
    rows = [{"step": step, "tokens": 100 * step, "train/loss": 5.0 - step, "train/lr": 0.1} for step in range(3)]
    rows[2] |= {"validation/loss": 3.5, "validation/bits_per_byte": 1.5}
    levels = {"validation/loss": {"uniform": 8.3}, "validation/bits_per_byte": {"uniform": 3.5}, "absent": {"x": 1.0}}
    found = panels(draw(tmp_path, monkeypatch, rows, levels))
    assert list(found) == ["Loss", "Validation bits per byte", "Learning rate"]
    train, validation, uniform = found["Loss"].lines
    assert (list(train.get_xdata()), list(train.get_ydata())) == ([0, 100, 200], [5.0, 4.0, 3.0])
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([200], [3.5])
    assert (uniform.get_label(), uniform.get_linestyle(), uniform.get_ydata()[0]) == ("uniform (8.3)", ":", 8.3)
    assert found["Validation bits per byte"].lines[1].get_label() == "uniform (3.5)"
    assert (found["Loss"].get_xlabel(), found["Loss"].get_ylabel()) == ("tokens", "nats")
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert picture.shape[0] > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_dpo_shows_what_the_accuracy_must_not_stand_without(tmp_path, monkeypatch):
    row = {
        "step": 1, "tokens": 10, "validation/accuracy": 0.8, "validation/accuracy_se": 0.02, "validation/margin": 1.0,
        "validation/chosen_logp_change": -3.0, "validation/loss": 0.6,
    }  # fmt: skip
    found = panels(draw(tmp_path, monkeypatch, [row], {}))
    assert list(found) == [
        "Loss",
        "Preference accuracy, validation",
        "Reward margin, validation",
        "Change of the chosen answer's log-probability",
    ]
    (bars,) = found["Preference accuracy, validation"].collections
    ((low, high),) = bars.get_segments()
    assert (low[1], high[1]) == (0.78, 0.8200000000000001)


def test_undefined_values_are_gaps(tmp_path, monkeypatch):
    rows = [{"step": n, "tokens": n, "train/loss": loss} for n, loss in enumerate((1.0, math.nan, math.inf, 2.0))]
    (axes,) = panels(draw(tmp_path, monkeypatch, rows, {})).values()
    assert [math.isnan(value) for value in axes.lines[0].get_ydata()] == [False, True, True, False]


def test_a_run_without_rows_has_an_empty_picture(tmp_path, monkeypatch):
    draw(tmp_path, monkeypatch, [], {})
    assert (tmp_path / "curves.png").stat().st_size > 1000
