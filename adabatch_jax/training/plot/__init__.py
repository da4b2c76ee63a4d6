"""How does a run look? Its picture, that of AutoWU's decision, and the style that pictures share.

`plot_run` draws loss, batch size and learning rate over the examples; `plot_warmup` draws what AutoWU
saw. The rest is the style: colours, panels, numbers as people write them. No picture uses pyplot.
"""

from adabatch_jax.training.plot._run import plot_run
from adabatch_jax.training.plot._style import (
    BLUE,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PURPLE,
    SOFT,
    TICKS,
    add_legend,
    decimal,
    dress,
    finish,
    new_figure,
    say,
    short,
    significant,
)
from adabatch_jax.training.plot._warmup import plot_warmup

__all__ = [
    "BLUE",
    "GREEN",
    "GRID",
    "INK",
    "ORANGE",
    "PURPLE",
    "SOFT",
    "TICKS",
    "add_legend",
    "decimal",
    "dress",
    "finish",
    "new_figure",
    "plot_run",
    "plot_warmup",
    "say",
    "short",
    "significant",
]
