"""An optimizer whose hyperparameters follow the examples: for `by_examples` and `grow_batch_size`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from adabatch_jax._clock import advance, as_float, zero_clock
from adabatch_jax._tree import cast_like, of_structure
from adabatch_jax._types import ArrayLike, PyTree, ScalingRule, Schedule
from adabatch_jax.learning_rate._examples import batch_sizes, examples_behind

RATE = "learning_rate"


class ExampleScheduleState(NamedTuple):
    """What one schedule carries: the examples before the next step, uint32 [2]."""

    hyperparameter_clock: jax.Array

    def after_dropped_step(
        self, after: ExampleScheduleState, used_up: bool
    ) -> ExampleScheduleState:
        """This state, or the one after a dropped step whose examples are used up."""
        return after if used_up else self


@dataclass(frozen=True)
class _ExampleSchedule:
    """One hyperparameter as `optax.inject_hyperparams` asks for it: a schedule with a state of its own."""

    where: str
    schedule: Schedule
    base: ArrayLike
    scaling: ScalingRule | None = None  # of the learning rate alone
    dtype: Any = None  # of the value; None: as the schedule gives it

    def init(self) -> ExampleScheduleState:
        return ExampleScheduleState(zero_clock())

    def update(self, state: ExampleScheduleState, **extra_args: Any) -> ExampleScheduleState:
        what = f"{self.where} counts examples"
        noise, number = (extra_args.get(name) for name in ("noise", "num_examples"))
        examples = examples_behind(what, noise, "num_examples", number)
        return ExampleScheduleState(advance(state.hyperparameter_clock, examples))

    def __call__(self, state: ExampleScheduleState, **extra_args: Any) -> jax.Array:
        if not isinstance(state, ExampleScheduleState):  # a count of steps
            raise ValueError(
                f"{self.where}: the factory hands one hyperparameter to optax.inject_hyperparams and to "
                "something outside of it: leave optax.inject_hyperparams out of the factory"
            )
        value = jnp.asarray(self.schedule(as_float(state.hyperparameter_clock) / self.base))
        told = {name: extra_args.get(name) for name in ("noise", "num_examples")}
        # `init` asks for the first value before there was a batch.
        if self.scaling is not None and any(x is not None for x in told.values()):
            size, base = batch_sizes(self.where, self.base, **told)
            value = value.astype(jnp.float32) * self.scaling(size, base)
        return value if self.dtype is None else value.astype(self.dtype)


class Hyperparameters:
    """What a factory is called with: what changes with the examples, and the rest.

    Raises:
      ValueError: a `learning_rate` that is callable and no schedule.
    """

    def __init__(
        self,
        where: str,
        factory: Callable[..., optax.GradientTransformation],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.where, self.factory = where, factory
        names = inspect.signature(factory).parameters
        # By name, so that a learning rate is known as such wherever it stands.
        given = dict(zip(names, args, strict=False)) | kwargs
        self.more_args = args[len(names) :]
        if RATE in names and names[RATE].default is not inspect.Parameter.empty:
            given.setdefault(RATE, names[RATE].default)
        self.learning_rate = given.get(RATE)
        self.schedules, self.stateful = {}, {}
        for name, value in given.items():
            if isinstance(value, optax.schedules.StatefulSchedule):
                self.stateful[name] = value
                continue
            schedule = as_schedule(value) if callable(value) else None
            if schedule is not None:
                self.schedules[name] = schedule
            elif name == RATE and callable(value):
                raise ValueError(
                    f"{where}: learning_rate={value!r} is no schedule: called with a number of steps it "
                    "must give one floating-point number"
                )
        moving = {**self.schedules, **self.stateful}
        self.rest = {name: x for name, x in given.items() if name not in moving}

    def check_learning_rate(self) -> None:
        """Raises ValueError where there is no learning rate that could follow the batch."""
        if self.learning_rate is None:
            name = getattr(self.factory, "__name__", repr(self.factory))
            raise ValueError(
                f"{self.where}: {name} was given no learning_rate=, and the rate is to follow the batch: "
                "give it by that name (lambda learning_rate: optax.chain(…))"
            )

    def optimizer(self, **scheduled: Any) -> optax.GradientTransformation:
        """The optimizer at these values of what is scheduled."""
        return self.factory(*self.more_args, **{**self.rest, **scheduled})

    def optimizer_at_first(self, learning_rate: float) -> optax.GradientTransformation:
        """The optimizer at this rate, and at what everything else begins with: to try it, while tracing."""
        with jax.ensure_compile_time_eval():
            first = {name: x(jnp.float32(0.0)) for name, x in self.schedules.items()}
            first |= {name: x(x.init()) for name, x in self.stateful.items()}
        return self.optimizer(**{**first, RATE: learning_rate})


def as_schedule(function: Callable[..., Any]) -> Schedule | None:
    """The function of a number of steps, float32 → number; None if `function` is nothing of the kind."""
    for dtype in (jnp.float32, jnp.int32):
        try:
            answer = jax.eval_shape(function, jax.ShapeDtypeStruct((), dtype))
        except Exception:  # a mask, a label function: anything may happen in there
            continue
        shape, kind = getattr(answer, "shape", None), getattr(answer, "dtype", jnp.bool_)
        if shape == () and jnp.issubdtype(kind, jnp.floating):
            return function if dtype == jnp.float32 else lambda n: function(n.astype(jnp.int32))
    return None


def scheduled_by_examples(
    hyperparameters: Hyperparameters,
    base_batch_size: ArrayLike,
    scaling_for: Callable[[PyTree], ScalingRule | None],
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of these hyperparameters; its rate follows the batch by `scaling_for(params)`.

    `scaling_for` is asked while tracing, and must depend on structure, shapes and dtypes alone.
    """
    rate = hyperparameters.learning_rate

    @of_structure  # what is traced in there is traced once, and not by `init` and every `update`
    def built(like: PyTree) -> optax.GradientTransformationExtraArgs:
        schedules, scaling = dict(hyperparameters.schedules), scaling_for(like)
        if scaling is not None:
            schedules.setdefault(RATE, lambda _: rate)
        stateful = dict(hyperparameters.stateful)
        for name, schedule in schedules.items():
            stateful[name] = _ExampleSchedule(hyperparameters.where, schedule, base_batch_size)
        if RATE in schedules:
            # An array of a wider dtype than the parameters would widen the update. A decay near 1, on the
            # other hand, would not survive a narrow one.
            dtypes = [x.dtype for x in jax.tree.leaves(like)]
            dtype = jnp.finfo(jnp.result_type(*(dtypes or [jnp.float32]))).dtype
            stateful[RATE] = replace(stateful[RATE], scaling=scaling, dtype=dtype)

        injected = _injected(hyperparameters, tuple(stateful), like)
        whole = {name: stateful.pop(name) for name in injected}

        def factory(**numbers: Any) -> optax.GradientTransformation:
            return hyperparameters.optimizer(**whole, **numbers)

        # `inject_hyperparams` reads the signature to tell one argument from another.
        kind = inspect.Parameter.KEYWORD_ONLY
        names = [inspect.Parameter(name, kind) for name in stateful]
        factory.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
        if not stateful:
            return optax.with_extra_args_support(factory())
        return optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)(**stateful)

    def init(params: PyTree) -> Any:
        return built(params).init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        made, state = built(updates).update(updates, state, params, **extra_args)
        return cast_like(made, updates), state  # a rate is as wide as the widest parameter

    return optax.GradientTransformationExtraArgs(init, update)


