"""What traits a direction has, found by trying it on small parameters of the same structure.

| question, in this order | answer of | tells |
|---|---|---|
| Is the step twice as long for twice the gradient? | SGD, momentum | linear |
| Is it shorter after 256 steps on the same gradient than after 64? | AdaGrad | gathers squares |
| Small gradients of 1, 2, 3 parts: do the steps lie on a rising line? | SGD behind a clip | linear |
| Is it twice as long at a parameter twice as large? | LAMB | a part of the parameter |
| None of these | Adam and the like | steps of one length |

Every array of parameters answers for itself. What most of the moved parameters say holds for all.
"""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from adabatch_jax._tree import cast_like
from adabatch_jax._types import PyTree, ScalingRule
from adabatch_jax.learning_rate._peak import IMPROVED_PEAK, Peak
from adabatch_jax.learning_rate._scaling import linear_scaling, sqrt_scaling

PEAK_PLACE, PEAK_FACTOR = IMPROVED_PEAK.at, IMPROVED_PEAK.factor  # or by the kind of the direction:
_PEAK_FACTOR_ACCUMULATED = 8.0  # steps that shrink while squares are gathered: AdaGrad
_PEAK_FACTOR_RELATIVE = 1.0  # steps that are a part of the parameters: LAMB
_LONGEST_STEP = 0.125  # of the parameters
_LARGE, _SMALL = 1e4, 1e-3  # lengths of gradients above and below any threshold of clipping
_LATE = 256  # steps after which it is looked at whether a direction still shrinks
_AXIS = 2  # entries along an axis of what stands for an array, at most
# Thresholds between the answers. A step is twice as long as another, or as long: halfway, in ratios.
_GROWS = 2**0.5
# The root of a sum of squares halves a step from 64 steps to 256; averages of squares have settled by 64.
_SHRUNK = 0.6
# A clip is a straight line up to its end. Adam bends at any ε, and weight decay adds a constant.
_FLAT, _STRAIGHT = 1e-4, 1e-3

Floats = npt.NDArray[np.float64]


class DirectionTraits(NamedTuple):
    """How a rate follows the batch, and how AutoWU finds its peak; the bound is `automatic`'s alone."""

    scaling: ScalingRule
    peak_factor: float = PEAK_FACTOR
    peak_at: str = PEAK_PLACE
    max_relative_step: float | None = _LONGEST_STEP

    @property
    def peak(self) -> Peak:
        """For `scale_by_improved_autowu`, without the bound."""
        found: dict[str, Any] = {"at": self.peak_at, "factor": self.peak_factor}
        return IMPROVED_PEAK.changed("probe_direction", found)


_LINEAR = DirectionTraits(linear_scaling())
# AdaGrad: its minimum moves up from test to test, and the last knows it best. It shrinks by itself.
_GATHERS = DirectionTraits(sqrt_scaling(), _PEAK_FACTOR_ACCUMULATED, "earliest", None)
_RELATIVE = DirectionTraits(sqrt_scaling(), _PEAK_FACTOR_RELATIVE)
_OF_ONE_LENGTH = DirectionTraits(sqrt_scaling())


class UntriedError(ValueError):
    """A direction could not be tried."""


def probe_direction(
    direction: optax.GradientTransformation, where: str, remedy: str, params: PyTree = None
) -> DirectionTraits:
    """The traits, found on a gradient, its double, the same again and again, on larger parameters.

    Arrays with at most two entries along each axis stand for the parameters, of which only structure and
    shapes count: they may be traced, or abstract. Of several kinds, as `optax.partition` may hold, that of
    the most elements is told; parameters that are not moved say nothing. What cannot be tried so, for it
    counts on sizes, is tried on a single matrix.

    The gradient is larger than what AdaGrad starts from. Clipping before or after counts for nothing,
    wherever its threshold is: where a large gradient says no more than another, small ones are tried.

    Args:
      direction: as `automatic` takes it.
      where: named by errors.
      remedy: what to do if it cannot be tried.
      params: pytree of arrays, or of `jax.ShapeDtypeStruct`; None: a single number.

    Raises:
      UntriedError: it fails, or moves nothing.
      ValueError: it turns a gradient around.
    """
    if params is None:
        return _majority(direction, where, remedy, np.ones(1))
    try:
        return _majority(direction, where, remedy, params)
    except UntriedError as of_structure:
        try:
            return _majority(direction, where, remedy, np.ones((_AXIS, _AXIS)))
        except UntriedError:
            raise of_structure from of_structure.__cause__


