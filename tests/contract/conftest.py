"""The table: every public transformation, how to make it, and what one step of it is given."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax.learning_rate import Peak, quasisep_smoother, rbf_smoother

PyTree = Any
SIZES = {"initial_batch_size": 16, "max_batch_size": 4096}


def no_arguments(gradient: PyTree, step: int) -> dict[str, Any]:
    return {}


def noise_of(gradient: PyTree, step: int) -> dict[str, Any]:
    """A noise whose every number changes from step to step, and makes batch sizes move."""
    scatter = jax.tree.map(
        lambda g: (step + 1) * 50.0 * jnp.square(jnp.abs(g).astype(jnp.float32)), gradient
    )
    noise = adabatch.GradientNoise(
        mean=gradient,
        scatter=jnp.float32(400.0 * (step + 1)),
        num_examples=jnp.int32(16 * (step + 1)),
        num_groups=jnp.int32(8 + step),
        coordinate_scatter=scatter,
    )
    hold = jnp.bool_(step == 2)
    return {"noise": noise, "value": jnp.float32(1 / (step + 1)), "hold_batch_size": hold}


def value_of(gradient: PyTree, step: int) -> dict[str, Any]:
    return {"value": jnp.float32(1.0 / (step + 1))}


def bowl(scale: jax.Array, params: PyTree) -> jax.Array:
    """Its curvatures are 1, 2, … in every leaf, times `scale`."""

    def of_leaf(p: jax.Array) -> jax.Array:
        curvatures = jnp.arange(1, p.size + 1, dtype=p.dtype)
        return 0.5 * jnp.sum(curvatures * jnp.square(p.reshape(-1))).astype(jnp.float32)

    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(params):
        total = total + scale * of_leaf(leaf)
    return total


def curved(gradient: PyTree, step: int) -> dict[str, Any]:
    """A loss whose curvature changes from step to step; a pytree, as every argument here."""
    value_fn = jax.tree_util.Partial(bowl, jnp.float32(1.0 + (step % 3)))
    return {"value_fn": value_fn, "num_examples": jnp.int32(16 * (step + 1))}


def leaning(scale: jax.Array, params: PyTree, group: jax.Array) -> jax.Array:
    """`bowl` for examples of different steepness."""
    return jnp.mean(group).astype(jnp.float32) * bowl(scale, params)


def curved_groups(gradient: PyTree, step: int) -> dict[str, Any]:
    """Groups of two examples, whose curvature and spread change from step to step."""
    loss_fn = jax.tree_util.Partial(leaning, jnp.float32(1.0 + (step % 3)))
    groups = jnp.arange(1.0, 9.0, dtype=jnp.float32).reshape(4, 2) + jnp.float32(step)
    return {"loss_fn": loss_fn, "groups": groups, "num_examples": jnp.int32(16 * (step + 1))}


@dataclass(frozen=True, eq=False)  # each row is its own key
class Row:
    name: str
    factory: Callable[..., optax.GradientTransformation]
    args: tuple[Any, ...]
    options: dict[str, Any]
    injected: tuple[str, ...]  # by inject_hyperparams; every other argument is in its static_args
    extra_args: Callable[[PyTree, int], dict[str, Any]]
    promotes: bool = False  # something of Optax's in it needs implicit promotion of dtypes
    by_hand: int = 2  # steps that can be run without compiling in reasonable time
    rtol: float = 1e-4  # what rounding elsewhere may change: more where something is fitted
    narrow: float | None = 0.01  # what bfloat16 may change; None: all, by Optax's moments in it
    cheaper: dict[str, Any] = field(default_factory=dict)  # options without what compiles long
    variant: bool = False  # of a row above, or around one: what compiles once more is slow

    @property
    def measures(self) -> bool:
        """A curvature, by a model that rounds as its parameters do."""
        return self.extra_args in (curved, curved_groups)

    def promotion(self, strictly: Callable[[], Any]) -> Any:
        return contextlib.nullcontext() if self.promotes else strictly()

    def make(self, **more: Any) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.factory(*self.args, **(self.options | more)))

    def inject(self) -> optax.GradientTransformationExtraArgs:
        static_args = set(inspect.signature(self.factory).parameters) - set(self.injected)
        factory = optax.inject_hyperparams(self.factory, static_args=static_args)
        return factory(*self.args, **self.options)

    def steps(self, params: PyTree, count: int = 4) -> list[tuple[PyTree, dict]]:
        """Gradients like `params`, and the extra arguments beside them."""
        rng = np.random.default_rng(0)

        def draw(p: jax.Array) -> jax.Array:
            return jnp.asarray(rng.normal(1.0, 0.5, p.shape), p.dtype)

        gradients = [jax.tree.map(draw, params) for _ in range(count)]
        return [(g, self.extra_args(g, step)) for step, g in enumerate(gradients)]


def with_controller(criterion: Any, direction: optax.GradientTransformation) -> Any:
    return optax.chain(adabatch.adapt_batch_size(criterion, **SIZES), direction)


def by_examples(learning_rate: Any, momentum: float) -> optax.GradientTransformation:
    factory = adabatch.by_examples(optax.sgd, base_batch_size=16, scaling=adabatch.sqrt_scaling())
    return factory(learning_rate, momentum)


IMPROVED = adabatch.scale_by_improved_autowu(total_steps=50, smoother="rbf")
AUTOWU_OPTIONS = {"num_tests": 40, "max_losses": 16, "smoother": "rbf"}
TABLE = [
    Row(
        "adapt_batch_size",
        adabatch.adapt_batch_size,
        (adabatch.norm_test(0.5),),
        SIZES,
        ("growth_limit", "smoothing"),
        noise_of,
    ),
    Row(
        "adapt_batch_size smoothed",
        adabatch.adapt_batch_size,
        (adabatch.norm_test(0.5),),
        SIZES | {"smoothing": 0.9, "debias": True, "growth_limit": 2.0, "test_interval": 2},
        ("growth_limit", "smoothing"),
        noise_of,
        variant=True,
    ),
    Row(
        "adapt_batch_size by coordinates",
        adabatch.adapt_batch_size,
        (adabatch.coordinate_norm_test(0.5),),
        SIZES | {"smoothing": 0.5, "dataset_size": 10_000, "monotone": False},
        ("growth_limit", "smoothing"),
        noise_of,
    ),
    Row(
        "adaptive_multi_steps around adam",
        adabatch.adaptive_multi_steps,
        (with_controller(adabatch.norm_test(0.5), optax.adam(0.1)),),
        {"micro_batch_size": 8},
        (),
        value_of,
        promotes=True,  # optax.adam itself fails there: 0.9 ** int32
        narrow=None,
    ),
    Row(
        "adaptive_multi_steps by coordinates",
        adabatch.adaptive_multi_steps,
        (with_controller(adabatch.coordinate_norm_test(0.5), optax.sgd(0.1, momentum=0.9)),),
        {"micro_batch_size": 8, "coordinate_wise": True},
        (),
        value_of,
        narrow=0.05,  # Optax's trace is in bfloat16, where 0.9 is 0.8984
        variant=True,
    ),
    Row(
        "track_noise_scale",
        adabatch.track_noise_scale,
        (),
        {"batch_size": 16, "interval": 2},
        ("ema_decay",),
        no_arguments,
    ),
    Row(
        "grow_batch_size",
        adabatch.grow_batch_size,
        (optax.sgd,),
        {"base_batch_size": 16, "max_batch_size": 1024, "micro_batch_size": 8}
        | {
            "learning_rate": optax.linear_schedule(0.1, 0.0, 100),
            "scaling": adabatch.linear_scaling(),
        },
        (),
        value_of,
        variant=True,
    ),
    Row(
        "by_examples",
        by_examples,
        (optax.linear_schedule(0.1, 0.0, 100),),
        {"momentum": 0.9},
        (),
        noise_of,
        narrow=0.05,  # Optax's trace again
    ),
    Row(
        "scale_by_batch_size",
        adabatch.scale_by_batch_size,
        (adabatch.sqrt_scaling(),),
        {"base_batch_size": 16},
        ("base_batch_size",),
        noise_of,
    ),
    Row(
        "scale_by_example_schedule",
        adabatch.scale_by_example_schedule,
        (optax.linear_schedule(1.0, 0.0, 1000),),
        {},
        (),
        noise_of,
    ),
    Row(
        "scale_by_autowu",
        adabatch.scale_by_autowu,
        (),
        {"total_steps": 20, "steps_per_test": 1, "patience": 2, "smoother": "as they are"},
        ("min_learning_rate", "max_learning_rate", "confidence"),
        value_of,
    ),
    Row(
        "scale_by_autowu with the paper's Gaussian process",
        adabatch.scale_by_autowu,
        (),
        {"total_steps": 20, "steps_per_test": 1, "patience": 2},
        ("min_learning_rate", "max_learning_rate", "confidence"),
        value_of,
        cheaper={"smoother": rbf_smoother(warmup_over=True)},
        by_hand=1,  # the second makes a Gaussian process test
        rtol=1e-3,
        variant=True,
    ),
    Row(
        "scale_by_autowu by examples",
        adabatch.scale_by_autowu,
        (),
        {"total_examples": 400, "examples_per_test": 16, "cooldown_fraction": 0.2}
        | {"smoother": "quasisep", "watch_divergence": True, "max_losses": 16}
        | {"peak": Peak(max_relative_step=0.1, at_limit="minimum")},
        ("min_learning_rate", "confidence"),
        noise_of,
        cheaper={"smoother": quasisep_smoother(warmup_over=True)},
        by_hand=1,
        rtol=1e-3,
        variant=True,
    ),
    Row(
        "scale_by_improved_autowu",
        adabatch.scale_by_improved_autowu,
        (),
        {
            "total_steps": 50,
            "smoother": "rbf",
        },  # the other is in the row above, and compiles longer
        (),
        value_of,
        cheaper={"smoother": rbf_smoother(warmup_over=True)},
        by_hand=1,
        rtol=1e-3,
        variant=True,
    ),
    Row(
        "return_to_minimum",
        adabatch.return_to_minimum,
        (optax.chain(optax.trace(0.9), IMPROVED),),
        {},
        (),
        value_of,
        by_hand=1,
        rtol=1e-3,
        variant=True,
    ),
    Row(
        "automatic",
        adabatch.automatic,
        (optax.trace(0.9),),
        SIZES | {"total_examples": 6400, "autowu_options": AUTOWU_OPTIONS},
        (),
        noise_of,
        narrow=0.05,  # Optax's trace again
        cheaper={"autowu_options": AUTOWU_OPTIONS | {"smoother": rbf_smoother(warmup_over=True)}},
        by_hand=1,
        rtol=3e-3,
        variant=True,
    ),
    Row(
        "scale_by_lanczos",
        adabatch.scale_by_lanczos,
        (),
        {"refresh_every": 2, "num_steps": 3},
        ("max_momentum", "safety", "ema_decay"),
        curved,
    ),
    Row(
        "scale_by_lanczos by examples",
        adabatch.scale_by_lanczos,
        ("nesterov",),
        {"refresh_every": 40, "refresh_unit": "example", "num_steps": 3}
        | {"nu_squared": 4.0, "curvature_batch_size": 64},
        ("max_momentum", "safety", "ema_decay", "nu_squared", "curvature_batch_size"),
        curved,
        variant=True,
    ),
    Row(
        "scale_by_random_matrix",
        adabatch.scale_by_random_matrix,
        (),
        {"base_batch_size": 16, "adaptive": True, "refresh_every": 2, "num_steps": 3},
        ("base_batch_size", "momentum", "ema_decay", "dataset_size"),
        curved_groups,
    ),
    Row(
        "scale_by_random_matrix by examples",
        adabatch.scale_by_random_matrix,
        (),
        {"base_batch_size": 16, "adaptive": False, "refresh_every": 40, "num_steps": 3}
        | {"refresh_unit": "example", "dataset_size": 1000, "momentum": 0.9},
        ("base_batch_size", "momentum", "ema_decay", "dataset_size"),
        curved_groups,
        variant=True,
    ),
    Row(
        "scale_by_adamp",
        adabatch.optimizers.scale_by_adamp,
        (),
        {"weight_decay": 0.1},
        ("b1", "b2", "eps", "weight_decay", "delta", "wd_ratio"),
        no_arguments,
    ),
    Row(
        "adamp",
        adabatch.adamp,
        (0.1,),
        {"nesterov": True},
        ("learning_rate", "b1", "b2", "eps", "weight_decay", "delta", "wd_ratio"),
        no_arguments,
        variant=True,
    ),
    Row(
        "scale_by_batch_adam",
        adabatch.optimizers.scale_by_batch_adam,
        (),
        {"base_batch_size": 16},
        ("b1", "b2", "eps", "base_batch_size"),
        noise_of,
    ),
    Row(
        "scale_by_batch_adam with fixed betas",
        adabatch.optimizers.scale_by_batch_adam,
        (),
        {"base_batch_size": 16, "scale_betas": False, "nesterov": True}
        | {"scaling": adabatch.linear_scaling()},
        ("b1", "b2", "eps", "base_batch_size"),
        noise_of,
        variant=True,
    ),
    Row(
        "scale_by_adagrad_norm",
        adabatch.scale_by_adagrad_norm,
        (),
        {},
        ("initial_accumulator_value", "eps"),
        no_arguments,
    ),
    Row(
        "adadagrad",
        adabatch.adadagrad,
        (0.1,),
        SIZES | {"criterion": adabatch.norm_test(0.5), "scaling": adabatch.sqrt_scaling()},
        ("learning_rate", "initial_accumulator_value", "eps"),
        noise_of,
    ),
    Row(
        "adadagrad_norm",
        adabatch.adadagrad_norm,
        (0.1,),
        SIZES | {"criterion": adabatch.norm_test(0.5), "scaling": adabatch.linear_scaling()},
        ("learning_rate", "initial_accumulator_value", "eps"),
        noise_of,
        variant=True,
    ),
]


# Every public name of the core: the facade has only some of them.
PUBLIC = {
    name: getattr(room, name)
    for room in (
        *(adabatch.noise, adabatch.batch_size, adabatch.curvature),
        *(adabatch.learning_rate, adabatch.optimizers),
    )
    for name in room.__all__
}


@pytest.fixture
def public() -> dict[str, Any]:
    return PUBLIC


@pytest.fixture
def table() -> list[Row]:
    return TABLE


@pytest.fixture(params=TABLE, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


# Each compiles a program of its own. A variant keeps its promises in the others by default.
COMPILES_ONCE_MORE = {
    *("test_jit_changes_no_number", "test_vmap_in_scan_equals_a_loop", "test_under_masked"),
    *("test_under_inject_hyperparams", "test_modes", "test_one_trace_serves_every_step"),
    *("test_a_replicated_state_stays_replicated", "test_the_state_can_be_donated"),
    *("test_narrow_floats_follow_float32", "test_complex_parameters_are_exact_or_refused"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
        name = getattr(item, "originalname", None)
        # By hand every operation of a measurement is a program of its own.
        if row and (
            (row.variant and name in COMPILES_ONCE_MORE)
            or (row.measures and name == "test_jit_changes_no_number")
        ):
            item.add_marker(pytest.mark.slow)
