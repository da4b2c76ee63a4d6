"""The picture of a run: what it shows, and that no run can break it."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from adabatch_jax.training.plot import _run, _style, plot_run
from tests.marks import slow


def run(number=200, seed=0):
    """A run whose batch doubles four times, and whose loss falls."""
    noise = np.random.Generator(np.random.Philox(seed)).standard_normal(number)
    batch_size = 64 * 2 ** (5 * np.arange(number) // number)
    examples = np.cumsum(batch_size)
    progress = examples / examples[-1]
    return {
        "step": np.arange(1, number + 1),
        "examples": examples,
        "loss": 0.3 + 2 * np.exp(-5 * progress) + 0.02 * noise,
        "batch_size": batch_size,
        "noise_scale": batch_size * np.exp(0.1 * noise),
        "learning_rate": 0.1 * (1 - progress),
    }


def line(axes, label):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts]


def tick_labels(axis, low, high):
    """The labels a reader sees: those of ticks inside the limits."""
    return [
        tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
    ]


def test_three_panels_over_examples():
    rows = run()
    figure = plot_run(rows, title="A run")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Loss",
        "Batch size",
        "Learning rate",
    ]
    assert figure.get_suptitle() == "A run"
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert low == 0
        assert rows["examples"][-1] <= high <= 1.05 * rows["examples"][-1]
    legends = [axes.get_legend() is not None for axes in figure.axes]
    assert legends == [False, True, False], "one line needs no legend"


def test_the_batch_size_is_exact():
    rows = run()
    axes = plot_run(rows).axes[1]
    assert axes.get_yscale() == "log"
    steps = line(axes, "batch size")
    assert steps.get_drawstyle() == "steps-pre"
    x, y = steps.get_xdata(), steps.get_ydata()
    # steps-pre: a position takes the value of the next point to its right.
    positions = rows["examples"] - 0.5
    np.testing.assert_array_equal(y[np.searchsorted(x, positions)], rows["batch_size"])
    assert x[0] == 0
    assert len(x) < 20, "equal steps in a row are one step"
    assert texts(axes) == ["max 1,024"]
    begin = rows["examples"][np.argmax(rows["batch_size"] == 1024) - 1]
    assert [tuple(text.xy) for text in axes.texts] == [(begin, 1024)]


def test_tick_labels_are_short():
    figure = plot_run(run(2000))
    figure.draw_without_rendering()
    batch = tick_labels(figure.axes[1].yaxis, *figure.axes[1].get_ylim())
    assert {"64", "128", "512", "1k"} <= set(batch)
    examples = tick_labels(figure.axes[2].xaxis, *figure.axes[2].get_xlim())
    assert examples[:3] == ["0", "200k", "400k"]


@pytest.mark.parametrize(
    ("function", "number", "text"),
    [
        (_style.decimal, 0, "0"),
        (_style.decimal, 250, "250"),
        (_style.decimal, 1_200_000, "1.2M"),
        (_style.decimal, 3e9, "3B"),
        (_run._binary, 0.5, "0.5"),
        (_run._binary, 512, "512"),
        (_run._binary, 65536, "64k"),
        (_run._binary, 2**20, "1M"),
        (_style.short, 2e-5, "2e-5"),
        (_style.short, 0.025, "0.025"),
    ],
)
def test_numbers_as_people_write_them(function, number, text):
    assert function(number) == text


def test_the_maximum_is_marked_where_it_begins_even_if_it_is_not_the_end():
    rows = run()
    rows["batch_size"][100] = 5000
    axes = plot_run(rows).axes[1]
    assert texts(axes) == ["max 5,000"]
    assert axes.texts[0].xy == (rows["examples"][99], 5000)


def test_a_constant_batch_says_so():
    rows = run()
    rows["batch_size"][:] = 96
    axes = plot_run(rows).axes[1]
    assert texts(axes) == ["96 throughout"]
    low, high = axes.get_ylim()
    assert low <= 48
    assert high >= 192


@pytest.mark.parametrize("constant", [True, False])
def test_a_last_batch_that_is_cut_short_says_nothing_about_the_sizes(constant):
    rows = run()
    if constant:
        rows["batch_size"][:] = 96
    whole = plot_run(rows).axes[1]
    rows["batch_size"][-1] = 3
    axes = plot_run(rows).axes[1]
    assert texts(axes) == ["96, the last 3" if constant else "max 1,024"]
    assert axes.get_ylim() == whole.get_ylim()
    assert line(axes, "batch size").get_ydata()[-1] == 3


def test_a_note_stands_above_the_learning_rate():
    axes = plot_run(run(20), note="no minimum of the loss was found").axes[2]
    assert axes.get_title(loc="right") == "no minimum of the loss was found"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -5.0])
def test_without_noise_scale(value):
    rows = run()
    rows["noise_scale"] = np.full(200, value)
    axes = plot_run(rows).axes[1]
    assert axes.get_legend() is None
    assert [found.get_label() for found in axes.lines if found.get_label()[0] != "_"] == [
        "batch size"
    ]
    del rows["noise_scale"]
    assert plot_run(rows).axes[1].get_ylim() == axes.get_ylim()


def test_holes_in_the_noise_scale_stay_holes():
    rows = run()
    rows["noise_scale"][:50] = np.nan
    rows["noise_scale"][80:90] = np.inf
    rows["noise_scale"][::7] = -1
    drawn = line(plot_run(rows).axes[1], "noise scale").get_ydata()
    known = np.isfinite(rows["noise_scale"]) & (rows["noise_scale"] > 0)
    np.testing.assert_array_equal(np.isfinite(drawn), known)


def test_the_noise_scale_does_not_dwarf_the_batch_size():
    rows = run()
    limits = plot_run({**rows, "noise_scale": rows["noise_scale"] * 1e6}).axes[1].get_ylim()
    octaves = math.log2(limits[1] / limits[0])
    assert octaves < 10, "the batch size spans 4 octaves and must fill a good part of the panel"
    assert limits[0] < 64 < 1024 < limits[1]


def test_a_spike_does_not_flatten_the_loss():
    rows = run()
    expected = plot_run(rows).axes[0].get_ylim()
    rows["loss"][50] = 1e6
    rows["loss"][70] = np.nan
    rows["loss"][71] = np.inf
    axes = plot_run(rows).axes[0]
    np.testing.assert_allclose(axes.get_ylim(), expected, atol=0.2)
    assert texts(axes)[0].startswith("0.3")


def test_a_loss_over_decades_gets_a_log_axis():
    rows = run()
    assert plot_run(rows).axes[0].get_yscale() == "linear"
    rows["loss"] = np.exp(-8 * rows["examples"] / rows["examples"][-1])
    assert plot_run(rows).axes[0].get_yscale() == "log"
    assert plot_run({**rows, "loss": rows["loss"] - 0.5}).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("number", [1, *slow(3)])
@pytest.mark.parametrize("broken", [None, "loss", "noise_scale", "learning_rate", "batch_size"])
def test_short_and_broken_runs_can_be_drawn(tmp_path, number, broken):
    rows = {name: values[:number].astype(np.float64) for name, values in run().items()}
    if broken is not None:
        rows[broken] = np.full(number, np.nan)
    path = tmp_path / "run.png"
    plot_run(rows, path=path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (1080, 1200)
    assert (pixels < 200).sum() > 1000, "there is something to see"


@pytest.mark.parametrize("reach", [0, 1, 5, 30])
def test_smoothing_keeps_straight_lines_and_gaps(reach):
    row = np.arange(100.0)
    line = 2 * row + 1
    inner = slice(2 * reach + 10, 100 - 2 * reach - 10)
    np.testing.assert_allclose(_run._smooth(line, reach)[inner], line[inner])
    np.testing.assert_allclose(_run._smooth(np.full(100, 3.0), reach), 3.0)
    holes = np.where(row % 4 == 1, np.nan, 3.0)
    np.testing.assert_array_equal(_run._smooth(holes, reach), holes)


def test_smoothing_takes_out_noise_and_lone_spikes():
    noise = np.random.Generator(np.random.Philox(0)).standard_normal(1000)
    smooth = _run._smooth(noise, 20)
    assert smooth.std() < 0.35 * noise.std()
    spiked = noise.copy()
    spiked[[300, 301, 600]] = 1e6
    np.testing.assert_allclose(_run._smooth(spiked, 20), smooth, atol=0.3)


@pytest.mark.parametrize("number", [10, 3_999, 4_001, 100_003])
def test_thinning_keeps_the_extremes_and_the_ends(number):
    x = np.arange(float(number))
    y = np.random.Generator(np.random.Philox(1)).standard_normal(number)
    y[number // 2] = np.nan
    thin_x, thin_y = _run._thin(x, y)
    assert len(thin_x) <= max(_run._MAX_POINTS, 4_001) + 2
    assert (thin_x[0], thin_x[-1]) == (0, number - 1)
    assert (np.nanmin(thin_y), np.nanmax(thin_y)) == (np.nanmin(y), np.nanmax(y))
    np.testing.assert_array_equal(thin_y, y[thin_x.astype(int)])


@pytest.mark.parametrize("suffix", [".svg", "", *slow(".png", ".pdf")])
def test_saves_in_the_format_of_the_suffix(tmp_path, suffix):
    path = tmp_path / "deep" / f"run{suffix}"
    assert isinstance(plot_run(run(20), path=path), Figure)
    start = {".png": b"\x89PNG", "": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert [path] == list(path.parent.iterdir()), "nothing else is left"


def test_a_failed_save_leaves_the_old_picture(tmp_path):
    path = tmp_path / "run.doc"
    path.write_text("old")
    with pytest.raises(ValueError, match="doc"):
        plot_run(run(20), path=path)
    assert path.read_text() == "old"
    assert [path] == list(tmp_path.iterdir())


def test_no_global_state():
    import matplotlib.pyplot

    before = dict(matplotlib.rcParams)
    plot_run(run(20))
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": None}, "lacks the columns loss"),
        ({"loss": [1.0]}, "columns must be of one length"),
        ({"examples": np.arange(20)[::-1]}, "must not decrease"),
        ({"examples": np.full(20, np.nan)}, "must be finite"),
    ],
)
def test_wrong_rows_are_named(change, message):
    rows = {**run(20), **change}
    rows = {name: values for name, values in rows.items() if values is not None}
    with pytest.raises(ValueError, match=message):
        plot_run(rows)
    with pytest.raises(ValueError, match="at least 1"):
        plot_run({name: [] for name in run(20)})
