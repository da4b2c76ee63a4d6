"""The pictures of AutoWU's decision: by themselves, and inside the picture of a run."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

import adabatch_jax as adabatch
from adabatch_jax.training import plot_run, plot_warmup
from adabatch_jax.training.plot import _warmup


def seen(**changes):
    """A bowl of losses with a curve through it, ended at 3000."""
    x = np.arange(0.0, 3000.0, 100.0)
    grid = np.linspace(0.0, 3000.0, 50)
    shown = adabatch.learning_rate.SmoothedLosses(
        positions=x,
        losses=1.0 + ((x - 2000) / 1000) ** 2,
        grid=grid,
        mean=1.0 + ((grid - 2000) / 1000) ** 2,
        deviation=np.full(50, 0.1),
        minimum=float(grid[np.argmin(np.abs(grid - 2000))]),
        by_steps=False,
        end=3000.0,
    )
    return shown._replace(**changes)


@pytest.fixture
def draw(monkeypatch):
    def of(shown, **options):
        monkeypatch.setattr(_warmup, "smoothed_losses", lambda state: shown)
        axes = plot_warmup(None, **options)
        axes.figure.draw_without_rendering()
        return axes

    return of


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_it_shows_losses_curve_band_minimum_and_switch(draw):
    axes = draw(seen())
    assert axes.get_xlabel() == "Examples"
    assert labels(axes) == ["losses", "smoothed, ± 2 deviations", "minimum", "end of the warm-up"]
    losses, curve, minimum, switch = axes.lines
    np.testing.assert_array_equal(losses.get_ydata(), seen().losses)
    np.testing.assert_array_equal(curve.get_ydata(), seen().mean)
    np.testing.assert_allclose(minimum.get_xydata(), [[seen().minimum, seen().mean.min()]])
    assert list(switch.get_xdata()) == [3000, 3000]
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices
    assert edges[:, 1].min() == pytest.approx(seen().mean.min() - 0.2)


def test_before_the_end_there_is_no_line_and_before_a_test_no_curve(draw):
    assert labels(draw(seen(end=np.nan)))[-1] == "minimum"
    nothing = np.zeros(0)
    axes = draw(
        seen(
            grid=nothing, mean=nothing, deviation=nothing, minimum=np.nan, end=np.nan, by_steps=True
        )
    )
    assert labels(axes) == ["losses"]
    assert axes.get_xlabel() == "Steps"


def test_without_a_finite_loss_it_says_so(draw):
    nothing = np.zeros(0)
    axes = draw(seen(positions=nothing, losses=nothing, grid=nothing, mean=nothing))
    assert [text.get_text() for text in axes.texts] == ["no finite loss"]


def test_an_explosion_does_not_flatten_the_curve(draw):
    losses = seen().losses.copy()
    losses[-1] = 1e9
    assert draw(seen(losses=losses)).get_ylim()[1] < 1e9


def test_it_draws_where_it_is_told_to(draw):
    axes = Figure().subplots()
    assert draw(seen(), axes=axes) is axes


def test_the_picture_of_a_run_shows_the_curve_and_the_switch():
    examples = np.arange(100.0, 10_100.0, 100.0)
    rows = {
        "examples": examples,
        "loss": 1.0 + np.exp(-examples / 3000),
        "batch_size": np.full(100, 100),
        "learning_rate": np.linspace(0.1, 0.0, 100),
    }
    plain, shown = plot_run(rows), plot_run(rows, smoothed=seen())
    for before, after in zip(plain.axes, shown.axes, strict=True):
        assert before.get_ylim() == after.get_ylim()
        assert any(list(line.get_xdata()) == [3000, 3000] for line in after.lines)
    assert labels(shown.axes[0]) == ["smoothed, ± 2 deviations", "minimum", "end of the warm-up"]
    assert plain.axes[0].get_legend() is None
    still = plot_run(rows, smoothed=seen(grid=np.zeros(0), end=np.nan))
    assert still.axes[0].get_legend() is None