def _majority(
    direction: optax.GradientTransformation, where: str, remedy: str, params: PyTree
) -> DirectionTraits:
    leaves, structure = jax.tree.flatten(params)
    shapes = [jnp.shape(x) for x in leaves]
    try:
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            runs = _try(direction, shapes, structure)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UntriedError(
            f"{where}: the direction could not be tried on small parameters of the same structure "
            f"({why}): {remedy}"
        ) from error
    votes: collections.Counter[DirectionTraits] = collections.Counter()
    for shape, run in zip(shapes, runs, strict=True):
        if not run.once >= 0:
            raise ValueError(
                f"{where}: direction turns a gradient of {_LARGE:g} into {run.once:g}: give it without "
                "sign and learning rate, optax.scale_by_adam() instead of optax.adam(1e-3)"
            )
        if run.once:
            votes[_traits(run)] += math.prod(shape)
    if not votes:
        raise UntriedError(f"{where}: the direction moves no parameter: {remedy}")
    return votes.most_common(1)[0][0]


class _Run(NamedTuple):
    """How far the updates of one array go along its gradient, trial by trial."""

    once: float  # at the first step
    early: float  # after 64 steps on the same gradient
    late: float  # after 256
    twice: float  # at the first step, for twice the gradient
    larger: float  # … at twice the parameters
    small: float  # … for a small gradient, its double, its triple
    double: float
    triple: float


def _traits(run: _Run) -> DirectionTraits:
    if run.twice > _GROWS * run.once:
        return _LINEAR
    if run.late < _SHRUNK * run.early:
        return _GATHERS
    rise, next_rise = run.double - run.small, run.triple - run.double
    if rise > _FLAT * run.small and abs(next_rise - rise) < _STRAIGHT * rise:
        return _LINEAR
    return _RELATIVE if run.larger > _GROWS * run.once else _OF_ONE_LENGTH


def _try(
    direction: optax.GradientTransformation, shapes: list[tuple[int, ...]], structure: Any
) -> list[_Run]:
    link = optax.with_extra_args_support(direction)
    shapes = [tuple(min(n, _AXIS) for n in shape) for shape in shapes]
    # Unequal entries: what subtracts their mean, as gradient centralisation does, would leave nothing.
    patterns = [1.0 / np.arange(1.0, math.prod(shape) + 1.0).reshape(shape) for shape in shapes]
    units = [x / max(float(np.linalg.norm(x)), 1e-30) for x in patterns]

    def tree(leaves: list[Any]) -> PyTree:
        return jax.tree.unflatten(structure, [jnp.asarray(x, jnp.float32) for x in leaves])

    @jax.jit
    def last_update(gradient: PyTree, params: PyTree, number: int) -> PyTree:
        """Of so many steps on one gradient. In a loop, so that the program is one update long."""

        def step(_: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            return cast_like(link.update(gradient, carry[1], params), carry)

        first = jax.tree.map(jnp.zeros_like, gradient), link.init(params)
        return jax.lax.fori_loop(0, number, step, first)[0]

    def far(length: float, size: float = 1.0, steps: int = 1) -> list[float]:
        """For a gradient that has this length on all arrays together, in the last of so many steps."""
        gradient = tree([length / len(units) ** 0.5 * x for x in units])
        updates = last_update(gradient, tree([np.full(shape, size) for shape in shapes]), steps)
        moved = (np.asarray(u, np.float64) for u in jax.tree.leaves(updates))
        return [float(np.vdot(x, u)) for x, u in zip(units, moved, strict=True)]

    seen = [far(_LARGE, steps=number) for number in (1, _LATE // 4, _LATE)]
    seen += [far(2 * _LARGE), far(_LARGE, size=2.0)]
    seen += [far(part * _SMALL) for part in (1, 2, 3)]
    return [_Run(*of_array) for of_array in zip(*seen, strict=True)]
