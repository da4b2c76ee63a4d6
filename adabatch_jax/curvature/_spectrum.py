"""The spectrum of a symmetric matrix from products with vectors: Lanczos with full re-orthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._tree import scale, squared_norm, widen
from adabatch_jax._types import PyTree
from adabatch_jax.curvature._products import CurvatureProduct

_HIGHEST = jax.lax.Precision.HIGHEST
_BREAKDOWN = 1e-6  # of the largest entry so far: what float32 leaves of a zero


class Spectrum(NamedTuple):
    """Ritz values of Lanczos runs, float32 [num_probes, num_steps], ascending along the last axis.

    A run that has seen its whole Krylov space stops early (a matrix of low rank, fewer dimensions than
    steps), to 1e-6 of its largest entry; the residuals tell what lies below. The entries it left over
    repeat its largest eigenvalue with weight and residual 0: extremes, moments and densities are right
    without a mask.

    Example:
      >>> import jax.numpy as jnp
      >>> Spectrum(jnp.array([[-1.0, 4.0]]), jnp.array([[0.5, 0.5]]), jnp.zeros((1, 2))).largest.tolist()
      4.0

    Source: Golub and Welsch (1969); Ghorbani, Krishnan, Xiao (2019), arXiv 1901.10159, section 2.
    """

    eigenvalues: jax.Array  # θ
    weights: jax.Array  # squared first components of T's eigenvectors; they sum to 1 in every run
    residuals: jax.Array  # ‖A y − θ y‖ for the Ritz vector y, = |β_m s_m|

    @property
    def largest(self) -> jax.Array:
        """The largest eigenvalue: Ritz values approach it from below, so the largest of all probes."""
        return jnp.max(self.eigenvalues)

    @property
    def smallest(self) -> jax.Array:
        """The smallest eigenvalue, negative if there is any negative curvature that was found."""
        return jnp.min(self.eigenvalues)

    def converged(self, tolerance: float = 1e-2) -> jax.Array:
        """Whether both extremes are known: residual ≤ tolerance · max |θ|.

        Args:
          tolerance: relative to the largest magnitude. The error of an extreme is at most its residual.

        Returns:
          bool scalar.
        """
        flat, residuals = self.eigenvalues.reshape(-1), self.residuals.reshape(-1)
        allowed = tolerance * jnp.max(jnp.abs(flat))
        at = lambda i: residuals[i] <= allowed
        return at(jnp.argmax(flat)) & at(jnp.argmin(flat))


def lanczos_spectrum(
    operator: Callable[[PyTree], PyTree],
    params: PyTree,
    key: jax.Array,
    *,
    num_steps: int,
    num_probes: int = 1,
    start: PyTree | None = None,
) -> Spectrum:
    """Extreme eigenvalues and spectral density of a symmetric operator, by Lanczos iteration.

    From a random unit vector q₁, m steps of A Q = Q T + β q eᵀ with T tridiagonal; every new vector is
    orthogonalised twice against all before it. Eigenvalues θ of T approach the extremes of A from
    inside, and for smooth f the mean over probes of Σ w_k f(θ_k) estimates tr f(A) / P. Ends of the
    spectrum of both signs converge first.

    The vectors are kept in float32 and in the shape (and sharding) of `params`: num_steps copies of them.

    Args:
      operator: `hessian_vector_product(…)`, `gauss_newton_vector_product(…)`, or any linear function
        from a pytree like `params` to one of the same shapes.
      params: pytree: only shapes are read.
      key: PRNG key of the probes.
      num_steps: m, products per probe; static.
      num_probes: independent runs, one after the other; static.
      start: pytree like `params`, the one start vector in place of random ones. From the gradient of the
        batch, or the `top_eigenvector` of a part of it, λ₁ of a network's Hessian takes fewer steps.
        Weights are then those of this vector, and no estimate of the density; what is orthogonal to it
        is not found. Zero gives NaN.

    Returns:
      A `Spectrum`. Values that are not finite, where the operator's are not.

    Raises:
      ValueError: a count is not a positive integer; `operator` is not callable; `params` are empty, or hold
        what is no array of real floating-point numbers; `start` has other shapes, or more than one probe.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> a = jnp.diag(jnp.array([5.0, 2.0, -1.0]))
      >>> spectrum = lanczos_spectrum(lambda v: a @ v, jnp.ones(3), jax.random.key(0), num_steps=5)
      >>> [round(float(x), 4) for x in spectrum.eigenvalues[0]]
      [-1.0, 2.0, 5.0, 5.0, 5.0]

    Source: Lanczos (1950); Golub and Meurant (1994), Matrices, moments and quadrature; Ghorbani et al.
    (2019), arXiv 1901.10159.
    """
    where = "lanczos_spectrum"
    _check(where, operator, params, start, num_steps=num_steps, num_probes=num_probes)
    if start is not None and num_probes != 1:
        raise ValueError(f"{where}: num_probes must be 1 with start, got {num_probes!r}")
    sizes = dict(num_steps=int(num_steps), num_probes=int(num_probes))
    if isinstance(operator, CurvatureProduct):
        return _jitted_spectrum(operator, params, key, start, **sizes)
    return _spectrum(operator, params, key, start, **sizes)


def top_eigenvector(
    operator: Callable[[PyTree], PyTree],
    params: PyTree,
    key: jax.Array,
    *,
    num_steps: int,
    start: PyTree | None = None,
) -> tuple[Spectrum, PyTree]:
    """The direction of the largest eigenvalue of a symmetric operator, by one run of Lanczos iteration.

    It is also a start for another matrix that is nearly the same. Of a part of the batch it costs
    little, and `lanczos_spectrum(whole, …, start=vector)` then needs few products with the whole batch,
    one where the largest eigenvalue stands alone. That run's own residual says how good the answer is.

    Args:
      operator: as for `lanczos_spectrum`.
      params: pytree: only shapes are read.
      key: PRNG key of the start vector: the run is that of `lanczos_spectrum` with the same key.
      num_steps: m, products; static.
      start: pytree like `params`, in place of a random vector. Zero gives NaN.

    Returns:
      The `Spectrum` of the run, [1, num_steps], and the unit Ritz vector v of its largest eigenvalue λ:
      a pytree like `params`, at least float32, of either sign. ‖A v − λ v‖ is `residuals[0, -1]`.

    Raises:
      ValueError: as `lanczos_spectrum`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> a, key = jnp.diag(jnp.array([5.0, 2.0, -1.0])), jax.random.key(0)
      >>> _, vector = top_eigenvector(lambda v: a @ v, jnp.ones(3), key, num_steps=3)
      >>> near = lambda v: a @ v + 0.1 * v[::-1]  # for a larger batch
      >>> found = lanczos_spectrum(near, jnp.ones(3), key, num_steps=1, start=vector)
      >>> round(float(found.largest), 2), round(float(found.residuals[0, 0]), 2)
      (5.0, 0.1)

    Source: Lanczos (1950). The start from a part of the batch is ours.
    """
    where = "top_eigenvector"
    _check(where, operator, params, start, num_steps=num_steps)
    if isinstance(operator, CurvatureProduct):
        return _jitted_run(operator, params, key, start, num_steps=int(num_steps))
    return _run(operator, params, key, start, num_steps=int(num_steps))


def _check(where: str, operator: Any, params: PyTree, start: PyTree, **counts: int) -> None:
    _validate.function(where, operator=operator)
    _validate.positive_int(where, **counts)
    if not jax.tree.leaves(params):
        raise ValueError(f"{where}: params must hold at least one array, got {params!r}")
    _validate.real_arrays(where, params=params, start=start)
    wanted, given = _shapes(params), _shapes(params if start is None else start)
    if given != wanted:
        raise ValueError(f"{where}: start must be like params, {wanted}, got {given}")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(k): jnp.shape(x) for k, x in jax.tree.leaves_with_path(tree)}


def _spectrum(
    operator: Callable[[PyTree], PyTree],
    params: PyTree,
    key: jax.Array,
    start: PyTree | None,
    *,
    num_steps: int,
    num_probes: int,
) -> Spectrum:
    if start is not None:
        return _run(operator, params, key, start, num_steps=num_steps)[0]
    linear = _linear(operator)

    def probe(key: jax.Array) -> Spectrum:
        return lanczos(linear, random_unit(key, params), num_steps)[0]

    return jax.lax.map(probe, jax.random.split(key, num_probes))


def _run(
    operator: Callable[[PyTree], PyTree],
    params: PyTree,
    key: jax.Array,
    start: PyTree | None,
    *,
    num_steps: int,
) -> tuple[Spectrum, PyTree]:
    vector = random_unit(jax.random.split(key, 1)[0], params) if start is None else unit(start)
    spectrum, vector = lanczos(_linear(operator), vector, num_steps)
    return jax.tree.map(lambda x: x[None], spectrum), vector


def _linear(operator: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    return operator.linear() if isinstance(operator, CurvatureProduct) else operator


_jitted_spectrum = partial(jax.jit, static_argnames=("num_steps", "num_probes"))(_spectrum)
_jitted_run = partial(jax.jit, static_argnames="num_steps")(_run)


def random_unit(key: jax.Array, params: PyTree) -> PyTree:
    """A vector uniform on the unit sphere, in the shape of `params`, at least float32."""
    leaves, form = jax.tree.flatten(jax.eval_shape(widen, params))
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    vector = jax.tree.unflatten(form, draws)
    return scale(vector, jax.lax.rsqrt(squared_norm(vector)))


def unit(vector: PyTree) -> PyTree:
    """The vector at length 1, at least float32, however small its entries are; NaN for zero."""
    vector = widen(vector)
    vector = scale(vector, power_of_two_below(vector))
    return scale(vector, jax.lax.rsqrt(squared_norm(vector)))


def power_of_two_below(tree: PyTree) -> jax.Array:
    """The power of two that brings the largest entry near 1, so that no square leaves float32; 1 for zero.

    A product with it is exact.
    """
    sizes = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack([x.astype(jnp.float32) for x in sizes]), initial=0.0)
    usable = jnp.isfinite(largest) & (largest > 0)
    exponent = jnp.clip(jnp.frexp(jnp.where(usable, largest, 1.0))[1], -125, 125)
    return jnp.ldexp(jnp.float32(1.0), -exponent)


def lanczos(
    linear: Callable[[PyTree], PyTree], start: PyTree, num_steps: int
) -> tuple[Spectrum, PyTree]:
    """One run from a unit vector: Ritz values, and the unit Ritz vector of the largest one."""

    def step(i: jax.Array, carry: tuple) -> tuple:
        basis, vector, diagonal, off, valid, greatest, units = carry
        image = widen(linear(vector))
        # The matrix in units of its first image: a norm squares, and the square of 1e-20 is no float32.
        units = jnp.where(i == 0, power_of_two_below(image), units)
        image = scale(image, units)
        coefficients = _coordinates(basis, image)
        image = _without(basis, image, coefficients)
        image = _without(basis, image, _coordinates(basis, image))
        length = jnp.sqrt(squared_norm(image))
        alive = i < valid
        greatest = jnp.maximum(greatest, jnp.maximum(jnp.abs(coefficients[i]), length))
        ends = alive & (length <= _BREAKDOWN * greatest)
        valid = jnp.where(ends, i + 1, valid)
        diagonal = diagonal.at[i].set(jnp.where(alive, coefficients[i], 0.0))
        off = off.at[i].set(jnp.where(alive, length, 0.0))
        # Rows that a finished run leaves are zero, and so are products with them.
        inside, usable = i + 1 < num_steps, (length > 0) & (i + 1 < valid)
        following = scale(image, jnp.where(usable, 1.0 / jnp.where(usable, length, 1.0), 0.0))
        # Stored last, by way of what was read: XLA would copy the whole basis, several times a step,
        # if it were read after it was written. The last vector has no row, and rewrites the one before.
        row = jnp.minimum(i + 1, num_steps - 1)

        def stored(b: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
            return b.at[row].set(jnp.where(inside, new, old).astype(b.dtype))

        basis = jax.tree.map(stored, basis, following, vector)
        return basis, following, diagonal, off, valid, greatest, units

    basis = jax.tree.map(lambda v: jnp.zeros((num_steps, *v.shape), v.dtype).at[0].set(v), start)
    numbers = jnp.zeros(num_steps, jnp.float32)
    carry = (basis, start, numbers, numbers, jnp.int32(num_steps), jnp.float32(0), jnp.float32(1))
    basis, _, diagonal, off, valid, _, units = jax.lax.fori_loop(0, num_steps, step, carry)

    steps = jnp.arange(num_steps)
    # Rows beyond the last valid one get an eigenvalue outside the spectrum, so they sort to the end.
    bound = jnp.max(jnp.abs(diagonal)) + 2 * jnp.max(off)
    outside = jnp.where(bound > 0, 2 * bound, 1.0)
    between = jnp.where(steps < valid - 1, off, 0.0)[: num_steps - 1]
    tridiagonal = (
        jnp.diag(jnp.where(steps < valid, diagonal, outside))
        + jnp.diag(between, 1)
        + jnp.diag(between, -1)
    )
    values, vectors = jnp.linalg.eigh(tridiagonal)
    real = steps < valid
    top = valid - 1
    weights = jnp.where(real, jnp.square(vectors[0]), 0.0)
    spectrum = Spectrum(
        jnp.where(real, values, values[top]) / units,
        weights / jnp.sum(weights),
        jnp.where(real, jnp.abs(off[top] * vectors[top]), 0.0) / units,
    )
    return spectrum, _combination(basis, vectors[:, top])


def _coordinates(basis: PyTree, vector: PyTree) -> jax.Array:
    """Inner products of every row of the basis with a vector."""

    def one(b: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.tensordot(b, v, axes=v.ndim, precision=_HIGHEST).astype(jnp.float32)

    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(one, basis, vector))), axis=0)


def _combination(basis: PyTree, coefficients: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda b: jnp.tensordot(coefficients.astype(b.dtype), b, axes=1, precision=_HIGHEST), basis
    )


def _without(basis: PyTree, vector: PyTree, coefficients: jax.Array) -> PyTree:
    return jax.tree.map(jnp.subtract, vector, _combination(basis, coefficients))
