"""Whole training steps with numbers that go wrong: what happens then is defined, and nothing is poisoned.

"Fused" is a step of `make_step`; "drop-in" a micro-batch of `adaptive_multi_steps`, in
batch_size/test_multi_steps_faults.py.

| fault                                 | fused                          | drop-in                        |
|---------------------------------------|--------------------------------|--------------------------------|
| NaN or inf in one micro-batch, in its | step skipped, its examples     | micro-batch skipped, counted;  |
| gradient or in its loss alone         | used up, all else as before    | the batch takes one more       |
| the same in every step                | `TrainingError` after 10 in a  | no step is made, the counts    |
|                                       | row (test_loop.py)             | show it; AutoWU goes back      |
| the same on one device                | step skipped (one merged mean) | left out, counted              |
| a gradient whose square overflows     | step skipped                   | skipped, counted               |
| a scatter that overflows              | step skipped                   | step made, batch held          |
| zero gradient; one example repeated   | step made, batch held          | step made, batch held          |
| float16 that overflows under a loss   | step dropped and counted,      | skipped, counted; batch held,  |
| scale                                 | batch held, scale halved       | scale halved                   |
| dtypes mixed                          | dtypes stay, statistics are float32                             |
| label out of range, empty data, …     | refused before training (test_check.py)                         |
| batch larger than the data, budget a  | the run ends exactly at the    | –                              |
| multiple of nothing                   | budget                         |                                |
| more than 2²⁴ examples in a batch,    | counted exactly (batch_size/test_long_soak.py)                  |
| more than 2³¹ in a run                |                                                                 |
| a batch of more than 2³⁰              | refused when the optimizer is made (the same file)              |
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import BatchSizeStatus
from adabatch_jax.training import (
    TrainConfig,
    build_optimizer,
    load_dataset,
    make_step,
    resolve,
    run_steps,
)
from tests.marks import slow

CLASSES, FEATURES, GROUPS, SIZE = 3, 4, 8, 4
DIRECTIONS = [  # that of the default run; the others are compiled with the slow tests
    "adadagrad",
    *slow("adadagrad-norm", "adam", "adamp", "lamb"),
]


def apply(params, inputs):
    """Linear, so that inputs of zero have a gradient of zero."""
    return inputs @ params["w"] + inputs.sum(axis=-1, keepdims=True) * params["b"][None]


def first_params():
    w = np.random.default_rng(1).normal(size=(FEATURES, CLASSES)).astype(np.float32)
    return {"w": jnp.asarray(w), "b": jnp.zeros(CLASSES)}


def examples():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(GROUPS * SIZE, FEATURES)).astype(np.float32)
    return inputs, rng.integers(0, CLASSES, GROUPS * SIZE).astype(np.int32)


@functools.cache
def fused(optimizer):
    config = TrainConfig(optimizer=optimizer, eta=0.1, initial_batch_size=32, schedule="constant")
    chain = build_optimizer(resolve(config, 500))
    return chain.init, jax.jit(make_step(apply, chain))


def run_fused(data, state=None, optimizer="adadagrad"):
    """One step on all examples: → ((params, optimizer state) before, after, report)."""
    init, step = fused(optimizer)
    before = (first_params(), init(first_params())) if state is None else state
    indices = np.arange(GROUPS * SIZE, dtype=np.int32).reshape(GROUPS, SIZE)
    sizes = np.full(GROUPS, SIZE, np.int32)
    *after, report = step(*before, data, indices, sizes, np.int32(GROUPS))
    return before, tuple(after), report


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def without_clocks(tree):
    """A skipped step uses its examples up."""

    def put_back(path, x):
        return 0 * x if jax.tree_util.keystr(path).endswith("_clock") else x

    return jax.tree_util.tree_map_with_path(put_back, tree)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


def spoil(inputs, labels, fault):
    inputs, labels = inputs.copy(), labels.copy()
    if fault == "label":
        labels[9] = CLASSES
    elif fault == "square":  # the loss is finite, the gradient too, its square is not
        inputs[9], labels[9] = 1e25, np.argmin(first_params()["w"].sum(axis=0))
    elif fault == "scatter":  # and here only 4 · (the gap of two groups)² is not
        inputs[8:12], inputs[12:16] = 1.2e19, -1.2e19
        labels[8:16] = 0
    else:
        inputs[9, 2] = {"nan": np.nan, "inf": np.inf}[fault]
    return inputs, labels


@pytest.mark.parametrize("fault", ["nan", "inf", "label", "square", "scatter"])
@pytest.mark.parametrize("optimizer", DIRECTIONS[:3])
def test_a_fused_step_with_a_fault_changes_nothing_and_says_so(fault, optimizer):
    data = spoil(*examples(), fault)
    before, after, report = run_fused(data, optimizer=optimizer)
    assert report["skipped"]
    if fault in ("square", "scatter"):
        assert np.isfinite(report["loss"])
    assert report["next_batch_size"] == 32 and report["num_examples"] == GROUPS * SIZE
    assert_same(without_clocks(after), without_clocks(before))
    _, after, report = run_fused(examples(), after, optimizer)
    assert not report["skipped"] and report["test_status"] == BatchSizeStatus.CHANGED
    assert_finite(after)


def test_a_label_out_of_range_shows_in_the_loss_alone():
    """Why the loss is looked at beside the gradient: optax gives NaN, and a gradient without it."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    logits = jnp.arange(3.0)
    value, gradient = jax.value_and_grad(loss)(logits, jnp.int32(3))
    assert np.isnan(value) and np.isfinite(gradient).all()
    assert loss(logits, jnp.int32(-1)) == loss(logits, jnp.int32(2))  # without a word


