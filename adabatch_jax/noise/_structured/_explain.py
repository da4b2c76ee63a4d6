"""The way of each parameter, in words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax._types import LossFn, PyTree
from adabatch_jax.noise._structured._estimate import check_single_examples
from adabatch_jax.noise._structured._plan import make_plan


def explain_noise(
    loss_fn: LossFn, params: PyTree, group: PyTree, *args: Any, has_aux: bool = False
) -> None:
    """Prints how `value_and_grad_structured` treats each parameter, and why.

    * formula: ‖gᵢ‖² follows from the inputs x of one operation and its signals δ. For an input of one row
      it is ‖x‖²·‖δ‖²; for more ⟨x xᵀ, δ δᵀ⟩ where that takes fewer multiplications than the gradient.
    * direct: the gradient of each example is formed from inputs and signals, a few at once, and they add up
      to the mean gradient: as many multiplications as in a plain step. Only what has a program inside (a
      scan over layers, a custom derivative) is run again for every example, as `vmap(grad)` does.
    * unused: the loss does not depend on it.

    A penalty on the weights inside the loss is a second use of each: leave it to the optimizer
    (`optax.add_decayed_weights`).

    Args:
      loss_fn: `loss_fn(params, group, *args)`, as `value_and_grad_noise` takes it.
      params: pytree of floats; nothing is computed with them, shapes will do.
      group: one group, of one example: every leaf [1, …].
      *args: what else `loss_fn` takes.
      has_aux: whether it returns auxiliary data.

    Raises:
      ValueError: `group` holds more or less than one example, a parameter is no real float, or the loss
        does not depend on the example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def loss_fn(params, x):
      ...     hidden = jax.nn.relu(x @ params["in"] + params["bias"][None])
      ...     return jnp.mean(hidden @ params["out"])
      >>> params = {"in": jnp.ones((3, 4)), "bias": jnp.zeros(4), "out": jnp.ones(4)}
      >>> explain_noise(loss_fn, params, jnp.ones((1, 3)))
      ['bias']  [4]     direct   add
      ['in']    [3, 4]  formula  dot_general, ‖x‖²·‖δ‖²
      ['out']   [4]     formula  dot_general, ‖x‖²·‖δ‖²

    Source: Goodfellow (2015), arXiv 1510.01799; Li et al. (2021), arXiv 2110.05679; Rochette et al. (2019),
    arXiv 1912.06015.
    """
    stacked = jax.eval_shape(lambda g: jax.tree.map(lambda x: jnp.asarray(x)[None], g), group)
    check_single_examples(params, stacked)
    paths, structure = jax.tree.flatten_with_path(params)
    rows, batch = jax.tree.flatten(group)

    def fn(leaves: list[Any], rows: list[Any]) -> list[Any]:
        out = loss_fn(jax.tree.unflatten(structure, leaves), jax.tree.unflatten(batch, rows), *args)
        return [out[0] if has_aux else out]

    leaves = [p for _, p in paths]
    plan = make_plan(fn, leaves, rows)
    table = [
        (jax.tree_util.keystr(path) or "parameter", str(list(p.shape)), way.kind, way.reason)
        for (path, p), way in zip(paths, plan.ways, strict=True)
    ]
    widths = [max(len(row[k]) for row in table) for k in range(3)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        print("  ".join([*cells, row[3]]))
