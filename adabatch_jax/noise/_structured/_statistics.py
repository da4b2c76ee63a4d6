"""Mean gradient, squared norms, squares and inner products of many gradients, from one backward pass.

All of them carry the weights of their examples: gᵢ stands for a weight times the gradient of example i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax._axes import to_varying
from adabatch_jax._tree import squared_norm, widen
from adabatch_jax._types import PyTree
from adabatch_jax.noise._structured._plan import Plan, Use, bind, evaluate, is_program, value_of
from adabatch_jax.noise._structured._rules import formula_of, gradient_of


class Signals(NamedTuple):
    """Of every tapped operation: its operands, and what comes back to its results, δ; all [n, …]."""

    seen: dict[int, list[Any]]
    deltas: dict[int, list[jax.Array]]

    def of(self, uses: Sequence[Use]) -> list[tuple[list[Any], list[jax.Array]]]:
        return [(self.seen[use.place], self.deltas[use.place]) for use in uses]

    @property
    def size(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.deltas))


def backward(
    plan: Plan,
    params: Sequence[jax.Array],
    examples: Sequence[jax.Array],
    weights: jax.Array,
    varying: frozenset[str],
) -> tuple[list[jax.Array], Signals]:
    """The results [n, …] of all examples, and the signals.

    A tap is a zero, added to the result of an operation; the derivative of the loss by it is the signal
    that comes back to that result. Under `vmap` examples cannot depend on each other.
    """

    def forward(taps: Any) -> tuple[jax.Array, Any]:
        one = lambda example, taps: evaluate(plan, params, example, taps)
        results, seen = jax.vmap(one)(list(examples), taps)
        return results[0], (results, seen)

    def tap(v: Any) -> jax.Array:
        return jnp.zeros((len(weights), *v.aval.shape), v.aval.dtype)

    taps = {place: [tap(v) for v in plan.results(place)] for place in plan.places}
    losses, pull, (results, seen) = jax.vjp(forward, to_varying(taps, varying), has_aux=True)
    return results, Signals(seen, pull(weights.astype(losses.dtype))[0])


def sums(
    plan: Plan, params: Sequence[jax.Array], signals: Signals, kind: str
) -> dict[int, jax.Array]:
    """Σ gᵢ of the parameters of one kind, as a plain step has it."""
    return {
        i: _total(
            _pull_back(plan, params, i, use, others, deltas, many=True)
            for use, (others, deltas) in zip(way.uses, signals.of(way.uses), strict=True)
        )
        for i, way in enumerate(plan.ways)
        if way.kind == kind
    }


def squares(
    plan: Plan, params: Sequence[jax.Array], signals: Signals, coordinate_wise: bool
) -> tuple[jax.Array, dict[int, Any], dict[int, jax.Array]]:
    """Σ ‖gᵢ‖² over all parameters together, Σ gᵢ² by parameter if asked for, Σ gᵢ of the direct ones."""
    norms = jnp.zeros((), jnp.float32)
    each: dict[int, Any] = {}
    formed: dict[int, jax.Array] = {}
    for i, way in enumerate(plan.ways):
        if way.kind == "formula":
            norm, square = _by_formula(plan, params, i, signals, coordinate_wise)
        elif way.kind == "direct":
            norm, square, formed[i] = _by_gradients(plan, params, i, signals, coordinate_wise)
        else:
            norm, square = jnp.zeros(()), jnp.zeros(params[i].shape, jnp.float32)
        norms += norm
        if coordinate_wise:
            each[i] = square
    return norms, each, formed


def along(
    plan: Plan, params: Sequence[jax.Array], signals: Signals, direction: Sequence[jax.Array]
) -> jax.Array:
    """⟨gᵢ, v⟩, float32 [n] (or 0): ⟨δᵢ, d⟩ of every use, d the change of its results along v."""
    found: list[jax.Array] = []
    for use in dict.fromkeys(use for way in plan.ways for use in way.uses):

        def one(given: Any, use: Use = use) -> jax.Array:
            others, deltas = given
            own = sorted(use.params)
            points, v = ([x[i] for i in own] for x in (params, direction))
            run = lambda ps: _results(plan, _with(params, own, ps), use, others)
            if is_program(plan.jaxpr.eqns[use.place]):  # it may have no forward mode
                return _inner(jax.vjp(run, points)[1](deltas)[0], v)
            return _inner(deltas, jax.jvp(run, (points,), (v,))[1])

        (given,) = signals.of([use])
        found.append(jax.vmap(one)(given))
    return _total(found) if found else jnp.zeros((), jnp.float32)


def _by_formula(
    plan: Plan, params: Sequence[jax.Array], i: int, signals: Signals, coordinate_wise: bool
) -> tuple[jax.Array, jax.Array | None]:
    (use,) = plan.ways[i].uses
    ((others, (delta,)),) = signals.of([use])
    eqn, k = plan.jaxpr.eqns[use.place], use.operand
    formula = formula_of(eqn, k)
    assert formula and k is not None

    def norm(given: Any) -> jax.Array:
        others, delta = given
        return formula.squared_norm(eqn, k, [x for x in others if x is not None], delta)

    if not coordinate_wise:
        return _summed(norm, (others, delta), _at_once(signals, formula.room)), None
    wide = formula.wide
    if not wide:
        return _by_gradients(plan, params, i, signals, coordinate_wise)[:2]
    others, delta = jax.tree.map(lambda x: jnp.square(widen(x)), (others, delta))

    def run(p: jax.Array) -> jax.Array:
        operand = value_of(plan, eqn.invars[k])(_with(params, [i], [p]))
        one = lambda *xs: wide(eqn, *(operand if x is None else x for x in xs))
        return jax.vmap(one)(*others)

    square = jax.vjp(run, widen(params[i]))[1](delta)[0]
    return jnp.sum(square), square


def _by_gradients(
    plan: Plan, params: Sequence[jax.Array], i: int, signals: Signals, coordinate_wise: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    uses = plan.ways[i].uses

    def one(given: Any) -> Any:
        g = _total(
            widen(_pull_back(plan, params, i, use, others, deltas))
            for use, (others, deltas) in zip(uses, given, strict=True)
        )
        return squared_norm(g), jnp.square(g) if coordinate_wise else None, g

    ways = [gradient_of(plan.jaxpr.eqns[use.place], use.operand) for use in uses]
    room = params[i].size + sum(way.room for way in ways if way)
    return _summed(one, signals.of(uses), _at_once(signals, room))


def _total(parts: Iterable[Any]) -> Any:
    first, *rest = parts
    return sum(rest, start=first)


def _inner(a: PyTree, b: PyTree) -> jax.Array:
    """Re Σ a·b: of complex numbers without a conjugate, since a signal of JAX has it already."""
    parts = jax.tree.map(lambda x, y: jnp.real(jnp.vdot(jnp.conj(widen(x)), widen(y))), a, b)
    return _total(jax.tree.leaves(parts)).astype(jnp.float32)


def _at_once(signals: Signals, room: int) -> int:
    """So many examples that they take a quarter of the memory of all signals: at least one."""
    return max(1, signals.size // max(4 * room, 1))


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


def _results(plan: Plan, params: Sequence[Any], use: Use, others: Sequence[Any]) -> list[jax.Array]:
    """What an operation gives for these parameters, the operands that depend on the example as seen."""
    eqn = plan.jaxpr.eqns[use.place]
    operands = [
        value_of(plan, v)(params) if other is None else other
        for v, other in zip(eqn.invars, others, strict=True)
    ]
    found = dict(zip(eqn.outvars, bind(eqn, operands), strict=True))
    return [found[v] for v in plan.results(use.place)]


def _pull_back(
    plan: Plan,
    params: Sequence[jax.Array],
    i: int,
    use: Use,
    others: list[Any],
    deltas: list[jax.Array],
    many: bool = False,
) -> jax.Array:
    """By parameter i, of one example, or the sum over many."""
    eqn = plan.jaxpr.eqns[use.place]
    k, gradient = use.operand, gradient_of(eqn, use.operand)
    if gradient and k is not None and not many:
        run = lambda p: value_of(plan, eqn.invars[k])(_with(params, [i], [p]))
        known = [x for x in others if x is not None]
        return jax.vjp(run, params[i])[1](gradient.function(eqn, known, *deltas))[0]

    def results(p: jax.Array) -> list[jax.Array]:
        one = lambda others: _results(plan, _with(params, [i], [p]), use, others)
        return jax.vmap(one)(others) if many else one(others)

    return jax.vjp(results, params[i])[1](deltas)[0]
