"""The picture of a spectrum: what it shows, and that odd numbers can be drawn."""

import math

import numpy as np
import pytest

from adabatch_jax.curvature import SpectralDensity
from adabatch_jax.training import plot_spectrum
from adabatch_jax.training.spectrum._theory import predicted

SIZES = [16, 64, 256]
GRID = np.linspace(-2.0, 11.0, 500)
DENSITY = SpectralDensity(GRID, np.exp(-np.square(GRID)), 0.1 * np.exp(-np.square(GRID)))


def summary(matrix="hessian", **changes):
    """A spectrum from −1 to 10; batches that follow the theory, but for a tenth."""
    found = dict(
        matrix=matrix,
        examples=4096,
        num_parameters=1000,
        full=dict(largest=10.0, smallest=-1.0 if matrix == "hessian" else 1e-6),
        noise=6400.0 if matrix == "hessian" else 0.5,
        noise_smallest=4.0,
        transition_batch_size=64.0,
    )
    largest, smallest = predicted(found, SIZES)
    found["batches"] = [
        dict(
            batch_size=size,
            largest=1.1 * float(high),
            smallest=1.1 * float(low),
            largest_standard_error=0.05 * float(high),
            smallest_standard_error=0.02,
        )
        for size, high, low in zip(SIZES, largest, smallest, strict=True)
    ]
    return found | changes


def draw(*arguments, **options):
    figure = plot_spectrum(*arguments, **options)
    figure.draw_without_rendering()
    return figure.axes


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_density_and_its_ends():
    upper, _ = draw(summary(), DENSITY, title="A model")
    assert upper.figure.get_suptitle() == "A model"
    assert upper.get_title(loc="left") == "Spectral density: Hessian of 4,096 examples"
    assert (upper.get_xlabel(), upper.get_yscale()) == ("Eigenvalue", "log")
    curve, *ends = upper.lines
    np.testing.assert_array_equal(curve.get_xdata(), GRID)
    seen = DENSITY.density > upper.get_ylim()[0]
    np.testing.assert_array_equal(curve.get_ydata()[seen], DENSITY.density[seen])
    assert [line.get_xdata()[0] for line in ends] == [-1.0, 10.0]
    assert texts(upper) == ["$λ_P$ = -1", "λ₁ = 10"]


def test_a_single_eigenvalue_is_above_the_lower_limit():
    """One of 1000 eigenvalues, as wide as 1 % of the range, has this height."""
    upper, _ = draw(summary(), DENSITY)
    height = 1 / (1000 * 0.11 * math.sqrt(2 * math.pi))
    assert upper.get_ylim()[0] == pytest.approx(height / 10)


def test_batches_against_the_theory():
    shown = summary()
    _, lower = draw(shown, DENSITY)
    assert (lower.get_xscale(), lower.get_yscale()) == ("log", "log")
    assert legend(lower) == ["λ₁", "$|λ_P|$", "theory", "measured", "all examples"]
    for container, name, sign in zip(
        lower.containers, ("largest", "smallest"), (1, -1), strict=True
    ):
        points, _, (bars,) = container
        np.testing.assert_array_equal(points.get_xdata(), SIZES)
        values = [sign * row[name] for row in shown["batches"]]
        np.testing.assert_array_equal(points.get_ydata(), values)
        errors = np.array([row[f"{name}_standard_error"] for row in shown["batches"]])
        heights = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
        np.testing.assert_allclose(heights, 2 * errors)
        curve = next(
            line for line in lower.lines
            if line.get_color() == points.get_color() and len(line.get_xdata()) > len(SIZES)
        )  # fmt: skip
        at = np.interp(np.log(SIZES), np.log(curve.get_xdata()), curve.get_ydata())
        np.testing.assert_allclose(1.1 * at, values, rtol=2e-3)


def test_the_full_eigenvalues_are_dotted():
    _, lower = draw(summary(), DENSITY)
    level = [line.get_ydata()[0] for line in lower.lines if len(set(line.get_ydata())) == 1]
    assert {10.0, 1.0} <= set(level)


def test_a_gauss_newton_matrix_has_one_end_in_the_lower_panel():
    upper, lower = draw(summary("gauss-newton"), DENSITY)
    assert upper.get_title(loc="left") == "Spectral density: Gauss-Newton matrix of 4,096 examples"
    assert texts(upper)[0] == "$λ_P$ = 1e-6"
    assert legend(lower) == ["λ₁", "theory", "measured", "all examples"]
    assert len(lower.containers) == 1


@pytest.mark.parametrize(
    ("size", "marks"), [(64.0, ["b* = 64"]), (2.0, []), (math.inf, []), (math.nan, [])]
)
def test_a_transition_is_marked_inside_the_picture(size, marks):
    _, lower = draw(summary(transition_batch_size=size), DENSITY)
    assert texts(lower) == marks


def test_batch_sizes_are_written_out():
    rows = [{**summary()["batches"][0], "batch_size": size} for size in (16, 2048)]
    _, lower = draw(summary(batches=rows), DENSITY)
    assert [tick.label1.get_text() for tick in lower.xaxis.get_major_ticks()] == ["16", "2,048"]


def test_a_single_batch_size_measured_once():
    row = {**summary()["batches"][0], "largest_standard_error": math.nan}
    row["smallest"] = 0.5  # of the wrong sign: it has no place on a logarithmic axis
    _, lower = draw(summary(batches=[row]), DENSITY)
    assert len(lower.containers) == 1
    assert lower.get_xlim() == (8, 32)


def test_one_probe_has_no_band():
    single = DENSITY._replace(standard_error=np.full(500, np.nan))
    upper, _ = draw(summary(), single)
    assert np.isfinite(upper.collections[0].get_paths()[0].vertices).all()


def test_nothing_to_draw():
    row = {**summary()["batches"][0], "largest": -1.0, "smallest": 1.0}
    _, lower = draw(summary(batches=[row]), DENSITY)
    assert texts(lower) == ["no batch has an eigenvalue of the sign expected"]


def test_the_format_follows_the_name(tmp_path):
    draw(summary(), DENSITY, path=tmp_path / "a.svg")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    with pytest.raises(ValueError, match="bad"):
        plot_spectrum(summary(), DENSITY, path=tmp_path / "a.bad")
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]
