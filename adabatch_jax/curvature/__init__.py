"""How sharp is the loss, and what does a batch show of it?

* `hessian_vector_product` and `gauss_newton_vector_product` make a curvature matrix a function.
* `lanczos_spectrum` finds the ends of its spectrum, `spectral_density` all of it, `top_eigenvector` the
  direction of its largest eigenvalue.
* `hessian_noise` is how much the Hessians of examples differ, `fit_hessian_noise` the same from
  eigenvalues at several batch sizes; `batch_sharpness` is the curvature along mini-batch gradients.

A batch's matrix is the full one plus noise, so its outermost eigenvalues are larger in magnitude.
Random-matrix theory says by how much:

* `batch_hessian_extremes` and `batch_gauss_newton_extremes` go from the full matrix to a batch's,
  `full_hessian_extremes` and `full_gauss_newton_extremes` back. The noise is ν² for the Hessian and σ²
  for the Gauss-Newton matrix; `gauss_newton_noise` fits σ² to measured eigenvalues.
* `transition_batch_size` is the b* = ν²/λ₁² below which noise dominates.
* `effective_batch_size` and `inverse_effective_batch_size` allow for a finite data set.
* `max_stable_learning_rate` is the learning rate that all this permits.

For other rooms: `lanczos` and `random_unit`, one run that keeps its Ritz vector, and
`spectrum_and_noise` with `group_shape`, the two halves of `hessian_noise`.
"""

from adabatch_jax.curvature._batch_gauss_newton import (
    GaussNewtonExtremes,
    batch_gauss_newton_extremes,
    full_gauss_newton_extremes,
    gauss_newton_noise,
)
from adabatch_jax.curvature._batch_hessian import (
    HessianExtremes,
    batch_hessian_extremes,
    full_hessian_extremes,
    transition_batch_size,
)
from adabatch_jax.curvature._density import SpectralDensity, spectral_density
from adabatch_jax.curvature._effective_batch_size import (
    effective_batch_size,
    inverse_effective_batch_size,
)
from adabatch_jax.curvature._hessian_noise import (
    BatchSharpness,
    HessianFit,
    batch_sharpness,
    fit_hessian_noise,
    hessian_noise,
)
from adabatch_jax.curvature._products import (
    CurvatureProduct,
    gauss_newton_vector_product,
    hessian_vector_product,
)
from adabatch_jax.curvature._spectrum import Spectrum, lanczos_spectrum, top_eigenvector
from adabatch_jax.curvature._stability import max_stable_learning_rate

__all__ = [
    "BatchSharpness",
    "CurvatureProduct",
    "GaussNewtonExtremes",
    "HessianExtremes",
    "HessianFit",
    "SpectralDensity",
    "Spectrum",
    "batch_gauss_newton_extremes",
    "batch_hessian_extremes",
    "batch_sharpness",
    "effective_batch_size",
    "fit_hessian_noise",
    "full_gauss_newton_extremes",
    "full_hessian_extremes",
    "gauss_newton_noise",
    "gauss_newton_vector_product",
    "hessian_noise",
    "hessian_vector_product",
    "inverse_effective_batch_size",
    "lanczos_spectrum",
    "max_stable_learning_rate",
    "spectral_density",
    "top_eigenvector",
    "transition_batch_size",
]

# For other rooms: no part of the public interface.
from adabatch_jax.curvature._hessian_noise import (
    group_shape as group_shape,
    spectrum_and_noise as spectrum_and_noise,
)
from adabatch_jax.curvature._spectrum import lanczos as lanczos, random_unit as random_unit
