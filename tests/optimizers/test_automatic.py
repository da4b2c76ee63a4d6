"""`automatic`: its links in order, each told what it needs, around any direction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import AutowuPhase, WarmupEnd
from adabatch_jax.learning_rate import probe_direction
from adabatch_jax.learning_rate._return_to_minimum import ReturnToMinimumState
from adabatch_jax.optimizers import _automatic

MICRO, FIRST, LARGEST, TOTAL = 4, 32, 512, 40_000
PARAMS = {"w": jnp.zeros(6), "b": jnp.zeros(())}
UNSMOOTHED = {
    "smoother": "as they are",
    "patience": 50,
}  # to its limit, and back to the lowest loss
RNG = np.random.default_rng(0)
X = jnp.float32(RNG.normal(size=(8192, 6)))
Y = X @ jnp.arange(1.0, 7.0) + jnp.float32(2.0 * RNG.normal(size=8192))


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean(jnp.square(x @ params["w"] + params["b"] - y))


def make(direction=None, **options):
    sizes = dict(total_examples=TOTAL, initial_batch_size=FIRST, max_batch_size=LARGEST)
    direction = optax.scale_by_adam() if direction is None else direction
    return adabatch.automatic(direction, **(sizes | {"multiple_of": MICRO} | options))


def train(optimizer):
    """The metrics of every step, as columns; and the last loss."""
    measure = adabatch.value_and_grad_noise(loss_fn)

    @jax.jit
    def step(params, state, start, count):
        rows = (start + jnp.arange(LARGEST)) % len(Y)
        groups = adabatch.split_groups((X[rows], Y[rows]), LARGEST // MICRO)
        value, noise = measure(params, groups, count=count)
        updates, state = optimizer.update(noise.mean, state, params, value=value, noise=noise)
        return optax.apply_updates(params, updates), state, value, adabatch.metrics(state)

    params, used, rows = PARAMS, 0, []
    state = optimizer.init(params)
    while used < TOTAL:
        size = int(adabatch.get_batch_size(state))
        params, state, value, shown = step(params, state, used, size // MICRO)
        used += size
        rows.append({**jax.device_get(shown), "used": size, "loss": float(value)})
    assert step._cache_size() == 1
    return {k: np.array([r[k] for r in rows]) for k in rows[0]}, params


@pytest.fixture(scope="module")
def run():
    return train(make(autowu_options=UNSMOOTHED))


def test_it_learns(run):
    columns, params = run
    np.testing.assert_allclose(params["w"], np.arange(1.0, 7.0), atol=0.15)
    assert np.mean(columns["loss"][-5:]) < 4.5, "the noise alone is 4"


def test_the_batch_is_held_while_the_rate_is_sought_and_grows_after(run):
    columns, _ = run
    rising = columns["warmup_end"] == WarmupEnd.RUNNING
    assert 10 < rising.sum() <= 0.2 * TOTAL / FIRST
    assert (columns["next_batch_size"][rising] == FIRST).all()
    assert (columns["test_status"][rising] == adabatch.BatchSizeStatus.HELD).all()
    assert columns["next_batch_size"][-1] >= 4 * FIRST


def test_the_rate_is_autowu_s_times_that_of_the_batch(run):
    columns, _ = run
    scale = np.sqrt(columns["used"] / FIRST)
    falls = columns["phase"] == AutowuPhase.DECAY
    start = columns["used"][~falls].sum()
    position = start + np.cumsum(columns["used"][falls])
    part = (position - start) / (TOTAL - start)
    peak = columns["peak_learning_rate"][falls]
    ramp = np.minimum(
        1 / 3 + 2 / 3 * (position - columns["used"][falls] - start) / (0.5 * start), 1
    )
    decay = 0.5 * (1 + np.cos(np.pi * np.minimum(part, 1)))
    expected = peak * ramp * decay * scale[falls]
    np.testing.assert_allclose(columns["learning_rate"][falls], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_drop_in_finds_about_the_same():
    """Slow: two whole runs with a Gaussian process in their step."""
    optimizer = adabatch.adaptive_multi_steps(make(), micro_batch_size=MICRO)

    @jax.jit
    def steps(params, state, starts):
        def step(carry, start):
            params, state = carry
            rows = (start + jnp.arange(MICRO)) % len(Y)
            value, gradient = jax.value_and_grad(loss_fn)(params, (X[rows], Y[rows]))
            updates, state = optimizer.update(gradient, state, params, value=value)
            return (optax.apply_updates(params, updates), state), adabatch.has_updated(state)

        return jax.lax.scan(step, (params, state), starts)

    (params, state), updated = steps(
        PARAMS, optimizer.init(PARAMS), jnp.arange(0, TOTAL, MICRO, dtype=jnp.int32)
    )
    columns, fused = train(make())
    shown = adabatch.metrics(state)
    assert abs(int(updated.sum()) - len(columns["loss"])) <= 2
    assert shown["next_batch_size"] == columns["next_batch_size"][-1]
    np.testing.assert_allclose(
        shown["peak_learning_rate"], columns["peak_learning_rate"][-1], rtol=0.02
    )
    np.testing.assert_allclose(params["w"], fused["w"], atol=0.02)


DIRECTIONS = {
    "adam": (optax.scale_by_adam(), "sqrt", 4.0),
    "adamp": (adabatch.optimizers.scale_by_adamp(), "sqrt", 4.0),
    "rms": (optax.scale_by_rms(0.9), "sqrt", 4.0),
    "slow rms": (optax.scale_by_rms(0.99), "sqrt", 4.0),
    "lion": (optax.scale_by_lion(), "sqrt", 4.0),
    "adagrad": (optax.scale_by_rss(0.0), "sqrt", 8.0),
    "adagrad norm": (adabatch.scale_by_adagrad_norm(), "sqrt", 8.0),
    "lamb": (optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()), "sqrt", 1.0),
    "adam with decay": (
        optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4)),
        "sqrt",
        4.0,
    ),
    "sgd": (optax.identity(), "linear", 4.0),
    "momentum": (optax.trace(0.9), "linear", 4.0),
    "clipped sgd": (
        optax.chain(optax.clip_by_global_norm(10.0), optax.trace(0.9)),
        "linear",
        4.0,
    ),
    "sgd clipped hard, with decay": (
        optax.chain(optax.clip(0.01), optax.identity(), optax.add_decayed_weights(0.1)),
        "linear",
        4.0,
    ),
    "clipped by the parameters": (
        optax.chain(optax.adaptive_grad_clip(0.01), optax.trace(0.9)),
        "linear",
        4.0,
    ),
    "clipped adam with a large eps": (
        optax.chain(optax.clip_by_global_norm(0.25), optax.scale_by_adam(eps=0.1)),
        "sqrt",
        4.0,
    ),
    "adagrad norm from afar": (adabatch.scale_by_adagrad_norm(1e3), "sqrt", 8.0),
    "normalized": (optax.normalize_by_update_norm(), "sqrt", 4.0),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_rule_and_peak_suit_the_kind_of_direction(name):
    direction, rule, peak_factor = DIRECTIONS[name]
    traits = probe_direction(direction, "here", "do that")
    factor = float(traits.scaling(jnp.float32(64.0), jnp.float32(16.0)))
    assert factor == {"sqrt": 2.0, "linear": 4.0}[rule]
    assert traits.peak_factor == peak_factor
    assert traits.peak_at == ("earliest" if peak_factor == 8.0 else "confirmed")
    assert (traits.max_relative_step is None) == (peak_factor == 8.0)  # it shrinks by itself


@pytest.mark.parametrize(
    ("direction", "options", "message"),
    [
        (optax.adam(1e-3), {}, "without sign and learning rate"),
        (optax.scale_by_adam(), {"total_examples": 0}, "total_examples must be a positive integer"),
        (optax.scale_by_adam(), {"initial_batch_size": 1024}, "initial_batch_size"),
        (optax.scale_by_adam(), {"wings": 2}, "wings"),
        (optax.scale_by_adam(), {"autowu_options": {"patience": 0}}, "patience"),
        (optax.masked(optax.trace(0.9), {"v": True}), {}, r"could not be tried.*scaling="),
        (optax.set_to_zero(), {}, r"moves no parameter.*scaling="),
    ],
)
def test_bad_arguments_are_named(direction, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(direction, **options).init(PARAMS)


NETWORK = {
    "embed": jnp.full((6, 4), 0.5),
    "dense": {"kernel": jnp.full((4, 3), 0.5), "bias": jnp.zeros(3)},
}
MATRICES = jax.tree.map(lambda p: p.ndim > 1, NETWORK)
DENSE = {"embed": "frozen", "dense": {"kernel": "dense", "bias": "dense"}}
DIMENSIONS = optax.contrib.MuonDimensionNumbers()


def by_rank(params):
    return jax.tree.map(lambda p: "vector" if p.ndim < 2 else "matrix", params)


STRUCTURED = {
    "decay by a tree": (
        optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1, MATRICES)),
        "sqrt",
    ),
    "masked by a function": (
        optax.masked(optax.scale_by_adam(), lambda p: jax.tree.map(lambda w: w.ndim > 1, p)),
        "sqrt",
    ),
    "the rest frozen": (
        optax.partition({"dense": optax.trace(0.9), "frozen": optax.set_to_zero()}, DENSE),
        "linear",
    ),
    "muon for matrices": (
        optax.partition(
            {
                "matrix": optax.contrib.scale_by_muon(
                    weight_dimension_numbers=lambda p: jax.tree.map(lambda _: DIMENSIONS, p)
                ),
                "vector": optax.scale_by_adam(),
            },
            by_rank,
        ),
        "sqrt",
    ),
    "mostly momentum": (
        optax.partition({"matrix": optax.trace(0.9), "vector": optax.scale_by_adam()}, by_rank),
        "linear",
    ),
    "mostly Adam": (
        optax.partition({"matrix": optax.scale_by_adam(), "vector": optax.trace(0.9)}, by_rank),
        "sqrt",
    ),
    "for one matrix alone": (optax.contrib.scale_by_muon(), "sqrt"),  # as Optax 0.2.8 has it
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_direction_is_tried_on_parameters_of_the_same_structure(name):
    """Shapes are enough; what small parameters do not fit is tried on one matrix."""
    direction, rule = STRUCTURED[name]
    shapes = jax.eval_shape(lambda: NETWORK)
    traits = probe_direction(direction, "here", "do that", shapes)
    factor = float(traits.scaling(jnp.float32(64.0), jnp.float32(16.0)))
    assert factor == {"sqrt": 2.0, "linear": 4.0}[rule]
    state = jax.eval_shape(make(direction, autowu_options=UNSMOOTHED).init, shapes)
    assert isinstance(state, ReturnToMinimumState)


@pytest.mark.parametrize(
    ("direction", "factor", "bound"),
    [
        (optax.scale_by_adam(), 4.0, 0.125),
        (optax.scale_by_rss(0.0), 8.0, None),
        (optax.stateless(lambda g, _: {"w": g["w"].reshape(2, 3)}), 4.0, 0.125),
    ],
    ids=["adam", "adagrad", "not to be tried"],
)
def test_a_rule_that_is_given_switches_nothing_else_off(direction, factor, bound, monkeypatch):
    asked = []

    def schedule(**options):
        asked.append(options)
        return adabatch.scale_by_improved_autowu(**options)

    monkeypatch.setattr(_automatic, "scale_by_improved_autowu", schedule)
    make(direction, scaling=adabatch.linear_scaling(), autowu_options=UNSMOOTHED).init(PARAMS)
    peak = asked[-1]["peak"]
    assert (peak.factor, peak.max_relative_step) == (factor, bound)


def test_an_update_without_init_knows_the_kind_and_what_is_frozen():
    """As after a restart. A frozen matrix would raise the bound: its √outputs are no part of the length."""
    params = {"embed": jnp.ones((64, 64)), "dense": {"kernel": jnp.full((4, 3), 0.1)}}
    parts = {"dense": optax.scale_by_adam(), "frozen": optax.set_to_zero()}
    direction = optax.partition(parts, {"embed": "frozen", "dense": {"kernel": "dense"}})
    options = dict(autowu_options=UNSMOOTHED, multiple_of=1)
    state = make(direction, **options).init(params)
    mean = jax.tree.map(jnp.ones_like, params)
    noise = adabatch.GradientNoise(mean, *(jnp.float32(1), *map(jnp.int32, (FIRST, 8))))
    updates, state = jax.jit(make(direction, **options).update)(
        noise.mean, state, params, value=jnp.float32(1.0), noise=noise
    )
    np.testing.assert_allclose(updates["dense"]["kernel"], -1e-5, rtol=1e-5)
    assert not updates["embed"].any()
    bound = state.inner_returning_state.inner_schedule.step_length.highest_rate
    np.testing.assert_allclose(bound, 0.125 * (0.25 * 3) ** 0.5 / 12**0.5, rtol=1e-5)


def test_a_run_too_short_for_a_search_begins_at_once_and_says_so():
    """At the rate that the first steps allow, which are as long for every weight under Adam."""
    steps = 60
    with pytest.warns(
        UserWarning, match=r"warm-up has 6 steps, and it takes 40 .*total_examples=12800"
    ):
        optimizer = make(total_examples=FIRST * steps, max_batch_size=FIRST, multiple_of=1)

    def loss(params, batch):
        x, y = batch
        return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) @ params["v"] - y[:, None] / 10.0))

    @jax.jit
    def run(params):
        def step(carry, start):
            params, state = carry
            rows = start + jnp.arange(FIRST)
            groups = adabatch.split_groups((X[rows], Y[rows]), 8)
            value, noise = adabatch.value_and_grad_noise(loss)(params, groups)
            updates, state = optimizer.update(noise.mean, state, params, value=value, noise=noise)
            return (optax.apply_updates(params, updates), state), adabatch.metrics(state)

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, jnp.arange(steps) * FIRST)

    w, v = RNG.normal(size=(6, 32)) / 6**0.5, RNG.normal(size=(32, 1)) / 32**0.5
    before = {"w": jnp.float32(w), "v": jnp.float32(v)}
    (params, _), shown = run(before)
    assert loss(params, (X, Y)) < 0.3 * loss(before, (X, Y))
    assert (shown["warmup_end"] == WarmupEnd.NO_WARMUP).all() and not shown["minimum_found"].any()
    peak = 0.125 * np.linalg.norm(v) / 32**0.5  # that array allows less than the other
    np.testing.assert_allclose(shown["peak_learning_rate"][-1], peak, rtol=0.02)
    part = np.arange(1, steps + 1) / steps
    expected = (
        peak * np.minimum(np.arange(1, steps + 1) / 24, 1.0) * 0.5 * (1 + np.cos(np.pi * part))
    )
    np.testing.assert_allclose(shown["learning_rate"], expected, rtol=0.02, atol=1e-7)


def test_a_short_run_of_vectors_alone_is_refused_before_it_starts():
    with pytest.warns(UserWarning, match="taken from the length of the parameters instead"):
        optimizer = make(total_examples=60 * FIRST)
    with pytest.raises(ValueError, match=r"initial_batch_size=32 is too short .*two axes"):
        optimizer.init(PARAMS)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("value", "value=loss"), ("noise", "noise="), ("params", "keeps a snapshot")],
)
def test_what_update_needs_is_said(left_out, message):
    optimizer = make(autowu_options=UNSMOOTHED)
    noise = adabatch.GradientNoise(PARAMS, *(jnp.float32(1), *map(jnp.int32, (FIRST, 8))))
    given = {"params": PARAMS, "value": jnp.float32(1.0), "noise": noise}
    given.pop(left_out)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(optimizer.update, PARAMS, optimizer.init(PARAMS), **given)
