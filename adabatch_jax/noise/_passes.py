"""The passes of `value_and_grad_noise` over its groups, as functions of what is fixed and what is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax._axes import to_varying, varying_axes
from adabatch_jax._tree import cast_like
from adabatch_jax._types import LossFn, PyTree
from adabatch_jax.noise._accumulate import (
    Tally,
    accumulate,
    first,
    pool_devices,
    pool_leading,
    prepare,
    single,
)
from adabatch_jax.noise._arguments import (
    Parameters,
    check_in_turn,
    check_scalar,
    explained,
    take_apart,
    taken_apart_loss,
    to_arrays,
    warn_of_shared_keys,
)
from adabatch_jax.noise._aux import join_aux, split_aux
from adabatch_jax.noise._gradient_noise import GradientNoise, unless_measured
from adabatch_jax.noise._groups import group_sizes, leading_shape

WHERE = "value_and_grad_noise"
# Of the parameters and a group: the loss, and the parts of aux as `split_aux` gives them.
LossParts = Callable[[PyTree, PyTree], Any]
# Of a direction: how far the gradient of each example goes along it, float32 [n].
Project = Callable[[PyTree], jax.Array]


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """The arguments of `value_and_grad_noise`, checked.

    With `together`, which is called as `_structured`'s `batch_tally`, `vectorize` groups go through it as
    one; all of them with None.
    """

    loss_fn: LossFn
    has_aux: bool = False
    sum_aux: PyTree = False
    trained: PyTree = None
    axes: tuple[str, ...] = ()
    vectorize: int | None = None
    coordinate_wise: bool = False
    inner_products: bool = False
    lanes: bool = False
    together: Callable[..., tuple[Tally, Project]] | None = None

    @property
    def leading_ndim(self) -> int:
        """Axes of the groups before those of a group."""
        return 2 if self.lanes else 1


class Work(NamedTuple):
    """The groups of one call, and how they are gone through."""

    groups: PyTree
    sizes: jax.Array  # int32 [num_groups], or [num_loops, num_lanes]
    bound: Any  # groups, or loops, that are computed
    masked: bool  # whether a group may be empty, or left out
    at_once: int
    varying: frozenset[str]  # the device axes over which everything varies

    def over(self, options: Options, bound: Any, *given: Any, together: bool = False) -> Tally:
        """Runs a function over the first groups, and merges what it gives: see `accumulate`."""
        return accumulate(
            (self.groups, self.sizes),
            bound,
            *given,
            vectorize=self.at_once,
            lanes=options.lanes,
            varying=self.varying,
            together=together,
        )


def loss_parts(
    options: Options, parts: Parameters, args: tuple[Any, ...], trained: PyTree, group: PyTree
) -> Any:
    """The loss of a group, and its aux taken apart."""
    with explained(WHERE):
        out = options.loss_fn(parts.whole(trained), group, *args)
    value, aux = taken_apart_loss(WHERE, "loss_fn", out, options.has_aux)
    check_scalar(WHERE, value)
    return value, split_aux(WHERE, aux, options.sum_aux)


def gradient_of(
    options: Options, loss: LossParts, params: PyTree, group: PyTree, size: jax.Array
) -> Tally:
    """The tally of one group: its mean gradient, without scatter."""
    (value, aux), mean = jax.value_and_grad(loss, has_aux=True)(params, group)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), mean)
    noise = single(mean, size)._replace(
        coordinate_scatter=zeros if options.coordinate_wise else None
    )
    return Tally(noise, value, *aux)


def projection_of(
    loss: LossParts, params: PyTree, direction: PyTree, group: PyTree, size: jax.Array
) -> Tally:
    """The tally of one number of a group: how far its gradient goes along the direction."""
    value, along = jax.jvp(lambda p: loss(p, group)[0], (params,), (direction,))
    return Tally(single(along, size), value, (), (), ())


def mean_pass(
    options: Options, loss: LossParts, params: PyTree, work: Work, measure: Any
) -> tuple[Tally, Work, Project | None]:
    """What the groups of this device add up to.

    Also the work as it was done, and with `together`, if all groups go at once, how to project.
    """
    if options.together is None:
        one = partial(gradient_of, options, loss, params)
        return work.over(options, work.bound, one, measure), work, None
    batch = partial(
        options.together,
        loss,
        params,
        coordinate_wise=options.coordinate_wise,
        measure=measure,
        varying=work.varying,
    )
    length = len(work.sizes)
    if work.at_once == length:
        inside = jnp.arange(length) < work.bound
        counted = isinstance(work.bound, jax.Array)
        work = work._replace(sizes=jnp.where(inside, work.sizes, 0) if counted else work.sizes)
        total, project = batch(work.groups, work.sizes, masked=work.masked)
        return total, work, project
    each = lambda group, sizes: batch(group, sizes, masked=True)[0]
    return work.over(options, work.bound, each, measure, together=True), work, None


def inner_product_scatter(
    options: Options,
    loss: LossParts,
    params: PyTree,
    work: Work,
    project: Project | None,
    mean: PyTree,
    measure: Any,
) -> jax.Array:
    """The second pass: the scatter of the groups' gradients along the mean one."""
    # The gradient g of JAX is that for which a step d changes the loss by Re Σ g·d: conjugate.
    direction = to_varying(jax.tree.map(jnp.conj, mean), varying_axes(params))
    if project:
        along = project(direction)
        tally = jax.vmap(lambda x, size: Tally(single(x, size), x, (), (), ()))(along, work.sizes)
        products = pool_leading(tally)
    else:
        bound = work.bound if measure is None else jnp.where(measure, work.bound, 0)
        products = work.over(options, bound, partial(projection_of, loss, params, direction))
    return pool_devices(products, options.axes).noise.scatter


