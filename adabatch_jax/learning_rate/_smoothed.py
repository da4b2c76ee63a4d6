"""The smoothed losses behind AutoWU's last decision, to look at: a curve, its band, the switch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from adabatch_jax._clock import as_int
from adabatch_jax._types import PyTree
from adabatch_jax.learning_rate._autowu_state import ScaleByAutowuState, WarmupEnd, find_schedule
from adabatch_jax.learning_rate._quasisep import quasisep_smoother
from adabatch_jax.learning_rate._rbf import RbfFit, rbf_smoother

Floats = npt.NDArray[np.float64]
_MOST_EXACT = 500  # losses that the dense smoother is conditioned on, as in one of its draws


class SmoothedLosses(NamedTuple):
    """A warm-up seen by its Gaussian process; positions are steps or examples, by AutoWU's clock.

    Source: ours; see `smoothed_losses`.
    """

    positions: Floats  # [n]: of the losses kept
    losses: Floats  # [n]: the losses kept; neighbours' means where the buffer has overflowed
    grid: Floats  # [k]: positions of the curve; empty if no test was made yet
    mean: Floats  # [k]: the smoothed loss
    deviation: Floats  # [k]: its standard deviation, without the noise of a single loss
    minimum: float  # position of the lowest smoothed loss; NaN if no test was made yet
    by_steps: bool  # whether positions are steps
    end: float  # position at which the warm-up ended; NaN while it goes on


def smoothed_losses(opt_state: PyTree) -> SmoothedLosses:
    """What AutoWU saw when it decided: the losses of the warm-up and the posterior on them.

    With hyper-parameters as the last test left them, mean ± 2 deviations is the band of the loss
    curve. Runs on the host, not inside jit: the number of losses depends on the state.

    Args:
      opt_state: state of an optimizer with one `scale_by_autowu` in it.

    Returns:
      `SmoothedLosses`, as NumPy arrays.

    Raises:
      ValueError: `opt_state` holds no `scale_by_autowu`, or several.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import scale_by_autowu
      >>> link = scale_by_autowu(total_steps=40, steps_per_test=5)
      >>> state = link.init({})
      >>> for loss in (3.0, 2.0, 1.5, 1.0, 1.2):
      ...     _, state = link.update({}, state, value=jnp.array(loss))
      >>> seen = smoothed_losses(state)
      >>> [round(loss, 4) for loss in seen.losses.tolist()], len(seen.grid), 2 < seen.minimum < 5
      ([3.0, 2.0, 1.5, 1.0, 1.2], 500, True)

    Source: Kim et al. (2021), arXiv 2107.05855, figure 1, shows such a curve.
    """
    state = _on_host(find_schedule(opt_state, "smoothed_losses"))
    history = state.loss_history
    count = int(history.complete) + int(history.in_last > 0)
    positions, losses = (
        np.asarray(v[:count], np.float64) for v in (history.positions, history.losses)
    )
    ended = int(state.warmup_end) != WarmupEnd.RUNNING
    nothing = np.zeros(0)
    seen = SmoothedLosses(
        positions=positions,
        losses=losses,
        grid=nothing,
        mean=nothing,
        deviation=nothing,
        minimum=float("nan"),
        by_steps=int(state.first_increment) <= 1,
        end=float(state.peak_position) if ended else float("nan"),
    )
    if int(state.last_warmup_test.tests_made) == 0 or count < 2:
        return seen
    fit = state.warmup_memory.smoother_state
    if isinstance(fit, RbfFit):
        smoother, span = rbf_smoother(), seen.end if ended else float(as_int(state.autowu_clock))
        chosen = np.unique(np.linspace(0, count - 1, min(count, _MOST_EXACT)).astype(int))
        positions, losses = positions[chosen], losses[chosen]
    else:
        smoother, span = quasisep_smoother(), float(positions[-1])
    with jax.numpy_rank_promotion("allow"):
        grid, posterior = smoother.posterior(
            fit, np.float32(positions / span), np.float32(losses), len(losses)
        )
    mean = np.asarray(posterior.mean, np.float64)
    points = span * np.asarray(grid, np.float64)
    return seen._replace(
        grid=points,
        mean=mean,
        deviation=np.sqrt(np.asarray(posterior.variance, np.float64)),
        minimum=float(points[np.argmin(mean)]),
    )


def _on_host(state: ScaleByAutowuState) -> ScaleByAutowuState:
    """NumPy arrays, freed from the wrappers of `nnx.Optimizer` and from pmap's device axis."""
    bare = jax.tree.map(
        lambda node: np.asarray(jax.tree.leaves(node)[0]),
        state,
        is_leaf=lambda node: not isinstance(node, tuple),
    )
    stacked = bare.autowu_learning_rate.ndim
    return jax.tree.map(lambda x: x[(0,) * stacked], bare) if stacked else bare
