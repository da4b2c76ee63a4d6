"""Which parameters an optimizer moves, and which gradients it reads: told by its program, not by names.

A frozen parameter is one whose update is zero whatever the gradient is: `optax.set_to_zero` behind
`optax.masked`, `optax.partition`, `optax.freeze` or any other wrapper. The update is traced, not run,
and two facts are followed from equation to equation: is this value zero, and which inputs are behind it?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from adabatch_jax._types import PyTree
from adabatch_jax.noise import GradientNoise


class _Known(NamedTuple):
    """What is known of a value: whether all of it is zero; the inputs behind it, as bits of an integer."""

    zero: bool
    inputs: int


class Leaves(NamedTuple):
    """What an optimizer does with the leaves of a gradient, in the order of `jax.tree.leaves`."""

    trained: tuple[bool, ...]  # whether the parameter is moved
    used: tuple[bool, ...]  # whether its gradient has a part in moving any parameter, now or later

    def trained_part(self, tree: PyTree) -> list[Any]:
        """The leaves whose parameters are moved."""
        return [x for x, moves in zip(jax.tree.leaves(tree), self.trained, strict=True) if moves]

    def frozen_part(self, tree: PyTree) -> list[Any]:
        """The leaves whose parameters stay, but which change the way of others, by a global norm say."""
        kinds = zip(jax.tree.leaves(tree), self.trained, self.used, strict=True)
        return [x for x, moves, used in kinds if used and not moves]

    def noise_of_trained(self, noise: GradientNoise) -> GradientNoise:
        """The same noise with lists of the trained leaves in the place of trees."""
        scatter = noise.coordinate_scatter
        return noise._replace(
            mean=self.trained_part(noise.mean),
            coordinate_scatter=None if scatter is None else self.trained_part(scatter),
        )

    def joined(
        self,
        tree: PyTree,
        trained: list[Any] | None,
        frozen: list[Any] | None = None,
        rest: Callable[[Any], Any] = jnp.zeros_like,
    ) -> PyTree:
        """The parts in the structure of `tree`; in every place of neither `rest` of what stands there."""
        if trained is None:
            return None
        leaves, structure = jax.tree.flatten(tree)
        moved, beside = iter(trained), iter(frozen or [])
        for i, (moves, used) in enumerate(zip(self.trained, self.used, strict=True)):
            if moves:
                leaves[i] = next(moved)
            elif used and frozen is not None:
                leaves[i] = next(beside)
            else:
                leaves[i] = rest(leaves[i])
        return jax.tree.unflatten(structure, leaves)


# Zero if the first operand is: they move numbers around, or change their type or sign.
_ZERO_BY_FIRST = frozenset(
    """abs broadcast_in_dim ceil conj convert_element_type copy copy_p cumsum device_put div
    dynamic_slice expand_dims floor gather imag integer_pow neg pcast pvary psum real reduce_max
    reduce_min reduce_precision reduce_sum reshape rev round sharding_constraint sign sin slice sqrt
    square squeeze stop_gradient tan tanh transpose""".split()  # noqa: SIM905
)
# Zero if every operand is.
_ZERO_BY_ALL = frozenset(["add", "add_any", "sub", "max", "min", "concatenate", "pad", "complex"])
# Zero if one operand is: what a factor of NaN would make of it does not make a parameter trained.
_ZERO_BY_ANY = frozenset(["mul", "dot_general", "conv_general_dilated"])


def moved_leaves(
    update: Callable[..., tuple[PyTree, PyTree]], updates: PyTree, state: PyTree, *rest: PyTree
) -> Leaves:
    """Which leaves `update(updates, state, *rest)` moves, and which leaves of `updates` have a part in it.

    A gradient counts as used if it reaches an update that is not zero, also by way of the state in a later
    step. Where the updates come back in another structure nothing is known, and every leaf counts as both.
    """
    number, states = len(jax.tree.leaves(updates)), len(jax.tree.leaves(state))
    closed, (moved, left) = jax.make_jaxpr(update, return_shape=True)(updates, state, *rest)
    there, here = (str(jax.tree.structure(tree)) for tree in (moved, updates))
    if there != here or len(jax.tree.leaves(left)) != states:
        return Leaves((True,) * number, (True,) * number)
    sources = number + states
    inputs = range(len(closed.jaxpr.invars))
    given = [_Known(False, 1 << i if i < sources else 0) for i in inputs]
    known = _follow(closed.jaxpr, given)
    trained = tuple(not x.zero for x in known[:number])
    reached = 0
    for x in known[:number]:
        reached |= 0 if x.zero else x.inputs
    while True:  # through the state, step by step, until nothing is added
        more = reached
        for i, x in enumerate(known[number:]):
            more |= x.inputs if reached >> (number + i) & 1 else 0
        if more == reached:
            return Leaves(trained, tuple(bool(reached >> i & 1) for i in range(number)))
        reached = more


def _literal(value: Any) -> _Known:
    number = bool(jnp.issubdtype(jnp.result_type(value), jnp.number))
    return _Known(number and np.ndim(value) == 0 and complex(value) == 0, 0)


def _follow(jaxpr: Jaxpr, given: Sequence[_Known]) -> list[_Known]:
    known: dict[Any, _Known] = dict(zip(jaxpr.invars, given, strict=True))
    known.update(dict.fromkeys(jaxpr.constvars, _Known(False, 0)))

    def read(x: Any) -> _Known:
        return _literal(x.val) if isinstance(x, Literal) else known[x]

    for eqn in jaxpr.eqns:
        found = _equation(eqn, [read(x) for x in eqn.invars])
        known.update(zip(eqn.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _equation(eqn: Any, operands: list[_Known]) -> list[_Known]:
    name = eqn.primitive.name
    inputs = 0
    for x in operands:
        inputs |= x.inputs
    if name == "cond":
        index, *rest = operands
        branches = [_call(branch, rest) for branch in eqn.params["branches"]]
        return [_either(index.inputs, ways) for ways in zip(*branches, strict=True)]
    if name == "while":
        return _while(eqn, operands)
    if name == "scan":
        return _scan(eqn, operands)
    inner = _inner(eqn)
    if inner is not None and len(_plain(inner).invars) == len(operands):
        return _call(inner, operands)
    if name == "optimization_barrier":
        return operands
    zero = False
    if name == "select_n":
        zero = all(x.zero for x in operands[1:])
    elif name in _ZERO_BY_FIRST:
        zero = operands[0].zero
    elif name in _ZERO_BY_ALL:
        zero = all(x.zero for x in operands)
    elif name in _ZERO_BY_ANY:
        # A scalar that is zero may be a learning rate: a parameter that waits for its warm-up is trained.
        zero = any(x.zero and v.aval.ndim for x, v in zip(operands, eqn.invars, strict=True))
        zero |= any(x.zero for x in operands) and not inputs
    return [_Known(zero, 0 if zero else inputs)] * len(eqn.outvars)


def _either(inputs: int, ways: Sequence[_Known]) -> _Known:
    """The result of a branch: zero if it is zero in each; else it comes from the predicate, too."""
    zero = all(x.zero for x in ways)
    for x in ways:
        inputs |= x.inputs
    return _Known(zero, 0 if zero else inputs)


def _inner(eqn: Any) -> Any:
    """The program that an equation calls with its own operands (pjit, remat, custom_jvp, …), if it does."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if isinstance(eqn.params.get(key), ClosedJaxpr | Jaxpr):
            return eqn.params[key]
    return None