@pytest.mark.parametrize("optimizer", DIRECTIONS)
def test_a_fused_step_with_a_zero_gradient_holds_the_batch(optimizer):
    (inputs, labels), state = examples(), None
    for number in (1, 2):
        _, state, report = run_fused((0.0 * inputs, labels), state, optimizer)
        assert not report["skipped"] and report["test_status"] == BatchSizeStatus.ZERO_GRADIENT
        assert report["next_batch_size"] == 32 and report["num_examples"] == number * 32
        assert report["skipped_tests"] == number
        assert_finite(state)
    assert_same(state[0], first_params())


@pytest.mark.parametrize("optimizer", DIRECTIONS)
def test_a_fused_step_on_one_example_repeated_holds_the_batch(optimizer):
    data, state = tuple(np.repeat(v[:1], GROUPS * SIZE, axis=0) for v in examples()), None
    for _ in range(3):
        _, state, report = run_fused(data, state, optimizer)
        assert report["test_status"] == BatchSizeStatus.PASSED and report["next_batch_size"] == 32
        assert report["required_batch_size"] < 1e-3 and report["noise_scale"] < 1e-3
        assert_finite(state)


def test_a_broken_device_breaks_the_merged_mean_of_a_fused_step():
    """On every device, so that all of them hold the batch and skip alike."""
    x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    x[2, 1, 0] = np.nan
    fn = adabatch.value_and_grad_noise(lambda p, x: jnp.mean((p - x) ** 2), axis_name="data")
    link = adabatch.adapt_batch_size(
        adabatch.norm_test(0.1), initial_batch_size=8, max_batch_size=64, ema_decay=0.9
    )

    def on_device(x):
        value, noise = fn(jnp.float32(1.0), x[:, None])
        return value, noise, link.update(noise.mean, link.init(noise.mean), noise=noise)[1]

    value, noise, state = jax.vmap(on_device, axis_name="data")(x[..., 0])
    assert np.isnan(value).all() and np.isnan(noise.mean).all()
    assert (state.last_size_test.test_status == BatchSizeStatus.NOT_FINITE).all()
    assert (state.next_batch_size == 8).all() and (state.last_size_test.skipped_tests == 1).all()
    assert_finite((*state.size_memory[:2], state.last_size_test.display_ema))


# Dtypes and sizes ---------------------------------------------------------------------------


def test_mixed_dtypes_stay_and_their_statistics_are_float32():
    """The noise of the fused step and of the drop-in, against NumPy in float64."""
    dtypes = {"single": jnp.float32, "brain": jnp.bfloat16, "half": jnp.float16}
    params = {k: jnp.ones(3, dtype) for k, dtype in dtypes.items()}
    x = np.random.default_rng(5).normal(1.0, 1.0, (8, 3)).astype(np.float32)
    controller = adabatch.adapt_batch_size(
        adabatch.norm_test(0.2), initial_batch_size=8, max_batch_size=4096
    )
    optimizer = optax.chain(controller, optax.sgd(0.1))

    def loss(params, x):
        return sum(
            jnp.mean(p[None] * x.astype(p.dtype)).astype(jnp.float32) for p in params.values()
        )

    def fused_step(params, state, groups):
        value, noise = adabatch.value_and_grad_noise(loss)(params, groups)
        updates, state = optimizer.update(noise.mean, state, params, noise=noise, value=value)
        return optax.apply_updates(params, updates), state

    def drop_in(params, state, groups):
        def call(carry, group):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, group)
            updates, state = wrapped.update(gradient, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(call, (params, state), groups)[0]

    wrapped = adabatch.adaptive_multi_steps(optimizer, micro_batch_size=1)
    rounded = np.stack([np.asarray(x.astype(d), np.float64) for d in dtypes.values()], 1) / 3
    trace = rounded.var(0, ddof=1).sum()
    for step, link in ((fused_step, optimizer), (drop_in, wrapped)):
        new, state = jax.jit(step)(params, link.init(params), x[:, None])
        assert {k: v.dtype for k, v in new.items()} == dtypes
        shown = adabatch.metrics(state)
        np.testing.assert_allclose(shown["noise_numerator"], trace, rtol=2e-3)
        assert shown["next_batch_size"] > 8 and shown["test_status"] == BatchSizeStatus.CHANGED
        assert_finite(new)


def small(number):
    digits = load_dataset("digits")
    return digits._replace(
        train_inputs=digits.train_inputs[:number], train_labels=digits.train_labels[:number]
    )


@pytest.mark.parametrize(
    ("number", "first", "largest", "epochs"),
    [
        pytest.param(101, 64, 96, 3, id="batches across epochs", marks=pytest.mark.slow),
        pytest.param(101, 150, 256, 2, id="batch larger than the data", marks=pytest.mark.slow),
        pytest.param(101, 300, 512, 2, id="batch larger than the budget"),
        pytest.param(103, 17, 17, 1, id="one example left over"),
    ],
)
def test_a_run_ends_exactly_at_its_budget(number, first, largest, epochs):
    rows, budget = [], number * epochs
    config = TrainConfig(
        model="logistic",
        **({"criterion": "none"} if first == 17 else {"eta": 0.4}),
        initial_batch_size=first,
        max_batch_size=largest,
        max_micro_batch_size=first // 8,
        epochs=epochs,
    )
    done = run_steps(config, small(number), rows.append)
    used = np.diff([row["examples"] for row in rows], prepend=0)
    said = np.array([row["batch_size"] for row in rows])
    assert used.sum() == budget == adabatch.metrics(done.opt_state)["num_examples"]
    np.testing.assert_array_equal(used, said)
    assert all(np.isfinite(row["loss"]) and not row["skipped"] for row in rows)
    if first == 17:
        assert used[-1] == 1, "a group alone"
    assert_finite((done.params, done.opt_state))
