"""Every public function that is no transformation, inside a program for TPU and CUDA."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import curvature
from adabatch_jax.learning_rate._posterior_test import in_floats_of
from adabatch_jax.learning_rate._quasisep import _fit, quasisep_smoother
from adabatch_jax.learning_rate._rbf import rbf_smoother
from adabatch_jax.training import SpectrumConfig
from adabatch_jax.training.spectrum._batches import compile_measures

GROUPS = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
SIZES, EXTREMES = np.float32([16, 64, 256]), np.float32([3.0, 2.0, 1.5])
ON_THE_HOST = {
    "smoothed_losses",  # how much it returns depends on the state
    "recommend_estimator",  # plain numbers in, plain numbers out
    "trained_parameters",  # an optimizer in, bools out
    "rbf_smoother",  # what they make is exported below
    "quasisep_smoother",
}


def loss_fn(params, group):
    """Without a product; its curvatures differ between parameters, and between groups."""
    bowl = jnp.zeros((), jnp.float32)
    for x in jax.tree.leaves(params):
        bowl += jnp.sum(jnp.arange(1, x.size + 1, dtype=x.dtype) * jnp.square(x.reshape(-1)))
    return jnp.mean(group) * bowl + jnp.mean(jnp.sin(params["b"][0] * group))


def model_fn(params, inputs):
    return params["w"][0, 0] * inputs + params["b"][0]


def square_loss(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def value_and_grad_noise(params, *, groups=GROUPS, **options):
    noisy = adabatch.value_and_grad_noise(loss_fn, **options)
    return lambda params, count: noisy(params, groups, count=count), params, np.int32(2)


def value_and_grad_signs(params, **options):
    def losses_fn(params, group):
        return jax.vmap(lambda x: loss_fn(params, x[None]))(group)

    noisy = adabatch.noise.value_and_grad_signs(losses_fn, **options)

    def fn(params, key, count):
        return noisy(params, GROUPS, jax.random.wrap_key_data(key), count=count)

    return fn, params, np.zeros(2, np.uint32), np.int32(2)


def of_noise(function, params):
    """A function of a noise in which nothing is missing."""
    scalars = np.float32(3.0), np.int32(8), np.int32(4)
    more = dict(coordinate_scatter=params, inner_product_scatter=np.float32(2.0))
    return function, adabatch.GradientNoise(params, *scalars, **more)


def controller():
    sizes = dict(initial_batch_size=16, max_batch_size=64)
    return adabatch.adapt_batch_size(adabatch.norm_test(0.5), **sizes)


def of_state(function, params):
    return function, controller().init(params)


def hessian(params, *, counted=False):
    def fn(params, groups, count, vector):
        count = count if counted else None
        return curvature.hessian_vector_product(loss_fn, params, groups, count=count)(vector)

    return fn, params, GROUPS, np.int32(2), params


def gauss_newton(params, *, counted=False):
    def fn(params, groups, count, vector):
        batch = (groups, groups) if counted else (groups[0], groups[1])
        product = curvature.gauss_newton_vector_product(
            model_fn, square_loss, params, *batch, count=count if counted else None
        )
        return product(vector)

    return fn, params, GROUPS, np.int32(2), params


def lanczos(function, params, *, from_start=False, **options):
    def fn(params, groups, key):
        operator = curvature.hessian_vector_product(loss_fn, params, groups)
        start = params if from_start else None
        return function(operator, params, jax.random.wrap_key_data(key), start=start, **options)

    return fn, params, GROUPS, np.zeros(2, np.uint32)


def hessian_noise(params, probe):
    def fn(params, groups, key):
        key = jax.random.wrap_key_data(key)
        return curvature.hessian_noise(loss_fn, params, groups, key, probe=probe, num_steps=3)

    return fn, params, GROUPS, np.zeros(2, np.uint32)


def density():
    numbers = (np.ones((2, 3), np.float32) for _ in range(3))
    return curvature.spectral_density, curvature.Spectrum(*numbers)


def number(function, *values, **options):
    return functools.partial(function, **options), *map(np.float32, values)


def followed(rule, params):
    """A rule in its place: where Optax asks for a hyper-parameter."""
    decay = adabatch.learning_rate.follow_batch_size(rule, base_batch_size=16)
    link = optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=decay)
    return updated(link, params)


def scaled(rule, params):
    return updated(adabatch.scale_by_batch_size(rule, base_batch_size=16), params)


def updated(link, params):
    def update(gradient, state, params, size):
        return link.update(gradient, state, params, num_examples=size)

    return update, params, link.init(params), params, np.int32(64)


# By name, or name and variant: a function and what it is given.
FUNCTIONS = {
    "value_and_grad_noise": value_and_grad_noise,
    "value_and_grad_noise: everything": lambda p: value_and_grad_noise(
        p, vectorize=2, coordinate_wise=True, inner_products=True
    ),
    "value_and_grad_noise: lanes": lambda p: value_and_grad_noise(
        p, groups=GROUPS.reshape(2, 2, 2), lanes=True, coordinate_wise=True, inner_products=True
    ),
    "value_and_grad_signs": value_and_grad_signs,
    "value_and_grad_signs: everything": lambda p: value_and_grad_signs(
        p, num_signs=2, coordinate_wise=True
    ),
    "merge_noise": lambda p: of_noise(lambda noise: adabatch.merge_noise(noise, noise), p),
    "split_groups": lambda p: (lambda x: adabatch.split_groups(x, 2), GROUPS),
    "norm_test": lambda p: of_noise(adabatch.norm_test(0.5), p),
    "coordinate_norm_test": lambda p: of_noise(adabatch.coordinate_norm_test(0.5), p),
    "coordinate_norm_test: the largest": lambda p: of_noise(
        adabatch.coordinate_norm_test(0.5, quantile=1.0, floor=0.0), p
    ),
    "inner_product_test": lambda p: of_noise(adabatch.inner_product_test(0.9), p),
    "augmented_inner_product_test": lambda p: of_noise(
        adabatch.augmented_inner_product_test(0.9, 5.84), p
    ),
    "gradient_noise_scale": lambda p: of_noise(adabatch.gradient_noise_scale(), p),
    "cabs": lambda p: of_noise(functools.partial(adabatch.cabs(0.1), value=2.0), p),
    "batch_size_schedule": lambda p: of_noise(
        functools.partial(adabatch.batch_size_schedule(lambda n: n / 2), examples_seen=64.0), p
    ),
    "get_batch_size": lambda p: of_state(adabatch.get_batch_size, p),
    "has_updated": lambda p: of_state(adabatch.has_updated, p),
    "needs_noise": lambda p: of_state(adabatch.needs_noise, p),
    "metrics": lambda p: of_state(adabatch.metrics, p),
    "unless_skipped": lambda p: of_state(lambda s: adabatch.unless_skipped(s, p, p), p),
    "hessian_vector_product": hessian,
    "hessian_vector_product: counted": lambda p: hessian(p, counted=True),
    "gauss_newton_vector_product": gauss_newton,
    "gauss_newton_vector_product: counted": lambda p: gauss_newton(p, counted=True),
    "lanczos_spectrum": lambda p: lanczos(curvature.lanczos_spectrum, p, num_steps=4, num_probes=2),
    "lanczos_spectrum: from a start": lambda p: lanczos(
        curvature.lanczos_spectrum, p, num_steps=4, from_start=True
    ),
    "top_eigenvector": lambda p: lanczos(curvature.top_eigenvector, p, num_steps=4),
    "spectral_density": lambda p: density(),
    "hessian_noise": lambda p: hessian_noise(p, "ritz"),
    "hessian_noise: random": lambda p: hessian_noise(p, "random"),
    "fit_hessian_noise": lambda p: (curvature.fit_hessian_noise, SIZES, EXTREMES),
    "batch_sharpness": lambda p: (
        lambda params, groups: curvature.batch_sharpness(loss_fn, params, groups),
        *(p, GROUPS),
    ),
    "gauss_newton_noise": lambda p: (
        curvature.gauss_newton_noise,
        SIZES,
        EXTREMES,
        EXTREMES[2],
    ),
    "batch_hessian_extremes": lambda p: number(curvature.batch_hessian_extremes, 2, -1, 8, 16),
    "full_hessian_extremes": lambda p: number(curvature.full_hessian_extremes, 2, -1, 8, 16, 100),
    "batch_gauss_newton_extremes": lambda p: number(
        curvature.batch_gauss_newton_extremes, 2, 0.1, 4
    ),
    "full_gauss_newton_extremes": lambda p: number(curvature.full_gauss_newton_extremes, 2, 0.1, 4),
    "effective_batch_size": lambda p: number(curvature.effective_batch_size, 16, 100),
    "inverse_effective_batch_size": lambda p: number(
        curvature.inverse_effective_batch_size, 16, 100
    ),
    "transition_batch_size": lambda p: number(curvature.transition_batch_size, 2, 8, momentum=0.9),
    "max_stable_learning_rate": lambda p: number(
        curvature.max_stable_learning_rate, 2, momentum=0.9, noise=8.0, batch_size=16
    ),
    "linear_scaling": lambda p: scaled(adabatch.linear_scaling(), p),
    "sqrt_scaling": lambda p: scaled(adabatch.sqrt_scaling(), p),
    "random_matrix_scaling": lambda p: scaled(
        adabatch.random_matrix_scaling(1000.0, adaptive=True, dataset_size=10_000), p
    ),
    "follow_batch_size": lambda p: followed(lambda size, base: size / base, p),
    "scaled_weight_decay": lambda p: followed(adabatch.learning_rate.scaled_weight_decay(0.1), p),
    "scaled_eps": lambda p: followed(adabatch.learning_rate.scaled_eps(1e-8), p),
    "scaled_beta": lambda p: followed(adabatch.learning_rate.scaled_beta(0.9), p),
    "scaled_average": lambda p: followed(adabatch.learning_rate.scaled_average(0.9), p),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_exported(check, params, name):
    check(*FUNCTIONS[name](params))


def test_no_function_is_forgotten(table, public):
    functions = {name for name, thing in public.items() if inspect.isfunction(thing)}
    named = {name.split(":")[0] for name in FUNCTIONS}
    assert functions - {row.factory.__name__ for row in table} == named | ON_THE_HOST


@pytest.mark.parametrize("what", ["test", "posterior"])
@pytest.mark.parametrize("make", [rbf_smoother, quasisep_smoother])
def test_every_smoother_is_exported(check, make, what):
    """On more losses than one draw is conditioned on."""
    smoother, losses = make(), np.linspace(1.0, 0.0, 600, dtype=np.float32)
    in_float64 = make is quasisep_smoother
    more = (np.zeros(2, np.uint32), np.float32(0.5)) if what == "test" else ()

    def fn(state, x, y, count, *more):
        with jax.numpy_rank_promotion("allow"):
            return getattr(smoother, what)(state, x, y, count, *more)

    check(fn, smoother.init(), losses, losses, np.int32(590), *more, float64=in_float64)


def test_the_fit_to_all_losses_stays_in_float32(check):
    losses = np.linspace(1.0, 0.0, 600, dtype=np.float32)

    def fit(state, x, y, count):
        with jax.numpy_rank_promotion("allow"), in_floats_of(32):
            return _fit(state, x, y, count, 0.5)

    check(fit, quasisep_smoother().init(), losses, losses, np.int32(590))


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
def test_what_the_spectrum_command_runs_is_exported(check, matrix):
    def apply(params, inputs):
        return inputs * params["scale"][None]

    params, count, key = {"scale": np.ones(4, np.float32)}, np.int32(2), np.zeros(2, np.uint32)
    inputs, labels = np.ones((3, 5, 4), np.float32), np.zeros((3, 5), np.int32)
    batch = {"inputs": inputs, "labels": labels, "weights": np.ones((3, 5), np.float32)}
    config = SpectrumConfig(matrix=matrix, steps=3)
    of_batch, noise_along = compile_measures(config, apply)
    check(
        lambda p, b, n, k: of_batch(p, b, n, jax.random.wrap_key_data(k)), params, batch, count, key
    )
    check(lambda p, b, k: noise_along(p, b, -1.0, jax.random.wrap_key_data(k)), params, batch, key)


def noise_of_devices(params, groups):
    options = dict(axis_name="data", coordinate_wise=True, inner_products=True)
    return adabatch.value_and_grad_noise(loss_fn, **options)(params, groups)


def hessian_noise_of_devices(params, groups):
    options = dict(num_steps=3, axis_name="data")
    return curvature.hessian_noise(loss_fn, params, groups, jax.random.key(0), **options)


def update_on_devices(params, groups):
    link = adabatch.adaptive_multi_steps(controller(), micro_batch_size=2, axis_name="data")
    apart = jax.lax.pcast(params, "data", to="varying")
    value, gradient = jax.value_and_grad(loss_fn)(apart, groups)
    return link.update(gradient, link.init(params), params, value=value)


ON_DEVICES = [noise_of_devices, hessian_noise_of_devices, update_on_devices]


@pytest.mark.parametrize("function", ON_DEVICES)
def test_a_program_for_eight_devices_is_exported(check, params, function):
    """None of which is here."""
    mesh = jax.sharding.AbstractMesh((8,), ("data",))

    def shaped(x, *axes):
        place = jax.NamedSharding(mesh, jax.P(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    specs = jax.P(), jax.P("data")
    fn = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=jax.P())
    check(fn, jax.tree.map(shaped, params), shaped(np.tile(GROUPS, (8, 1)), "data"))


@pytest.mark.parametrize("name", ["value_and_grad_noise", "hessian_noise", "random matrix"])
def test_groups_may_be_numpy_arrays(params, name):
    """Where a loop counts through them, they must be indexed by what is traced."""
    link = adabatch.scale_by_random_matrix(base_batch_size=1, adaptive=False, refresh_every=10)
    more = dict(loss_fn=loss_fn, groups=GROUPS, num_examples=4)
    measures = {
        "value_and_grad_noise": lambda p: adabatch.value_and_grad_noise(loss_fn, vectorize=2)(
            p, GROUPS
        ),
        "hessian_noise": lambda p: curvature.hessian_noise(
            loss_fn, p, GROUPS, jax.random.key(0), num_steps=3
        ),
        "random matrix": lambda p: link.update(p, link.init(p), p, **more),
    }
    jax.eval_shape(measures[name], params)
