"""`adapt_batch_size`: evidence that is unusable never moves the batch, and the state says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import (
    BatchSizeStatus,
    GradientNoise,
    coordinate_norm_test,
    inner_product_test,
    norm_test,
)

BAD = {
    "nan_scatter": ({"trace": np.nan}, BatchSizeStatus.NOT_FINITE),
    "inf_scatter": ({"trace": np.inf}, BatchSizeStatus.NOT_FINITE),
    "nan_gradient": ({"square": np.nan}, BatchSizeStatus.NOT_FINITE),
    "inf_gradient": ({"square": np.inf}, BatchSizeStatus.NOT_FINITE),
    "overflowing_square": ({"square": 1e39}, BatchSizeStatus.NOT_FINITE),
    "zero_gradient": ({"square": 0.0}, BatchSizeStatus.ZERO_GRADIENT),
    "zero_gradient_and_noise": ({"trace": 0.0, "square": 0.0}, BatchSizeStatus.ZERO_GRADIENT),
    "one_group": ({"num_groups": 1}, BatchSizeStatus.TOO_FEW_GROUPS),
    "no_group": ({"num_groups": 0, "num_examples": 0}, BatchSizeStatus.TOO_FEW_GROUPS),
}


@pytest.fixture(scope="session")
def controls(controller):
    """Two controllers that have seen one good test: the paper's, and everything switched on."""
    plain = controller(norm_test(1.0))
    shrinking = controller(norm_test(1.0), monotone=False, ema_decay=0.9, debias=True)
    return {"paper": plain, "smoothed_debiased_shrinking": shrinking}


@pytest.mark.parametrize("kind", ["paper", "smoothed_debiased_shrinking"])
@pytest.mark.parametrize(("statistics", "status"), BAD.values(), ids=BAD)
def test_bad_evidence_changes_nothing_but_the_count(controls, make_noise, kind, statistics, status):
    control = controls[kind]
    control.state = control.link.init(jnp.zeros(2))
    control.feed(make_noise(trace=100, square=4))
    before = control.state
    control.feed(make_noise(**{"trace": 1000.0, "square": 2.0} | statistics))
    assert control.status is status
    assert int(control.metrics["skipped_tests"]) == 1
    changed = {"test_status", "skipped_tests", "updates_seen", "examples_clock"}
    changed |= {"last_batch_size", "last_gradient_norm"}
    if kind != "paper" and status is BatchSizeStatus.TOO_FEW_GROUPS:
        changed |= {"next_batch_size", "two_group_examples"}  # the way out: tests of its own
    for path, old in jax.tree_util.tree_leaves_with_path(before):
        if not changed & {getattr(key, "name", None) for key in path}:
            new = dict(jax.tree_util.tree_leaves_with_path(control.state))[path]
            np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("how", ["not finite", "held", "between two tests"])
def test_the_numbers_of_an_update_without_a_test_are_zero(controller, make_noise, how):
    control = controller(norm_test(1.0), test_interval=3 if how == "between two tests" else 1)
    control.feed(make_noise(trace=100))
    assert int(control.metrics["degrees_of_freedom"]) == 7
    more = {"hold_batch_size": True} if how == "held" else {}
    control.feed(make_noise(trace=np.nan), **more)
    for name in ("required_batch_size", "noise_numerator", "noise_denominator"):
        assert control.metrics[name] == 0
    assert int(control.metrics["degrees_of_freedom"]) == 0
    assert control.metrics["noise_scale"] > 0  # the last one measured


def test_after_bad_evidence_the_next_test_is_as_if_nothing_had_been(controller, make_noise):
    good = [make_noise(trace=t, square=4) for t in (100, 400, 900)]
    bad = [make_noise(**statistics) for statistics, _ in BAD.values()]
    clean, disturbed = (controller(norm_test(0.9), ema_decay=0.5) for _ in range(2))
    for noise in good:
        clean.feed(noise)
        for spoilt in bad:
            disturbed.feed(spoilt)
        disturbed.feed(noise)
    assert disturbed.batch_size == clean.batch_size
    assert int(disturbed.metrics["skipped_tests"]) == 3 * len(bad)


def test_a_nan_inner_product_holds_the_batch(controller, make_noise):
    control = controller(inner_product_test(0.1))
    assert control.feed(make_noise(along=np.nan)) == 64
    assert control.status is BatchSizeStatus.NOT_FINITE


def test_one_coordinate_without_a_number_holds_the_batch(controller, make_noise):
    control = controller(coordinate_norm_test(0.1, quantile=0.5))
    noise = make_noise()._replace(coordinate_scatter=jnp.array([1.0, jnp.nan]))
    assert control.feed(noise) == 64
    assert control.status is BatchSizeStatus.NOT_FINITE


def test_what_the_criterion_does_not_read_may_be_nan(controller, make_noise):
    control = controller(norm_test(1.0))
    assert control.feed(make_noise(trace=100, along=np.nan)) == 100


@pytest.mark.parametrize("answer", [np.nan, np.inf])
def test_a_plain_function_that_has_no_answer_holds_the_batch(controller, make_noise, answer):
    control = controller(lambda noise: answer)
    assert control.feed(make_noise()) == 64
    assert control.status is BatchSizeStatus.NOT_FINITE


def test_a_scatter_that_was_not_measured_is_no_evidence_even_beside_coordinates(controller):
    run = controller(coordinate_norm_test(0.1))
    mean = jnp.ones(2)
    noise = GradientNoise(mean, jnp.float32(-1), jnp.int32(64), jnp.int32(8), 7 * mean)
    run.feed(noise)
    assert run.batch_size == 64
    assert run.status == BatchSizeStatus.NOT_FINITE
    assert np.isfinite(run.state.last_size_test.display_ema).all()
