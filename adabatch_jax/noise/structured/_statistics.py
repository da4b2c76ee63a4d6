"""Mean gradient, squared norms, squares and inner products of many gradients, from one backward pass.

All of them carry the weights of their examples: gᵢ stands for a weight times the gradient of example i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax._axes import to_varying
from adabatch_jax._tree import squared_norm, widen
from adabatch_jax.noise.structured._plan import Plan, Use, bind, evaluate, operand_of
from adabatch_jax.noise.structured._rules import formula_of, gradient_of

PyTree = Any


class Signals(NamedTuple):
    """Of every tap: the operands of its operation, and what comes back to it, δ; [n, …]."""

    seen: dict[int, list[Any]]
    deltas: dict[tuple[int, int | None], jax.Array]

    def of(self, uses: Sequence[Use]) -> list[tuple[list[Any], jax.Array]]:
        return [(self.seen.get(use.place, []), self.deltas[use.tap]) for use in uses]


def backward(
    plan: Plan,
    params: Sequence[jax.Array],
    examples: Sequence[jax.Array],
    weights: jax.Array,
    varying: frozenset[str],
) -> tuple[list[jax.Array], Signals, dict[int, jax.Array]]:
    """The results [n, …] of all examples, the signals, and Σ gᵢ of the parameters that are apart.

    A tap is a zero, added to the result of an operation; the derivative of the loss by it is the signal
    that comes back to that result. Under `vmap` examples cannot depend on each other.
    """

    def forward(taps: Any, own: list[jax.Array]) -> tuple[jax.Array, Any]:
        given = _with(params, plan.apart, own)
        one = lambda example, taps: evaluate(plan, given, example, taps)  # noqa: E731
        results, seen = jax.vmap(one)(list(examples), taps)
        return results[0], (results, seen)

    taps = {key: jnp.zeros((len(weights), *s.shape), s.dtype) for key, s in plan.taps.items()}
    own = [params[i] for i in plan.apart]
    losses, pull, (results, seen) = jax.vjp(forward, to_varying(taps, varying), own, has_aux=True)
    deltas, sums = pull(weights.astype(losses.dtype))
    return results, Signals(seen, deltas), dict(zip(plan.apart, sums, strict=True))


def sums(
    plan: Plan, params: Sequence[jax.Array], signals: Signals, kind: str
) -> dict[int, jax.Array]:
    """Σ gᵢ of the parameters of one kind, as a plain step has it."""
    return {
        i: _total(
            _pull_back(plan, params, i, use, others, delta, many=True)
            for use, (others, delta) in zip(way.uses, signals.of(way.uses), strict=True)
        )
        for i, way in enumerate(plan.ways)
        if way.kind == kind
    }


def squares(
    plan: Plan,
    params: Sequence[jax.Array],
    examples: Sequence[jax.Array],
    weights: jax.Array,
    signals: Signals,
    coordinate_wise: bool,
) -> tuple[jax.Array, dict[int, Any], dict[int, jax.Array]]:
    """Σ ‖gᵢ‖² over all parameters together, Σ gᵢ² by parameter if asked for, Σ gᵢ of the direct ones."""
    norms = jnp.zeros((), jnp.float32)
    each: dict[int, Any] = {}
    sums: dict[int, jax.Array] = {}
    for i, way in enumerate(plan.ways):
        if way.kind == "formula":
            norm, square = _by_formula(plan, params, i, signals, coordinate_wise)
        elif way.kind == "direct":
            norm, square, sums[i] = _by_gradients(plan, params, i, signals, coordinate_wise)
        else:
            norm, square = jnp.zeros(()), jnp.zeros(params[i].shape, jnp.float32)
        norms += norm
        if coordinate_wise:
            each[i] = square
    if plan.apart:
        norm, found = _apart(plan, params, examples, weights, coordinate_wise)
        norms, each = norms + norm, each | found
    return norms, each, sums


def along(
    plan: Plan,
    params: Sequence[jax.Array],
    examples: Sequence[jax.Array],
    signals: Signals,
    weights: jax.Array,
    direction: Sequence[jax.Array],
) -> jax.Array:
    """⟨gᵢ, v⟩, float32 [n]: of a use that is ⟨δᵢ, d⟩, d the change of its result along v."""
    total = jnp.zeros(len(weights), jnp.float32)
    for use in dict.fromkeys(use for way in plan.ways for use in way.uses):
        ((others, delta),) = signals.of([use])

        def one(others: Any, delta: jax.Array, use: Use = use) -> jax.Array:
            moved = [
                d if i in use.params and i not in plan.apart else jnp.zeros_like(d)
                for i, d in enumerate(direction)
            ]
            run = lambda ps: _result(plan, ps, use, others)  # noqa: E731
            change = jax.jvp(run, (list(params),), (moved,))[1]
            return jnp.vdot(widen(delta), widen(change)).astype(jnp.float32)

        total += jax.vmap(one)(others, delta)
    if plan.apart:
        own, v = ([x[i] for i in plan.apart] for x in (params, direction))

        def slope(example: Any) -> jax.Array:
            loss = lambda own: _loss(plan, params, own, example)  # noqa: E731
            return jax.jvp(loss, (own,), (v,))[1].astype(jnp.float32)

        total += weights * jax.vmap(slope)(list(examples))
    return total


def _by_formula(
    plan: Plan, params: Sequence[jax.Array], i: int, signals: Signals, coordinate_wise: bool
) -> tuple[jax.Array, jax.Array | None]:
    (use,) = plan.ways[i].uses
    ((others, delta),) = given = signals.of([use])
    eqn = plan.jaxpr.eqns[use.place]
    formula = formula_of(eqn, use.operand)
    assert formula

    def norm(given: Any) -> jax.Array:
        ((others, delta),) = given
        known = [x for x in others if x is not None]
        return formula.squared_norm(eqn, use.operand, known, delta)

    if not coordinate_wise:
        return _summed(norm, given, _at_once(delta.size, formula.room)), None
    wide = formula.wide
    if not wide:
        return _by_gradients(plan, params, i, signals, coordinate_wise)[:2]
    others, delta = jax.tree.map(lambda x: jnp.square(widen(x)), (others, delta))

    def run(p: jax.Array) -> jax.Array:
        operand = operand_of(plan, eqn.invars[use.operand])(_with(params, [i], [p]))
        one = lambda *xs: wide(eqn, *(operand if x is None else x for x in xs))  # noqa: E731
        return jax.vmap(one)(*others)

    square = jax.vjp(run, widen(params[i]))[1](delta)[0]
    return jnp.sum(square), square


def _by_gradients(
    plan: Plan, params: Sequence[jax.Array], i: int, signals: Signals, coordinate_wise: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    uses = plan.ways[i].uses
    given = signals.of(uses)

    def one(given: Any) -> Any:
        g = _total(
            widen(_pull_back(plan, params, i, use, others, delta))
            for use, (others, delta) in zip(uses, given, strict=True)
        )
        return squared_norm(g), jnp.square(g) if coordinate_wise else None, g

    signal = sum(delta.size for _, delta in given)
    return _summed(one, given, _at_once(signal, params[i].size))


def _apart(
    plan: Plan,
    params: Sequence[jax.Array],
    examples: Sequence[jax.Array],
    weights: jax.Array,
    coordinate_wise: bool,
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """From the gradients themselves, a few examples at once."""
    own = [params[i] for i in plan.apart]

    def one(given: Any) -> tuple[jax.Array, dict[int, jax.Array]]:
        example, weight = given
        found = jax.grad(lambda own: _loss(plan, params, own, example))(own)
        g = [widen(x) * weight for x in found]
        squares = dict(zip(plan.apart, map(jnp.square, g), strict=True))
        return squared_norm(g), squares if coordinate_wise else {}

    signal = len(weights) * sum(math.prod(s.shape) for s in plan.taps.values())
    at_once = _at_once(signal, sum(p.size for p in own))
    return _summed(one, (list(examples), weights), at_once)


def _total(parts: Iterable[Any]) -> Any:
    first, *rest = parts
    return sum(rest, start=first)


def _at_once(signal: int, room: int) -> int:
    """So many examples that they take no more memory than the signals: at least one."""
    return max(1, signal // max(room, 1))


def _summed(fn: Callable[[Any], PyTree], xs: PyTree, at_once: int) -> PyTree:
    """Σ_i fn(x_i) over the leading axis, so many at once."""

    def total(xs: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.vmap(fn)(xs))

    n = len(jax.tree.leaves(xs)[0])
    if at_once >= n:
        return total(xs)
    rest = n % at_once or at_once
    shape = (n - rest) // at_once, at_once
    blocks = jax.tree.map(lambda a: a[rest:].reshape(*shape, *a.shape[1:]), xs)

    def step(so_far: PyTree, block: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, so_far, total(block)), None

    return jax.lax.scan(step, total(jax.tree.map(lambda a: a[:rest], xs)), blocks)[0]


def _with(params: Sequence[Any], places: Sequence[int], own: Sequence[Any]) -> list[Any]:
    given = list(params)
    for i, p in zip(places, own, strict=True):
        given[i] = p
    return given


def _loss(plan: Plan, params: Sequence[Any], own: Sequence[Any], example: Any) -> jax.Array:
    return evaluate(plan, _with(params, plan.apart, own), example, {})[0][0]


def _result(plan: Plan, params: Sequence[Any], use: Use, others: Sequence[Any]) -> jax.Array:
    """What the parameters give to one example by one use, its other operands as they were."""
    eqn = plan.jaxpr.eqns[use.place]
    if use.copied:
        return operand_of(plan, eqn.invars[use.operand])(params)
    operands = [
        operand_of(plan, v)(params) if other is None else other
        for v, other in zip(eqn.invars, others, strict=True)
    ]
    return bind(eqn, operands)[0]


def _pull_back(
    plan: Plan,
    params: Sequence[jax.Array],
    i: int,
    use: Use,
    others: Any,
    delta: jax.Array,
    many: bool = False,
) -> jax.Array:
    """By parameter i, of one example, or the sum over many."""
    eqn = plan.jaxpr.eqns[use.place]
    gradient = None if many or use.copied else gradient_of(eqn, use.operand)

    def run(p: jax.Array) -> jax.Array:
        given = _with(params, [i], [p])
        if gradient:
            return operand_of(plan, eqn.invars[use.operand])(given)
        one = lambda others: _result(plan, given, use, others)  # noqa: E731
        return jax.vmap(one, axis_size=len(delta))(others) if many else one(others)

    if gradient:
        delta = gradient(eqn, [x for x in others if x is not None], delta)
    return jax.vjp(run, params[i])[1](delta)[0]
