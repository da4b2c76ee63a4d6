"""`adapt_batch_size(monotone=False)`: a batch that comes as one group finds its way out, and stays out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import (
    BatchSizeStatus,
    adapt_batch_size,
    adaptive_multi_steps,
    cabs,
    get_batch_size,
    metrics,
    norm_test,
)
from tests.marks import slow

SMALL = {"trace": 5.0, "square": 1.0}


def feed(control, make_noise, group, down=False, **statistics):
    """One update with a batch of whole groups, or of what is asked for in groups and a rest."""
    size = control.batch_size
    groups = max(size // group, 1) if down else -(-size // group)
    examples = groups * group if down else size
    return control.feed(make_noise(num_examples=examples, num_groups=groups, **statistics))


@pytest.mark.parametrize("down", [True, False], ids=["whole groups", "a rest"])
@pytest.mark.parametrize("group", [1, 48, *slow(8, 16)])
def test_it_settles_at_two_groups_and_grows_again(controller, make_noise, group, down):
    control = controller(norm_test(1.0), monotone=False)
    sizes = [feed(control, make_noise, group, down, **SMALL) for _ in range(12)]
    settled = set(sizes[4:])
    assert len(settled) == 1
    least = settled.pop()
    assert max(group, 5) < least + (group == 1) and least <= max(2 * group, 5)
    assert control.status is not BatchSizeStatus.TOO_FEW_GROUPS
    assert control.metrics["skipped_tests"] <= (1 if down else 4)
    assert feed(control, make_noise, group, down, trace=2000.0) == 2000


def test_the_way_out_leads_to_whole_calls_and_not_beyond_the_maximum(controller, make_noise):
    for limit, size in ((1024, 72), (64, 48)):
        control = controller(norm_test(1.0), monotone=False, max_batch_size=limit)
        lonely = make_noise(num_examples=33, num_groups=1)
        _, state = control.link.update(
            lonely.mean, control.state, noise=lonely, batch_size_multiple=24
        )
        assert int(get_batch_size(state)) == size


def test_a_short_last_batch_is_no_reason_to_grow(controller, make_noise):
    control = controller(norm_test(1.0), monotone=False)
    assert control.feed(make_noise(trace=64, num_examples=20, num_groups=1)) == 64
    assert control.status is BatchSizeStatus.TOO_FEW_GROUPS
    assert feed(control, make_noise, 8, **SMALL) == 5


def test_smaller_groups_lower_the_least_again(controller, make_noise):
    control = controller(norm_test(1.0), monotone=False)
    for _ in range(4):
        feed(control, make_noise, 32, True, **SMALL)
    assert control.batch_size == 64
    assert [feed(control, make_noise, 4, **SMALL) for _ in range(2)] == [8, 8]


@pytest.mark.parametrize("bad", [{"square": np.nan}, {"square": 0.0}, {"num_groups": 0}])
def test_one_group_without_a_gradient_moves_nothing(controller, make_noise, bad):
    control = controller(norm_test(1.0), monotone=False)
    assert control.feed(make_noise(**{"num_groups": 1} | bad)) == 64


def test_a_batch_that_may_not_shrink_stays(controller, make_noise):
    control = controller(norm_test(1.0))
    assert [control.feed(make_noise(num_groups=1)) for _ in range(3)] == [64] * 3
    assert int(control.metrics["skipped_tests"]) == 3


@pytest.mark.parametrize("group", [8, *slow(1)])
def test_cabs_rises_with_a_rate_that_warms_up_from_nothing(controller, make_noise, group):
    """As its docstring has it; b = α tr Σ / L = 0 at first, and 200 at the end."""
    control = controller(
        cabs(lambda seen: jnp.minimum(seen / 2000.0, 1.0) - 64 / 2000),
        ema_decay=0.95,
        monotone=False,
    )
    sizes = []
    for _ in range(400):
        size = control.batch_size
        noise = make_noise(trace=400, num_examples=size, num_groups=max(size // group, 1))
        sizes.append(control.feed(noise, value=2.0))
    assert min(sizes[5:]) == 2 * group
    assert 180 <= sizes[-1] <= 200


def test_the_drop_in_finds_its_way_out():
    """Noise scale 5, then 2000: 32 examples, which are two micro-batches, then about 2000."""
    optimizer = adaptive_multi_steps(
        adapt_batch_size(norm_test(1.0), initial_batch_size=64, max_batch_size=4096, monotone=False,
                         ema_decay=0.9, debias=True),
        micro_batch_size=16,
    )  # fmt: skip
    scale = np.where(np.arange(6000) < 300, 5.0, 2000.0)
    noise = np.random.default_rng(0).normal(size=(6000, 20)) * np.sqrt(scale / 320)[:, None]
    gradients = jnp.asarray(noise + np.eye(20)[0], jnp.float32)

    def step(state, gradient):
        _, state = optimizer.update(gradient, state, batch_size_multiple=16)
        return state, (get_batch_size(state), metrics(state)["skipped_tests"])

    _, (sizes, skipped) = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(
        optimizer.init(jnp.zeros(20)), gradients
    )
    assert set(sizes[100:300].tolist()) == {32}
    assert 1000 < np.median(sizes[-2000:]) <= 4096
    assert skipped[-1] == 1