def _plain(jaxpr: Any) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _call(jaxpr: Any, operands: Sequence[_Known]) -> list[_Known]:
    return _follow(_plain(jaxpr), operands)


def _settle(turn: Callable[[list[_Known]], list[_Known]], carry: list[_Known]) -> list[_Known]:
    """What is known of a loop's carry after any number of turns."""
    while True:
        after = [_either(0, pair) for pair in zip(carry, turn(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _while(eqn: Any, operands: list[_Known]) -> list[_Known]:
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body, carry = (
        operands[:of_test],
        operands[of_test : of_test + of_body],
        operands[of_test + of_body :],
    )
    carry = _settle(lambda carry: _call(eqn.params["body_jaxpr"], [*body, *carry]), carry)
    (ends,) = _call(eqn.params["cond_jaxpr"], [*test, *carry])
    return [_either(ends.inputs, [x]) for x in carry]


def _scan(eqn: Any, operands: list[_Known]) -> list[_Known]:
    inner = eqn.params["jaxpr"]

    def whole(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        """How many are the same outside and inside: what is scanned over has one axis more outside."""
        pairs = zip(outside, inside, strict=True)
        return sum(a.aval.ndim == b.aval.ndim for a, b in pairs)

    carried = whole(eqn.outvars, _plain(inner).outvars)
    consts = whole(eqn.invars, _plain(inner).invars) - carried
    fixed, rest = operands[:consts], operands[consts + carried :]

    def turn(carry: list[_Known]) -> list[_Known]:
        return _call(inner, [*fixed, *carry, *rest])

    carry = _settle(lambda carry: turn(carry)[:carried], operands[consts : consts + carried])
    return [*carry, *turn(carry)[carried:]]


def trained_parameters(
    optimizer: optax.GradientTransformation, params: PyTree, **extra_args: Any
) -> PyTree:
    """Which parameters `optimizer` moves: a pytree of bools like `params`, for `trained=`.

    False where the update is zero whatever the gradient is: `optax.set_to_zero` inside `optax.partition`,
    `optax.masked` or `optax.freeze`, however they are nested. This is read from the traced program of
    `optimizer.update`; nothing is computed. `adaptive_multi_steps` does the same by itself. Fused, give
    the result to `value_and_grad_noise(loss_fn, trained=…)` and, for `coordinate_norm_test`, to
    `optimizer.update(…, trained=…)`: the noise of parameters that are not trained must not decide the batch
    size of those that are.

    Args:
      optimizer: any Optax transformation; `noise=` and `value=` are given to it.
      params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
      **extra_args: what its `update` needs besides.

    Returns:
      Python bools in the structure of `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"backbone": jnp.ones(3), "head": jnp.ones(2)}
      >>> labels = {"backbone": "frozen", "head": "trained"}
      >>> parts = {"frozen": optax.set_to_zero(), "trained": optax.adam(1e-3)}
      >>> trained_parameters(optax.partition(parts, labels), params)
      {'backbone': False, 'head': True}

    Source: ours.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    state = jax.eval_shape(optimizer.init, shapes)

    def update(updates: PyTree, state: PyTree, params: PyTree, told: dict[str, Any]) -> Any:
        return optimizer.update(updates, state, params, trace_only=True, **told, **extra_args)

    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.int32)
    squares = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), shapes)
    told = {"noise": GradientNoise(shapes, zero, one, one, squares, zero), "value": zero}
    trained = moved_leaves(update, shapes, state, shapes, told).trained
    return jax.tree.unflatten(jax.tree.structure(params), trained)