def _injected(hyperparameters: Hyperparameters, names: tuple[str, ...], like: PyTree) -> set[str]:
    """Those of these names that the factory itself hands to `optax.inject_hyperparams`.

    That keeps a number which `init` was given in its state, and looks at no other; what it has to be given
    is the schedule. So a name is found by what `init` makes of its number.
    """

    def init(numbers: list[jax.Array], params: PyTree) -> PyTree:
        return hyperparameters.optimizer(**dict(zip(names, numbers, strict=True))).init(params)

    numbers = [jax.ShapeDtypeStruct((), jnp.float32)] * len(names)
    closed, state = jax.make_jaxpr(init, return_shape=True)(numbers, like)
    origins = dict(zip(closed.jaxpr.invars, ({name} for name in names), strict=False))

    def behind(*values: Any) -> set[str]:
        known = [origins.get(x, set()) for x in values if not isinstance(x, Literal)]
        return set().union(*known)

    for equation in closed.jaxpr.eqns:
        origins.update(dict.fromkeys(equation.outvars, behind(*equation.invars)))
    outputs = jax.tree.unflatten(jax.tree.structure(state), closed.jaxpr.outvars)
    kinds = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
    nodes = jax.tree.leaves(outputs, is_leaf=lambda x: isinstance(x, kinds))
    return behind(*jax.tree.leaves([x.hyperparams for x in nodes if isinstance(x, kinds)]))