def value_and_noise(
    options: Options,
    params: PyTree,
    groups: PyTree,
    args: tuple[Any, ...],
    *,
    count: Any,
    sizes: Any,
    measure: Any,
) -> tuple[Any, GradientNoise]:
    """One call of what `value_and_grad_noise` returns."""
    warn_of_shared_keys(WHERE, args)
    groups = to_arrays(WHERE, "groups", groups)
    parts = take_apart(WHERE, params, options.trained)
    leading = leading_shape(groups, options.leading_ndim)
    masked = count is not None or sizes is not None
    sizes = group_sizes(groups, sizes, leading)
    bound = leading[0] if count is None else jnp.clip(count, 0, leading[0]).astype(jnp.int32)
    params = prepare(WHERE, parts.trained, groups, options.axes)
    varying = varying_axes((params, parts.frozen, groups, args, sizes, bound))
    if not options.lanes:
        check_in_turn(WHERE, groups)
    at_once = min(leading[0], options.vectorize or leading[0])
    work = Work(groups, sizes, bound, masked, at_once, varying)
    loss = partial(loss_parts, options, parts, args)

    total, work, project = mean_pass(options, loss, params, work, measure)
    total = pool_devices(total, options.axes)
    mean = cast_like(total.noise.mean, params)
    noise = total.noise._replace(mean=mean)
    if options.inner_products:
        scatter = inner_product_scatter(options, loss, params, work, project, mean, measure)
        noise = noise._replace(inner_product_scatter=scatter)
    if measure is not None:
        noise = unless_measured(noise, jnp.asarray(measure).astype(bool))

    noise = noise._replace(
        mean=parts.filled(noise.mean),
        coordinate_scatter=parts.filled(noise.coordinate_scatter, jnp.float32),
    )
    value = jnp.where(noise.num_examples == 0, jnp.nan, total.value)
    if not options.has_aux:
        return value, noise
    one = partial(first, ndim=options.leading_ndim)
    of_first = lambda g: options.loss_fn(parts.whole(params), one(g), *args)[1]
    shape = jax.eval_shape(of_first, groups)
    return (value, join_aux(WHERE, shape, options.sum_aux, total[2:])), noise
