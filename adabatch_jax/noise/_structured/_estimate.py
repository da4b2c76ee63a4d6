"""Value, mean gradient and the exact noise of single examples, all of them in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._types import LossFn, PyTree
from adabatch_jax.noise._arguments import take_apart, to_arrays
from adabatch_jax.noise._estimate import estimator
from adabatch_jax.noise._gradient_noise import GradientNoise
from adabatch_jax.noise._groups import is_key
from adabatch_jax.noise._structured._batch import batch_tally


def value_and_grad_structured(
    loss_fn: LossFn,
    *,
    vectorize: int | None = None,
    **options: Any,
) -> Callable[..., tuple[Any, GradientNoise]]:
    """`value_and_grad_noise` over groups of one example, at little more than the price of a plain step.

    All examples go forward and back together, as in a batch of a plain step, and what each contributes
    is read off the inputs and signals of every layer. Any loss will do: `explain_noise` tells how each
    parameter is treated, and which take a slower way. Under sharded `jit` shard axis 0 of the groups.

    Args:
      loss_fn: as for `value_and_grad_noise`.
      vectorize: examples that go together; all by default.
      **options: has_aux, sum_aux, trained, axis_name, coordinate_wise, inner_products: as for
        `value_and_grad_noise`.

    Returns:
      A function like that of `value_and_grad_noise`, of groups [num_groups, 1, …].

    Raises:
      ValueError: as `value_and_grad_noise`; groups of more than one example, or parameters that are no
        real floats; the loss does not depend on the example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adabatch_jax import split_groups
      >>> fn = jax.jit(value_and_grad_structured(lambda w, x: 0.5 * jnp.mean((w - x) ** 2)))
      >>> _, noise = fn(jnp.array(0.0), split_groups(jnp.array([1.0, 3.0, 5.0, 7.0]), 4))
      >>> round(float(noise.trace), 4), bool(below_resolution(noise))
      (6.6667, False)

    Source: Goodfellow (2015), arXiv 1510.01799; Li et al. (2021), arXiv 2110.05679; Rochette et al. (2019),
    arXiv 1912.06015.
    """
    where = "value_and_grad_structured"
    if vectorize is not None:
        _validate.positive_int(where, vectorize=vectorize)
    measured = estimator(loss_fn, vectorize=vectorize, lanes=False, together=batch_tally, **options)

    def fn(params: PyTree, groups: PyTree, *args: Any, **given: Any) -> Any:
        groups = to_arrays(where, "groups", groups)
        check_single_examples(take_apart(where, params, options.get("trained")).trained, groups)
        return measured(params, groups, *args, **given)

    return fn


def below_resolution(noise: GradientNoise) -> jax.Array:
    """Whether ‖ḡ‖² > 1000 tr Σ, bool scalar.

    The scatter is the difference of two sums here, which float32 then cannot tell well from 0.
    """
    return noise.squared_norm > 1e3 * noise.trace


def check_single_examples(params: PyTree, groups: PyTree) -> None:
    """Groups of one example, and real parameters."""
    shapes = [x.shape for x in jax.tree.leaves(groups) if not is_key(x, 1)]
    if any(shape[1:2] != (1,) for shape in shapes):
        raise ValueError(
            "value_and_grad_structured: needs groups of one example, every leaf "
            f"[num_groups, 1, …], as split_groups(batch, B) gives; got shapes {shapes}"
        )
    dtypes = {str(x.dtype) for x in jax.tree.leaves(params)}
    if other := {d for d in dtypes if not jnp.issubdtype(d, jnp.floating)}:
        raise ValueError(
            "value_and_grad_structured: needs real floating-point parameters, "
            f"got {', '.join(sorted(other))}"
        )
