"""Where parameters enter a loss: the jaxpr of one example, read once, and the way of each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from adabatch_jax.noise.structured._rules import LINEAR, formula_of, rearranges

PyTree = Any
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}


class Use(NamedTuple):
    """One operation on an example that has an operand made of parameters alone.

    The operation is linear in the operand, or the operand is small enough for a copy per example: then
    `copied`, and the tap is on the operand instead of the result.
    """

    place: int  # of the operation in the flat jaxpr
    operand: int
    params: frozenset[int]  # behind the operand
    isometric: bool  # the operand is the parameter, its entries in another order
    copied: bool

    @property
    def tap(self) -> tuple[int, int | None]:
        return self.place, self.operand if self.copied else None


class Way(NamedTuple):
    """How the per-example statistics of one parameter come about."""

    kind: str  # "formula", "direct", "apart" or "unused"
    uses: tuple[Use, ...]
    reason: str


class Plan(NamedTuple):
    """A flat jaxpr of the loss of one example, and the way of each parameter."""

    jaxpr: Jaxpr
    consts: Sequence[Any]
    num_params: int
    ways: tuple[Way, ...]
    example: frozenset[Any]  # the variables that depend on the example
    taps: dict[
        tuple[int, int | None], jax.ShapeDtypeStruct
    ]  # (place, operand or None for the result)

    @property
    def apart(self) -> list[int]:
        return [i for i, way in enumerate(self.ways) if way.kind == "apart"]


def make_plan(fn: Callable[..., Any], params: Sequence[Any], example: Sequence[Any]) -> Plan:
    """Of `fn(params, example) -> list of arrays`, the loss first."""
    flat = flattened(fn, params, example)
    jaxpr, number = flat.jaxpr, len(params)
    invars = jaxpr.invars
    behind: dict[Any, frozenset[int]] = {v: frozenset([i]) for i, v in enumerate(invars[:number])}
    isometric, from_example = set(invars[:number]), set(invars[number:])
    uses: list[list[Use]] = [[] for _ in params]
    apart: dict[int, str] = {}

    for place, eqn in enumerate(jaxpr.eqns):
        operands = [v for v in eqn.invars if not isinstance(v, Literal)]
        made_of = frozenset().union(*(behind.get(v, frozenset()) for v in operands))
        if not any(v in from_example for v in operands):
            if made_of:  # no derivative goes through integers
                behind.update({v: made_of for v in eqn.outvars if _is_float(v)})
                if len(operands) == 1 and operands[0] in isometric and rearranges(eqn):
                    isometric.update(eqn.outvars)
            continue
        from_example.update(eqn.outvars)
        if not any(map(_is_float, eqn.outvars)):
            continue
        for k, v in enumerate(eqn.invars):
            if isinstance(v, Literal) or v not in behind:
                continue
            name = eqn.primitive.name
            linear = k in LINEAR.get(name, ()) and eqn.invars.count(v) == 1
            room = sum(math.prod(out.aval.shape) for out in eqn.outvars)
            copied = not linear
            if copied and math.prod(v.aval.shape) > room:
                apart.update(dict.fromkeys(behind[v], f"{name} has no rule"))
                continue
            use = Use(place, k, behind[v], v in isometric, copied)
            for i in behind[v]:
                uses[i].append(use)
    for out in jaxpr.outvars[:1]:
        if not isinstance(out, Literal) and out not in from_example:
            apart.update(
                dict.fromkeys(behind.get(out, ()), "the loss is the same for all examples")
            )

    ways = tuple(_way(i, uses[i], apart, jaxpr) for i in range(number))
    taps = {}
    for way in ways:
        for use in way.uses:
            eqn = jaxpr.eqns[use.place]
            v = eqn.invars[use.operand] if use.copied else eqn.outvars[0]
            taps[use.tap] = jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
    return Plan(jaxpr, flat.consts, number, ways, frozenset(from_example), taps)


def _way(i: int, uses: list[Use], apart: dict[int, str], jaxpr: Jaxpr) -> Way:
    if i in apart:
        return Way("apart", (), apart[i])
    if not uses:
        return Way("unused", (), "the loss does not depend on it")
    names = [jaxpr.eqns[use.place].primitive.name for use in uses]
    if len(uses) > 1:
        return Way("direct", tuple(uses), f"{len(uses)} uses: {', '.join(names)}")
    (use,), (name,) = uses, names
    if use.copied:
        return Way("direct", (use,), f"{name} has no rule; small enough for copies")
    if not use.isometric:
        return Way("direct", (use,), f"changed before {name}")
    eqn = jaxpr.eqns[use.place]
    if formula := formula_of(eqn, use.operand):
        return Way("formula", (use,), f"{name}, {formula.name}")
    return Way("direct", (use,), name)


def _is_float(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


def flattened(fn: Callable[..., Any], *args: Any) -> ClosedJaxpr:
    """The jaxpr of `fn`, with the calls of compiled and rematerialised functions written out."""
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
    plan: Plan, params: Sequence[Any], example: Sequence[Any], taps: dict[Any, Any]
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
        operands = [x + taps[place, k] if (place, k) in taps else x for k, x in enumerate(operands)]
        results = bind(eqn, operands)
        if (place, None) in taps:
            varies = [not isinstance(v, Literal) and v in plan.example for v in eqn.invars]
            seen[place] = [x if yes else None for x, yes in zip(operands, varies, strict=True)]
            results = [results[0] + taps[place, None]]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(env, v) for v in jaxpr.outvars], seen


def operand_of(plan: Plan, variable: Any) -> Callable[[Sequence[Any]], Any]:
    """The function of the parameters that a variable is which does not depend on the example."""
    if isinstance(variable, Literal):
        return lambda params: variable.val
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
