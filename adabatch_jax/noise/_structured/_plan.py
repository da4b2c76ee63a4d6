"""Where parameters enter a loss: the jaxpr of one example, read once, and the way of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from adabatch_jax.noise._structured._rules import formula_of, rearranges

CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}


class Use(NamedTuple):
    """One operation on an example that has operands made of parameters alone."""

    place: int  # of the operation in the flat jaxpr
    params: frozenset[int]  # behind those operands
    operand: int | None  # which, where it is only one
    isometric: bool  # and that is a parameter as it is, its entries perhaps in another order


class Way(NamedTuple):
    """How the per-example statistics of one parameter come about."""

    kind: str  # "formula", "direct" or "unused"
    uses: tuple[Use, ...]
    reason: str


class Plan(NamedTuple):
    """A flat jaxpr of the loss of one example, and the way of each parameter."""

    jaxpr: Jaxpr
    consts: Sequence[Any]
    ways: tuple[Way, ...]
    example: frozenset[Any]  # the variables that depend on the example

    def results(self, place: int) -> list[Any]:
        """The variables of an operation through which derivatives come back."""
        return [v for v in self.jaxpr.eqns[place].outvars if _is_inexact(v)]

    @property
    def places(self) -> list[int]:
        return sorted({use.place for way in self.ways for use in way.uses})


def make_plan(fn: Callable[..., Any], params: Sequence[Any], example: Sequence[Any]) -> Plan:
    """Of `fn(params, example) -> list of arrays`, the loss first."""
    flat = flattened(fn, params, example)
    jaxpr, number = flat.jaxpr, len(params)
    invars = jaxpr.invars
    behind: dict[Any, frozenset[int]] = {v: frozenset([i]) for i, v in enumerate(invars[:number])}
    isometric, from_example = set(invars[:number]), set(invars[number:])
    uses: list[list[Use]] = [[] for _ in params]

    # Variables are of three sorts: made of parameters alone (`behind` tells of which), made of constants
    # alone, and dependent on the example. Only through the last do gradients of examples differ. So what
    # happens to a parameter before it meets the example is left alone, and the operation where the two
    # meet is a `Use`: its signal δ and its other operands say all about the example's gradient.
    for place, eqn in enumerate(jaxpr.eqns):
        operands = [v for v in eqn.invars if not isinstance(v, Literal)]
        made_of = frozenset().union(*(behind.get(v, frozenset()) for v in operands))
        if not any(v in from_example for v in operands):
            if made_of:  # no derivative goes through integers
                behind.update({v: made_of for v in eqn.outvars if _is_inexact(v)})
                if len(operands) == 1 and operands[0] in isometric and rearranges(eqn):
                    isometric.update(eqn.outvars)
            continue
        from_example.update(eqn.outvars)
        if made_of and any(map(_is_inexact, eqn.outvars)):
            # A formula needs the parameter to be one operand, as it is. With two operands made of
            # parameters, or one that was changed before, the gradient has to be formed.
            own = [
                k for k, v in enumerate(eqn.invars) if not isinstance(v, Literal) and v in behind
            ]
            operand = own[0] if len(own) == 1 else None
            as_it_is = operand is not None and eqn.invars[operand] in isometric
            for i in made_of:
                uses[i].append(Use(place, made_of, operand, as_it_is))
    loss = jaxpr.outvars[0]
    if isinstance(loss, Literal) or loss not in from_example:
        raise ValueError("value_and_grad_structured: the loss does not depend on the example")
    ways = tuple(_way(uses[i], jaxpr) for i in range(number))
    return Plan(jaxpr, flat.consts, ways, frozenset(from_example))


def _way(uses: list[Use], jaxpr: Jaxpr) -> Way:
    if not uses:
        return Way("unused", (), "the loss does not depend on it")
    names = [jaxpr.eqns[use.place].primitive.name for use in uses]
    if len(uses) > 1:
        return Way("direct", tuple(uses), f"{len(uses)} uses: {', '.join(names)}")
    (use,), (name,) = uses, names
    eqn = jaxpr.eqns[use.place]
    if is_program(eqn):
        return Way("direct", (use,), f"{name}, again for every example")
    if not use.isometric:
        return Way("direct", (use,), f"changed before {name}")
    if formula := formula_of(eqn, use.operand):
        return Way("formula", (use,), f"{name}, {formula.name}")
    return Way("direct", (use,), name)


def is_program(eqn: Any) -> bool:
    """Whether an operation has a program inside: a loop, a branch, a derivative of its own."""
    return any(
        isinstance(x, (Jaxpr, ClosedJaxpr)) for x in jax.tree.leaves(list(eqn.params.values()))
    )


def _is_inexact(v: Any) -> bool:
    """Whether derivatives go through a variable: a float, or a complex number on the way."""
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def flattened(fn: Callable[..., Any], *args: Any) -> ClosedJaxpr:
    """The jaxpr of `fn`, with the calls of compiled and rematerialised functions written out."""
    # Traced again, since inlining runs the inner jaxprs on tracers: the result has no calls left.
    closed = jax.make_jaxpr(fn)(*args)
    return jax.make_jaxpr(lambda *flat: _inlined(closed.jaxpr, closed.consts, flat))(
        *jax.tree.leaves(args)
    )


def _inlined(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        operands = [read(env, v) for v in eqn.invars]
        if eqn.primitive.name in CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            body, inner_consts = (
                (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            )
            results = _inlined(body, inner_consts, operands)
        else:
            results = bind(eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(env, v) for v in jaxpr.outvars]


def read(env: dict[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, Literal) else env[v]


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of one operation."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def evaluate(
    plan: Plan, params: Sequence[Any], example: Sequence[Any], taps: dict[int, list[Any]]
) -> tuple[list[Any], dict[int, list[Any]]]:
    """The results for one example, with the taps added; and the operands of the tapped operations.

    Of those only what depends on the example; None stands for the others.
    """
    jaxpr = plan.jaxpr
    env = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*plan.consts, *params, *example], strict=True)
    )
    seen = {}
    for place, eqn in enumerate(jaxpr.eqns):
        operands = [read(env, v) for v in eqn.invars]
        env.update(zip(eqn.outvars, bind(eqn, operands), strict=True))
        if place in taps:  # what `backward` needs of it, before the tap stands in for its results
            varies = [not isinstance(v, Literal) and v in plan.example for v in eqn.invars]
            seen[place] = [x if yes else None for x, yes in zip(operands, varies, strict=True)]
            for v, tap in zip(plan.results(place), taps[place], strict=True):
                env[v] += tap
    return [read(env, v) for v in jaxpr.outvars], seen


def value_of(plan: Plan, variable: Any) -> Callable[[Sequence[Any]], Any]:
    """The function of the parameters that a variable is which does not depend on the example."""
    if isinstance(variable, Literal):
        return lambda params: variable.val
    # The operations that it takes, found backwards from the variable; they run forwards again.
    needed, steps = {variable}, []
    for eqn in reversed(plan.jaxpr.eqns):
        if needed & set(eqn.outvars):
            steps.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}

    def function(params: Sequence[Any]) -> Any:
        env = dict(zip(plan.jaxpr.constvars, plan.consts, strict=True))
        env.update(zip(plan.jaxpr.invars, params, strict=False))
        for eqn in reversed(steps):
            results = bind(eqn, [read(env, v) for v in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        return env[variable]

    return function
