"""Parameters of every kind under the drop-in: many, complex, of mixed dtypes, of wrong structure."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from tests.marks import slow


def wrap(direction, micro_batch_size=2, **options):
    sizes = dict(initial_batch_size=4, max_batch_size=64) | options
    controller = adabatch.adapt_batch_size(adabatch.norm_test(1.0), **sizes)
    chain = optax.chain(controller, direction)
    return adabatch.adaptive_multi_steps(chain, micro_batch_size=micro_batch_size)


def additions(number, optimizer):
    """In the compiled program of one call; XLA once copied a sum over all leaves into every leaf."""
    shapes = {f"p{i}": jax.ShapeDtypeStruct((8,), jnp.float32) for i in range(number)}
    state = jax.eval_shape(optimizer.init, shapes)

    def call(gradient, state, params):
        return optimizer.update(gradient, state, params, value=jnp.float32(1))

    compiled = jax.jit(call).lower(shapes, state, shapes).compile()
    return len(re.findall(r" add\(", compiled.as_text()))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_program_is_linear_in_the_number_of_parameter_arrays():
    """Slow: three programs of up to 400 arrays, with all optimizations."""
    few, more, many = (additions(n, wrap(optax.sgd(1e-3))) for n in (50, 200, 400))
    assert abs((many - more) / 200 - (more - few) / 150) < 1  # as many for every further array
    assert many < 15 * 400


def test_complex_parameters_move_as_under_plain_accumulation():
    """By hand: optax.MultiSteps keeps the real part of the mean alone."""
    target, rng = jnp.complex64(2j), np.random.default_rng(0)
    params = {"z": jnp.zeros(2, jnp.complex64), "x": jnp.ones(3)}
    noise = (rng.normal(size=(20, 2)) + 1j * rng.normal(size=(20, 2))).astype(np.complex64)

    def loss(p, e):
        return jnp.mean(jnp.abs(p["z"] - target - e) ** 2) + jnp.mean((p["x"] - e.real) ** 2)

    def gradient(p, e):
        return jax.tree.map(jnp.conj, jax.grad(loss)(p, e))

    def call(carry, e):
        p, s = carry
        u, s = optimizer.update(gradient(p, e), s, p)
        return (optax.apply_updates(p, u), s), None

    def pair(p, e):
        g = jax.tree.map(lambda a, b: (a + b) / 2, gradient(p, e[0]), gradient(p, e[1]))
        return jax.tree.map(lambda p, g: p - 0.3 * g, p, g), None

    optimizer = wrap(optax.sgd(0.3), max_batch_size=4)
    start = (params, optimizer.init(params))
    (ours, state), _ = jax.jit(lambda e: jax.lax.scan(call, start, e.reshape(-1)))(noise)
    theirs, _ = jax.jit(lambda e: jax.lax.scan(pair, params, e))(noise)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    assert ours["z"].dtype == jnp.complex64
    assert np.abs(ours["z"] - target).max() < 1
    assert int(state.skipped_micro_batches) == 0


def test_the_noise_of_complex_parameters_is_that_of_their_two_parts():
    g = np.random.default_rng(0).normal(1.0, 1.0, (2, 3, 2)).astype(np.float32)
    optimizer = wrap(optax.sgd(0.1))

    def numerator(gradients):
        state = optimizer.init(gradients[0])
        for x in gradients:
            _, state = jax.jit(optimizer.update)(x, state, x)
        return float(adabatch.metrics(state)["noise_numerator"])

    np.testing.assert_allclose(
        numerator(jnp.asarray(g[..., 0] + 1j * g[..., 1])), numerator(jnp.asarray(g)), rtol=1e-6
    )


MIXED = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}


@pytest.mark.parametrize(
    "name", ["dog", *slow("prodigy", "dadapt_adamw", "momo", "schedule_free_adamw")]
)
def test_mixed_dtypes_keep_the_types_of_the_inner_state(name):
    """As in `optax.MultiSteps`, with the same parameters; these make states of other types step by step."""
    factory = getattr(optax.contrib, name)
    inner = factory(0.1 if name.startswith("schedule") else 1.0)

    def run(optimizer, **told):
        def step(carry, i):
            p, s = carry
            g = jax.tree.map(lambda p: (p * 0.1 + i * 0.01).astype(p.dtype), p)
            u, s = optimizer.update(g, s, p, **told)
            return (optax.apply_updates(p, u), s), None

        start = (MIXED, optimizer.init(MIXED))
        end = jax.lax.scan(step, start, jnp.arange(6.0))[0]
        assert jax.tree.map(jnp.result_type, end) == jax.tree.map(jnp.result_type, start)
        return end[0]

    told = {"value": jnp.float32(1.0)} if name == "momo" else {}
    ours = run(wrap(inner, max_batch_size=4), **told)
    theirs = run(optax.MultiSteps(inner, 2).gradient_transformation(), **told)
    for key, rtol in (("a", 2**-7), ("b", 1e-5)):
        np.testing.assert_allclose(ours[key], theirs[key], rtol=rtol)


def test_the_mean_loss_of_narrow_calls_is_kept_in_float32():
    heard = []

    def hear(updates, state, params=None, *, value, **extra_args):
        jax.debug.callback(lambda x: heard.append((str(x.dtype), float(x))), value)
        return updates, state

    listener = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), hear)
    optimizer, w = wrap(listener), jnp.ones(3, jnp.bfloat16)
    state = optimizer.init(w)
    for loss in (2.3125, 2.296875):
        _, state = jax.jit(optimizer.update)(w, state, w, value=jnp.bfloat16(loss))
    jax.effects_barrier()
    assert heard == [("float32", 2.3046875)]


def test_a_healthy_run_raises_no_alarm_under_debug_nans():
    optimizer, w = wrap(optax.adam(0.1), test_interval=2), jnp.ones(3)
    rng = np.random.default_rng(0)
    with jax.debug_nans(True):
        state = optimizer.init(w)
        adabatch.metrics(state)
        update, shown = jax.jit(optimizer.update), jax.jit(adabatch.metrics)
        for i in range(12):
            gradient = rng.normal(1.0, 1.0, 3).astype(np.float32)
            _, state = (optimizer.update if i < 4 else update)(
                gradient, state, w, value=jnp.float32(1)
            )
            adabatch.metrics(state), shown(state)


@pytest.mark.parametrize(
    ("gradient", "given", "message"),
    [
        (
            {"a": jnp.ones(2)},
            {},
            r"at \['b'\] the gradient has nothing .* shape \(3,\).*eqx.filter",
        ),
        ({"a": jnp.ones(2), "b": None}, {}, r"at \['b'\] the gradient has nothing"),
        ({"a": jnp.ones(2), "b": jnp.ones(4)}, {}, r"at \['b'\] the gradient has shape \(4,\)"),
        (
            {"a": jnp.ones(2), "b": jnp.ones(3)},
            {"value": jnp.ones(1)},
            r"value= .*scalar.*shape \(1,\)",
        ),
        ({"a": jnp.ones(2), "b": jnp.ones(3)}, {"value": (1.0, 2.0)}, r"value= .*scalar.*a tuple"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(gradient, given, message):
    optimizer = wrap(optax.sgd(0.1))
    state = optimizer.init({"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="adaptive_multi_steps: .*" + message):
        optimizer.update(gradient, state, None, **given)


def test_noise_of_another_structure_is_refused_where_the_wrapper_stands_inside():
    params, mask = {"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": True, "b": False}
    optimizer = optax.masked(wrap(optax.sgd(0.1)), mask)
    noise = adabatch.GradientNoise(params, jnp.float32(1), jnp.int32(2), jnp.int32(2))
    with pytest.raises(ValueError, match=r"noise\.mean has another structure .* around them"):
        optimizer.update(params, optimizer.init(params), params, noise=noise)
