"""How sharp is what was trained? The spectrum of a curvature matrix, against the formulas.

`report_spectrum(SpectrumConfig(...))` is what `adabatch-jax spectrum` calls. `measure_spectrum` compares
the curvature of batches with that of all examples and with the formulas of random-matrix theory,
`plot_spectrum` draws it, and `show_spectrum` prints it. The training loop has no part in it.
"""

from adabatch_jax.training.spectrum._command import report_spectrum, show_spectrum
from adabatch_jax.training.spectrum._config import SpectrumConfig
from adabatch_jax.training.spectrum._measure import SpectrumResult, measure_spectrum
from adabatch_jax.training.spectrum._plot import plot_spectrum

__all__ = [
    "SpectrumConfig",
    "SpectrumResult",
    "measure_spectrum",
    "plot_spectrum",
    "report_spectrum",
    "show_spectrum",
]
